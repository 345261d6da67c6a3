"""A row of `rwkv-npu bench matmul`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rwkv_npu.bench import document


@dataclass(frozen=True)
class Row:
    """One (backend, dtype, device) at one size: C (m, n) = A (m, k) @ B (k, n), B constant. Times in seconds.

    time_s, time_p10_s, time_p90_s   median and percentiles of single calls; an estimate has no percentiles
    time_error_s    half the 68 % interval of the median, from the repeats
    submit_s        the part of time_s in which work is handed over (asynchronous backends; `rknn_run` on a board)
    overhead_s      a call of this backend on 32x32x32: what a call costs that has nothing to do
    dtype, accumulate   of the operands A and B, and of the sums
    gb_per_s        A + B + C, each once, in the dtypes in which the backend holds them, over time_s
    max_rel_error   largest difference from float64, over the largest element of the result
    estimated       true: from the compiler's cycle table, not from a clock
    flags           what speaks against the figure (`busy`, `throttled`, ...), joined by spaces
    failed          why there is no time
    """

    backend: str
    device: str
    dtype: str
    accumulate: str
    m: int
    k: int
    n: int
    time_s: float | None = None
    time_p10_s: float | None = None
    time_p90_s: float | None = None
    time_error_s: float | None = None
    repeats: int = 0
    gflops: float | None = None
    gb_per_s: float | None = None
    submit_s: float | None = None
    overhead_s: float | None = None
    max_rel_error: float | None = None
    estimated: bool = False
    threads: int | None = None
    npu_ops: int | None = None
    versions: str = ""
    flags: str = ""
    failed: str | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        return self.m, self.k, self.n

    @property
    def is_square(self) -> bool:
        return self.m == self.k == self.n

    @property
    def work(self) -> int:
        """Floating-point (or integer) operations."""
        return 2 * self.m * self.k * self.n

    @property
    def series(self) -> str:
        return series_name(self.backend, self.dtype, self.device.startswith("OpenCL"), self.estimated)


def series_name(backend: str, dtype: str, opencl: bool, estimated: bool) -> str:
    """What all sizes of a backend have in common, as people read it."""
    return f"{backend}{' OpenCL' if opencl else ''} {dtype}{' (estimate)' if estimated else ''}"


def with_rates(row: dict[str, Any], moved_bytes: float) -> dict[str, Any]:
    """`row` with gflops and gb_per_s filled in from its time."""
    seconds = row["time_s"]
    row["gflops"] = 2 * row["m"] * row["k"] * row["n"] / seconds / 1e9
    row["gb_per_s"] = moved_bytes / seconds / 1e9
    return row


class Document(document.Document[Row]):
    FORMAT = 1
    ROW = Row
    COMMAND = "rwkv-npu bench matmul"


def by_series(rows: Iterable[Row], *, square: bool = False) -> dict[str, list[Row]]:
    """Rows that have a time, by series, each in order of work."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.time_s is not None and (row.is_square or not square):
            found.setdefault(row.series, []).append(row)
    return {name: sorted(some, key=lambda row: (row.work, row.size)) for name, some in found.items()}
