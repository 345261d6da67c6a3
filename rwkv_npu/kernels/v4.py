"""RWKV-4: `models.v4.time_mix`, compiled.

Letters: t of T tokens, b of B sequences, A attention width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.kernels.parts import CHANNELS, ROWS, exp, kernel, rows, sigmoid
from rwkv_npu.models.common import Arrays

STATES = ("att.a", "att.b", "att.q")
P_W, P_U = range(2)
X_R, X_K, X_V = range(3)


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    return p["w"], p["u"]


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    return x["r"], x["k"], x["v"]


@kernel(rows(3), CHANNELS, CHANNELS, CHANNELS, CHANNELS, ROWS, "i8", "i8")
def run(x: Any, p: Any, a: Any, b: Any, q: Any, y: Any, begin: Any, end: Any) -> None:
    """Sequences `begin` to `end`, whole: a "head" is as wide as the model."""
    for n in range(begin, end):
        for t in range(len(y)):
            for j in range(y.shape[2]):
                k, v, last = x[X_K][t, n, j], x[X_V][t, n, j], q[n, j]
                own = p[P_U, j] + k
                top = max(last, own)
                old, new = exp(last - top), exp(own - top)
                mean = (old * a[n, j] + new * v) / (old * b[n, j] + new)
                y[t, n, j] = sigmoid(x[X_R][t, n, j]) * mean
                last += p[P_W, j]
                top = max(last, k)
                old, new = exp(last - top), exp(k - top)
                a[n, j] = old * a[n, j] + new * v
                b[n, j] = old * b[n, j] + new
                q[n, j] = top
