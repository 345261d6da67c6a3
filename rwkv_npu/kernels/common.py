"""Shared by the recurrences: compile options, their arguments, exponentials, group norm.

A compiled `math.exp` is one call for every number. The polynomials here take a few instructions for a whole vector, on
any processor. NaN stays NaN, since comparisons with it are false.

Loops over a head use addresses and the vectors of `simd`: LLVM vectorises few loops over arrays that may overlap.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils

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
    pointer_to,
    store_float,
    sub,
    total,
)
from rwkv_npu.models.common import GROUP_NORM_EPS
from rwkv_npu.quant.cpu import LANES

F = np.float32
ZERO, ONE = F(0), F(1)

# LLVM may reorder sums, and add products without rounding them first: kernels and reference differ by that. NaN and
# infinity keep their meaning. A division by zero gives them, as IEEE 754 says, and needs no branch.
COMPILED: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# For functions in which an addition rounds on purpose.
_IN_ORDER: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

inlined: Any = functools.partial(inner, forceinline=True, **COMPILED)
called: Any = functools.partial(inner, **COMPILED)  # large functions: not copied into each caller

# -- arguments -------------------------------------------------------------------------------------------


def recurrence(run: Any) -> Kernel:
    """Make run(arguments, begin, end) a kernel. Python calls its `.ctypes`, compiled code its `.address`.

    arguments: address of the arguments of a recurrence (see `instructions`). begin, end: a range of units, of which
    unit u is head u % H of segment u // H.
    """
    return Kernel(run, **COMPILED)


_int64s, float32s = pointer_to(types.int64), pointer_to(types.float32)


@inlined
def arguments(address: Any) -> Any:
    """The arguments of a recurrence as an array (ARGUMENTS,) int64."""
    return carray(_int64s(address), (ARGUMENTS,))


@inlined
def array(address: Any, shape: Any) -> Any:
    """The fp32 array at an address."""
    return carray(float32s(address), shape)


@inlined
def row_count(a: Any) -> Any:
    """M, the rows of all segments."""
    return carray(_int64s(a[A_SEGMENTS]), (SEGMENT_WORDS,))[S_ROWS]


@inlined
def segment(a: Any, number: Any) -> Any:
    """The first row of a segment, and the row after its last."""
    line = carray(_int64s(a[A_SEGMENTS] + (1 + number) * SEGMENT_WORDS * 8), (SEGMENT_WORDS,))
    return line[S_FIRST], line[S_FIRST] + line[S_COUNT]


@inlined
def state(a: Any, number: Any, part: Any, shape: Any) -> Any:
    """A part of a segment's state, in the layer of the arguments. part: counted among those that recurrences update."""
    line = carray(_int64s(a[A_SEGMENTS] + (1 + number) * SEGMENT_WORDS * 8), (SEGMENT_WORDS,))
    return array(line[S_RECURRENT + part] + a[A_LAYER], shape)


@inlined
def padded(N: Any) -> Any:
    """N floats as whole vectors: the length of a row of scratch."""
    return (N + LANES - 1) // LANES * LANES


@called
def head_at(a: Any, unit: Any) -> Any:
    """(first, step, count, h, state) of a unit, which is `count` rows of one head.

    first: bytes from the address of an input, or of y, to the unit's first row. step: bytes from a row to the next.
    h: number of the head. state: address of its matrix (N, N).
    """
    H, N, step = a[A_H], a[A_N], 4 * a[A_STRIDE]
    number, h = unit // H, unit % H
    first, last = segment(a, number)
    matrix = state(a, number, 0, (H, N, N)).ctypes.data + 4 * h * N * N
    return first * step + 4 * h * N, step, last - first, h, matrix


@inlined
def _whole(source: Any, N: Any, target: Any) -> Any:
    """An address at which N floats can be read as whole vectors: that of the floats, or of a padded copy of them."""
    if N % LANES == 0:
        return source
    for j in range(N):
        store_float(load_float(source + 4 * j), target + 4 * j)
    return target


@called
def read_inputs(a: Any, count: Any, place: Any, x: Any, scratch: Any) -> None:
    """Set x (count,) to the addresses of a token's inputs. place: bytes from the begin of an input to the token."""
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
    """Prefetch a token's inputs. Processors do so themselves only within a page, and rows are farther apart."""
    for i in range(count):
        for line in range(0, 4 * a[A_N], 64):
            _prefetch(a[A_VALUES + i] + place + line)


@called
def read_parameters(a: Any, count: Any, h: Any, p: Any, scratch: Any) -> None:
    """Set p (count,) to the addresses of a head's parameters."""
    N = a[A_N]
    for i in range(count):
        p[i] = _whole(a[A_TABLE] + 4 * (i * a[A_H] + h) * N, N, scratch + 4 * i * padded(N))


@inlined
def write_output(source: Any, target: Any, N: Any) -> None:
    for j in range(N):
        store_float(load_float(source + 4 * j), target + 4 * j)


# -- exponentials ----------------------------------------------------------------------------------------
# The method of `simd.exp`, for single numbers: x = n ln 2 + f, exp x = 2^n exp f. Adding 1.5 * 2^(bits of the mantissa)
# to x / ln 2 leaves n in the last bits, and a shift moves it to the exponent. ln 2 comes in two parts; the product of n
# and the first is exact.


@njit(forceinline=True, **_IN_ORDER, **PLAIN)
def exp(x: Any) -> Any:
    """e^x of fp32 within 1.1 units in the last place, limited to 2^-126 .. 2^127: never 0 nor infinite."""
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
    """e^x of fp64 x <= 700, within a factor of 1 + 1e-11. Below x = -700 it is e^-700."""
    x = -700.0 if x < -700.0 else x
    shifted = x * 1.4426950408889634 + 1.5 * 2**52
    n = shifted - 1.5 * 2**52
    f = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    # Taylor's series to the ninth power, in pairs: in a chain of nine each step would wait for the one before.
    f2 = f * f
    f4 = f2 * f2
    low = (1 + f) + f2 * (1 / 2 + f * (1 / 6))
    middle = (1 / 24 + f * (1 / 120)) + f2 * (1 / 720 + f * (1 / 5040))
    p = low + f4 * (middle + f4 * (1 / 40320 + f * (1 / 362880)))
    bits = (np.float64(shifted).view(np.int64) << 52) + (1023 << 52)
    return p * np.int64(bits).view(np.float64)


@inlined
def exp_of_decay(x: Any) -> Any:
    """e^x of fp32 x <= 0, correct to the last bit since it is computed in fp64. `models.common` says why."""
    return np.float32(exp64(np.float64(x)))


@inlined
def sigmoid(x: Any) -> Any:
    return ONE / (ONE + exp(-x))


# -- heads -----------------------------------------------------------------------------------------------


@called
def moments(y: Any, N: Any) -> Any:
    """Mean and 1 / standard deviation of a head's N floats at address y, for group norm."""
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
