"""The backends of `bench matmul`: one short class each. A child process imports the library that it needs.

A backend is created for a dtype and a number of threads, and describes itself (`device`, `accumulate`, `versions`).
`prepare(problem)` converts the operands, allocates the result if the library allows it, and returns an Operation. Only
the Operation's stages are timed. B is constant, like the weights of a model: ONNX Runtime and the NPU may pack it in
advance, NumPy and PyTorch take it as it is.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_npu.backends.npu_matmul import Products
from rwkv_npu.backends.rknn import submit
from rwkv_npu.backends.rknn_api import CORES, FP16, INT8, Library
from rwkv_npu.bench.products import Problem, Stage
from rwkv_npu.board.hardware import cpu_model, runtime_build, runtime_library, soc
from rwkv_npu.board.npu import LOCK, raise_file_limit
from rwkv_npu.errors import BackendError, first_line
from rwkv_npu.runtime import rk3588
from rwkv_npu.toolkit import CompileOptions, CompileResult, Environment, compile_graph, require


@dataclass(frozen=True)
class Operation:
    """A product that is ready to be timed.

    moved_bytes: of A, B and C in the backend's dtypes. submit: index of the stage that submits the work, if there is
    one. npu_ops: number of operations that the compiler splits the product into.
    """

    stages: Sequence[Stage]
    result: Callable[[], np.ndarray]
    moved_bytes: float
    submit: int | None = None
    npu_ops: int | None = None
    close: Callable[[], None] = lambda: None


class Backend(Protocol):
    dtype: str
    device: str
    accumulate: str
    versions: str

    def prepare(self, problem: Problem) -> Operation: ...


class NumpyBackend:
    """fp32 by NumPy's BLAS. fp16 has no BLAS and runs as a plain loop."""

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        configuration: Any = np.show_config(mode="dicts")
        blas = configuration["Build Dependencies"]["blas"]
        self.dtype, self.device, self.accumulate = dtype, f"CPU ({cpu_model()})", "fp32"
        name = f"{blas.get('name', 'unknown BLAS')} {blas.get('version', '')}".strip()
        self.versions = f"numpy {np.__version__}, {name}{_kernels()}"
        self._type = {"fp32": np.float32, "fp16": np.float16}[dtype]

    def prepare(self, problem: Problem) -> Operation:
        a, b = problem.a.astype(self._type), problem.b.astype(self._type)
        c = np.empty((problem.m, problem.n), self._type)
        size = c.itemsize
        return Operation([lambda: np.matmul(a, b, out=c)], lambda: c, problem.moved(size, size, size))


def _kernels() -> str:
    """The processor type of the BLAS kernels, "" if threadpoolctl is not installed.

    Kernels for an older processor can halve the speed.
    """
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return ""
    names = {str(pool["architecture"]) for pool in threadpool_info() if pool.get("architecture")}
    return f" ({'/'.join(sorted(names))} kernels)" if names else ""


class TorchBackend:
    def __init__(self, dtype: str, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self.dtype, self.device, self.accumulate = dtype, f"CPU ({cpu_model()})", "fp32"
        self.versions = f"torch {torch.__version__}"
        self._torch = torch
        self._type = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]

    def prepare(self, problem: Problem) -> Operation:
        torch = self._torch
        a, b = torch.from_numpy(problem.a).to(self._type), torch.from_numpy(problem.b).to(self._type)
        c = torch.empty((problem.m, problem.n), dtype=self._type)
        size = c.element_size()

        def multiply() -> None:
            with torch.inference_mode():
                torch.mm(a, b, out=c)

        return Operation([multiply], lambda: c.float().numpy(), problem.moved(size, size, size))


