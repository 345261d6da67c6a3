"""The rows of `bench inference`: each backend is measured in its own process, then an RK3588 is estimated.

The arithmetic of the estimates is in `runtime.estimate`, their terms and sources are in `runtime.rk3588`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_npu.backends import BACKENDS
from rwkv_npu.bench import machine
from rwkv_npu.bench.child import Child, Failed
from rwkv_npu.bench.document import PREFILLS, Document, ModelRow
from rwkv_npu.bench.matmul import measure_roofline
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.bundle import Artifact, is_bundle, read_manifest
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import Spec
from rwkv_npu.runtime import estimate, rk3588
from rwkv_npu.runtime.estimate import Estimate, Milliseconds
from rwkv_npu.runtime.rk3588 import TERMS, Terms

DEFAULT_BACKENDS = ("numba", "ort", "torch", "numpy")
STAGES = 1 + len(PREFILLS) + 1  # load, prompts, decode

Log = Callable[[str], None]


@dataclass(frozen=True)
class Assumptions:
    """Flags that replace terms of the estimates. None keeps the table's value.

    board: the terms to begin with. call_overhead_us: microseconds of an NPU call. host_factor: ratio of the
    board's time to this machine's for recurrence, sampling and Python; their times are then measured here instead of
    taken from the table.
    """

    call_overhead_us: float | None = None
    host_factor: float | None = None
    board: Terms = field(default_factory=lambda: TERMS)

    def __post_init__(self) -> None:
        call, factor = self.call_overhead_us, self.host_factor
        if call is not None and not 0 <= call < float("inf"):
            raise UsageError(f"--call-overhead-us is {call:g}: it must be a number of at least 0")
        if factor is not None and not 0 < factor < float("inf"):
            raise UsageError(f"--host-factor is {factor:g}: it must be a number above 0")

    @property
    def terms(self) -> Terms:
        if self.call_overhead_us is None:
            return self.board
        return self.board.measured({"npu_call": self.call_overhead_us}, "--call-overhead-us")


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    seconds: limit of a stage's repeats. file: keeps the rows. log: receives messages for the user. redo: measure rows
    again that were disturbed.
    """

    models: Sequence[Path]
    backends: Sequence[str] = DEFAULT_BACKENDS
    repeats: int = 5
    seconds: float = 30.0
    threads: int | None = None
    fusion: str | None = None
    assumptions: Assumptions = field(default_factory=Assumptions)
    profile: bool = False
    file: Path | None = None
    redo: bool = False
    command: str = ""
    log: Log = lambda line: None

    def __post_init__(self) -> None:
        for name in self.backends:
            if name == "rknn-sim":
                raise UsageError(
                    "rknn-sim simulates the NPU's results, not its speed: omit it, artifacts are estimated anyway"
                )
            if name not in BACKENDS:
                known = [name for name in BACKENDS if name != "rknn-sim"]
                raise UsageError(f"backend {name!r} is unknown: use some of {', '.join(known)}")
        for flag, value in (("-r", self.repeats), ("-t", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} is {value}: it must be at least 1")
        if not 0 < self.seconds < float("inf"):
            raise UsageError(f"--seconds is {self.seconds:g}: it must be a number above 0")


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    path: Path
    spec: Spec
    fingerprint: str
    artifacts: Sequence[Artifact] = ()
    cpu_precisions: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.path.name

    def row(self, backend: str, **fields: Any) -> ModelRow:
        spec = self.spec
        return ModelRow(self.name, self.fingerprint, spec.generation, spec.parameters, backend, **fields)

    def is_in(self, row: ModelRow) -> bool:
        return (row.fingerprint, row.model) == (self.fingerprint, self.name)


def open_subject(path: Path) -> Subject:
    """Open a model to measure. Raises BundleError or CheckpointError."""
    if is_bundle(path):
        manifest = read_manifest(path)
        return Subject(path, manifest.spec, manifest.fingerprint, manifest.artifacts, manifest.cpu_precisions)
    checkpoint = open_checkpoint(path)
    return Subject(path, checkpoint.spec, checkpoint.fingerprint)


class Study:
    """The rows of a benchmark, in `document`. `run` measures those that are missing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.subjects = [open_subject(path) for path in settings.models]
        self.threads = settings.threads or len(hardware.usable_cores())
        self.document = Document.resume(
            settings.file, ModelRow, machine.describe(), self.threads, settings.command
        )
        # Failed and interrupted rows are dropped, to be measured again.
        self.document.results = [row for row in self.document.results if row.is_whole]

    @property
    def total(self) -> int:
        """Number of stages of all cases."""
        return STAGES * len(self._cases())

    def run(self) -> Iterator[tuple[str, int]]:
        """Measure all cases. Yields (current work, stages done). Each row is saved before the next one begins."""
        for subject, backend, precision in self._cases():
            known = [row for row in self.document.results if self._is_of(row, subject, backend, precision)]
            if known and not (self.settings.redo and known[0].flags):
                yield subject.name, STAGES
                continue
            yield f"{subject.name} {backend} memory bandwidth", 0
            row = subject.row(backend, threads=self.threads)
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

    def add_estimates(self) -> None:
        """Replace the estimates of the models by those of this version."""
        rows = [
            row
            for row in self.document.results
            if not (row.estimated and any(subject.is_in(row) for subject in self.subjects))
        ]
        if hardware.soc() is None:
            for subject in self.subjects:
                measured = [row for row in rows if subject.is_in(row) and not row.estimated]
                rows += estimates(subject, measured, self.settings.assumptions)
        self.document.results = rows
        for row in rows:
            row.finish(self.document.machine.get("bandwidth_gb_per_s"))
        if self.settings.file:
            self.document.save(self.settings.file)

    def _measure_roofline(self) -> float | None:
        """Measure the memory read speed of all threads, in GB/s. The machine's facts keep the best."""
        try:
            speeds = measure_roofline(self.threads)
        except (Failed, BackendError) as error:
            self.settings.log(f"the machine's bandwidth could not be measured: {error}")
            return None
        facts = self.document.machine
        facts |= {name: max(value, facts.get(name, 0.0)) for name, value in speeds.items()}
        return speeds["bandwidth_gb_per_s"]

    def _cases(self) -> list[tuple[Subject, str, str | None]]:
        """(model, backend, precision); precision None if there is no choice."""
        cases: list[tuple[Subject, str, str | None]] = []
        for subject in self.subjects:
            for backend in dict.fromkeys(self.settings.backends):
                precisions: Sequence[str | None] = ()
                if backend.startswith("rknn"):
                    precisions = list(dict.fromkeys(a.precision for a in subject.artifacts))
                elif backend in ("numba", "ort"):
                    precisions = subject.cpu_precisions
                cases += [(subject, backend, precision) for precision in precisions or (None,)]
        return cases

    def _is_of(self, row: ModelRow, subject: Subject, backend: str, precision: str | None) -> bool:
        if row.estimated or not subject.is_in(row) or row.backend != backend:
            return False
        return precision in (None, row.weights, row.stored) and self.settings.fusion in (None, row.fusion)

    def _request(self, subject: Subject, backend: str, precision: str | None) -> dict[str, Any]:
        names = ("repeats", "seconds", "threads", "fusion", "profile")
        request = {name: getattr(self.settings, name) for name in names}
        return {**request, "model": str(subject.path), "backend": backend, "precision": precision}

    def _keep(self, row: ModelRow, replaced: Sequence[ModelRow]) -> None:
        """Add a row. If it is complete, it replaces the rows that it measured again."""
        row.finish(self.document.machine.get("bandwidth_gb_per_s"))
        if row.is_whole:
            self.document.results = [other for other in self.document.results if other not in replaced]
        self.document.results.append(row)
        if row.failed:
            self.settings.log(f"{row.model} {row.backend} failed: {row.failed}")
        elif row.decode_tps and row.prefill_128_tps:
            speeds = f"{row.prefill_128_tps:.4g} tokens/s reading, {row.decode_tps:.4g} writing"
            self.settings.log(f"{row.model} {row.name}: {speeds}")
        if self.settings.file:
            self.document.save(self.settings.file)


def measure(row: ModelRow, request: Mapping[str, Any]) -> Iterator[str]:
    """Fill in `row` from a child process. Yields the name of each stage as it begins.

    After a failure, `row.failed` holds the reason; fields that are known already stay.
    """
    with Child(request["threads"], f"{request['backend']} {request['model']}") as child:
        try:
            for message in child.messages({**request, "task": "model", "started": child.started}):
                if "stage" in message:
                    yield message["stage"]
                row.update(message.get("fields", {}))
        except Failed as error:
            row.failed = str(error)


# -- estimates -------------------------------------------------------------------------------------------


def estimates(subject: Subject, measured: Sequence[ModelRow], assumptions: Assumptions) -> list[ModelRow]:
    """Estimated rows for an RK3588 with either kind of DRAM. [] for a model without artifacts for the RK3588."""
    kinds: dict[tuple[str, str], list[Artifact]] = {}
    for artifact in subject.artifacts:
        if artifact.target == rk3588.NAME:
            kinds.setdefault((artifact.precision, artifact.fusion), []).append(artifact)
    if not kinds:
        return []
    estimator = _Estimator(subject, assumptions, _host_row(measured))
    rows = []
    for dram in rk3588.DRAMS:
        rows += [estimator.cpu(precision, dram) for precision in estimate.CPU_PRECISIONS]
        rows += [estimator.npu(kind, dram) for kind in kinds.values() if all(a.cycles for a in kind)]
        rows += [estimator.three_cores(precision, dram) for precision in estimate.MATMUL_PRECISIONS]
    return rows


def _host_row(measured: Sequence[ModelRow]) -> ModelRow | None:
    """The row whose times --host-factor multiplies. All estimates of a model use the same one, to be comparable."""
    usable = [row for row in measured if row.decode_ms and row.prefill_128_ms]
    order = {"numba": 0, "ort": 1}
    return min(usable, key=lambda row: (order.get(row.backend, 2), -(row.decode_tps or 0)), default=None)


@dataclass(frozen=True)
class _Estimator:
    """Computes the estimated rows of one model."""

    subject: Subject
    assumptions: Assumptions
    host: ModelRow | None

    @property
    def basis(self) -> str:
        factor = self.assumptions.host_factor
        if self.host is None or factor is None:
            return "terms of the estimates"
        return f"terms of the estimates; recurrence, sampling and rest as {self.host.name} took here, times {factor:g}"

    def cpu(self, precision: str, dram: str) -> ModelRow:
        spec, terms = self.subject.spec, self.assumptions.terms
        return self._row(
            "cpu",
            precision,
            f"{rk3588.CPU_NAME}, {dram}",
            sum(estimate.weight_bytes(spec, precision).values()),
            lambda tokens, host: estimate.on_cpu(spec, precision, tokens, dram, terms, host),
        )

    def npu(self, artifacts: Sequence[Artifact], dram: str) -> ModelRow:
        spec, terms = self.subject.spec, self.assumptions.terms
        row = self._row(
            "rknn",
            artifacts[0].precision,
            f"RK3588 NPU, {dram}",
            sum(artifact.weight_bytes for artifact, _ in estimate.served_by(artifacts, 1)),
            lambda tokens, host: estimate.on_npu(spec, artifacts, tokens, dram, terms, host),
        )
        row.fusion = artifacts[0].fusion
        return row

    def three_cores(self, precision: str, dram: str) -> ModelRow:
        spec, terms = self.subject.spec, self.assumptions.terms
        bits = estimate.MATMUL_PRECISIONS[precision]
        return self._row(
            "rknn-matmul",
            precision,
            f"RK3588 NPU, 3 cores, {dram}",
            sum(estimate.weights(spec).values()) * bits // 8,
            lambda tokens, host: estimate.on_three_cores(spec, precision, tokens, dram, terms, host),
        )

    def _row(
        self,
        backend: str,
        precision: str,
        device: str,
        weight_bytes: int,
        compute: Callable[[int, Milliseconds | None], Estimate],
    ) -> ModelRow:
        row = self.subject.row(backend, weights=precision, stored=precision, device=device, estimated=True)
        row.bytes_per_token = weight_bytes + estimate.state_bytes(self.subject.spec)
        row.basis = self.basis
        for name, tokens in (("decode", 1), *((f"prefill_{count}", count) for count in PREFILLS)):
            host = self._host_ms(name)
            result = compute(tokens, host)
            slow, central, fast = result.speeds(tokens)
            row.update({f"{name}_tps": central, f"{name}_tps_p10": slow, f"{name}_tps_p90": fast})
            row.update({f"{name}_ms": dict(result.ms)})
            if name == "decode":
                row.calls_per_token = float(result.npu_calls) or None
            elif tokens == PREFILLS[0]:
                row.first_token_s = result.total_ms / 1e3
        return row

    def _host_ms(self, name: str) -> Milliseconds | None:
        """The CPU's times in the row `host`, times --host-factor. None to use the table's figures."""
        factor = self.assumptions.host_factor
        parts: Mapping[str, float] = getattr(self.host, f"{name}_ms") if self.host else {}
        if factor is None or not parts:
            return None
        rest = parts.get("rest", 0.0) + parts.get("dispatch", 0.0)
        recurrence, sampling = parts.get("recurrence", 0.0), parts.get("sampling", 0.0)
        return {"recurrence": factor * recurrence, "sampling": factor * sampling, "rest": factor * rest}
