"""RWKV-6: `models.v6.time_mix`, compiled.

Letters: h of H heads, N head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.kernels import chunk
from rwkv_npu.kernels.common import (
    ONE,
    ZERO,
    arguments,
    array,
    called,
    exp_of_decay,
    head_at,
    inlined,
    padded,
    prefetch_inputs,
    read_inputs,
    read_parameters,
    recurrence,
    write_output,
)
from rwkv_npu.kernels.instructions import A_N, A_VALUES, A_Y
from rwkv_npu.kernels.simd import add, exp, floats, load_floats, mul, store_floats
from rwkv_npu.kernels.v5 import enter, finish, fits, own_score, step
from rwkv_npu.models.common import Arrays

P_DECAY, P_U, P_WEIGHT, P_BIAS, PARAMETERS = range(5)
X_R, X_W, X_K, X_V, X_G, INPUTS = range(6)

# Rows of scratch: padded copies of the inputs and parameters of a head, where they need padding, then w and y.
W, Y = INPUTS + PARAMETERS, INPUTS + PARAMETERS + 1
SCRATCH = Y + 1


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    names = ("time_decay", "u", "ln_x.weight", "ln_x.bias")
    return tuple(p[name] for name in names)


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    return tuple(x[name] for name in "rwkvg")


@inlined
def _decay(x: Any, p: Any, w: Any, row: Any) -> None:
    """w = exp(-exp(p + x)). x, p, w: addresses of `row` bytes; p is time_decay."""
    for j in range(0, row, 64):
        rate = exp(add(load_floats(p + j), load_floats(x + j)))
        store_floats(mul(rate, floats(-ONE)), w + j)
    decays = array(w, (row // 4,))
    for i in range(len(decays)):
        decays[i] = exp_of_decay(decays[i])


@called
def _chunks(a: Any, x: Any, p: Any, at: Any, m: Any, own: Any, first: Any, stride: Any, count: Any) -> None:
    """Compute a unit, `count` rows of a head, in chunks. The memory m of a chunk holds the head's state, transposed."""
    w, begin = at + W * chunk.ROW, 0
    while begin < count:
        chunk.start(m)
        tokens, alone = 0, False
        while tokens < min(chunk.C, count - begin):
            place = first + (begin + tokens) * stride
            prefetch_inputs(
                a, INPUTS, place + chunk.C * stride if begin + tokens + chunk.C < count else place
            )
            read_inputs(a, INPUTS, place, x, at)
            _decay(x[X_W], p[P_DECAY], w, chunk.ROW)
            if not fits(m, w):
                if tokens:
                    break
                alone = True
            own[tokens] = own_score(x[X_R], p[P_U], x[X_K], chunk.ROW)
            enter(m, tokens, x[X_R], w, x[X_K], x[X_V], alone)
            tokens += 1
        chunk.advance_v5(m, tokens, alone)
        for t in range(tokens):
            place = first + (begin + t) * stride
            out, v = m + (chunk.OUT + chunk.C + t) * chunk.ROW, m + (chunk.VALUES + chunk.C + t) * chunk.ROW
            gate = a[A_VALUES + X_G] + place
            finish(out, own[t], v, p[P_WEIGHT], p[P_BIAS], gate, chunk.N, a[A_Y] + place)
        begin += tokens


@recurrence
def run(where: Any, begin: Any, end: Any) -> None:
    """Write y and update the states of units `begin` to `end`, which are heads of segments."""
    a = arguments(where)
    N = a[A_N]
    scratch, m = np.zeros((SCRATCH, padded(N)), np.float32), np.empty((chunk.ROWS, chunk.N), np.float32)
    at, memory, row = np.int64(scratch.ctypes.data), np.int64(m.ctypes.data), 4 * padded(N)
    # Addresses of a token's inputs and of a head's parameters; the own scores of a chunk's tokens.
    x, p, own = np.empty(INPUTS, np.int64), np.empty(PARAMETERS, np.int64), np.empty(chunk.C, np.float32)
    for unit in range(begin, end):
        first, stride, count, h, state = head_at(a, unit)
        read_parameters(a, PARAMETERS, h, p, at + INPUTS * row)
        if N == chunk.N and count >= chunk.SHORTEST:
            chunk.transpose_state(state, memory)
            _chunks(a, x, p, at, memory, own, first, stride, count)
            chunk.transpose_state(memory, state)
            continue
        S, w, y = array(state, (N, N)), scratch[W], scratch[Y]
        for t in range(count):
            read_inputs(a, INPUTS, first + t * stride, x, at)
            _decay(x[X_W], p[P_DECAY], at + W * row, row)
            step(S, array(x[X_R], (N,)), w, array(x[X_K], (N,)), array(x[X_V], (N,)), y)
            score = own_score(x[X_R], p[P_U], x[X_K], row)
            finish(at + Y * row, score, x[X_V], p[P_WEIGHT], p[P_BIAS], x[X_G], N, at + Y * row)
            write_output(at + Y * row, a[A_Y] + first + t * stride, N)
    # numba frees an array after its last use by name. Without these, `at` and `memory` would point to freed memory.
    scratch[0, 0] = m[0, 0] = ZERO
