"""Who multiplies on the CPU (and through OpenCL): one short class each, imported when a child process opens it.

A backend is made for a dtype and a number of threads, and says what it is (`device`, `accumulate`, `versions`).
`prepare(problem)` makes an Operation: operands converted and in place, the result's memory allocated where the
library lets it be. Only its stages are timed. B is constant, as a model's weights are: ONNX Runtime and the NPU may
pack it beforehand, NumPy and PyTorch get it as it is.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rwkv_npu.bench.problem import Problem
from rwkv_npu.bench.timing import Stage
from rwkv_npu.board.hardware import cpu_model
from rwkv_npu.errors import BackendError, first_line

DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Operation:
    """A product ready to be timed. `moved_bytes`: A, B and C once each, as the backend holds them."""

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


def moved(problem: Problem, a: float, b: float, c: float) -> float:
    """Bytes of A, B and C, given those of an element."""
    m, k, n = problem.m, problem.k, problem.n
    return a * m * k + b * k * n + c * m * n


class NumpyBackend:
    """fp32 by its BLAS; fp16 has none and is a plain loop."""

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
        return Operation([lambda: np.matmul(a, b, out=c)], lambda: c, moved(problem, size, size, size))


def _kernels() -> str:
    """For which processor the BLAS has chosen its kernels, where threadpoolctl is there to tell: it can be an older
    one than this, at half the speed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return ""
    names = {str(found["architecture"]) for found in threadpool_info() if found.get("architecture")}
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

        return Operation([multiply], lambda: c.float().numpy(), moved(problem, size, size, size))


class TinygradBackend:
    """Devices `cpu` (compiled by clang) and `opencl` (the first platform's GPU, or what it has)."""

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        os.environ["NUM_CPU_THREADS"] = str(threads)  # read on import
        from tinygrad import Device, dtypes

        self._name = {"cpu": "CPU", "opencl": "CL"}[device]
        try:
            opened: Any = Device[self._name]
        except (
            Exception
        ) as error:  # a missing library is an AttributeError, a missing clang a FileNotFoundError
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

        for _ in range(3):  # the first runs, the second records, the third replays what is timed
            submit()
        self._opened.synchronize()
        size = self._type.itemsize
        return Operation(
            [submit, self._opened.synchronize],
            lambda: last[0].float().numpy(),  # type: ignore[attr-defined]
            moved(problem, size, size, size),
            submit=0,
        )


class OrtBackend:
    """fp32; int8: A quantized in the call, B beforehand; int4: B alone, in blocks of 32, A as int8 within."""

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
            [lambda: session.run_with_iobinding(binding)], output.numpy, moved(problem, 4, weight, 4)
        )


def plain_graph(problem: Problem) -> bytes:
    """C = A @ B, fp32, B inside: what ONNX Runtime runs, and what Rockchip's compiler reads."""
    from onnx import helper

    return _graph(problem, [helper.make_node("MatMul", ["a", "b"], ["c"], name="c")], {"b": problem.b})


def int8_graph(problem: Problem) -> bytes:
    """A quantized in the graph (one scale a call), B beforehand (a scale a column), int32 sums, scaled back.

    B has 7 bits. Without VNNI, ONNX Runtime adds two products of uint8 and int8 in int16, which saturates: with 8 bits
    the result would be wrong on such processors. ONNX Runtime's documentation advises the same (`reduce_range`).
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
    """ONNX Runtime's MatMulNBits: B as (N, blocks, bytes of a block), the low half of a byte first, 8 is zero."""
    from onnx import helper

    block, k, n = OrtBackend.BLOCK, problem.k, problem.n
    blocks = -(-k // block)
    padded = np.zeros((blocks * block, n), np.float32)
    padded[:k] = problem.b
    cut = padded.T.reshape(n, blocks, block)
    scale = np.maximum(np.abs(cut).max(axis=2), 1e-30) / 7
    levels = (np.clip(np.rint(cut / scale[..., None]), -8, 7) + 8).astype(np.uint8)
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
        raise BackendError("B does not fit into an ONNX graph, which holds 2 GiB")
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
