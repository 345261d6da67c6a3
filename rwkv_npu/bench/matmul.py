"""The sweep of `bench matmul`: every series over every shape, one at a time. A file keeps the rows.

A series is measured in a child process, estimated for an RK3588 from the terms of `runtime.rk3588`, or published by
others who measured it on a board.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rwkv_npu.backends import NPU_BACKENDS
from rwkv_npu.backends.rknn_api import OVERRIDE
from rwkv_npu.bench import backends, machine
from rwkv_npu.bench.child import Child, Failed
from rwkv_npu.bench.document import Document, ProductRow, series_name, with_rates
from rwkv_npu.bench.products import STOP_S, Effort, Shape, make_problem
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError, RwkvNpuError, UsageError, first_line
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.estimate import cpu_product_ms, graph_ms, port_ms
from rwkv_npu.runtime.rk3588 import BOUNDS, TERMS
from rwkv_npu.toolkit import require

DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
BOARD_CPU = "rk3588-cpu"

# Backend -> (supported dtypes, default dtypes).
BACKENDS = {
    "numpy": (("fp32", "fp16"), ("fp32",)),
    "torch": (("fp32", "bf16", "fp16"), ("fp32", "bf16")),
    "tinygrad": (("fp32", "fp16"), ("fp32",)),
    "ort": (("fp32", "int8", "int4"), ("fp32",)),
    BOARD_CPU: (("fp32", "fp16", "int8"), ("fp16",)),
    "rknn": (("fp16", "bf16", "int8"), ("fp16",)),
    "rknn-matmul": (("fp16", "int8"), ("fp16",)),
}
DEFAULT_BACKENDS = ("numpy", "torch", "ort", BOARD_CPU, "rknn")
DRAM = rk3588.DRAMS[0]

Log = Callable[[str], None]


@dataclass(frozen=True)
class Series:
    """A backend with a dtype. device: cpu or opencl, for tinygrad."""

    backend: str
    dtype: str
    device: str = "cpu"
    estimated: bool = False
    published: bool = False

    @property
    def name(self) -> str:
        return series_name(self.backend, self.dtype, self.device == "opencl", self.estimated, self.published)


class Opened(Protocol):
    """An open series. `row` makes the row of a shape, or raises Failed. `blank` makes a row that records a failure."""

    def row(self, shape: Shape) -> ProductRow: ...

    def blank(self, shape: Shape, reason: str) -> ProductRow: ...

    def close(self) -> None: ...


Open = Callable[[Series, int, Effort], Opened]


# -- series ----------------------------------------------------------------------------------------------


class Measured:
    """A series that a child process measures. Raises BackendError if the backend cannot be opened."""

    def __init__(self, series: Series, threads: int, effort: Effort) -> None:
        self._child = Child(threads, series.name)
        names = ("backend", "dtype", "device")
        request = {name: getattr(series, name) for name in names}
        try:
            fields = self._child.ask(
                {"task": "open", **request, "threads": threads, "effort": asdict(effort)}
            )
        except Failed as error:
            self.close()
            raise BackendError(str(error)) from None
        except BaseException:
            self.close()
            raise
        self._fields = {"backend": series.backend, "threads": threads, **fields}

    def row(self, shape: Shape) -> ProductRow:
        answer = self._child.ask({"task": "product", "shape": list(shape)})
        return ProductRow(**{**self._fields, **answer})

    def blank(self, shape: Shape, reason: str) -> ProductRow:
        m, k, n = shape
        return ProductRow(**self._fields, m=m, k=k, n=n, failed=reason)

    def close(self) -> None:
        self._child.close()


class _Computed:
    """A series that needs no child process: estimates and published times. `fields` are common to all rows."""

    fields: dict[str, Any]

    def blank(self, shape: Shape, reason: str) -> ProductRow:
        m, k, n = shape
        return ProductRow(**self.fields, m=m, k=k, n=n, failed=reason)

    def close(self) -> None:
        pass

    def _row(self, shape: Shape, times_ms: Sequence[float], moved: float, **fields: Any) -> ProductRow:
        """times_ms: (low, central, high), or a single time without a range."""
        m, k, n = shape
        low, central, high = (ms / 1e3 for ms in (times_ms if len(times_ms) == 3 else list(times_ms) * 3))
        row = {**self.fields, "m": m, "k": k, "n": n, "time_s": central, **fields}
        if low < high:
            row |= {"time_p10_s": low, "time_p90_s": high}
        return ProductRow(**with_rates(row, moved))


class EstimatedNpu(_Computed):
    """Estimates for one NPU core through RKNNLite.

    Cycles and tiles come from Rockchip's compiler, errors from its simulator, times from the terms of the estimates.
    Raises ToolkitError without the compiler.
    """

    def __init__(self, series: Series) -> None:
        self.environment = require()
        self.fields = {
            "backend": series.backend,
            "device": f"RK3588 NPU, 1 core, {DRAM}: estimate",
            "dtype": series.dtype,
            # Sums over more than 512 or 1024 inputs are split; the parts are probably added in fp16.
            "accumulate": "int32" if series.dtype == "int8" else "fp32, fp16 between parts",
            "versions": f"rknn-toolkit2 {self.environment.version}",
            "estimated": True,
        }

    def row(self, shape: Shape) -> ProductRow:
        m, k, n = shape
        dtype = self.fields["dtype"]
        try:
            problem = make_problem(m, k, n)
            built = backends.compile_product(self.environment, problem, dtype, rk3588.NAME, verify=True)
            assert built.verify_outputs is not None
            deviation = problem.error(built.verify_outputs["c"])
        except RwkvNpuError as error:
            raise Failed(str(error), fatal=False) from None
        except MemoryError as error:
            raise Failed(f"not enough memory: {first_line(error)}", fatal=True) from None
        if built.cycles is None:
            raise Failed("the compiler printed no cycles", fatal=False)
        cycles = {"ddr": built.cycles.ddr, "npu": built.cycles.npu}
        size = backends.BYTES[dtype]
        return self._row(
            shape,
            [npu_product_ms(cycles, m, k, n, bound) for bound in BOUNDS],
            problem.moved(size, size, size),
            max_rel_error=deviation,
            npu_ops=backends.npu_ops(built),
            flags="cpu-fallback" if built.cpu_fallback else "",
        )


def npu_product_ms(cycles: dict[str, int], m: int, k: int, n: int, bound: str) -> float:
    """Milliseconds of one call through RKNNLite: product, transposes, conversion of A and C, and call overhead."""
    transposes, _ = port_ms(k + n, m, TERMS, bound)
    conversion = m * (k + n) * TERMS["conversion_element"].at(bound) / 1e6
    call = TERMS["rknnlite_call"].at(bound) / 1e3
    return graph_ms(cycles, m, DRAM, TERMS, bound) + transposes + conversion + call


class EstimatedCpu(_Computed):
    """Estimates for the board's four large cores: the time of the memory traffic or of the kernel, whichever is longer.

    The kernel's time comes from a static count of its cycles.
    """

    SIZES = {"fp32": 4, "fp16": 2, "int8": 1}

    def __init__(self, series: Series) -> None:
        self.fields = {
            "backend": series.backend,
            "device": f"{rk3588.CPU_NAME}, {DRAM}: estimate",
            "dtype": series.dtype,
            "accumulate": "int32" if series.dtype == "int8" else "fp32",
            "estimated": True,
        }

    def row(self, shape: Shape) -> ProductRow:
        m, k, n = shape
        dtype = self.fields["dtype"]
        bytes_ = self.SIZES[dtype] * (m * k + k * n) + 4 * m * n
        times = [cpu_product_ms(bytes_, m * k * n, dtype, m, DRAM, TERMS, bound) for bound in BOUNDS]
        return self._row(shape, times, bytes_)


class Published(_Computed):
    """Square fp16 products on one NPU core through the matmul interface, measured on boards and published by others."""

    fields = {
        "backend": "rknn-matmul",
        "device": "RK3588 NPU, 1 core: published board measurements",
        "dtype": "fp16",
        "accumulate": "fp32",
        "published": True,
    }

    def row(self, shape: Shape) -> ProductRow:
        n = shape[0]
        return self._row(shape, [rk3588.PUBLISHED_MATMUL_MS[n]], 2.0 * (2 * n * n) + 4.0 * n * n)


def open_series(series: Series, threads: int, effort: Effort) -> Opened:
    """Open a series. Raises BackendError or ToolkitError if its backend is missing."""
    if series.published:
        return Published()
    if series.estimated:
        return EstimatedCpu(series) if series.backend == BOARD_CPU else EstimatedNpu(series)
    return Measured(series, threads, effort)


def measure_roofline(threads: int) -> dict[str, float]:
    """Measure the machine's GB/s and GFLOP/s in a child process. Raises Failed."""
    with Child(threads, "roofline") as child:
        return child.ask({"task": "roofline", "threads": threads})


