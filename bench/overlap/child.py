"""Time a prompt in plain order and in overlapping waves, in this process: `python -m bench.overlap.child REQUEST`.

The NPU is the stand-in with its clock. It computes nothing: outputs are zeros. All else is real: the engine,
`rknn` and its fallback, and the kernels of the recurrence.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, GoldenVectors, allocate_inputs
from rwkv_npu.backends.fallback import Fallback
from rwkv_npu.backends.memory import MemoryPlan
from rwkv_npu.backends.rknn import RknnBackend
from rwkv_npu.backends.rknn_api import CHIP, OVERRIDE
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.kernels.recurrence import compiled
from rwkv_npu.models.network import Program
from rwkv_npu.models.official import official_spec
from rwkv_npu.models.spec import Group, Spec, tensors
from rwkv_npu.runtime.engine import Engine
from tools.board.clock import busy_seconds


class NoHead:
    """The head, which reads one row after the prompt, is left out."""

    name = "none"

    def __init__(self, spec: Spec):
        self._logits = np.zeros((1, spec.V), np.float32)

    def row_counts(self, group: Group) -> None: ...

    def open(self, group: Group, rows: int) -> Any:
        return SimpleNamespace(inputs=allocate_inputs(group, rows), run=lambda: {"logits": self._logits})

    def close(self) -> None: ...


def zeros(program: Program) -> dict[str, GoldenVectors]:
    """Golden vectors of an NPU that returns zeros."""
    return {
        group.name: GoldenVectors(
            {port.name: np.zeros((1, port.width), np.float32) for port in group.inputs},
            {port.name: np.zeros((1, port.width), np.float32) for port in group.outputs},
        )
        for group in program.groups
    }


def open_engine(spec: Spec, folder: Path, rows: int, threads: int) -> Engine:
    program, rng = Program(spec, "layer"), np.random.default_rng(0)
    vectors: dict[str, np.ndarray] = {}
    shapes = {tensor.name: tensor.used_shape for tensor in tensors(spec)}

    def host(name: str) -> np.ndarray:
        if name not in vectors:
            vectors[name] = rng.standard_normal(shapes[name], np.float32)
        return vectors[name]

    golden = zeros(program)
    artifacts = [Artifact("", g.name, CHIP, "fp16", "layer", rows, 0) for g in program.groups]
    source = SimpleNamespace(
        precision=None,
        outdated="",
        artifacts=lambda: artifacts,
        artifact_path=lambda artifact: folder / f"{artifact.group}.rknn",
        memory_plan=lambda chosen: MemoryPlan(0, 0, 0),
    )
    npu, head = RknnBackend(cast(Any, source)), NoHead(spec)
    fallback = Fallback(npu, lambda: golden, lambda: cast(Backend, head), Faults())
    return Engine(
        program,
        host,
        assign=lambda group, decode: cast(Backend, head if group.role == "head" else fallback),
        fingerprint="",
        initial={},
        recurrence=compiled(spec, threads),
    )


def measure(request: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each prompt: the order, the wall time, the busy time of each core, and the time of the CPU's work."""
    path = os.environ[OVERRIDE]
    spec = official_spec(request["model"])
    engine = open_engine(spec, Path(request["folder"]), request["rows"], request["threads"])
    ids = np.random.default_rng(1).integers(1, spec.V, request["tokens"])
    engine.forward(ids)
    found = []
    for number in range(request["repeats"]):
        for order in ("plain", "waves"):
            engine.overlap = order == "waves"
            state = engine.new_state()
            cores, waited, begin = busy_seconds(path), engine.counters.waited_s, time.perf_counter()
            engine.forward(ids, state, inplace=True)
            wall = time.perf_counter() - begin
            found.append(
                {
                    "round": number,
                    "order": order,
                    "wall_s": wall,
                    "cpu_s": wall - (engine.counters.waited_s - waited),
                    "cores_s": [
                        after - before for after, before in zip(busy_seconds(path), cores, strict=True)
                    ],
                }
            )
    assert not engine.counters.faults.calls
    engine.close()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
