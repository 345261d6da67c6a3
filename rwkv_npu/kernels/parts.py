"""Shared by the kernels: how they are compiled, exponentials that vectorise, norms over heads.

A compiled `math.exp` is a call for every number; the polynomials here are a few instructions for a whole vector of
them, on any processor. NaN passes through: a comparison with it leaves it as it is.

Loops over a head are written in vectors (`simd`), by address: the compiler vectorises few of the loops over arrays
that may overlap.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from rwkv_npu.kernels.compiler import PLAIN, Kernel, inner
from rwkv_npu.kernels.instructions import (
    A_H,
    A_LAYER,
    A_N,
    A_SEGMENTS,
    A_STRIDE,
    A_TABLE,
    A_VALUES,
    ARGUMENTS,
    S_COUNT,
    S_FIRST,
    S_RECURRENT,
    S_ROWS,
    SEGMENT_WORDS,
)
from rwkv_npu.kernels.simd import (
    ADDRESS,
    add,
    floats,
    fma,
    load_float,
    load_floats,
    operation,
    store_float,
    sub,
    total,
)
from rwkv_npu.models.common import GROUP_NORM_EPS
from rwkv_npu.quant.cpu import LANES

F = np.float32
ZERO, ONE = F(0), F(1)

# Sums may be taken in any order and products added unrounded: by that kernel and reference differ. NaN and infinity
# keep their meaning; a division by zero is IEEE's and needs no branch.
COMPILED: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# Where an addition rounds on purpose.
_IN_ORDER: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

inlined: Any = functools.partial(inner, forceinline=True, **COMPILED)
called: Any = functools.partial(inner, **COMPILED)  # large functions, of which LLVM should make one copy

# -- arguments -------------------------------------------------------------------------------------------


def recurrence(run: Any) -> Kernel:
    """The kernel run(arguments, begin, end), called from Python by its `.ctypes`, from compiled code by its `.address`.

    arguments: the address of what `instructions.A_SEGMENTS` and the names after it list. begin, end: numbers of units;
    unit u is head u % H of segment u // H.
    """
    return Kernel(run, **COMPILED)


@intrinsic
def _words(_context: Any, address: Any) -> Any:
    return as_pointer(types.CPointer(types.int64))


@intrinsic
def float32s(_context: Any, address: Any) -> Any:
    return as_pointer(types.CPointer(types.float32))


def as_pointer(kind: Any) -> Any:
    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(kind))

    return kind(types.int64), code


@inlined
def arguments(address: Any) -> Any:
    return carray(_words(address), (ARGUMENTS,))  # type: ignore[call-arg]


@inlined
def array(address: Any, shape: Any) -> Any:
    return carray(float32s(address), shape)  # type: ignore[call-arg]


@inlined
def row_count(a: Any) -> Any:
    return carray(_words(a[A_SEGMENTS]), (SEGMENT_WORDS,))[S_ROWS]  # type: ignore[call-arg]


@inlined
def segment(a: Any, number: Any) -> Any:
    """The first row of a segment, and the row after its last."""
    line = carray(_words(a[A_SEGMENTS] + (1 + number) * SEGMENT_WORDS * 8), (SEGMENT_WORDS,))  # type: ignore[call-arg]
    return line[S_FIRST], line[S_FIRST] + line[S_COUNT]


@inlined
def state(a: Any, number: Any, part: Any, shape: Any) -> Any:
    """A part of a segment's state that the recurrence updates, by its number, at the layer of the arguments."""
    line = carray(_words(a[A_SEGMENTS] + (1 + number) * SEGMENT_WORDS * 8), (SEGMENT_WORDS,))  # type: ignore[call-arg]
    return array(line[S_RECURRENT + part] + a[A_LAYER], shape)


@inlined
def padded(N: Any) -> Any:
    """Floats of a row of scratch: whole vectors."""
    return (N + LANES - 1) // LANES * LANES


@called
def head_at(a: Any, unit: Any) -> Any:
    """(first, step, count, h, state) of a unit: its `count` rows lie `first` bytes, and then every `step` bytes, after
    the address of a value or of y; state is the address of the head's own."""
    H, N, step = a[A_H], a[A_N], 4 * a[A_STRIDE]
    number, h = unit // H, unit % H
    first, last = segment(a, number)
    matrix = state(a, number, 0, (H, N, N)).ctypes.data + 4 * h * N * N
    return first * step + 4 * h * N, step, last - first, h, matrix


@inlined
def _whole(source: Any, N: Any, target: Any) -> Any:
    """The address of N floats as whole vectors: where they lie, or a copy where that would read beyond them."""
    if N % LANES == 0:
        return source
    for j in range(N):
        store_float(load_float(source + 4 * j), target + 4 * j)
    return target