class TinygradBackend:
    """Device `cpu` (compiled by clang) or `opencl` (the first platform's GPU, else its other device)."""

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        os.environ["NUM_CPU_THREADS"] = str(threads)  # read on import
        from tinygrad import Device, dtypes

        self._name = {"cpu": "CPU", "opencl": "CL"}[device]
        try:
            opened: Any = Device[self._name]
        except Exception as error:  # AttributeError without the library, FileNotFoundError without clang
            raise BackendError(f"tinygrad cannot open {device}: {first_line(error)}") from error
        chip = getattr(opened, "device_name", None)
        self.device = f"OpenCL ({chip})" if device == "opencl" else f"CPU ({cpu_model()})"
        driver = f", OpenCL driver {opened.driver_version}" if device == "opencl" else ""
        self.dtype, self.accumulate = dtype, "fp32"
        self.versions = f"tinygrad {importlib.metadata.version('tinygrad')}{driver}"
        self._opened, self._type = opened, {"fp32": dtypes.float32, "fp16": dtypes.float16}[dtype]

    def prepare(self, problem: Problem) -> Operation:
        from tinygrad import Tensor, TinyJit

        def tensor(array: np.ndarray) -> Any:
            return Tensor(array, device=self._name).cast(self._type).contiguous().realize()

        multiply = TinyJit(lambda a, b: (a @ b).realize())
        a, b, last = tensor(problem.a), tensor(problem.b), [None]

        def submit() -> None:
            last[0] = multiply(a, b)

        for _ in range(3):  # the first call runs, the second records, the third replays
            submit()
        self._opened.synchronize()
        size = self._type.itemsize
        return Operation(
            [submit, self._opened.synchronize],
            lambda: last[0].float().numpy(),  # type: ignore[attr-defined]
            problem.moved(size, size, size),
            submit=0,
        )


class OrtBackend:
    """fp32. int8: A is quantised in the call, B in advance. int4: only B, in blocks of 32; A becomes int8 inside."""

    BLOCK = 32

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        import onnxruntime as ort

        ort.set_default_logger_severity(3)
        self.dtype, self.device = dtype, f"CPU ({cpu_model()})"
        self.accumulate = {"fp32": "fp32", "int8": "int32", "int4": "int32+fp32"}[dtype]
        self.versions = f"onnxruntime {ort.__version__}"
        self._ort, self._options = ort, ort.SessionOptions()
        self._options.intra_op_num_threads = threads

    def prepare(self, problem: Problem) -> Operation:
        graph = {"fp32": plain_graph, "int8": int8_graph, "int4": int4_graph}[self.dtype](problem)
        session = self._ort.InferenceSession(graph, self._options, providers=["CPUExecutionProvider"])
        c = np.empty((problem.m, problem.n), np.float32)
        binding = session.io_binding()
        value = self._ort.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("a", value(problem.a))
        output = value(c)
        binding.bind_ortvalue_output("c", output)
        weight = {"fp32": 4, "int8": 1, "int4": 0.5 + 4 / self.BLOCK}[self.dtype]
        return Operation(
            [lambda: session.run_with_iobinding(binding)], output.numpy, problem.moved(4, weight, 4)
        )


def plain_graph(problem: Problem) -> bytes:
    """C = A @ B in fp32 with B as a constant, for ONNX Runtime and for Rockchip's compiler."""
    from onnx import helper

    return _graph(problem, [helper.make_node("MatMul", ["a", "b"], ["c"], name="c")], {"b": problem.b})


def int8_graph(problem: Problem) -> bytes:
    """A is quantised in the graph (one scale for each call), B in advance (a scale for each column). Sums are int32.

    B has 7 bits. Without VNNI, ONNX Runtime adds two uint8 x int8 products in int16, which saturates with 8 bits: the
    result would be wrong on such processors. ONNX Runtime's documentation gives the same advice (`reduce_range`).
    """
    from onnx import TensorProto, helper

    scale = np.maximum(np.abs(problem.b).max(axis=0), 1e-30) / 63  # (N,): 2 * 255 * 63 fits int16
    weight = np.rint(problem.b / scale).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["a"], ["aq", "a_scale", "a_zero"]),
        helper.make_node("MatMulInteger", ["aq", "b", "a_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a_scale", "b_scale"], ["scale"]),
        helper.make_node("Mul", ["floats", "scale"], ["c"]),
    ]
    return _graph(problem, nodes, {"b": weight, "b_scale": scale.astype(np.float32)})


