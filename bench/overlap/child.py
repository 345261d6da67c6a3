"""Time a prompt in plain order and in overlapping waves, in this process: `python -m bench.overlap.child REQUEST`.

The NPU is the stand-in with its clock, called through its C interface. It computes nothing: outputs are zeros. All else
is real: the engine, the recurrence's kernels, copies of inputs and outputs, checks of the fallback.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, GoldenVectors, allocate_inputs
from rwkv_npu.backends.fallback import Fallback
from rwkv_npu.backends.rknn import CORES, THREADS_A_CORE
from rwkv_npu.backends.rknn_api import OVERRIDE
from rwkv_npu.kernels.recurrence import compiled
from rwkv_npu.models.network import Program
from rwkv_npu.models.official import official_spec
from rwkv_npu.models.spec import Group, Spec, tensors
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.toolkit import rknn_info
from tools.board.clock import busy_seconds

FLOAT32 = 0


class Input(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_uint32),
        ("buf", ctypes.c_void_p),
        ("size", ctypes.c_uint32),
        ("pass_through", ctypes.c_uint8),
        ("type", ctypes.c_int32),
        ("fmt", ctypes.c_int32),
    ]


class Output(ctypes.Structure):
    _fields_ = [
        ("want_float", ctypes.c_uint8),
        ("is_prealloc", ctypes.c_uint8),
        ("index", ctypes.c_uint32),
        ("buf", ctypes.c_void_p),
        ("size", ctypes.c_uint32),
    ]


class StandInRunner:
    """A context of the stand-in, on one core."""

    def __init__(self, library: Any, path: Path, group: Group, rows: int, mask: int):
        data = path.read_bytes()
        self._library, self._context = library, ctypes.c_uint64()
        assert library.rknn_init(ctypes.byref(self._context), data, len(data), 0, None) == 0
        assert library.rknn_set_core_mask(self._context, mask) == 0
        self.inputs = allocate_inputs(group, rows)
        self._outputs = {port.name: np.zeros((rows, port.width), np.float32) for port in group.outputs}
        given = [self.inputs[port["name"]] for port in rknn_info(path)["inputs"]]
        self._given = (Input * len(given))(
            *(Input(i, a.ctypes.data, a.nbytes, 0, FLOAT32, 0) for i, a in enumerate(given))
        )
        taken = self._outputs.values()
        self._taken = (Output * len(taken))(
            *(Output(1, 1, i, a.ctypes.data, a.nbytes) for i, a in enumerate(taken))
        )

    def run(self) -> Mapping[str, np.ndarray]:
        library, context = self._library, self._context
        assert library.rknn_inputs_set(context, len(self._given), self._given) == 0
        assert library.rknn_run(context, None) == 0
        assert library.rknn_outputs_get(context, len(self._taken), self._taken, None) == 0
        return self._outputs


class StandIn:
    """Contexts dealt over the cores by layer, as `rknn` deals them."""

    name, masks = "stand-in", CORES["0,1,2"]

    def __init__(self, library: Any, folder: Path, rows: int):
        self._library, self._folder, self._rows = library, folder, rows

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return (self._rows,)

    def queue(self, group: Group) -> int:
        return group.layer % (THREADS_A_CORE * len(self.masks))

    def open(self, group: Group, rows: int) -> StandInRunner:
        path = self._folder / f"{group.name}.rknn"
        return StandInRunner(self._library, path, group, rows, self.masks[group.layer % len(self.masks)])

    def close(self) -> None: ...


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


def open_engine(spec: Spec, library: Any, folder: Path, rows: int, threads: int) -> Engine:
    program, rng = Program(spec, "layer"), np.random.default_rng(0)
    vectors: dict[str, np.ndarray] = {}
    shapes = {tensor.name: tensor.used_shape for tensor in tensors(spec)}

    def host(name: str) -> np.ndarray:
        if name not in vectors:
            vectors[name] = rng.standard_normal(shapes[name], np.float32)
        return vectors[name]

    golden = zeros(program)
    npu, head = StandIn(library, folder, rows), NoHead(spec)
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
    """A row for each prompt: the order, and seconds of the wall, of each core, and in which the CPU had work."""
    path = os.environ[OVERRIDE]
    spec, library = official_spec(request["model"]), ctypes.CDLL(path)
    engine = open_engine(spec, library, Path(request["folder"]), request["rows"], request["threads"])
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