# -- the sweep -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The settings of a sweep.

    file: keeps the rows. redo: measure rows again that other processes or a falling clock may have slowed down. log:
    receives messages for the user.
    """

    shapes: Sequence[Shape]
    backends: Sequence[str] = DEFAULT_BACKENDS
    dtypes: Sequence[str] | None = None
    threads: int = field(default_factory=lambda: len(hardware.usable_cores()))
    effort: Effort = Effort()
    file: Path | None = None
    redo: bool = False
    command: str = ""
    log: Log = lambda line: None
    open: Open | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("backend", self.backends, BACKENDS),
            ("dtype", self.dtypes or (), DTYPES),
        ):
            if wrong := [value for value in given if value not in known]:
                raise UsageError(f"{name} {wrong[0]!r} is unknown: use some of {', '.join(known)}")
        if self.threads < 1 or self.effort.repeats < 1:
            raise UsageError("the numbers of threads and of repeats must be at least 1")


def plan(settings: Settings) -> list[Series]:
    """The series that can run here. Logs a line for each that cannot."""
    series: list[Series] = []
    chip = hardware.soc()
    for backend in dict.fromkeys(settings.backends):
        supported, default = BACKENDS[backend]
        dtypes = [dtype for dtype in settings.dtypes or default if dtype in supported]
        if not dtypes:
            settings.log(f"{backend} supports none of these dtypes, only {', '.join(supported)}")
        elif backend == "rknn-matmul" and not chip and OVERRIDE not in os.environ:
            settings.log("rknn-matmul needs a board")
        elif backend == BOARD_CPU and chip:
            continue  # the board's CPU is measured instead
        else:
            devices = ("cpu", "opencl") if backend == "tinygrad" else ("cpu",)
            on_board = chip and importlib.util.find_spec("rknnlite")
            estimated = backend == BOARD_CPU or (backend == "rknn" and not on_board)
            series += [Series(backend, dtype, device, estimated) for device in devices for dtype in dtypes]
    npu = any(one.backend in NPU_BACKENDS for one in series)
    if npu and any(_is_published(shape) for shape in settings.shapes):
        series.append(Series("rknn-matmul", "fp16", published=True))
    return series


def _is_published(shape: Shape) -> bool:
    return len(set(shape)) == 1 and shape[0] in rk3588.PUBLISHED_MATMUL_MS


class Sweep:
    """The rows of a sweep, in `document`. `run` measures those that are missing."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.plan = settings, plan(settings)
        self.document = Document.resume(
            settings.file, ProductRow, machine.describe(), settings.threads, settings.command
        )
        disturbed = {"busy", "throttled"} if settings.redo else set()
        # Failed rows and estimates are computed again. Old rows stay until new ones replace them.
        self._known = {
            (row.series, row.size): row
            for row in self.document.results
            if row.failed is None and row.is_measured_here and not disturbed & set(row.flags.split())
        }

    @property
    def total(self) -> int:
        return sum(len(self._shapes(series)) for series in self.plan)

    def run(self) -> Iterator[tuple[Series, int, ProductRow | None]]:
        """Yields (series, shapes done, the row if it is new). A row is saved before it is yielded."""
        if any(not (s.estimated or s.published) and s.backend not in NPU_BACKENDS for s in self.plan):
            self._measure_roofline()
        for series in self.plan:
            yield from self._run(series)

    def _shapes(self, series: Series) -> list[Shape]:
        return [shape for shape in self.settings.shapes if not series.published or _is_published(shape)]

    def _run(self, series: Series) -> Iterator[tuple[Series, int, ProductRow | None]]:
        shapes = self._shapes(series)
        waiting = [shape for shape in shapes if (series.name, shape) not in self._known]
        known = [self._known[series.name, shape] for shape in shapes if shape not in waiting]
        yield series, len(known), None
        # Larger products than one that was too slow in an earlier run are not measured.
        if slow := [row for row in known if _is_slow(row)]:
            waiting = [shape for shape in waiting if _work(shape) < min(row.work for row in slow)]
        if not waiting:
            return
        try:
            opened = (self.settings.open or open_series)(series, self.settings.threads, self.settings.effort)
        except RwkvNpuError as error:
            self.settings.log(f"{series.name} is skipped: {error}")
            return
        try:
            for count, shape in enumerate(waiting, 1):
                try:
                    row = opened.row(shape)
                    stop = _is_slow(row)
                    if stop and count < len(waiting):
                        self._note(f"{series.name} ends at {_text(shape)}: a run took {row.time_s:.0f} s")
                except Failed as error:
                    row = opened.blank(shape, str(error))
                    self.settings.log(f"{series.name} failed at {_text(shape)}: {error}")
                    stop = error.fatal
                self._keep(row)
                yield series, 1, row
                if stop:
                    return
        finally:
            opened.close()

    def _measure_roofline(self) -> None:
        facts = self.document.machine
        if "bandwidth_gb_per_s" not in facts or self.settings.redo:
            try:
                speeds = measure_roofline(self.settings.threads)
                # Disturbance only makes a measurement slower, so keep the best.
                facts |= {key: max(value, facts.get(key, 0.0)) for key, value in speeds.items()}
            except (Failed, BackendError) as error:
                self.settings.log(f"the machine's bandwidth could not be measured: {error}")

    def _note(self, line: str) -> None:
        self.settings.log(line)
        if line not in self.document.notes:
            self.document.notes.append(line)

    def _keep(self, row: ProductRow) -> None:
        key = row.series, row.size
        others = [old for old in self.document.results if (old.series, old.size) != key]
        self.document.results = [*others, row]
        if self.settings.file:
            self.document.save(self.settings.file)


def _is_slow(row: ProductRow) -> bool:
    return row.is_measured_here and row.time_s is not None and row.time_s > STOP_S


def _work(shape: Shape) -> int:
    return 2 * shape[0] * shape[1] * shape[2]


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
