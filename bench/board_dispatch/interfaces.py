"""Compare the CPU time around a call of the NPU: RKNNLite's calls, and librknnrt's own interface with NPU memory.

    RWKV_NPU_RKNNRT=librknnrt.so RKNN_STANDIN_NULL=1 python -m bench.board_dispatch.interfaces ARTIFACT

ARTIFACT has the inputs and outputs of v7's group `mid`. The stand-in returns at once. Where librknnrt copies and
converts, the stand-in only copies, so the first way takes longer on a board. Each way fills the inputs from fp32
arrays, runs, checks that every output is finite, and converts the outputs for the recurrence to fp32. Prints
microseconds of CPU time: the median of rounds in which both ways alternate.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu import kernels
from rwkv_npu.backends.rknn_api import Networks
from rwkv_npu.backends.rknn_context import Context, ContextRunner
from rwkv_npu.models.maths import largest_magnitude
from rwkv_npu.models.spec import Group, Port
from rwkv_npu.toolkit import rknn_info

ROUNDS, CALLS = 30, 10
RECURRENT = ("r", "w", "k", "v", "a", "g", "vmix")
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


def by_calls(path: Path, given: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Callable[[], None]:
    """The calls that RKNNLite makes, on one context: fp32 in and out, copied on both sides."""
    networks = Networks()
    library, content, context = networks._library, path.read_bytes(), ctypes.c_uint64()
    assert networks.init(ctypes.byref(context), content, len(content), 0, None) == 0
    arrays = {name: np.empty_like(array) for name, array in given.items()}
    ins, outs = (Input * len(given))(), (Output * len(outputs))()
    for index, array in enumerate(arrays.values()):
        ins[index] = Input(index, array.ctypes.data, array.nbytes, 0, FLOAT32, 3)

    def call() -> None:
        for name, array in given.items():
            arrays[name][...] = array
        assert library.rknn_inputs_set(context, len(ins), ins) == 0
        assert networks.run(context, None) == 0
        for index in range(len(outs)):
            outs[index] = Output(1, 0, index, None, 0)
        assert library.rknn_outputs_get(context, len(outs), outs, None) == 0
        for out, target in zip(outs, outputs.values(), strict=True):
            ctypes.memmove(target.ctypes.data, out.buf, target.nbytes)
        library.rknn_outputs_release(context, len(outs), outs)
        for array in outputs.values():
            largest_magnitude(array)

    return call


def by_memory(path: Path, group: Group, rows: int, given: dict[str, np.ndarray]) -> Callable[[], None]:
    """This project's runner: fp16 memory of the NPU, and fp32 copies for the recurrence."""
    runner = ContextRunner(Context.open(Networks(), path.read_bytes()), group, rows)
    widen = kernels.load("halves").widen
    wide = {
        port.name: np.empty((rows, port.width), np.float32)
        for port in group.outputs
        if port.name in RECURRENT
    }

    def call() -> None:
        runner.load(given)
        outputs = runner.run()
        for array in outputs.values():
            largest_magnitude(array)
        for name, target in wide.items():
            widen(outputs[name], target)

    return call


def main(path: Path) -> dict[str, Any]:
    info = rknn_info(path)
    rows = info["outputs"][0]["shape"][0]
    inputs, outs = (tuple(Port(p["name"], p["shape"][1]) for p in info[key]) for key in ("inputs", "outputs"))
    group, rng = Group("mid", 0, inputs, outs), np.random.default_rng(0)
    given = {port.name: rng.standard_normal((rows, port.width), np.float32) for port in inputs}
    given["x"] = given["x"].astype(np.float16).astype(np.float32)
    outputs = {port.name: np.empty((rows, port.width), np.float32) for port in outs}
    fp16 = {**given, "x": given["x"].astype(np.float16)}  # it is an output of the layer before
    ways = {"calls": by_calls(path, given, outputs), "memory": by_memory(path, group, rows, fp16)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, call in ways.items():
            begin = time.thread_time()
            for _ in range(CALLS):
                call()
            if number:  # the first round warms up
                times[name].append(1e6 * (time.thread_time() - begin) / CALLS)
    found = {name: statistics.median(values) for name, values in times.items()}
    ratios = [new / old for old, new in zip(times["calls"], times["memory"], strict=True)]
    low, middle, high = (float(value) for value in np.quantile(ratios, (0.1, 0.5, 0.9)))
    return {
        "rows": rows,
        "D": max(port.width for port in inputs),
        **found,
        "ratio": middle,
        "p10": low,
        "p90": high,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
