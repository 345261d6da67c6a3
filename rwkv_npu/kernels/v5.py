"""RWKV-5.0 to 5.2: `models.v5.time_mix`, compiled.

Letters: t of M rows, h of H heads, N head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.kernels.instructions import A_VALUES
from rwkv_npu.kernels.parts import (
    K,
    R,
    V,
    W,
    Y,
    arguments,
    eagle,
    inlined,
    matrices,
    moments,
    recurrence,
    result,
    segment,
    sigmoid,
    table,
    values,
)
from rwkv_npu.models.common import Arrays

P_W, P_U, P_WEIGHT, P_BIAS, PARAMETERS = range(5)
X_R, X_K, X_V, X_G = range(4)


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    return np.exp(p["log_w"]), p["u"], p["ln_x.weight"], p["ln_x.bias"]


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    return tuple(x[name] for name in "rkvg" if name in x)


@inlined
def _token(x: Any, p: Any, S: Any, c: Any, y: Any, t: Any, h: Any, N: Any) -> None:
    for j in range(N):
        c[R, j] = x[X_R][t, h, j]
        c[K, j] = x[X_K][t, h, j]
        c[V, j] = x[X_V][t, h, j]
    if N == 64:
        eagle(S, p[P_U, h], c, 64)
    else:
        eagle(S, p[P_U, h], c, N)
    mean, scale = moments(c[Y], N)
    for j in range(N):
        y[t, h, j] = (c[Y, j] - mean) * scale * p[P_WEIGHT, h, j] + p[P_BIAS, h, j]


@recurrence
def run(at: Any, begin: Any, end: Any) -> None:
    """Units `begin` to `end`: heads of segments. y is written, the states are updated."""
    a = arguments(at)
    x = values(a, X_R), values(a, X_K), values(a, X_V), values(a, X_G)
    p, y = table(a, PARAMETERS), result(a)
    H, N = p.shape[1:]
    c = np.empty((5, N), np.float32)
    gated = a[A_VALUES + X_G] != 0
    for unit in range(begin, end):
        number, h = unit // H, unit % H
        first, last = segment(a, number)
        S = matrices(a, number)[h]
        for j in range(N):
            c[W, j] = p[P_W, h, j]
        for t in range(first, last):
            _token(x, p, S, c, y, t, h, N)
            if gated:
                for j in range(N):
                    g = x[X_G][t, h, j]
                    y[t, h, j] *= g * sigmoid(g)
