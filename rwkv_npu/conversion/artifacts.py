"""The compile step: plan the artifacts of a request, and compile them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from rwkv_npu.backends.base import GoldenVectors, relative_error
from rwkv_npu.backends.memory import MemoryPlan, matrix_bytes, plan_memory
from rwkv_npu.backends.ort import OrtBackend
from rwkv_npu.backends.rknn_graph import CompilerGraph, compiler_graph, int8_parameters
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import Artifact, Bundle, Manifest, artifact_file, graph_file
from rwkv_npu.formats.files import write_atomically
from rwkv_npu.graphs.trace import Matrix, matrices, trace_group
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Group, Spec
from rwkv_npu.progress import Progress, progress
from rwkv_npu.quant.npu import ProjectionParams
from rwkv_npu.runtime.selftest import golden_vectors
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.toolkit import CompileResult, Environment, Job, compile_many

VERIFY_ROWS = 16
BOTH_ROWS, ONE_ROWS = (1, 64), (32,)  # the alternatives of `rows="auto"`


# -- the plan --------------------------------------------------------------------------------------------


def plan_artifacts(
    manifest: Manifest,
    program: Program,
    target: str,
    precision: str,
    rows: Sequence[int] | None,
    int8: Collection[str] = (),
) -> list[Artifact]:
    """Plan the artifacts for `target`. `rows` None means `rows="auto"`. `int8` names the projections in int8.

    With auto, decode and prefill have separate artifacts if the NPU's memory holds the weights twice; otherwise one
    artifact serves both. Existing artifacts of the same kind count too. Raises UsageError with the arithmetic if the
    model does not fit.
    """
    matrices_of = _matrices(program.spec, program.fusion)

    def weigh(group: Group) -> int:
        return sum(matrix_bytes(m.k, m.n, 8 if m.name in int8 else 16) for m in matrices_of[group.name])

    for artifacts, memory in candidates(manifest, program, target, precision, rows, weigh):
        if memory.fits:
            in_int8 = {group: [m.name for m in used if m.name in int8] for group, used in matrices_of.items()}
            return [replace(a, int8=_identity(manifest.int8_key, in_int8[a.group])) for a in artifacts]
    counts = ",".join(map(str, row_counts(artifacts)))
    raise UsageError(
        f"the model does not fit the NPU of {target} at {precision} with rows {counts}: {memory.arithmetic()}; "
        f"try {_alternatives(precision, rows)}"
    )


def _alternatives(precision: str, rows: Sequence[int] | None) -> str:
    options = [] if precision == "w8a8" else ["precision='w8a8'"]
    if precision == "mixed":
        options.append("a larger max_kl=")
    if rows and len(rows) > 1:
        options.append("fewer rows=")
    options.append("or target='none' for the CPU alone")
    return ", ".join(options) + " (rwkv-npu convert --dry-run shows what fits)"


@lru_cache(len(FUSIONS))
def _matrices(spec: Spec, fusion: str) -> dict[str, list[Matrix]]:
    """The matrices of each group. Cached: a conversion plans before and after it chooses int8 projections."""
    program = Program(spec, fusion)
    return {group.name: matrices(trace_group(program, group), spec) for group in program.groups}


def candidates(
    manifest: Manifest,
    program: Program,
    target: str,
    precision: str,
    rows: Sequence[int] | None,
    weigh: Callable[[Group], int],
) -> Iterator[tuple[list[Artifact], MemoryPlan]]:
    """Alternative sets of artifacts with their memory plans, the best first.

    A memory plan includes existing artifacts of the same kind. `weigh` gives the bytes of a group's weights.
    """
    sizes = {group.name: weigh(group) for group in program.groups}
    for counts in [rows] if rows else [BOTH_ROWS, ONE_ROWS]:
        artifacts = [
            Artifact(
                artifact_file(target, group.name, program.fusion, precision, count),
                group.name,
                target,
                precision,
                program.fusion,
                count,
                weight_bytes=sizes[group.name],
            )
            for group in program.groups
            # The head always runs on one row.
            for count in ((1,) if group.role == "head" else counts)
        ]
        yield artifacts, plan_memory(manifest, [*artifacts, *beside(manifest, artifacts)])


def beside(manifest: Manifest, artifacts: Collection[Artifact]) -> list[Artifact]:
    """Existing artifacts that `artifacts` do not replace, of the same target, precision and fusion."""
    kinds = {(a.target, a.precision, a.fusion) for a in artifacts}
    slots = set(map(slot, artifacts))
    alike = [a for a in manifest.artifacts if (a.target, a.precision, a.fusion) in kinds]
    return [artifact for artifact in alike if slot(artifact) not in slots]


def slot(artifact: Artifact) -> tuple[str, str, str, str, int]:
    """The key of an artifact: a bundle holds at most one artifact for each."""
    return artifact.target, artifact.precision, artifact.fusion, artifact.group, artifact.rows


def row_counts(artifacts: Iterable[Artifact]) -> list[int]:
    """Row counts of all groups except the head, which always has one row."""
    return sorted({artifact.rows for artifact in artifacts if artifact.group != "head"})


def _identity(key: str, names: Sequence[str]) -> str:
    """Digest of an artifact's int8 projections and of the key of their parameters. "" without int8."""
    return hashlib.blake2b(json.dumps([key, *names]).encode(), digest_size=8).hexdigest() if names else ""


