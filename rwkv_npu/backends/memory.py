"""The NPU memory that a bundle takes on a board, and the limits of the NPU."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.bundle import Artifact, Manifest

# RKNNLite has one IOMMU domain of 4 GiB in each process. The driver and other buffers use part of it.
BUDGET_BYTES = int(3.5 * (1 << 30))
MAX_CONTEXTS = 150  # the limit seen on boards; each artifact is a context

INT8_COLUMN_BYTES = 8  # each column of an int8 matrix also has a bias and a scale


def matrix_bytes(k: int, n: int, bits: int) -> int:
    """Bytes of NPU memory for a constant (k, n) matrix of 16 or 8 bits."""
    return 2 * k * n if bits == 16 else (k + INT8_COLUMN_BYTES) * n


@dataclass(frozen=True)
class MemoryPlan:
    """NPU memory of a set of artifacts, in bytes: their weights, and the buffers of their inputs and outputs."""

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
        """The sum and its limits, in GB, for messages."""
        return (
            f"{self.contexts} contexts (of {MAX_CONTEXTS}), weights {self.weights / 1e9:.2f} + "
            f"buffers {self.buffers / 1e9:.2f} = {self.total / 1e9:.2f} GB of NPU memory (of {BUDGET_BYTES / 1e9:.1f})"
        )


def plan_memory(manifest: Manifest, artifacts: list[Artifact] | None = None) -> MemoryPlan:
    """The NPU memory of `artifacts` (None: all in the manifest). Each artifact has its own copy of its weights."""
    artifacts = manifest.artifacts if artifacts is None else artifacts
    widths = {
        (fusion, group["name"]): sum(port["shape"][1] for port in (*group["inputs"], *group["outputs"]))
        for fusion, groups in manifest.groups.items()
        for group in groups
    }
    element = 2  # bytes; inputs and outputs are fp16 on the NPU
    return MemoryPlan(
        weights=sum(artifact.weight_bytes for artifact in artifacts),
        buffers=sum(element * a.rows * widths[a.fusion, a.group] for a in artifacts),
        contexts=len(artifacts),
    )


def check_room(plan: MemoryPlan, subject: str, advice: str) -> None:
    """Check, before loading, that a plan fits the NPU and the board's free memory. Raises BackendError.

    subject: a plural noun that begins the message. advice: ends it.
    """
    if not plan.fits:
        raise BackendError(f"{subject} do not fit the NPU: {plan.arithmetic()}; {advice}")
    free = hardware.memory().get("MemAvailable")
    if free is not None and plan.total > free:
        raise BackendError(
            f"{subject} do not fit the free memory of {free / 1e9:.2f} GB: {plan.arithmetic()}; end other "
            f"programs, or {advice}"
        )
