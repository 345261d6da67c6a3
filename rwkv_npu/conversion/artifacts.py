"""The `.rknn` files of a bundle: which of them there have to be, and having them compiled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rwkv_npu.backends.base import Recorded, relative_error
from rwkv_npu.backends.memory import MemoryPlan, matrix_bytes, plan_memory
from rwkv_npu.backends.ort import OrtBackend
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import MANIFEST, Artifact, Bundle, Manifest, artifact_file, graph_file
from rwkv_npu.formats.files import write_atomically
from rwkv_npu.graphs.trace import matrices, trace_group
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Group
from rwkv_npu.progress import Progress, progress
from rwkv_npu.runtime.selftest import record
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.toolkit import CompileResult, Environment, Job, compile_many

VERIFY_ROWS = 16
BOTH_ROWS, ONE_ROWS = (1, 64), (32,)  # what `--rows auto` chooses between


def plan_artifacts(
    manifest: Manifest,
    program: Program,
    target: str,
    precision: str,
    rows: Sequence[int] | None,
    int8: Collection[str] = (),
) -> list[Artifact]:
    """What there has to be for `target`; `rows` None is `--rows auto`, and what the bundle has already counts. `int8`
    names the projections of which an element takes one byte.

    auto: decode and prefill have artifacts of their own where the NPU's memory holds the weights twice, else one
    artifact serves both. Raises UsageError, with the arithmetic, where not even that fits.
    """
    traces = {group.name: trace_group(program, group) for group in program.groups}
    chosen = {name: [one for one in trace.projections if one in int8] for name, trace in traces.items()}

    def weigh(group: Group) -> int:
        found = matrices(traces[group.name], program.spec)
        return sum(matrix_bytes(one.k, one.n, 8 if one.name in int8 else 16) for one in found)

    for artifacts, memory in candidates(manifest, program, target, precision, rows, weigh):
        if memory.fits:
            return [replace(a, int8=_identity(manifest.int8_key, chosen[a.group])) for a in artifacts]
    counts = ",".join(map(str, row_counts(artifacts)))
    raise UsageError(
        f"the model does not fit the NPU of {target} at {precision} with rows {counts}: {memory.arithmetic()}; "
        f"try {_ways_out(precision, rows)}"
    )


def _ways_out(precision: str, rows: Sequence[int] | None) -> str:
    ways = {"w8a8": [], "mixed": ["--precision w8a8", "a larger --max-kl"]}.get(
        precision, ["--precision w8a8"]
    )
    if rows and len(rows) > 1:
        ways.append("fewer --rows")
    return ", ".join([*ways, "or --target none for the CPU alone"]) + " (--dry-run says what fits)"


def candidates(
    manifest: Manifest,
    program: Program,
    target: str,
    precision: str,
    rows: Sequence[int] | None,
    weigh: Callable[[Group], int],
) -> Iterator[tuple[list[Artifact], MemoryPlan]]:
    """Sets of artifacts, the best first, each with what it and those of its kind that are there take of the NPU's
    memory. `weigh` gives the bytes of a group's weights."""
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
            # The head reads one row at a time.
            for count in ((1,) if group.role == "head" else counts)
        ]
        yield artifacts, plan_memory(manifest, [*artifacts, *beside(manifest, artifacts)])


def beside(manifest: Manifest, artifacts: Collection[Artifact]) -> list[Artifact]:
    """What a bundle has already of the kinds of `artifacts`, and keeps beside them."""
    kinds = {(a.target, a.precision, a.fusion) for a in artifacts}
    paths = {artifact.path for artifact in artifacts}
    there = [a for a in manifest.artifacts if (a.target, a.precision, a.fusion) in kinds]
    return [artifact for artifact in there if artifact.path not in paths]


def row_counts(artifacts: Iterable[Artifact]) -> list[int]:
    """Those of the groups that are built for several, the head's one apart."""
    return sorted({artifact.rows for artifact in artifacts if artifact.group != "head"})


def _identity(key: str, names: Sequence[str]) -> str:
    """Of what is in int8, and of what its ranges follow from."""
    return hashlib.blake2b(json.dumps([key, *names]).encode(), digest_size=8).hexdigest() if names else ""