# -- compiling -------------------------------------------------------------------------------------------


def is_current(artifact: Artifact, planned: Artifact, environment: Environment, verify: bool) -> bool:
    """True if an artifact need not be built again: same int8 choice, same compiler, and verified if required."""
    verified = artifact.error is not None or not verify
    return artifact.int8 == planned.int8 and artifact.toolkit == environment.version and verified


def build_artifacts(
    source: BundleSource,
    planned: Sequence[Artifact],
    environment: Environment,
    *,
    jobs: int | None = None,
    verify: bool = False,
) -> list[Artifact]:
    """Compile the planned artifacts that the manifest lacks. Returns them with the compiler's results filled in.

    Builds run in child processes: `jobs` at a time, or as many as memory and cores allow. With `verify`, each
    child also runs its graph in Rockchip's simulator, which cannot load a finished `.rknn`. Two precisions with the
    same int8 projections share a file.
    """
    known = {slot(artifact) for artifact in source.bundle.manifest.artifacts}
    missing = [artifact for artifact in planned if slot(artifact) not in known]
    finished = []
    for artifact in missing:
        twin = _twin(artifact, source.bundle.manifest.artifacts)
        if twin is not None and is_current(twin, artifact, environment, verify):
            finished.append(replace(twin, precision=artifact.precision))
    shared = set(map(slot, finished))
    inputs: dict[tuple[str, int], GoldenVectors] = {}
    if verify:
        recorded = {rows: golden_vectors(source, rows) for rows in {a.rows for a in missing}}
        inputs = {(a.group, a.rows): recorded[a.rows][a.group] for a in missing}
    groups = {group.name: group for group in source.program.groups}
    parameters = int8_parameters(source.bundle, missing[0].precision) if missing else {}
    builds = [
        Build(source, groups[a.group], a, parameters, inputs.get((a.group, a.rows)))
        for a in missing
        if slot(a) not in shared
    ]
    earlier = [(build, build.finished(environment)) for build in builds]
    finished += [artifact for _, artifact in earlier if artifact]
    waiting = [build for build, artifact in earlier if not artifact]
    with progress("compile", "graph", total=len(planned), initial=len(planned) - len(waiting)) as bar:
        finished += _run_builds(waiting, environment, jobs, bar)
    return finished


def _twin(artifact: Artifact, others: Iterable[Artifact]) -> Artifact | None:
    """An artifact of another int8 precision with the same graph. fp16 and bf16 graphs are never shared."""
    alike = (a for a in others if a.int8 == artifact.int8 and a.precision != artifact.precision)
    return next((a for a in alike if a.int8 and _graph_key(a) == _graph_key(artifact)), None)


