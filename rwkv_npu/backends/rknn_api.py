"""librknnrt's matmul interface through ctypes: C (M, N) = A (M, K) B (K, N) on one core of the NPU.

Declarations of our own; a C program compiled from our own header holds every size and offset in tests/test_abi.py.
Layouts: A and C "native" are (K/k, M, k) and (N/4, M, 4), B native is (N/n, K/32, n, 32), with k, n = 8, 16 in fp16
and 16, 32 in int8.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_int, c_int8, c_int16, c_int32, c_uint32, c_uint64
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_npu.errors import BackendError

# Where boards' images put it, as RKNNLite looks for it; RWKV_NPU_RKNNRT names another file.
LIBRARIES = ("/usr/lib/librknnrt.so", "/usr/lib64/librknnrt.so", "/usr/lib/librknn_runtime.so")
OVERRIDE = "RWKV_NPU_RKNNRT"

CORES = (1, 2, 4)  # masks of the RK3588's three
K_ALIGNMENT = 32
MAX_K = 10240
NATIVE = 1
TO_DEVICE, FROM_DEVICE = 1, 2

MESSAGES = {
    -1: "failed",
    -2: "timed out",
    -3: "the NPU is unavailable",
    -4: "out of NPU memory, or of file descriptors",
    -5: "a parameter is refused",
    -7: "the context is invalid",
    -8: "an input is invalid",
}


@dataclass(frozen=True)
class Kind:
    """A type of product that the RK3588 has: operands and sums, and how N and the layouts of A and B are blocked."""

    code: int
    operand: np.dtype
    sum: np.dtype
    a_block: int
    b_block: int


FP16 = Kind(1, np.dtype(np.float16), np.dtype(np.float32), 8, 16)
INT8 = Kind(2, np.dtype(np.int8), np.dtype(np.int32), 16, 32)


class MatmulInfo(ctypes.Structure):
    _fields_ = [
        ("M", c_int32),
        ("K", c_int32),
        ("N", c_int32),
        ("type", c_int32),
        ("B_layout", c_int16),
        ("B_quant_type", c_int16),
        ("AC_layout", c_int16),
        ("AC_quant_type", c_int16),
        ("iommu_domain_id", c_int32),
        ("group_size", c_int16),
        ("reserved", c_int8 * 34),
    ]


class TensorAttr(ctypes.Structure):
    _fields_ = [
        ("name", c_char * 256),
        ("n_dims", c_uint32),
        ("dims", c_uint32 * 16),
        ("size", c_uint32),
        ("type", c_int32),
    ]


class IoAttr(ctypes.Structure):
    _fields_ = [("A", TensorAttr), ("B", TensorAttr), ("C", TensorAttr)]


class Shape(ctypes.Structure):
    _fields_ = [("M", c_int32), ("K", c_int32), ("N", c_int32)]


class TensorMem(ctypes.Structure):
    _fields_ = [
        ("virt_addr", ctypes.c_void_p),
        ("phys_addr", c_uint64),
        ("fd", c_int32),
        ("offset", c_int32),
        ("size", c_uint32),
        ("flags", c_uint32),
        ("priv_data", ctypes.c_void_p),
    ]


class Library:
    """The functions of librknnrt.so, with their types. Raises BackendError where there is none."""

    def __init__(self) -> None:
        chosen = os.environ.get(OVERRIDE)
        path = chosen or next((path for path in LIBRARIES if Path(path).exists()), None)
        if path is None:
            raise BackendError(
                f"no librknnrt.so: a board's image brings it, at one of {', '.join(LIBRARIES)} ({OVERRIDE} names "
                "another file)"
            )
        try:
            self._library = ctypes.CDLL(path)
            context, memory = c_uint64, POINTER(TensorMem)
            shapes = c_int, POINTER(Shape), POINTER(IoAttr)
            self.matmul_create = self._function(
                "rknn_matmul_create", POINTER(context), POINTER(MatmulInfo), POINTER(IoAttr)
            )
            self.matmul_destroy = self._function("rknn_matmul_destroy", context)
            self.matmul_run = self._function("rknn_matmul_run", context)
            self.set_io_mem = self._function("rknn_matmul_set_io_mem", context, memory, POINTER(TensorAttr))
            self.set_core_mask = self._function("rknn_matmul_set_core_mask", context, c_int)
            self.mem_sync = self._function("rknn_mem_sync", context, memory, c_int)
            self.destroy_mem = self._function("rknn_destroy_mem", context, memory)
            self.create_mem = self._function("rknn_create_mem", context, c_uint32)
            self.create_mem.restype = memory
        except (OSError, AttributeError) as error:
            raise BackendError(f"{path} cannot be used: {error}") from error
        # Younger than the rest: an older library has one row count a context.
        dynamic = hasattr(self._library, "rknn_matmul_create_dynamic_shape")
        self.matmul_create_dynamic = (
            self._function("rknn_matmul_create_dynamic_shape", POINTER(context), POINTER(MatmulInfo), *shapes)
            if dynamic
            else None
        )
        if dynamic:
            self.set_dynamic_shape = self._function("rknn_matmul_set_dynamic_shape", context, POINTER(Shape))

    def _function(self, name: str, *arguments: type) -> ctypes._FuncPtr:  # type: ignore[name-defined]
        function = getattr(self._library, name)
        function.argtypes = list(arguments)
        function.restype = c_int
        return function


class Memory:
    """A buffer of the NPU, and the same bytes as an array. It is given back by `close`."""

    def __init__(self, library: Library, context: int, size: int):
        self._library, self._context = library, context
        self.pointer = library.create_mem(context, size)
        if not self.pointer:
            raise BackendError(f"rknn_create_mem: {MESSAGES[-4]} ({size} bytes)")
        address = self.pointer.contents.virt_addr
        self.bytes = np.frombuffer((c_int8 * size).from_address(address), np.int8)

    def sync(self, direction: int) -> None:
        check("rknn_mem_sync", self._library.mem_sync(self._context, self.pointer, direction))

    def close(self) -> None:
        self._library.destroy_mem(self._context, self.pointer)


class Context:
    """Products (M, K) @ (K, N) for several M on one core: buffers for A and C, and whichever B is bound.

    Where the library takes several shapes a context, `handles` is one; else one for each M.
    """

    def __init__(self, library: Library, kind: Kind, rows: Sequence[int], K: int, N: int, core: int):
        self._library, self._kind, self.rows = library, kind, tuple(rows)
        self._shapes = [Shape(M, K, N) for M in rows]
        self._attrs = (IoAttr * len(rows))()
        self._memories: list[Memory] = []
        self.handles: list[int] = []
        try:
            self._create(K, N)
            for handle in self.handles:
                check("rknn_matmul_set_core_mask", library.set_core_mask(handle, core))
            self._allocate(K, N)
        except BaseException:
            self.close()
            raise

    def _create(self, K: int, N: int) -> None:
        info = MatmulInfo(M=self.rows[0], K=K, N=N, type=self._kind.code, B_layout=NATIVE, AC_layout=NATIVE)
        handle = c_uint64()
        self._dynamic = False
        if len(self.rows) > 1 and self._library.matmul_create_dynamic is not None:
            shapes = (Shape * len(self.rows))(*self._shapes)
            arguments = byref(handle), byref(info), len(self.rows), shapes, self._attrs
            self._dynamic = self._library.matmul_create_dynamic(*arguments) == 0
        if self._dynamic:
            self.handles.append(handle.value)
            return
        for number, M in enumerate(self.rows):
            info.M = M
            code = self._library.matmul_create(byref(handle), byref(info), byref(self._attrs[number]))
            check(f"rknn_matmul_create of {M}x{K}x{N}", code)
            self.handles.append(handle.value)

    def _allocate(self, K: int, N: int) -> None:
        """A and C, as large as the most rows need, and views of them for every row count."""
        kind, most = self._kind, max(self.rows)
        a = self._memory(most * K * kind.operand.itemsize)
        c = self._memory(most * N * kind.sum.itemsize)
        self._a_memory, self._c_memory = a, c
        # (M, K) and (M, N) as callers see them, over the native layouts.
        self.a = {
            M: a.bytes[: M * K * kind.operand.itemsize]
            .view(kind.operand)
            .reshape(K // kind.a_block, M, kind.a_block)
            .swapaxes(0, 1)
            for M in self.rows
        }
        self.c = {
            M: c.bytes[: M * N * kind.sum.itemsize].view(kind.sum).reshape(N // 4, M, 4).swapaxes(0, 1)
            for M in self.rows
        }
        self._bound: tuple[int, int] | None = None
