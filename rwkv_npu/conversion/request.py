"""What is asked of a conversion, and what such a request may hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rwkv_npu.conversion.precision_map import read_map
from rwkv_npu.conversion.quantise import MAX_KL, REMEDIES, sizes
from rwkv_npu.conversion.writer import STORAGE
from rwkv_npu.errors import UsageError
from rwkv_npu.models.spec import Spec, check_fusion
from rwkv_npu.quant.cpu import PRECISIONS
from rwkv_npu.quant.npu import PRECISIONS as INT8_PRECISIONS
from rwkv_npu.toolkit import OLDEST_INT8, TARGETS, Environment

Say = Callable[[str], None]  # gets a line for each stage

NO_TARGET = "none"  # graphs for the CPU only

# What artifacts can be in, and where a chip has another choice. bf16 builds for the RK3588; what a board makes of it is
# not known.
ARTIFACT_PRECISIONS = ("fp16", *INT8_PRECISIONS)
NPU_PRECISIONS = {"rk3588": ("fp16", "bf16", *INT8_PRECISIONS)}


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion. Raises UsageError for a value that does not exist."""

    target: str
    precision: str
    fusion: str
    rows: tuple[int, ...] | None  # None: auto
    cpu: str
    jobs: int | None
    verify: bool
    force: bool
    max_kl: float = MAX_KL
    remedies: str = "all"

    def __post_init__(self) -> None:
        check_fusion(self.fusion)
        known: list[tuple[str, str, Collection[str]]] = [
            ("CPU precision", self.cpu, (*STORAGE, *PRECISIONS)),
            ("target", self.target, (*TARGETS, NO_TARGET)),
            ("choice of remedies", self.remedies, REMEDIES),
        ]
        for what, value, values in known:
            if value not in values:
                raise UsageError(f"{what} {value!r} is unknown: use one of {', '.join(values)}")
        if self.precision not in self._npu_has:
            raise UsageError(
                f"{self.target} has no precision {self.precision!r}: use one of {', '.join(self._npu_has)}"
            )
        if not 0 < self.max_kl < float("inf"):
            raise UsageError(f"max_kl is {self.max_kl}: it must be a number of nats above 0")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs is {self.jobs}: it must be at least 1")

    def check_compiler(self, compiler: Environment) -> None:
        """Raises UsageError for one that cannot build what is asked for."""
        if self.quantises and not compiler.mixes_int8:
            floats = [name for name in self._npu_has if name not in INT8_PRECISIONS]
            raise UsageError(
                f"rknn-toolkit2 {compiler.version} has no precision {self.precision!r} for {self.target}: use one of "
                f"{', '.join(floats)}, or --toolkit {OLDEST_INT8} or later"
            )

    @property
    def _npu_has(self) -> tuple[str, ...]:
        return NPU_PRECISIONS.get(self.target, ARTIFACT_PRECISIONS)

    @property
    def storage(self) -> str:
        """Precision of the weights that every backend can read; quantised ones are there beside them."""
        return "fp32" if self.cpu == "fp32" else "fp16"

    @property
    def compiles(self) -> bool:
        return self.target != NO_TARGET

    @property
    def quantises(self) -> bool:
        return self.precision in INT8_PRECISIONS

    @property
    def calibrates(self) -> bool:
        """Whether a text has to be read: for the scales of fp16, or the ranges of int8."""
        return self.compiles or self.quantises


def parse_rows(rows: str | int | Sequence[int]) -> tuple[int, ...] | None:
    """`auto` -> None; "1,64", 64 or [1, 64] -> (1, 64). Raises UsageError outside 1 .. 1024."""
    if rows == "auto":
        return None
    parts = rows.split(",") if isinstance(rows, str) else [rows] if isinstance(rows, int) else rows
    try:
        counts = sorted({int(part) for part in parts})
    except (TypeError, ValueError):
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 1024:
        raise UsageError(f"rows {rows!r} makes no sense: write auto, or numbers from 1 to 1024 such as 1,64")
    return tuple(counts)


def mapped_projections(
    precision_map: str | os.PathLike[str] | None, request: Request, spec: Spec
) -> list[str] | None:
    """What a map has in int8, None without one. Raises UsageError."""
    if precision_map is None:
        return None
    if request.precision != "mixed":
        raise UsageError(
            f"a precision map is for --precision mixed, not for {request.precision}: it says what is in int8"
        )
    return read_map(os.fspath(precision_map), spec, sizes(spec))
