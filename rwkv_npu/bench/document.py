"""Rows of both benchmarks, and the JSON file that stores them with their machine and command."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.files import write_atomically


@dataclass(frozen=True)
class ProductRow:
    """One backend, dtype and device at one size: C (m, n) = A (m, k) @ B (k, n), B constant. Times in seconds.

    time_s          median of single calls; of an estimate its central value
    time_p10_s, time_p90_s   percentiles of single calls; of an estimate the fast and the slow end of its range
    time_error_s    half the 68 % interval of the median, from the repeats
    submit_s        part of time_s that submits the work (asynchronous backends; `rknn_run` on a board)
    overhead_s      a call of this backend on 32x32x32: the cost of an empty call
    dtype, accumulate   of the operands A and B, and of the sums
    gb_per_s        bytes of A, B and C, in the backend's dtypes, over time_s
    max_rel_error   largest difference from float64, over the largest element of the result
    estimated       computed from the terms of `runtime.rk3588`, not measured
    published       measured on a board by others, and published
    flags           reasons to doubt the figure (`busy`, `throttled`, ...), joined by spaces
    failed          reason for a missing time
    """

    FORMAT: ClassVar[int | str] = 1
    COMMAND: ClassVar[str] = "rwkv-npu bench matmul"

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
    published: bool = False
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
        """Number of floating-point (or integer) operations."""
        return 2 * self.m * self.k * self.n

    @property
    def is_measured_here(self) -> bool:
        return not (self.estimated or self.published)

    @property
    def series(self) -> str:
        opencl = self.device.startswith("OpenCL")
        return series_name(self.backend, self.dtype, opencl, self.estimated, self.published)


def series_name(
    backend: str, dtype: str, opencl: bool = False, estimated: bool = False, published: bool = False
) -> str:
    """The name of a series: all sizes of one backend, dtype and device."""
    mark = " (estimate)" if estimated else " (published)" if published else ""
    return f"{backend}{' OpenCL' if opencl else ''} {dtype}{mark}"


def with_rates(row: dict[str, Any], moved_bytes: float) -> dict[str, Any]:
    """Fill in gflops and gb_per_s of `row` from its time."""
    seconds = row["time_s"]
    row["gflops"] = 2 * row["m"] * row["k"] * row["n"] / seconds / 1e9
    row["gb_per_s"] = moved_bytes / seconds / 1e9
    return row


PREFILLS = (128, 512)  # tokens of the prompts
DECODE = 128  # tokens to sample and read after a prompt of the first length
# The parts of a measured time.
MEASURED_PARTS = ("projections", "head", "recurrence", "sampling", "dispatch", "rest")


@dataclass
class ModelRow:
    """One model on one backend: measured, or `estimated` from the terms of `runtime.rk3588`.

    weights, stored   dtype of the projections in the backend, and in the model's file
    fusion            the partitioning into groups
    threads           as requested, else one a core
    load_s            from the start of the process to its first logits
    first_token_s     to read a prompt of 128 tokens and sample a token, in a warm process
    *_tps, _p10, _p90 tokens a second: median of the repeats with their slow and fast end; of an estimate its
                      central value with the slow and fast end of its range
    *_ms              milliseconds by part: of a token (decode), or of a prompt and its first sampled token. An estimate
                      also has `calls`, `operators` and `io`, the other terms of `runtime.estimate`
    bytes_per_token   the projections' bytes in the backend, plus the state read and written. gb_per_s is
                      bytes_per_token over the time of a token, bandwidth_share is gb_per_s over this machine's best
    read_gb_per_s     memory read speed just before the row; other guests of the host may use part of it
    peak_bytes, own_bytes   peak of resident memory; resident memory at the end, without mapped files
    basis             the source of an estimate
    profile           a token's time by role of group and by function
    flags             reasons to doubt the figures (`busy`, `throttled`, `interrupted`)
    failed            reason for missing figures
    """

    FORMAT: ClassVar[int | str] = "inference 1"
    COMMAND: ClassVar[str] = "rwkv-npu bench inference"

    model: str
    fingerprint: str
    generation: str
    parameters: int
    backend: str
    device: str = ""
    weights: str = ""
    stored: str = ""
    fusion: str = ""
    threads: int | None = None
    estimated: bool = False
    prefill_128_tps: float | None = None
    prefill_128_tps_p10: float | None = None
    prefill_128_tps_p90: float | None = None
    prefill_128_repeats: int = 0
    prefill_512_tps: float | None = None
    prefill_512_tps_p10: float | None = None
    prefill_512_tps_p90: float | None = None
    prefill_512_repeats: int = 0
    decode_tps: float | None = None
    decode_tps_p10: float | None = None
    decode_tps_p90: float | None = None
    decode_repeats: int = 0
    decode_tokens: int = 0
    first_token_s: float | None = None
    load_s: float | None = None
    calls_per_token: float | None = None
    bytes_per_token: int | None = None
    gb_per_s: float | None = None
    bandwidth_share: float | None = None
    read_gb_per_s: float | None = None
    peak_bytes: int | None = None
    own_bytes: int | None = None
    decode_ms: dict[str, float] = field(default_factory=dict)
    prefill_128_ms: dict[str, float] = field(default_factory=dict)
    prefill_512_ms: dict[str, float] = field(default_factory=dict)
    basis: str = ""
    versions: str = ""
    flags: str = ""
    failed: str | None = None
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Label in tables and pictures: backend, precision, the NPU's fusion, the board's DRAM."""
        parts = [self.backend, self.precision]
        if self.backend == "rknn" and self.fusion:
            parts.append(self.fusion)
        if self.estimated and "LPDDR" in self.device:
            parts.append(self.device.rpartition(" ")[2])
        return " ".join(part for part in parts if part)

    @property
    def precision(self) -> str:
        """Precision in the backend, and in the file if it differs."""
        return self.weights + (f" of {self.stored}" if self.stored not in ("", self.weights) else "")

    @property
    def is_whole(self) -> bool:
        """True if the row neither failed nor was interrupted."""
        return not (self.failed or "interrupted" in self.flags)

    def finish(self, bandwidth_gb_per_s: float | None) -> None:
        """Fill in the fields that are computed from others."""
        if self.bytes_per_token and self.decode_tps:
            self.gb_per_s = self.bytes_per_token * self.decode_tps / 1e9
            if bandwidth_gb_per_s and not self.estimated:
                self.bandwidth_share = self.gb_per_s / bandwidth_gb_per_s

    def update(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name not in self.__dataclass_fields__:
                raise KeyError(name)
            setattr(self, name, value)


Row = TypeVar("Row", ProductRow, ModelRow)


@dataclass
class Document(Generic[Row]):
    """The content of one file: rows of one kind, the machine that measured them, and the command."""

    kind: type[Row]
    machine: dict[str, Any]
    command: str = ""
    results: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self, **extra: Any) -> str:
        data = {
            "format": self.kind.FORMAT,
            "command": self.command,
            "machine": self.machine,
            "notes": self.notes,
        }
        return (
            json.dumps({**data, **extra, "results": [asdict(row) for row in self.results]}, indent=1) + "\n"
        )

    def save(self, path: Path) -> None:
        """Write the file. Raises UsageError."""
        try:
            write_atomically(path, self.to_json().encode())
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path, kind: type[Row]) -> Document[Row]:
        """Read a file of `kind`. Ignores fields that this version does not know. Raises UsageError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != kind.FORMAT:
                raise UsageError(
                    f"{path} holds results of format {data['format']}; this version reads {kind.FORMAT}"
                )
            known = {field.name for field in fields(kind)}
            rows = [kind(**{name: row[name] for name in row if name in known}) for row in data["results"]]
            return Document(kind, data["machine"], data["command"], rows, data.get("notes", []))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} does not hold results of `{kind.COMMAND}` ({error})") from error

    @classmethod
    def resume(
        cls, path: Path | None, kind: type[Row], here: dict[str, Any], threads: int, command: str
    ) -> Document[Row]:
        """The document in a file, to be continued by `command`, or an empty one if there is no such file.

        here: the facts of this machine. Raises UsageError if another machine or number of threads wrote the file.
        """
        if not (path and path.exists() and path.stat().st_size):
            return Document(kind, here, command)
        document = Document.load(path, kind)
        document._check_same_machine(path, here, threads)
        if command not in document.command:
            document.command = f"{document.command}; {command}".strip("; ")
        return document

    def _check_same_machine(self, path: Path, here: dict[str, Any], threads: int) -> None:
        for key in ("cpu", "cores", "board"):
            stored = self.machine.get(key)
            if stored != here.get(key):
                reason = f"on another machine ({key}: {stored}, here: {here.get(key)})"
                raise UsageError(f"{path} was measured {reason}: name another file")
        for row in self.results:
            if row.threads not in (None, threads):
                reason = f"with {row.threads} threads, not {threads}"
                raise UsageError(f"{path} was measured {reason}: name another file, or give -t {row.threads}")


def by_series(rows: Iterable[ProductRow], *, square: bool = False) -> dict[str, list[ProductRow]]:
    """Group rows with a time by series, each sorted by work."""
    series: dict[str, list[ProductRow]] = {}
    for row in rows:
        if row.time_s is not None and (row.is_square or not square):
            series.setdefault(row.series, []).append(row)
    return {name: sorted(group, key=lambda row: (row.work, row.size)) for name, group in series.items()}


def by_model(rows: Iterable[ModelRow]) -> list[list[ModelRow]]:
    """Group rows by model: rows with the same fingerprint of the weights. Measured rows come first."""
    models: dict[str, list[ModelRow]] = {}
    for row in rows:
        models.setdefault(row.fingerprint, []).append(row)
    return [sorted(group, key=lambda row: row.estimated) for group in models.values()]