def _graph_key(artifact: Artifact) -> tuple[str, str, str, int]:
    return artifact.target, artifact.fusion, artifact.group, artifact.rows


@dataclass
class Build:
    """One artifact to build.

    A finished build has a `.rknn` and a notes file beside it, which survive an interruption. The notes are deleted
    before the compiler starts, because it may replace the `.rknn` and then be killed.
    """

    source: BundleSource
    group: Group
    artifact: Artifact
    parameters: Mapping[str, ProjectionParams]
    verify: GoldenVectors | None = None

    @property
    def out(self) -> Path:
        return self.source.bundle.path / self.artifact.path

    @property
    def notes(self) -> Path:
        return self.out.with_name(self.out.name + ".json")

    @property
    def onnx_path(self) -> Path:
        return self.out.with_suffix(".onnx")

    @cached_property
    def graph(self) -> CompilerGraph:
        return compiler_graph(self.source, self.artifact, self.parameters)

    def finished(self, environment: Environment) -> Artifact | None:
        """The artifact of an earlier, interrupted conversion if it is finished and still current, else None."""
        try:
            artifact = Artifact.from_json(json.loads(self.notes.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        current = is_current(artifact, self.artifact, environment, self.verify is not None)
        return artifact if current and self.out.exists() else None

    def job(self) -> Job:
        ports = self.group.fixed_inputs(self.artifact.rows)
        return Job(
            onnx_path=self.onnx_path,
            out_path=self.out,
            weight_bytes=self.graph.weight_bytes,
            options=self.graph.options,
            verify_inputs={port.name: self.verify.inputs[port.name] for port in ports}
            if self.verify
            else None,
            write_graph=self.write_graph,
        )

    def write_graph(self) -> None:
        """Write the graph for the compiler. Delete the notes of an earlier build first."""
        self.notes.unlink(missing_ok=True)
        self.onnx_path.parent.mkdir(parents=True, exist_ok=True)
        self.onnx_path.write_bytes(self.graph.onnx())

    def complete(self, result: CompileResult) -> Artifact:
        """Add the compiler's results and the verification error to the artifact, and write the notes."""
        error = None
        if self.verify and result.verify_outputs is not None:
            error = relative_error(result.verify_outputs, self.verify.outputs)
        artifact = replace(
            self.artifact,
            cycles=asdict(result.cycles) if result.cycles else {},
            on_cpu=result.cpu_fallback,
            toolkit=result.version,
            error=error,
        )
        write_atomically(self.notes, json.dumps(asdict(artifact)).encode())
        return artifact


def _run_builds(
    builds: Sequence[Build], environment: Environment, jobs: int | None, bar: Progress
) -> Iterator[Artifact]:
    by_path = {build.out: build for build in builds}
    for job, result in compile_many(environment, [build.job() for build in builds], parallel=jobs):
        build = by_path[job.out_path]
        bar.set_postfix_str(f"{build.group.name} m{build.artifact.rows}", refresh=False)
        bar.update()
        yield build.complete(result)


def verify_graphs(bundle: Bundle) -> dict[str, float]:
    """Run the graphs of both fusions in ONNX Runtime. Returns their relative rms errors by file name."""
    errors = {}
    for fusion in FUSIONS:
        source = BundleSource(bundle, fusion, bundle.manifest.cpu)
        recorded = golden_vectors(source, VERIFY_ROWS)
        for group in progress(f"verify graphs, {fusion}", "graph", over=source.program.groups):
            given, expected = recorded[group.name].inputs, recorded[group.name].outputs
            runner = OrtBackend(source).open(group, rows=max(map(len, given.values())))
            for name, array in given.items():
                runner.inputs[name][:] = array
            error = relative_error(runner.run(), expected)
            errors[graph_file(fusion, group.name)] = error
    return errors
