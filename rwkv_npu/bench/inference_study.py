"""The rows of `rwkv-npu bench inference`: each backend measured in a process of its own, then the estimates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_npu.backends import BACKENDS
from rwkv_npu.bench import machine
from rwkv_npu.bench.inference_estimate import estimates
from rwkv_npu.bench.inference_record import PREFILLS, Document, Row
from rwkv_npu.bench.series import Failed, roofline
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.bundle import Artifact, is_bundle, read_manifest
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import Spec
from rwkv_npu.runtime import estimate

DEFAULT_BACKENDS = ("numba", "ort", "torch", "numpy")
STAGES = 1 + len(PREFILLS) + 1  # load, prompts, decode
SILENCE_S = 900.0  # a child that says nothing for so long is ended

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What to measure. seconds: of a stage, after which it is not repeated. `file` keeps the rows, `say` takes
    lines for people. redo: measure rows of the file again that others disturbed."""

    models: Sequence[Path]
    backends: Sequence[str] = DEFAULT_BACKENDS
    repeats: int = 5
    seconds: float = 30.0
    threads: int | None = None
    fusion: str | None = None
    assumptions: estimate.Assumptions = field(default_factory=estimate.Assumptions)
    profile: bool = False
    file: Path | None = None
    redo: bool = False
    command: str = ""
    say: Say = lambda line: None

    def __post_init__(self) -> None:
        for name in self.backends:
            if name == "rknn-sim":
                raise UsageError(
                    "rknn-sim shows what the NPU computes, not how fast: artifacts are estimated anyway"
                )
            if name not in BACKENDS:
                able = [name for name in BACKENDS if name != "rknn-sim"]
                raise UsageError(f"backend {name!r} is unknown: use some of {', '.join(able)}")
        for flag, value in (("-r", self.repeats), ("-t", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} is {value}: it must be at least 1")
        if not 0 < self.seconds < float("inf"):
            raise UsageError(f"--seconds is {self.seconds:g}: it must be a number above 0")


@dataclass(frozen=True)
class Subject:
    """A model to be measured."""

    path: Path
    spec: Spec
    fingerprint: str
    artifacts: Sequence[Artifact] = ()
    cpu_precisions: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.path.name

    def row(self, backend: str, **more: Any) -> Row:
        spec = self.spec
        return Row(self.name, self.fingerprint, spec.generation, spec.parameters, backend, **more)

    def is_in(self, row: Row) -> bool:
        return (row.fingerprint, row.model) == (self.fingerprint, self.name)


def open_subject(path: Path) -> Subject:
    """Raises BundleError or CheckpointError."""
    if is_bundle(path):
        manifest = read_manifest(path)
        return Subject(path, manifest.spec, manifest.fingerprint, manifest.artifacts, manifest.cpu_precisions)
    checkpoint = open_checkpoint(path)
    return Subject(path, checkpoint.spec, checkpoint.fingerprint)


class Study:
    """The rows so far, in `document`; `run` adds the others."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.subjects = [open_subject(path) for path in settings.models]
        here = machine.describe()
        self.document = Document(here, settings.command)
        if settings.file and settings.file.exists() and settings.file.stat().st_size:
            self.document = Document.load(settings.file)
            self._check_same(here)
            if settings.command not in self.document.command:
                self.document.command = f"{self.document.command}; {settings.command}".strip("; ")
            # What failed or was cut short is tried again.
            self.document.results = [row for row in self.document.results if row.is_whole]

    @property
    def total(self) -> int:
        """Stages of all cases."""
        return STAGES * len(self._cases())

    def run(self) -> Iterator[tuple[str, int]]:
        """(what is being done, stages done with), as it goes. A row is kept before the next begins."""
        for subject, backend, precision in self._cases():
            known = [row for row in self.document.results if self._is_of(row, subject, backend, precision)]
            if known and not (self.settings.redo and known[0].flags):
                yield subject.name, STAGES
                continue
            yield f"{subject.name} {backend} memory bandwidth", 0
            row = subject.row(backend, threads=self.settings.threads or len(os.sched_getaffinity(0)))
            row.read_gb_per_s = self._measure_roofline()
            done = 0
            try:
                for stage in measure(row, self._request(subject, backend, precision)):
                    yield f"{subject.name} {backend} {stage}", min(1, STAGES - done - 1)
                    done += 1
            except KeyboardInterrupt:
                row.flags = f"{row.flags} interrupted".strip()
                raise
            finally:
                self._keep(row, known)
            yield subject.name, max(0, STAGES - done)

    def _measure_roofline(self) -> float | None:
        """GB/s that all threads read now; the machine's facts keep the best."""
        try:
            found = roofline(self.settings.threads or len(os.sched_getaffinity(0)))
        except (Failed, BackendError) as error:
            self.settings.say(f"the machine's bandwidth could not be measured: {error}")
            return None
        facts = self.document.machine
        facts |= {name: max(value, facts.get(name, 0.0)) for name, value in found.items()}
        return found["bandwidth_gb_per_s"]

    def add_estimates(self) -> None:
        """Replace the estimates of the models by those that follow from the rows."""
        rows = [
            row
            for row in self.document.results
            if not (row.estimated and any(subject.is_in(row) for subject in self.subjects))
        ]
        if hardware.soc() is None:
            for subject in self.subjects:
                about = [row for row in rows if subject.is_in(row) and not row.estimated]
                rows += estimates(
                    subject.spec, subject.artifacts, about, self.settings.assumptions, subject.row
                )
        self.document.results = rows
        for row in rows:
            row.finish(self.document.machine.get("bandwidth_gb_per_s"))
        if self.settings.file:
            self.document.save(self.settings.file)

    def _cases(self) -> list[tuple[Subject, str, str | None]]:
        """(model, backend, precision); None where there is no choice."""
        found: list[tuple[Subject, str, str | None]] = []
        for subject in self.subjects:
            for backend in dict.fromkeys(self.settings.backends):
                precisions: Sequence[str | None] = ()
                if backend.startswith("rknn"):
                    precisions = list(dict.fromkeys(a.precision for a in subject.artifacts))
                elif backend in ("numba", "ort"):
                    precisions = subject.cpu_precisions
                found += [(subject, backend, precision) for precision in precisions or (None,)]
        return found

    def _is_of(self, row: Row, subject: Subject, backend: str, precision: str | None) -> bool:
        if row.estimated or not subject.is_in(row) or row.backend != backend:
            return False
        return precision in (None, row.weights, row.stored) and self.settings.fusion in (None, row.fusion)

    def _request(self, subject: Subject, backend: str, precision: str | None) -> dict[str, Any]:
        settings = self.settings
        names = ("repeats", "seconds", "threads", "fusion", "profile")
        request = {name: getattr(settings, name) for name in names}
        return {**request, "model": str(subject.path), "backend": backend, "precision": precision}

    def _keep(self, row: Row, replaced: Sequence[Row]) -> None:
        """Add a row; those that it measured again go."""
        row.finish(self.document.machine.get("bandwidth_gb_per_s"))
        if row.is_whole:
            self.document.results = [other for other in self.document.results if other not in replaced]
        self.document.results.append(row)
        if row.failed:
            self.settings.say(f"{row.model} {row.backend} failed: {row.failed}")
        elif row.decode_tps and row.prefill_128_tps:
            speeds = f"{row.prefill_128_tps:.4g} tokens/s reading, {row.decode_tps:.4g} writing"
            self.settings.say(f"{row.model} {row.name}: {speeds}")
        if self.settings.file:
            self.document.save(self.settings.file)

    def _check_same(self, here: Mapping[str, Any]) -> None:
        """Raises UsageError where a file's rows come from another machine, or from another number of threads."""
        file, there = self.settings.file, self.document.machine
        for key in ("cpu", "cores", "board"):
            if there.get(key) != here.get(key):
                reason = f"on another machine ({key}: {there.get(key)}, here: {here.get(key)})"
                raise UsageError(f"{file} was measured {reason}: name another file")
        wanted = self.settings.threads or len(os.sched_getaffinity(0))
        for row in self.document.results:
            if row.threads not in (None, wanted):
                raise UsageError(
                    f"{file} was measured with {row.threads} threads, not {wanted}: name another file"
                )


def measure(row: Row, request: Mapping[str, Any]) -> Iterator[str]:
    """Fill in `row` from a child process, yielding the name of each stage as it begins.

    A child that fails leaves what it had found, and the reason in `row.failed`.
    """
    threads = request["threads"]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "rwkv_npu.bench.inference_child"]
            + [json.dumps({**request, "started": time.perf_counter()})],
            env={**os.environ, **({name: str(threads) for name in names} if threads else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        try:
            yield from _follow(process, row)
            code = process.wait()
            if code and not row.failed:
                errors.seek(0)
                row.failed = _why_it_ended(code, errors.read().decode(errors="replace"))
        finally:
            process.kill()
            process.communicate()


def _follow(process: subprocess.Popen[str], row: Row) -> Iterator[str]:
    assert process.stdout is not None
    while True:
        limit = threading.Timer(SILENCE_S, process.kill)
        limit.daemon = True
        limit.start()
        try:
            line = process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            return
        message = json.loads(line)
        if "stage" in message:
            yield message["stage"]
        row.failed = message.get("failed", row.failed)
        row.update(message.get("fields", {}))


def _why_it_ended(code: int, said: str) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, most likely for lack of memory"
    last = said.strip().splitlines()[-1:]
    how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
    return ": ".join([f"its process {how}", *last])
