"""librknnrt through ctypes: networks (`.rknn` files), and the matmul interface, C (M, N) = A (M, K) B (K, N).

The declarations are this project's own. tests/test_abi.py compares every size and offset with a C program.
Native layouts of the matmul interface: A (K/k, M, k), B (N/n, K/32, n, 32), C (N/4, M, 4), with k, n = 8, 16 in fp16
and 16, 32 in int8.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char, c_int, c_int8, c_int16, c_int32, c_uint32, c_uint64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError

OVERRIDE = "RWKV_NPU_RKNNRT"  # environment variable: the path of a librknnrt.so other than the image's

CHIP = "rk3588"  # the chip of the sizes, layouts and cores below
CORES = (1, 2, 4)  # masks of the cores
K_BLOCK, C_BLOCK = 32, 4  # blocks of K in B's native layout, and of N in C's; K is a multiple of K_BLOCK
MAX_K = 10240
NATIVE = 1
TO_DEVICE, FROM_DEVICE = 1, 2

# Flags of rknn_init: the caller flushes the caches of the memory that it binds, by rknn_mem_sync.
NO_FLUSH = 0x4000 | 0x8000
# Commands of rknn_query: the numbers of inputs and outputs, the attributes of a port, the duration of the last run,
# versions, and the attributes of a port in the native layout.
IN_OUT_NUM, INPUT_ATTR, OUTPUT_ATTR, PERF_RUN, SDK_VERSION = 0, 1, 2, 4, 5
NATIVE_INPUT_ATTR, NATIVE_OUTPUT_ATTR = 8, 9
FLOAT16 = 1  # a type of elements
NC1HWC2 = 2  # a format: blocks of channels

OUT_OF_MEMORY = -4
MESSAGES = {
    -1: "failed",
    -2: "timed out",
    -3: "the NPU is unavailable",
    OUT_OF_MEMORY: "out of NPU memory, or of file descriptors: end other programs, or raise the limit, ulimit -Hn",
    -5: "a parameter is refused",
    -6: "the file is refused",
    -7: "the context is invalid",
    -8: "an input is invalid",
}


@dataclass(frozen=True)
class Kind:
    """A type of product of the RK3588: its code, the dtypes of operands and sums, the blocks k of A and n of B."""

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


class InOutNum(ctypes.Structure):
    _fields_ = [("n_input", c_uint32), ("n_output", c_uint32)]


class PortAttr(ctypes.Structure):
    _fields_ = [
        ("index", c_uint32),
        ("n_dims", c_uint32),
        ("dims", c_uint32 * 16),
        ("name", c_char * 256),
        ("n_elems", c_uint32),
        ("size", c_uint32),
        ("fmt", c_int32),
        ("type", c_int32),
        ("qnt_type", c_int32),
        ("fl", c_int8),
        ("zp", c_int32),
        ("scale", ctypes.c_float),
        ("w_stride", c_uint32),
        ("size_with_stride", c_uint32),
        ("pass_through", ctypes.c_uint8),
        ("h_stride", c_uint32),
    ]


class SdkVersion(ctypes.Structure):
    _fields_ = [("api_version", c_char * 256), ("drv_version", c_char * 256)]


class PerfRun(ctypes.Structure):
    _fields_ = [("run_duration", ctypes.c_int64)]


class _Loaded:
    """librknnrt.so, loaded. Raises BackendError if that fails, or if the library lacks a function."""

    def __init__(self) -> None:
        path = os.environ.get(OVERRIDE) or hardware.runtime_library()
        if path is None:
            raise BackendError(
                f"librknnrt.so is not in /usr/lib: it comes with the board's image ({OVERRIDE} names another)"
            )
        self.path = Path(path)
        try:
            self._library = ctypes.CDLL(str(self.path))
            self._declare()
        except (OSError, AttributeError) as error:
            advice = f"check {OVERRIDE}" if OVERRIDE in os.environ else "rwkv-npu doctor names the right file"
            raise BackendError(f"{self.path} cannot be used as librknnrt.so ({error}): {advice}") from error

    def _declare(self) -> None:
        """Declare the functions of both interfaces. Raises AttributeError for a missing one."""
        context, memory = c_uint64, POINTER(TensorMem)
        self.mem_sync = self._function("rknn_mem_sync", context, memory, c_int)
        self.destroy_mem = self._function("rknn_destroy_mem", context, memory)
        self.create_mem = self._function("rknn_create_mem", context, c_uint32)
        self.create_mem.restype = memory

    def _function(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = list(arguments), c_int
        return function


class Memory:
    """A buffer in NPU memory, and an int8 array over the same bytes."""

    def __init__(self, library: _Loaded, context: int, size: int):
        self._library, self._context = library, context
        self.pointer = library.create_mem(context, size)
        if not self.pointer:
            raise BackendError(f"rknn_create_mem found no {size} bytes: {MESSAGES[OUT_OF_MEMORY]}")
        address = ctypes.cast(self.pointer.contents.virt_addr, ctypes.POINTER(ctypes.c_int8))
        self.bytes = np.ctypeslib.as_array(address, (size,))

    def sync(self, direction: int) -> None:
        check("rknn_mem_sync", self._library.mem_sync(self._context, self.pointer, direction))

    def close(self) -> None:
        self._library.destroy_mem(self._context, self.pointer)


class Networks(_Loaded):
    """The functions for networks whose inputs and outputs are in memory that the caller allocates."""

    def _declare(self) -> None:
        super()._declare()
        context, pointer = c_uint64, ctypes.c_void_p
        self.init = self._function(
            "rknn_init", POINTER(context), ctypes.c_char_p, c_uint32, c_uint32, pointer
        )
        self.dup = self._function("rknn_dup_context", POINTER(context), POINTER(context))
        self.destroy = self._function("rknn_destroy", context)
        self.query = self._function("rknn_query", context, c_int, pointer, c_uint32)
        self.set_core_mask = self._function("rknn_set_core_mask", context, c_int)
        self.set_io_mem = self._function("rknn_set_io_mem", context, POINTER(TensorMem), POINTER(PortAttr))
        self.run = self._function("rknn_run", context, pointer)


class Library(_Loaded):
    """The functions of the matmul interface."""

    def _declare(self) -> None:
        super()._declare()
        context, memory, info = c_uint64, POINTER(TensorMem), POINTER(MatmulInfo)
        self.create = self._function("rknn_matmul_create", POINTER(context), info, POINTER(IoAttr))
        self.destroy = self._function("rknn_matmul_destroy", context)
        self.run = self._function("rknn_matmul_run", context)
        self.set_io_mem = self._function("rknn_matmul_set_io_mem", context, memory, POINTER(TensorAttr))
        self.set_core_mask = self._function("rknn_matmul_set_core_mask", context, c_int)
        try:  # missing in older versions
            shapes = POINTER(context), info, c_int, POINTER(Shape), POINTER(IoAttr)
            self.create_dynamic = self._function("rknn_matmul_create_dynamic_shape", *shapes)
            self.set_shape = self._function("rknn_matmul_set_dynamic_shape", context, POINTER(Shape))
        except AttributeError:
            self.create_dynamic = None


def check(function: str, code: int, advice: str = "") -> None:
    """Raises BackendError if a function of the library returned a code other than 0."""
    if code:
        message = f"{function} returned {code}: {MESSAGES.get(code, 'see librknnrt')}"
        raise BackendError(f"{message}; {advice}" if advice else message)