@dataclass
class Build:
    """An artifact on its way: how to make its graph, and where what is known of it afterwards is kept.

    The `.rknn` and a `.json` beside it survive an interruption; both together are a finished build. So notes go before
    the compiler starts: it may replace the `.rknn`, and be killed before there are notes of the new one.
    """

    source: BundleSource
    group: Group
    artifact: Artifact
    verify: Recorded | None = None

    @property
    def out(self) -> Path:
        return self.source.bundle.path / self.artifact.path

    @property
    def notes(self) -> Path:
        return self.out.with_name(self.out.name + ".json")

    def noted(self, environment: Environment) -> Artifact | None:
        """The artifact of an earlier, interrupted conversion, if it is there and as much is known as is asked."""
        try:
            artifact = Artifact.from_json(json.loads(self.notes.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = artifact.int8 == self.artifact.int8
        good = same and self.out.exists() and _enough(artifact, environment, self.verify is not None)
        return artifact if good else None

    @property
    def graph(self) -> Path:
        return self.out.with_suffix(".onnx")

    def write_graph(self) -> None:
        """Write the graph that the compiler reads, which makes what was noted of an earlier build untrue."""
        self.notes.unlink(missing_ok=True)
        self.graph.parent.mkdir(parents=True, exist_ok=True)
        self.graph.write_bytes(self.source.compiler_onnx(self.artifact))

    def complete(self, result: CompileResult, error: float | None) -> Artifact:
        """Write down what the compiler and the verification said."""
        artifact = replace(
            self.artifact,
            cycles=asdict(result.cycles) if result.cycles else {},
            on_cpu=result.cpu_fallback,
            toolkit=result.version,
            error=error,
        )
        write_atomically(self.notes, json.dumps(asdict(artifact)).encode())
        return artifact


def build_artifacts(
    source: BundleSource,
    planned: Sequence[Artifact],
    environment: Environment,
    *,
    jobs: int | None = None,
    verify: bool = False,
) -> None:
    """Compile what the bundle's manifest lacks of `planned` and add it to the manifest.

    Builds run in child processes, `jobs` at a time or as many as memory and cores allow. With `verify` each is run
    in Rockchip's simulator right after it was built, since a loaded `.rknn` cannot be. An artifact of another
    version of the compiler than `environment`'s is built again.
    """
    bundle, manifest = source.bundle, source.bundle.manifest
    wanted = {artifact.path: artifact.int8 for artifact in planned}
    stale = {
        a.path
        for a in manifest.artifacts
        if a.path in wanted and not (a.int8 == wanted[a.path] and _enough(a, environment, verify))
    }
    if stale:  # they leave the manifest before they are replaced, in case of a kill
        manifest.artifacts = [a for a in manifest.artifacts if a.path not in stale]
        manifest.files = {name: record for name, record in manifest.files.items() if name not in stale}
        write_atomically(bundle.path / MANIFEST, manifest.to_json().encode())
    there = {artifact.path for artifact in manifest.artifacts}
    builds = _builds(source, [a for a in planned if a.path not in there], verify)
    finished = [(build, build.noted(environment)) for build in builds]
    manifest.artifacts += [artifact for _, artifact in finished if artifact]
    waiting = [build for build, artifact in finished if not artifact]
    total = len(planned)
    with progress("compile", "graph", total=total, initial=total - len(waiting)) as bar:
        manifest.artifacts += _run_builds(waiting, environment, jobs, bar)


def _enough(artifact: Artifact, environment: Environment, verify: bool) -> bool:
    """Whether an artifact need not be built again: of this compiler, and verified if that is asked."""
    return artifact.toolkit == environment.version and (artifact.error is not None or not verify)


def _builds(source: BundleSource, artifacts: Sequence[Artifact], verify: bool) -> list[Build]:
    groups = {group.name: group for group in source.program.groups}
    recorded = {rows: record(source, rows) for rows in {a.rows for a in artifacts}} if verify else {}
    return [
        Build(source, groups[a.group], a, recorded[a.rows][a.group] if verify else None) for a in artifacts
    ]


def _run_builds(
    builds: Sequence[Build], environment: Environment, jobs: int | None, bar: Progress
) -> Iterator[Artifact]:
    by_path = {build.out: build for build in builds}
    queue = [
        Job(
            onnx_path=build.graph,
            out_path=build.out,
            weight_bytes=build.source.compiler_bytes(build.artifact),
            options=build.source.compile_options(build.artifact),
            verify_inputs=build.verify.inputs if build.verify else None,
            write_graph=build.write_graph,
        )
        for build in builds
    ]
    for job, result in compile_many(environment, queue, parallel=jobs):
        build = by_path[job.out_path]
        error = None
        if build.verify and result.verify_outputs is not None:
            error = relative_error(result.verify_outputs, build.verify.outputs)
        bar.set_postfix_str(f"{build.group.name} m{build.artifact.rows}", refresh=False)
        bar.update()
        yield build.complete(result, error)


def verify_graphs(bundle: Bundle) -> None:
    """Run the graphs of both fusions in ONNX Runtime; the errors go into the manifest, by file name."""
    for fusion in FUSIONS:
        source = BundleSource(bundle, fusion, bundle.manifest.cpu)
        recorded = record(source, VERIFY_ROWS)
        for group in progress(f"verify graphs, {fusion}", "graph", over=source.program.groups):
            given, expected = recorded[group.name].inputs, recorded[group.name].outputs
            runner = OrtBackend(source).open(group, rows=max(map(len, given.values())))
            for name, array in given.items():
                runner.inputs[name][:] = array
            error = relative_error(runner.run(), expected)
            bundle.manifest.graph_errors[graph_file(fusion, group.name)] = error
