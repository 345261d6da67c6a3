"""The one place that adds up what a bundle takes on a board."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.bundle import Artifact, Manifest

DOMAIN_BYTES = 4 << 30  # an IOMMU domain, and RKNNLite has one a process
BUDGET_BYTES = int(3.5 * (1 << 30))  # what a plan may fill of it: the driver and other buffers need room too
MAX_CONTEXTS = 150  # seen on boards; every artifact is a context


INT8_COLUMN_BYTES = 8  # what every column of an int8 matrix has beside it: a bias and a scale


def matrix_bytes(k: int, n: int, bits: int) -> int:
    """Bytes of NPU memory for a constant (k, n) matrix of 16 or 8 bits."""
    return 2 * k * n if bits == 16 else (k + INT8_COLUMN_BYTES) * n


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that the NPU has to hold: weights of every artifact, and the buffers of their inputs and outputs."""

    weights: int
    buffers: int
    contexts: int

    @property
    def total(self) -> int:
        return self.weights + self.buffers

    @property
    def fits(self) -> bool:
        return self.total <= BUDGET_BYTES and self.contexts <= MAX_CONTEXTS

    def arithmetic(self) -> str:
        gib = 1 << 30
        return (
            f"{self.contexts} contexts (of {MAX_CONTEXTS}), weights {self.weights / gib:.2f} + "
            f"buffers {self.buffers / gib:.2f} = {self.total / gib:.2f} GiB of NPU memory (of {BUDGET_BYTES / gib:.1f})"
        )


def plan_memory(manifest: Manifest, artifacts: list[Artifact] | None = None) -> MemoryPlan:
    """Add up `artifacts` (all those of the manifest): each holds its own copy of its weights."""
    artifacts = manifest.artifacts if artifacts is None else artifacts
    widths = {
        (fusion, group["name"]): sum(port["shape"][1] for port in (*group["inputs"], *group["outputs"]))
        for fusion, groups in manifest.groups.items()
        for group in groups
    }
    element = 2  # fp16 on the NPU's side of every input and output
    return MemoryPlan(
        weights=sum(artifact.weight_bytes for artifact in artifacts),
        buffers=sum(element * a.rows * widths[a.fusion, a.group] for a in artifacts),
        contexts=len(artifacts),
    )


def check_room(plan: MemoryPlan, what: str, remedy: str) -> None:
    """Raises BackendError, with the arithmetic, for what the NPU or the board cannot hold. Asked before loading."""
    if not plan.fits:
        raise BackendError(f"{what} do not fit the NPU: {plan.arithmetic()}; {remedy}")
    free = hardware.memory().get("MemAvailable")
    if free is not None and plan.total > free:
        raise BackendError(
            f"{what} do not fit the memory that is free, {free / 2**30:.2f} GiB: {plan.arithmetic()}; end other "
            f"programs, or {remedy}"
        )
