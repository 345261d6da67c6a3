"""The `.rknn` files of a bundle: which of them there have to be, and having them compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rwkv_npu.bundle import Artifact, Manifest, artifact_file
from rwkv_npu.errors import UsageError
from rwkv_npu.files import write_atomically
from rwkv_npu.graphs import trace_group
from rwkv_npu.memory import plan_memory
from rwkv_npu.models.network import Program
from rwkv_npu.sources import BundleSource
from rwkv_npu.spec import Group, tensors
from rwkv_npu.toolkit import CompileResult, Environment, Job, compile_many
from rwkv_npu.verify import record_inputs, reference, relative_error

BOTH_ROWS, ONE_ROWS = (1, 64), (32,)  # what `--rows auto` chooses between


def plan_artifacts(
    manifest: Manifest, program: Program, target: str, precision: str, rows: Sequence[int] | None
) -> list[Artifact]:
    """What has to be built for `target`; `rows` None is `--rows auto`.

    auto: decode and prefill have artifacts of their own where the NPU's memory holds the weights twice, else one
    artifact serves both. Raises UsageError, with the arithmetic, where not even that fits.
    """
    attempts = [rows] if rows else [BOTH_ROWS, ONE_ROWS]
    for attempt in attempts:
        artifacts = [
            _planned(program, group, target, precision, count)
            for group in program.groups
            # The head reads one row at a time.
            for count in ([1] if group.role == "head" else sorted(set(attempt)))
        ]
        memory = plan_memory(manifest, artifacts)
        if memory.fits:
            return artifacts
    raise UsageError(
        f"the model does not fit the NPU of {target} at {precision} with rows "
        f"{','.join(map(str, attempts[-1]))}: {memory.arithmetic()}; use --target none for the CPU alone"
    )


def _planned(program: Program, group: Group, target: str, precision: str, rows: int) -> Artifact:
    path = artifact_file(target, group.name, program.fusion, precision, rows)
    weights = 2 * _projection_elements(program, group)
    return Artifact(path, group.name, target, precision, program.fusion, rows, weight_bytes=weights)


def _projection_elements(program: Program, group: Group) -> int:
    shapes = {tensor.name: tensor.used_shape for tensor in tensors(program.spec)}
    constants = trace_group(program, group).projections.values()
    return sum(prod(shapes[c.name][1:] if c.index is not None else shapes[c.name]) for c in constants)


@dataclass
class Build:
    """An artifact on its way: how to make its graph, and where what is known of it afterwards is kept.

    The `.rknn` and a `.json` beside it survive an interruption; both together are a finished build.
    """

    source: BundleSource
    group: Group
    artifact: Artifact
    verify_inputs: dict[str, np.ndarray] | None = None

    @property
    def out(self) -> Path:
        return self.source.bundle.path / self.artifact.path

    @property
    def notes(self) -> Path:
        return self.out.with_name(self.out.name + ".json")

    def finished(self) -> Artifact | None:
        """The artifact of an earlier, interrupted conversion, if it is there and as much is known as is asked."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        artifact = Artifact(**{**notes, "on_cpu": tuple(notes["on_cpu"])})
        wanted = self.verify_inputs is None or artifact.error is not None
        return artifact if wanted and self.out.exists() else None

    @property
    def graph(self) -> Path:
        return self.out.with_suffix(".onnx")

    def write_graph(self) -> None:
        """Write the graph that the compiler reads."""
        self.graph.parent.mkdir(parents=True, exist_ok=True)
        self.graph.write_bytes(self.source.compiler_onnx(self.group, self.artifact.rows))

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
    in Rockchip's simulator right after it was built, since a loaded `.rknn` cannot be.
    """
    manifest = source.bundle.manifest
    known = {a.path: a for a in manifest.artifacts if a.error is not None or not verify}
    builds = _builds(source, [a for a in planned if a.path not in known], verify)
    done = {build.artifact.path: artifact for build in builds if (artifact := build.finished())}
    waiting = [build for build in builds if build.artifact.path not in done]
    total = len(planned)
    with tqdm(total=total, initial=total - len(waiting), desc="compile", unit="graph", disable=None) as bar:
        for artifact in _run_builds(waiting, environment, jobs, bar):
            done[artifact.path] = artifact
    manifest.artifacts = [a for a in manifest.artifacts if a.path not in done] + list(done.values())
    for build in builds:
        manifest.files.pop(build.artifact.path, None)
        build.notes.unlink()


def _builds(source: BundleSource, artifacts: Sequence[Artifact], verify: bool) -> list[Build]:
    groups = {group.name: group for group in source.program.groups}
    recorded = {rows: record_inputs(source, rows) for rows in {a.rows for a in artifacts}} if verify else {}
    return [
        Build(source, groups[a.group], a, recorded[a.rows][a.group] if verify else None) for a in artifacts
    ]


def _run_builds(
    builds: Sequence[Build], environment: Environment, jobs: int | None, bar: tqdm[Any]
) -> Iterator[Artifact]:
    by_path = {build.out: build for build in builds}
    queue = [
        Job(
            onnx_path=build.graph,
            out_path=build.out,
            weight_bytes=2 * build.artifact.weight_bytes,  # the compiler works in fp32
            options=build.source.compile_options(build.artifact),
            verify_inputs=build.verify_inputs,
            write_graph=build.write_graph,
        )
        for build in builds
    ]
    for job, result in compile_many(environment, queue, parallel=jobs):
        build = by_path[job.out_path]
        error = None
        if build.verify_inputs is not None and result.verify_outputs is not None:
            expected = reference(build.source, build.group, build.verify_inputs)
            error = relative_error(result.verify_outputs, expected)
        bar.set_postfix_str(f"{build.group.name} m{build.artifact.rows}")
        bar.update()
        yield build.complete(result, error)