@called
def read_inputs(a: Any, count: Any, place: Any, x: Any, scratch: Any) -> None:
    """x (count,): addresses of a token's inputs."""
    N = a[A_N]
    for i in range(count):
        x[i] = _whole(a[A_VALUES + i] + place, N, scratch + 4 * i * padded(N))


@operation(types.void, ADDRESS)
def _prefetch(b: Any, address: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[ir.IntType(32)] * 3])
    code = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(code, [b.inttoptr(address, ir.IntType(8).as_pointer()), *map(ir.IntType(32), (0, 3, 1))])


@called
def prefetch_inputs(a: Any, count: Any, place: Any) -> None:
    """Have a token's inputs in the cache by the time they are read: its row is far from the row before, and a
    processor that guesses what comes next guesses within a page."""
    for i in range(count):
        for line in range(0, 4 * a[A_N], 64):
            _prefetch(a[A_VALUES + i] + place + line)


@called
def read_parameters(a: Any, count: Any, h: Any, p: Any, scratch: Any) -> None:
    """p (count,): addresses of a head's parameters."""
    N = a[A_N]
    for i in range(count):
        p[i] = _whole(a[A_TABLE] + 4 * (i * a[A_H] + h) * N, N, scratch + 4 * i * padded(N))


@inlined
def write_output(source: Any, target: Any, N: Any) -> None:
    for j in range(N):
        store_float(load_float(source + 4 * j), target + 4 * j)


# -- exponentials ----------------------------------------------------------------------------------------
# x = n ln 2 + f with a whole n and |f| <= ln 2 / 2, so that exp x = 2^n exp f. Adding 1.5 * 2^(bits of the mantissa)
# to x / ln 2 leaves n in the last bits, from where a shift brings it into the exponent's. ln 2 comes in two parts, of
# which the first times n is exact.


@njit(forceinline=True, **_IN_ORDER, **PLAIN)
def exp(x: Any) -> Any:
    """fp32, within 1.1 of its last place. Never 0 nor infinite: it ends at 2^-126 and 2^127."""
    x = F(-87.3) if x < F(-87.3) else x
    x = F(88.3) if x > F(88.3) else x
    shifted = x * F(1.44269504) + F(1.5 * 2**23)
    n = shifted - F(1.5 * 2**23)
    f = (x - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = F(1 / 720) + f * F(1 / 5040)
    p = F(1 / 24) + f * (F(1 / 120) + f * p)
    p = ONE + (f + (f * f) * (F(1 / 2) + f * (F(1 / 6) + f * p)))
    bits = np.int32(np.float32(shifted).view(np.int32) << 23) + np.int32(127 << 23)
    return p * np.int32(bits).view(np.float32)


@njit(forceinline=True, **_IN_ORDER, **PLAIN)
def exp64(x: Any) -> Any:
    """fp64 x <= 700, within 1e-11. It ends at e^-700."""
    x = -700.0 if x < -700.0 else x
    shifted = x * 1.4426950408889634 + 1.5 * 2**52
    n = shifted - 1.5 * 2**52
    f = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    # Taylor's series to the ninth power, in pairs: a chain of nine would wait for itself.
    f2 = f * f
    f4 = f2 * f2
    low = (1 + f) + f2 * (1 / 2 + f * (1 / 6))
    middle = (1 / 24 + f * (1 / 120)) + f2 * (1 / 720 + f * (1 / 5040))
    p = low + f4 * (middle + f4 * (1 / 40320 + f * (1 / 362880)))
    bits = (np.float64(shifted).view(np.int64) << 52) + (1023 << 52)
    return p * np.int64(bits).view(np.float64)


@inlined
def exp_of_decay(x: Any) -> Any:
    """fp32 x <= 0 -> exp x to the last bit of fp32, by way of fp64: see `models.common`."""
    return np.float32(exp64(np.float64(x)))


@inlined
def sigmoid(x: Any) -> Any:
    return ONE / (ONE + exp(-x))


# -- heads -----------------------------------------------------------------------------------------------


@called
def moments(y: Any, N: Any) -> Any:
    """Mean of a head's N floats, and the factor of group norm for their distance from it."""
    mean, variance = ZERO, ZERO
    if N % LANES == 0:
        sums = floats(ZERO)
        for j in range(0, 4 * N, 4 * LANES):
            sums = add(sums, load_floats(y + j))
        mean = total(sums) / F(N)
        sums = floats(ZERO)
        for j in range(0, 4 * N, 4 * LANES):
            distance = sub(load_floats(y + j), floats(mean))
            sums = fma(distance, distance, sums)
        variance = total(sums) / F(N)
    else:
        for j in range(N):
            mean += load_float(y + 4 * j)
        mean /= F(N)
        for j in range(N):
            distance_j = load_float(y + 4 * j) - mean
            variance += distance_j * distance_j
        variance /= F(N)
    return mean, ONE / np.sqrt(variance + GROUP_NORM_EPS)
