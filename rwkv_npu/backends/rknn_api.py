"""librknnrt's matmul interface through ctypes: C (M, N) = A (M, K) B (K, N) on one core of the NPU.

The declarations are this project's own. tests/test_abi.py compares every size and offset with a C program.
Native layouts: A (K/k, M, k), B (N/n, K/32, n, 32), C (N/4, M, 4), with k, n = 8, 16 in fp16 and 16, 32 in int8.
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

OUT_OF_MEMORY = -4
MESSAGES = {
    -1: "failed",
    -2: "timed out",
    -3: "the NPU is unavailable",
    OUT_OF_MEMORY: "out of NPU memory, or of file descriptors: end other programs, or raise the limit, ulimit -Hn",
    -5: "a parameter is refused",
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


class Library:
    """The functions of librknnrt.so that are used here. Raises BackendError if the library cannot be loaded."""

    def __init__(self) -> None:
        path = os.environ.get(OVERRIDE) or hardware.runtime_library()
        if path is None:
            raise BackendError(
                f"librknnrt.so is not in /usr/lib: it comes with the board's image ({OVERRIDE} names another)"
            )
        self.path = Path(path)
        context, memory, info = c_uint64, POINTER(TensorMem), POINTER(MatmulInfo)
        try:
            self._library = ctypes.CDLL(str(self.path))
            self.create = self._function("rknn_matmul_create", POINTER(context), info, POINTER(IoAttr))
            self.destroy = self._function("rknn_matmul_destroy", context)
            self.run = self._function("rknn_matmul_run", context)
            self.set_io_mem = self._function("rknn_matmul_set_io_mem", context, memory, POINTER(TensorAttr))
            self.set_core_mask = self._function("rknn_matmul_set_core_mask", context, c_int)
            self.mem_sync = self._function("rknn_mem_sync", context, memory, c_int)
            self.destroy_mem = self._function("rknn_destroy_mem", context, memory)
            self.create_mem = self._function("rknn_create_mem", context, c_uint32)
            self.create_mem.restype = memory
        except (OSError, AttributeError) as error:
            advice = f"check {OVERRIDE}" if OVERRIDE in os.environ else "rwkv-npu doctor names the right file"
            raise BackendError(f"{self.path} cannot be used as librknnrt.so ({error}): {advice}") from error
        try:  # missing in older versions
            shapes = POINTER(context), info, c_int, POINTER(Shape), POINTER(IoAttr)
            self.create_dynamic = self._function("rknn_matmul_create_dynamic_shape", *shapes)
            self.set_shape = self._function("rknn_matmul_set_dynamic_shape", context, POINTER(Shape))
        except AttributeError:
            self.create_dynamic = None

    def _function(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = list(arguments), c_int
        return function


def check(function: str, code: int, advice: str = "") -> None:
    """Raises BackendError if a function of the library returned a code other than 0."""
    if code:
        message = f"{function} returned {code}: {MESSAGES.get(code, 'see librknnrt')}"
        raise BackendError(f"{message}; {advice}" if advice else message)
