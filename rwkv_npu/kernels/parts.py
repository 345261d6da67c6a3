"""What the kernels share: how they are compiled, exponentials that vectorise, norms over heads.

A compiled `math.exp` is a call for every number; the polynomials here are a few instructions for a whole vector of
them, on any processor. NaN passes through: a comparison with it leaves it as it is.

Whatever loops over a head indexes (M, H, N) by its loop's own counter, or the rows of a small scratch array: an
index that is computed could be negative, for all the compiler knows, and its loop would not be vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from rwkv_npu.kernels.compiler import Kernel
from rwkv_npu.kernels.instructions import (
    A_H,
    A_LAYER,
    A_N,
    A_SEGMENTS,
    A_STRIDE,
    A_TABLE,
    A_VALUES,
    A_Y,
    ARGUMENTS,
    S_COUNT,
    S_FIRST,
    S_RECURRENT,
    S_ROWS,
    SEGMENT_WORDS,
)
from rwkv_npu.models.common import GROUP_NORM_EPS

F = np.float32
ZERO, ONE = F(0), F(1)

# Sums may be taken in any order and products added unrounded: by that kernel and reference differ. NaN and infinity
# keep their meaning; a division by zero is IEEE's and needs no branch.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# Where an addition rounds on purpose.
_IN_ORDER: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

inlined = njit(forceinline=True, **_OPTIONS)

# -- arguments -------------------------------------------------------------------------------------------


def recurrence(run: Any) -> Kernel:
    """The kernel run(arguments, begin, end), called from Python by its `.ctypes`, from compiled code by its `.address`.

    arguments: the address of what `instructions.A_SEGMENTS` and the names after it list. begin, end: numbers of units;
    unit u is head u % H of segment u // H.
    """
    return Kernel(run, **_OPTIONS)


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
def values(a: Any, number: Any) -> Any:
    """An output of the projections, (M, heads, N). There may be more heads than H: rows have padding."""
    return array(a[A_VALUES + number], (row_count(a), a[A_STRIDE] // a[A_N], a[A_N]))


@inlined
def result(a: Any) -> Any:
    """y, of the same shape."""
    return array(a[A_Y], (row_count(a), a[A_STRIDE] // a[A_N], a[A_N]))


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
def matrices(a: Any, number: Any) -> Any:
    """The state of all heads of a segment, (H, N, N)."""
    return state(a, number, 0, (a[A_H], a[A_N], a[A_N]))


@inlined
def table(a: Any, count: Any) -> Any:
    """The parameters of the layer, (count, H, N)."""
    return array(a[A_TABLE], (count, a[A_H], a[A_N]))


# -- exponentials ----------------------------------------------------------------------------------------
# x = n ln 2 + f with a whole n and |f| <= ln 2 / 2, so that exp x = 2^n exp f. Adding 1.5 * 2^(bits of the mantissa)
# to x / ln 2 leaves n in the last bits, from where a shift brings it into the exponent's. ln 2 comes in two parts, of
# which the first times n is exact.


@njit(forceinline=True, **_IN_ORDER)
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


@njit(forceinline=True, **_IN_ORDER)
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


@inlined
def moments(y: Any, N: Any) -> Any:
    """Of one head: its mean, and what group norm multiplies its distance from it with."""
    mean, variance = ZERO, ZERO
    for j in range(N):
        mean += y[j]
    mean /= F(N)
    for j in range(N):
        variance += (y[j] - mean) * (y[j] - mean)
    return mean, ONE / np.sqrt(variance / F(N) + GROUP_NORM_EPS)


# Rows of the scratch array of v5 and v6: what a token brings to the state of a head, and what it gets.
R, W, K, V, Y = range(5)


@inlined
def eagle(S: Any, u: Any, c: Any, N: Any) -> None:
    """y = S r + v (u*k . r); S = S diag(w) + v k^T, in one pass over S (N, N)."""
    own = ZERO
    for j in range(N):
        own += u[j] * c[K, j] * c[R, j]
    for i in range(N):
        v, y = c[V, i], ZERO
        for j in range(N):
            old = S[i, j]
            y += old * c[R, j]
            S[i, j] = old * c[W, j] + v * c[K, j]
        c[Y, i] = y + v * own