def int4_graph(problem: Problem) -> bytes:
    """ONNX Runtime's MatMulNBits: B as (N, blocks, bytes of a block), low nibble first, 8 represents zero."""
    from onnx import helper

    block, k, n = OrtBackend.BLOCK, problem.k, problem.n
    blocks = -(-k // block)
    padded = np.zeros((blocks * block, n), np.float32)
    padded[:k] = problem.b
    columns = padded.T.reshape(n, blocks, block)
    scale = np.maximum(np.abs(columns).max(axis=2), 1e-30) / 7
    levels = (np.clip(np.rint(columns / scale[..., None]), -8, 7) + 8).astype(np.uint8)
    packed = levels[..., 0::2] | (levels[..., 1::2] << 4)
    node = helper.make_node("MatMulNBits", ["a", "b", "b_scale"], ["c"], domain="com.microsoft")
    for name, value in {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 4}.items():
        node.attribute.append(helper.make_attribute(name, value))
    return _graph(problem, [node], {"b": packed, "b_scale": scale.astype(np.float32).reshape(-1)})


def _graph(problem: Problem, nodes: list[Any], constants: dict[str, np.ndarray]) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    from rwkv_npu.graphs.onnx import IR_VERSION, OPSET

    if sum(array.nbytes for array in constants.values()) > 2**31 - 4096:
        raise BackendError("B does not fit in an ONNX graph, whose limit is 2.1 GB")
    proto = helper.make_graph(
        nodes,
        "matmul",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [problem.m, problem.k])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [problem.m, problem.n])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rwkv_npu")
    return bytes(model.SerializeToString())


# -- Rockchip's NPU --------------------------------------------------------------------------------------

PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "int8": "w8a8"}  # dtype -> the compiler's name
BYTES = {"fp16": 2, "bf16": 2, "int8": 1}


def compile_product(
    environment: Environment,
    problem: Problem,
    dtype: str,
    target: str,
    *,
    verify: bool = False,
    out: Path | None = None,
) -> CompileResult:
    """Compile A @ B. int8 is calibrated on A itself, the best case. With `out`, the file is kept there."""
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
    """Number of operations that take cycles: more than one if the compiler split the product into tiles."""
    return sum(1 for layer in built.layers if layer.total_cycles)


def _runtime(library: Path | None) -> str:
    build = runtime_build(library) if library else None
    return f"librknnrt {build or '(unknown version)'}"


class RknnBackend:
    """RKNNLite on a board. Also needs the compiler there, which has wheels for aarch64.

    RKNNLite's `inference` ignores a failed run. So its three steps are called and timed separately: `submit_s` is
    `rknn_run`; the other two copy A in and C out.
    """

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        from rknnlite.api import RKNNLite

        self._target = soc() or rk3588.NAME
        self.dtype, self._environment = dtype, require()
        self.device = f"{self._target.upper()} NPU, core 0"
        self.accumulate = "int32" if dtype == "int8" else "fp32, fp16 between parts"
        self.versions = f"rknn-toolkit2 {self._environment.version}, {_runtime(runtime_library())}"
        self._lite = RKNNLite
        LOCK.acquire()  # until this process ends

    def prepare(self, problem: Problem) -> Operation:
        with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
            path = Path(folder) / "matmul.rknn"
            built = compile_product(self._environment, problem, self.dtype, self._target, out=path)
            lite = self._lite()
            if lite.load_rknn(str(path)) or lite.init_runtime(core_mask=self._lite.NPU_CORE_0):
                raise BackendError("RKNNLite cannot load the compiled file: see its messages above")
        runtime, last = lite.rknn_runtime, [np.empty(0)]

        def copy_in() -> None:
            runtime.set_inputs([problem.a], None, None)

        def copy_out() -> None:
            last[0] = runtime.get_outputs(False)[0]

        size = BYTES[self.dtype]
        return Operation(
            [copy_in, partial(submit, runtime), copy_out],
            lambda: last[0].reshape(problem.m, problem.n),
            problem.moved(size, size, size),
            submit=1,
            npu_ops=npu_ops(built),
            close=lite.release,
        )


class RknnMatmulBackend:
    """The matmul interface, with columns split over all cores. Each call converts A to the NPU's layout, and C back."""

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        self._kind, self._library = {"fp16": FP16, "int8": INT8}[dtype], Library()
        raise_file_limit()
        LOCK.acquire()
        self.dtype, self.device = dtype, f"{(soc() or rk3588.NAME).upper()} NPU, {len(CORES)} cores"
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
            [multiply], lambda: last[0], problem.moved(size, size, 4), submit=None, close=products.close
        )


BACKENDS: dict[str, type] = {
    "numpy": NumpyBackend,
    "torch": TorchBackend,
    "tinygrad": TinygradBackend,
    "ort": OrtBackend,
    "rknn": RknnBackend,
    "rknn-matmul": RknnMatmulBackend,
}
