"""Rockchip's simulator on a PC: it computes the results of the compiled graphs, slowly.

The simulator cannot load a `.rknn` file. Every graph is therefore built again from the bundle, with the options of its
artifact, in a child process.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.backends.rknn_graph import BundleModel, compiler_graph, int8_parameters
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Group
from rwkv_npu.progress import progress
from rwkv_npu.toolkit import Job, Simulator, available_memory, require

SHARE = 0.8  # the part of the available memory that all simulators together may use


class CompiledSource(BundleModel, Source, Protocol):
    """A model with artifacts."""

    @property
    def outdated(self) -> str: ...

    def artifacts(self) -> list[Artifact]: ...


class SimulatorRunner:
    """Runs one group on its simulator."""

    def __init__(self, simulator: Simulator, group: Group, rows: int):
        self._simulator = simulator
        self.inputs = allocate_inputs(group, rows)
        self._given = {port.name: self.inputs[port.name] for port in group.fixed_inputs(rows)}

    def run(self) -> Mapping[str, np.ndarray]:
        return self._simulator.run(self._given)


class RknnSimBackend:
    """Simulators of all artifacts of one target and precision. Building them takes most of the time."""

    name = "rknn-sim"

    def __init__(self, source: CompiledSource, *, threads: int | None = None):
        if source.outdated:
            raise BackendError(source.outdated)
        artifacts = source.artifacts()
        if not artifacts:
            raise BackendError(
                "rknn-sim simulates a bundle's artifacts, and there are none of this precision and fusion: "
                "convert the checkpoint for them first"
            )
        chosen = artifacts[0].target, artifacts[0].precision
        if len({a.target for a in artifacts}) > 1:
            warnings.warn(f"artifacts for several targets: simulating those for {chosen[0]}", stacklevel=3)
        parameters = int8_parameters(source.bundle, chosen[1])
        self._graphs = {
            (a.group, a.rows): compiler_graph(source, a, parameters)
            for a in artifacts
            if (a.target, a.precision) == chosen
        }
        self._environment = require()
        self._simulators: dict[tuple[str, int], Simulator] = {}
        _check_memory([graph.weight_bytes for graph in self._graphs.values()])
        self._bar = progress("build simulators", "graph", total=len(self._graphs))

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return tuple(sorted(rows for name, rows in self._graphs if name == group.name))

    def open(self, group: Group, rows: int) -> SimulatorRunner:
        key = group.name, rows
        if key not in self._graphs:
            raise BackendError(f"there is no artifact of {group.name} for {rows} rows")
        if key not in self._simulators:
            self._simulators[key] = self._build(group, rows)
            self._bar.update()
            if len(self._simulators) == len(self._graphs):
                self._bar.close()
        return SimulatorRunner(self._simulators[key], group, rows)

    def close(self) -> None:
        self._bar.close()
        while self._simulators:
            self._simulators.popitem()[1].close()

    def _build(self, group: Group, rows: int) -> Simulator:
        self._bar.set_postfix_str(f"{group.name} m{rows}", refresh=False)
        graph = self._graphs[group.name, rows]
        with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
            path = Path(folder) / f"{group.name}.onnx"
            path.write_bytes(graph.onnx())
            return Simulator(self._environment, path, graph.options)


def _check_memory(weights: list[int]) -> None:
    """Raises BackendError if the simulators need more memory than is available. weights: bytes for each simulator."""
    jobs = [Job(Path(), Path(), size) for size in weights]
    needed, available = sum(job.simulator_rss for job in jobs), int(SHARE * available_memory())
    if needed > available:
        raise BackendError(
            f"simulating {len(jobs)} artifacts takes about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} "
            "GB are available: convert with one row count, such as 32, or use another backend"
        )
