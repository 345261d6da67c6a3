"""Conversion between fp16 and fp32, which NumPy does one number at a time on x86-64."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from rwkv_npu.kernels.compiler import Kernel
from rwkv_npu.kernels.simd import (
    floats,
    larger_magnitude,
    largest,
    load_floats,
    load_halves,
    store_float,
    store_floats,
    store_halves,
)
from rwkv_npu.models import maths
from rwkv_npu.quant.cpu import LANES

_ZERO = np.float32(0)


def _widen(source: Any, target: Any, count: Any) -> None:
    for i in range(0, count, LANES):
        store_floats(load_halves(source + 2 * i), target + 4 * i)


def _narrow(source: Any, target: Any, count: Any, out: Any) -> None:
    """Convert `count` fp32 to fp16, and store their largest magnitude at `out`: NaN if any is NaN."""
    top = floats(_ZERO)
    for i in range(0, count, LANES):
        v = load_floats(source + 4 * i)
        top = larger_magnitude(top, v)
        store_halves(v, target + 2 * i)
    store_float(largest(top), out)


_WIDEN, _NARROW = Kernel(_widen, name="widen"), Kernel(_narrow, name="narrow")


def widen(source: np.ndarray, target: np.ndarray) -> None:
    """Copy an array of any float type to an fp32 array of the same shape."""
    if source.dtype == np.float16 and _plain(source, target):
        _WIDEN.ctypes(source.ctypes.data, target.ctypes.data, source.size)
    else:
        target[...] = source


def narrow(source: np.ndarray, target: np.ndarray) -> float:
    """`maths.narrow`, compiled: copy fp32 to fp16, and return the largest magnitude."""
    if source.dtype == np.float32 and source.size and _plain(source, target):
        found = ctypes.c_float()
        _NARROW.ctypes(source.ctypes.data, target.ctypes.data, source.size, ctypes.addressof(found))
        return found.value
    return maths.narrow(source, target)


def _plain(source: np.ndarray, target: np.ndarray) -> bool:
    same = source.shape == target.shape and not source.size % LANES
    return same and source.flags.c_contiguous and target.flags.carray
