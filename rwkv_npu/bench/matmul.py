"""The sweep: every series over every shape, one at a time, kept in a file as it goes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_npu.backends import NPU_BACKENDS
from rwkv_npu.backends.rknn_api import OVERRIDE
from rwkv_npu.bench import machine
from rwkv_npu.bench.backends import DTYPES
from rwkv_npu.bench.record import Document, Row
from rwkv_npu.bench.series import Failed, Open, Series, open_series, roofline
from rwkv_npu.bench.shapes import Shape
from rwkv_npu.bench.timing import STOP_S, Effort
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError, RwkvNpuError, UsageError

# What each backend can do, and what it does unasked.
BACKENDS = {
    "numpy": (("fp32", "fp16"), ("fp32",)),
    "torch": (("fp32", "bf16", "fp16"), ("fp32", "bf16")),
    "tinygrad": (("fp32", "fp16"), ("fp32",)),
    "ort": (("fp32", "int8", "int4"), ("fp32",)),
    "rknn": (("fp16", "bf16", "int8"), ("fp16",)),
    "rknn-matmul": (("fp16", "int8"), ("fp16",)),
}
DEFAULT_BACKENDS = ("numpy", "torch", "ort", "rknn")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """One call of the sweep. `say` takes lines for people, `file` keeps the rows; `redo` measures those again that
    the machine's other work, or its clock, may have spoilt."""

    shapes: Sequence[Shape]
    backends: Sequence[str] = DEFAULT_BACKENDS
    dtypes: Sequence[str] | None = None
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    effort: Effort = Effort()
    file: Path | None = None
    redo: bool = False
    command: str = ""
    say: Say = lambda line: None
    open: Open | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("backend", self.backends, BACKENDS),
            ("dtype", self.dtypes or (), DTYPES),
        ):
            if wrong := [one for one in given if one not in known]:
                raise UsageError(f"{name} {wrong[0]!r} is unknown: use some of {', '.join(known)}")
        if self.threads < 1 or self.effort.repeats < 1:
            raise UsageError("the numbers of threads and of repeats must be at least 1")


def plan(settings: Settings) -> list[Series]:
    """The series that can be tried here; what cannot is said in one line each."""
    found = []
    chip = hardware.soc()
    for backend in dict.fromkeys(settings.backends):
        able, unasked = BACKENDS[backend]
        dtypes = [dtype for dtype in settings.dtypes or unasked if dtype in able]
        if not dtypes:
            settings.say(f"{backend} does none of these dtypes: it does {', '.join(able)}")
        elif backend == "rknn-matmul" and not chip and OVERRIDE not in os.environ:
            settings.say("rknn-matmul needs a board")
        else:
            devices = ("cpu", "opencl") if backend == "tinygrad" else ("cpu",)
            estimated = backend == "rknn" and not (chip and importlib.util.find_spec("rknnlite"))
            found += [Series(backend, dtype, device, estimated) for device in devices for dtype in dtypes]
    return found


class Sweep:
    """The rows so far, in `document`; `run` yields the others as they come."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.plan = settings, plan(settings)
        here = machine.describe()
        self.document = Document(here, settings.command)
        if settings.file and settings.file.exists() and settings.file.stat().st_size:
            self.document = Document.load(settings.file)
            _check_same(self.document, here, settings)
            self.document.command = settings.command or self.document.command
        spoilt = {"busy", "throttled"} if settings.redo else set()
        # What failed is tried again. Rows to be measured again stay until the new ones are there.
        self._known = {
            (row.series, row.size): row
            for row in self.document.results
            if row.failed is None and not spoilt & set(row.flags.split())
        }

    @property
    def total(self) -> int:
        return len(self.plan) * len(self.settings.shapes)

    def run(self) -> Iterator[tuple[Series, int, Row | None]]:
        """(series, shapes done with, the row if it is a new one). Rows are saved before they are yielded."""
        if any(series.backend not in NPU_BACKENDS for series in self.plan):  # it is the CPU's
            self._measure_roofline()
        for series in self.plan:
            yield from self._run(series)

    def _run(self, series: Series) -> Iterator[tuple[Series, int, Row | None]]:
        shapes = list(self.settings.shapes)
        waiting = [shape for shape in shapes if (series.name, shape) not in self._known]
        known = [self._known[series.name, shape] for shape in shapes if shape not in waiting]
        yield series, len(known), None
        if slow := [row for row in known if _is_slow(row)]:
            waiting = [shape for shape in waiting if _work(shape) < min(row.work for row in slow)]
        if not waiting:
            return
        try:
            opened = (self.settings.open or open_series)(series, self.settings.threads, self.settings.effort)
        except RwkvNpuError as error:
            self.settings.say(f"{series.name} is left out: {error}")
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
                    self.settings.say(f"{series.name} failed at {_text(shape)}: {error}")
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
                found = roofline(self.settings.threads)
                # Whatever disturbs this makes it slower.
                facts |= {key: max(value, facts.get(key, 0.0)) for key, value in found.items()}
            except (Failed, BackendError) as error:
                self.settings.say(f"the machine's bandwidth could not be measured: {error}")

    def _note(self, line: str) -> None:
        self.settings.say(line)
        if line not in self.document.notes:
            self.document.notes.append(line)

    def _keep(self, row: Row) -> None:
        key = row.series, row.size
        self.document.results = [old for old in self.document.results if (old.series, old.size) != key] + [
            row
        ]
        if self.settings.file:
            self.document.save(self.settings.file)


def _is_slow(row: Row) -> bool:
    return not row.estimated and row.time_s is not None and row.time_s > STOP_S


def _work(shape: Shape) -> int:
    return 2 * shape[0] * shape[1] * shape[2]


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _check_same(found: Document, here: dict[str, Any], settings: Settings) -> None:
    """Raises UsageError where a file's rows come from another machine, or from another number of threads."""
    for key in ("cpu", "cores", "board"):
        there = found.machine.get(key)
        if there != here.get(key):
            reason = f"on another machine ({key}: {there}, here: {here.get(key)})"
            raise UsageError(f"{settings.file} was measured {reason}: name another file")
    for row in found.results:
        if row.threads not in (None, settings.threads):
            reason = f"with {row.threads} threads, not {settings.threads}"
            raise UsageError(
                f"{settings.file} was measured {reason}: name another file, or give -t {row.threads}"
            )
