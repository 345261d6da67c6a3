"""RWKV-4: `models.v4.time_mix`, compiled.

Letters: t of M rows, A attention width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.kernels.common import (
    arguments,
    array,
    exp,
    inlined,
    recurrence,
    row_count,
    segment,
    sigmoid,
    state,
)
from rwkv_npu.kernels.instructions import A_H, A_N, A_STRIDE, A_TABLE, A_VALUES, A_Y
from rwkv_npu.models.common import Arrays

P_W, P_U = range(2)
X_R, X_K, X_V = range(3)


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    return p["w"], p["u"]


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    return x["r"], x["k"], x["v"]


@inlined
def _rows(args: Any, address: Any) -> Any:
    """The rows at an address: (M, stride), of which A columns are used."""
    return array(address, (row_count(args), args[A_STRIDE]))


@recurrence
def run(at: Any, begin: Any, end: Any) -> None:
    """Write y and update the states of units `begin` to `end`, which are segments: H is 1 for RWKV-4."""
    args = arguments(at)
    r, k_, v_ = (
        _rows(args, args[A_VALUES + X_R]),
        _rows(args, args[A_VALUES + X_K]),
        _rows(args, args[A_VALUES + X_V]),
    )
    y, A = _rows(args, args[A_Y]), args[A_H] * args[A_N]
    p = array(args[A_TABLE], (2, A))
    for n in range(begin, end):
        first, stop = segment(args, n)
        a, b, q = state(args, n, 0, A), state(args, n, 1, A), state(args, n, 2, A)
        for t in range(first, stop):
            for j in range(A):
                k, v, last = k_[t, j], v_[t, j], q[j]
                own = p[P_U, j] + k
                top = max(last, own)
                old, new = exp(last - top), exp(own - top)
                mean = (old * a[j] + new * v) / (old * b[j] + new)
                y[t, j] = sigmoid(r[t, j]) * mean
                last += p[P_W, j]
                top = max(last, k)
                old, new = exp(last - top), exp(k - top)
                a[j] = old * a[j] + new * v
                b[j] = old * b[j] + new
                q[j] = top
