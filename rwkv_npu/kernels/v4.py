"""RWKV-4: `models.v4.time_mix`, compiled.

Letters: t of T tokens, B sequences, A attention width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.kernels.instructions import A_B, A_H, A_N, A_STATES, A_STRIDE, A_T, A_TABLE, A_VALUES, A_Y
from rwkv_npu.kernels.parts import arguments, array, exp, inlined, recurrence, sigmoid
from rwkv_npu.models.common import Arrays

STATES = ("att.a", "att.b", "att.q")
P_W, P_U = range(2)
X_R, X_K, X_V = range(3)


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    return p["w"], p["u"]


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    return x["r"], x["k"], x["v"]


@inlined
def _rows(args: Any, address: Any) -> Any:
    """(T, B, A or more)."""
    return array(address, (args[A_T], args[A_B], args[A_STRIDE]))


@recurrence
def run(at: Any, begin: Any, end: Any) -> None:
    """All tokens of sequences `begin` to `end`, whole: heads mean nothing here. y is written, the states updated."""
    args = arguments(at)
    r, k_, v_ = (
        _rows(args, args[A_VALUES + X_R]),
        _rows(args, args[A_VALUES + X_K]),
        _rows(args, args[A_VALUES + X_V]),
    )
    y, A = _rows(args, args[A_Y]), args[A_H] * args[A_N]
    p, state = array(args[A_TABLE], (2, A)), (args[A_B], A)
    a, b, q = array(args[A_STATES], state), array(args[A_STATES + 1], state), array(args[A_STATES + 2], state)
    for n in range(begin, end):
        for t in range(len(y)):
            for j in range(A):
                k, v, last = k_[t, n, j], v_[t, n, j], q[n, j]
                own = p[P_U, j] + k
                top = max(last, own)
                old, new = exp(last - top), exp(own - top)
                mean = (old * a[n, j] + new * v) / (old * b[n, j] + new)
                y[t, n, j] = sigmoid(r[t, n, j]) * mean
                last += p[P_W, j]
                top = max(last, k)
                old, new = exp(last - top), exp(k - top)
                a[n, j] = old * a[n, j] + new * v
                b[n, j] = old * b[n, j] + new
                q[n, j] = top
