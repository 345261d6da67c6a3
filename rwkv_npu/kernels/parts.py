"""What the kernels share: how they are compiled, exponentials that vectorise, norms over heads.

A compiled `math.exp` is a call for every number; the polynomials here are a few instructions for a whole vector of
them, on any processor. NaN passes through: a comparison with it leaves it as it is.

Whatever loops over a head indexes (T, B, H, N) by its loop's own counter, or the rows of a small scratch array: an
index that is computed could be negative, for all the compiler knows, and its loop would not be vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from rwkv_npu import kernels
from rwkv_npu.models.common import GROUP_NORM_EPS

F = np.float32
ZERO, ONE = F(0), F(1)

# Sums may be taken in any order and products added unrounded: by that kernel and reference differ. NaN and infinity
# keep their meaning; a division by zero is IEEE's and needs no branch.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# Where an addition rounds on purpose.
_IN_ORDER: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

ROWS = "f4[:, :, ::1]"  # (T, B, A)
CHANNELS = "f4[:, ::1]"  # (B, A), or a table of parameters (any, A)
MATRICES = "f4[:, :, :, ::1]"  # (B, H, N, N)

inlined = njit(forceinline=True, **_OPTIONS)


def kernel(*arguments: str) -> Callable[[Any], Any]:
    """Compile for these types at once, or read what was compiled before. A kernel lets other threads run."""
    return njit(f"void({', '.join(arguments)})", nogil=True, cache=kernels.KEEP, **_OPTIONS)


def rows(count: int) -> str:
    """The type of a tuple of so many outputs of projections."""
    return f"UniTuple({ROWS}, {count})"


@inlined
def by_head(x: Any, H: Any, N: Any) -> Any:
    """(T, B, A) -> (T, B, H, N)."""
    return x.reshape((x.shape[0], x.shape[1], H, N))


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
def exp_of_decay(x: Any) -> Any:
    """fp32 x <= 0 -> exp x to the last bit of fp32, by way of fp64: see `models.common`. 0 below e^-700."""
    x = np.float64(x)
    x = -700.0 if x < -700.0 else x
    shifted = x * 1.4426950408889634 + 1.5 * 2**52
    n = shifted - 1.5 * 2**52
    f = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    p = 1 / 5040 + f * (1 / 40320 + f * (1 / 362880))
    p = 1 / 24 + f * (1 / 120 + f * (1 / 720 + f * p))
    p = 1 + f * (1 + f * (1 / 2 + f * (1 / 6 + f * p)))
    bits = (np.float64(shifted).view(np.int64) << 52) + (1023 << 52)
    return np.float32(p * np.int64(bits).view(np.float64))


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
