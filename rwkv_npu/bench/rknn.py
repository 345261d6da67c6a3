"""Rockchip's NPU: on a board measured with RKNNLite and through the matmul interface, on a PC the compiler's estimate.

An estimate is the compiler's own cycle table for one core at 1 GHz: without the call, without moving operands in and
out, with the DDR at full speed. Boards were seen to need two to three times as long. Its error comes from Rockchip's
simulator.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.backends.npu_matmul import Products
from rwkv_npu.backends.rknn import submit
from rwkv_npu.backends.rknn_api import CORES, FP16, INT8, Library
from rwkv_npu.bench.backends import Operation, moved, plain_graph
from rwkv_npu.bench.problem import Problem
from rwkv_npu.board.hardware import runtime_build, runtime_library, soc
from rwkv_npu.board.npu import LOCK, raise_file_limit
from rwkv_npu.errors import BackendError
from rwkv_npu.toolkit import CompileOptions, CompileResult, Environment, compile_graph, require

CLOCK_HZ = 1e9  # of the NPU: the compiler's cycles are nanoseconds
PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "int8": "w8a8"}
BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
TARGET = "rk3588"

# The compiler's cost model of one RK3588 core, as its tables follow it: operations and bytes a second.
PEAK = {"fp16": 1.024e12, "bf16": 1.024e12, "int8": 2.048e12}
BANDWIDTH = 23.63e9


class Estimate:
    """The compiler's view of a product. `device` says that it is one."""

    def __init__(self, dtype: str, environment: Environment) -> None:
        self.dtype, self.environment = dtype, environment
        self.device = f"{TARGET.upper()} NPU, 1 core: compiler's estimate"
        # Wide sums are cut at 512 or 1024 inputs; the parts are probably added in fp16.
        self.accumulate = "int32" if dtype == "int8" else "fp32, fp16 between parts"
        self.versions = f"rknn-toolkit2 {environment.version}"

    def row(self, problem: Problem) -> dict[str, Any]:
        """Time and error as fields of a Row. Raises ToolkitError."""
        built = compile_product(self.environment, problem, self.dtype, TARGET, verify=True)
        assert built.verify_outputs is not None
        if built.cycles is None:
            raise BackendError("the compiler printed no cycles")
        return {
            "time_s": built.cycles.total / CLOCK_HZ,
            "max_rel_error": problem.error(built.verify_outputs["c"]),
            "npu_ops": npu_ops(built),
            "flags": "cpu-fallback" if built.cpu_fallback else "",
        }


def compile_product(
    environment: Environment,
    problem: Problem,
    dtype: str,
    target: str,
    *,
    verify: bool = False,
    out: Path | None = None,
) -> CompileResult:
    """Compile A @ B; int8 is calibrated on A itself, the best case. The file is kept only if `out` is given."""
    inputs = {"a": problem.a}
    precision = PRECISIONS[dtype]
    options = CompileOptions(
        target=target,
        precision=precision,
        custom_string=json.dumps({"product": f"{problem.m}x{problem.k}x{problem.n}"}),
        calibration=[inputs] if dtype == "int8" else [],
    )
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
        path = Path(folder) / f"matmul.{problem.m}x{problem.k}x{problem.n}.onnx"
        path.write_bytes(plain_graph(problem))
        return compile_graph(
            environment, path, out or path.with_suffix(".rknn"), options, inputs if verify else None
        )


def npu_ops(built: CompileResult) -> int:
    """Operations that take cycles: more than one where the compiler cut the product into tiles."""
    return sum(1 for layer in built.layers if layer.total_cycles)


def _runtime(library: Path | None) -> str:
    build = runtime_build(library) if library else None
    return f"librknnrt {build or 'of no known version'}"


class RknnBackend:
    """RKNNLite on a board. The compiler must be there too: it has wheels for aarch64.

    Its `inference` ignores a failing run, so the three steps are called apart, and timed apart: `submit_s` is
    `rknn_run`, the rest of the time copies A in and C out.
    """

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        from rknnlite.api import RKNNLite

        self._target = soc() or TARGET
        self.dtype, self._environment = dtype, require()
        self.device = f"{self._target.upper()} NPU, core 0"
        self.accumulate = "int32" if dtype == "int8" else "fp32, fp16 between parts"
        self.versions = f"rknn-toolkit2 {self._environment.version}, {_runtime(runtime_library())}"
        self._lite = RKNNLite
        LOCK.acquire()  # for the life of this process

    def prepare(self, problem: Problem) -> Operation:
        with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
            path = Path(folder) / "matmul.rknn"
            built = compile_product(self._environment, problem, self.dtype, self._target, out=path)
            lite = self._lite()
            if lite.load_rknn(str(path)) or lite.init_runtime(core_mask=self._lite.NPU_CORE_0):
                raise BackendError("RKNNLite cannot load what was compiled: see its own messages above")
        runtime, last = lite.rknn_runtime, [np.empty(0)]

        def copy_in() -> None:
            runtime.set_inputs([problem.a], None, None)

        def copy_out() -> None:
            last[0] = runtime.get_outputs(False)[0]

        size = BYTES[self.dtype]
        return Operation(
            [copy_in, partial(submit, runtime), copy_out],
            lambda: last[0].reshape(problem.m, problem.n),
            moved(problem, size, size, size),
            submit=1,
            npu_ops=npu_ops(built),
            close=lite.release,
        )


class RknnMatmulBackend:
    """The matmul interface, columns split over all cores. A call converts A into the NPU's layout, and C out of it."""

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        self._kind, self._library = {"fp16": FP16, "int8": INT8}[dtype], Library()
        raise_file_limit()
        LOCK.acquire()
        self.dtype, self.device = dtype, f"{(soc() or TARGET).upper()} NPU, {len(CORES)} cores"
        self.accumulate = "int32" if dtype == "int8" else "fp32"
        self.versions = _runtime(self._library.path)

    def prepare(self, problem: Problem) -> Operation:
        products, last = Products(self._library, self._kind, CORES, own=True), [np.empty(0)]
        try:
            weight = products.weight("b", problem.b, (problem.m,))
        except BackendError:
            products.close()
            raise

        def multiply() -> None:
            last[0] = products.multiply(problem.a, weight)

        size = BYTES[self.dtype]
        return Operation(
            [multiply], lambda: last[0], moved(problem, size, size, 4), submit=None, close=products.close
        )
