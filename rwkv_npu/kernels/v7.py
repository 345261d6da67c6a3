"""RWKV-7 and 7a: `models.v7.time_mix`, compiled.

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
    head_at,
    moments,
    padded,
    prefetch_inputs,
    read_inputs,
    read_parameters,
    recurrence,
    write_output,
)
from rwkv_npu.kernels.instructions import A_N, A_VALUES, A_Y
from rwkv_npu.kernels.simd import (
    add,
    div,
    exp,
    floats,
    fma,
    load_floats,
    mul,
    sigmoid,
    store_floats,
    sub,
    total,
)
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.v7 import LOG_DECAY, NORM_FLOOR

P_W0, P_K_K, P_K_A, P_R_K, P_WEIGHT, P_BIAS, PARAMETERS = range(7)
X_R, X_W, X_K, X_V, X_A, X_G, X_VMIX, X_FIRST, INPUTS = range(9)

# Rows of scratch: padded copies of the inputs and parameters of a head, where they need padding, then what `_prepare`
# computes from them, and y.
W, K, V, KAPPA, B, Y = range(INPUTS + PARAMETERS, INPUTS + PARAMETERS + 6)
SCRATCH = Y + 1


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    names = ("w0", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")
    return tuple(p[name] for name in names)


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    """The inputs of `run`. Layer 0 has no vmix. It is given v, so that v + (v_first - v) * vmix is v: v_first is v."""
    if "vmix" not in x:
        carry["v_first"] = x["v"]
    return *(x[name] for name in "rwkvag"), x.get("vmix", x["v"]), carry["v_first"]


@called
def _prepare(x: Any, p: Any, at: Any, row: Any) -> Any:
    """Write the rows W, K, V, KAPPA and B of a token, and return its bonus. row: bytes of a row of scratch."""
    square = floats(ZERO)
    for j in range(0, row, 64):
        kappa = mul(load_floats(x[X_K] + j), load_floats(p[P_K_K] + j))
        store_floats(kappa, at + KAPPA * row + j)
        square = fma(kappa, kappa, square)
    norm = np.sqrt(total(square))
    scale = floats(ONE / (NORM_FLOOR if norm < NORM_FLOOR else norm))
    bonus, one = floats(ZERO), floats(ONE)
    for j in range(0, row, 64):
        log_decay = mul(floats(LOG_DECAY), sigmoid(add(load_floats(p[P_W0] + j), load_floats(x[X_W] + j))))
        store_floats(exp(log_decay), at + W * row + j)
        a, kappa = load_floats(x[X_A] + j), mul(load_floats(at + KAPPA * row + j), scale)
        store_floats(kappa, at + KAPPA * row + j)
        store_floats(mul(kappa, a), at + B * row + j)
        k = mul(load_floats(x[X_K] + j), fma(sub(a, one), load_floats(p[P_K_A] + j), one))
        store_floats(k, at + K * row + j)
        bonus = fma(mul(load_floats(x[X_R] + j), k), load_floats(p[P_R_K] + j), bonus)
        v = load_floats(x[X_V] + j)
        v = fma(sub(load_floats(x[X_FIRST] + j), v), load_floats(x[X_VMIX] + j), v)
        store_floats(v, at + V * row + j)
    return total(bonus)


@called
def _update(S: Any, c: Any, r: Any, N: Any) -> None:
    """S = S diag(w) - (S kappa) b^T + v k^T; y = S r, row by row of S (N, N). c: the rows of scratch."""
    for i in range(N):
        removed = ZERO
        for j in range(N):
            removed += S[i, j] * c[KAPPA, j]
        v, y = c[V, i], ZERO
        for j in range(N):
            new = S[i, j] * c[W, j] - removed * c[B, j] + v * c[K, j]
            S[i, j] = new
            y += new * r[j]
        c[Y, i] = y


@called
def _enter(m: Any, x: Any, at: Any, t: Any) -> None:
    """Write token t of the chunk in memory m. Queries and keys are relative to the decay since the chunk began."""
    for j in range(0, chunk.ROW, 64):
        before = load_floats(m + chunk.DECAY * chunk.ROW + j)
        decay = mul(before, load_floats(at + W * chunk.ROW + j))
        growth = div(floats(ONE), decay)
        store_floats(decay, m + chunk.DECAY * chunk.ROW + j)
        kappa = load_floats(at + KAPPA * chunk.ROW + j)
        place = m + t * chunk.ROW + j
        store_floats(mul(mul(kappa, floats(-ONE)), before), place + chunk.QUERIES * chunk.ROW)
        store_floats(mul(load_floats(x[X_R] + j), decay), place + (chunk.QUERIES + chunk.C) * chunk.ROW)
        store_floats(mul(load_floats(at + B * chunk.ROW + j), growth), place + chunk.KEYS * chunk.ROW)
        key = mul(load_floats(at + K * chunk.ROW + j), growth)
        store_floats(key, place + (chunk.KEYS + chunk.C) * chunk.ROW)
        store_floats(load_floats(at + V * chunk.ROW + j), place + (chunk.VALUES + chunk.C) * chunk.ROW)


@called
def _finish(out: Any, v: Any, bonus: Any, gate: Any, p: Any, N: Any, y: Any) -> None:
    """y = (group norm of out + bonus * v) * gate."""
    mean, scale = moments(out, N)
    for j in range(0, 4 * padded(N), 64):
        normal = mul(sub(load_floats(out + j), floats(mean)), floats(scale))
        normal = fma(normal, load_floats(p[P_WEIGHT] + j), load_floats(p[P_BIAS] + j))
        normal = fma(floats(bonus), load_floats(v + j), normal)
        store_floats(mul(normal, load_floats(gate + j)), y + j)


@called
def _chunks(a: Any, x: Any, p: Any, at: Any, m: Any, bonuses: Any, first: Any, step: Any, count: Any) -> None:
    """Compute a unit, `count` rows of a head, in chunks. The memory m of a chunk holds the head's state, transposed."""
    for begin in range(0, count, chunk.C):
        tokens = min(chunk.C, count - begin)
        chunk.start(m)
        for t in range(begin + chunk.C, min(begin + 2 * chunk.C, count)):
            prefetch_inputs(a, INPUTS, first + t * step)
        for t in range(tokens):
            read_inputs(a, INPUTS, first + (begin + t) * step, x, at)
            bonuses[t] = _prepare(x, p, at, chunk.ROW)
            _enter(m, x, at, t)
        chunk.advance_v7(m, tokens)
        for t in range(tokens):
            place = first + (begin + t) * step
            out, v = m + (chunk.OUT + chunk.C + t) * chunk.ROW, m + (chunk.VALUES + chunk.C + t) * chunk.ROW
            _finish(out, v, bonuses[t], a[A_VALUES + X_G] + place, p, chunk.N, a[A_Y] + place)


@recurrence
def run(where: Any, begin: Any, end: Any) -> None:
    """Write y and update the states of units `begin` to `end`, which are heads of segments."""
    a = arguments(where)
    N = a[A_N]
    scratch, m = np.zeros((SCRATCH, padded(N)), np.float32), np.empty((chunk.ROWS, chunk.N), np.float32)
    at, memory, row = np.int64(scratch.ctypes.data), np.int64(m.ctypes.data), 4 * padded(N)
    # Addresses of a token's inputs and of a head's parameters; the bonuses of a chunk's tokens.
    x, p, bonuses = np.empty(INPUTS, np.int64), np.empty(PARAMETERS, np.int64), np.empty(chunk.C, np.float32)
    for unit in range(begin, end):
        first, step, count, h, state = head_at(a, unit)
        read_parameters(a, PARAMETERS, h, p, at + INPUTS * row)
        if N == chunk.N and count >= chunk.SHORTEST:
            chunk.transpose_state(state, memory)
            _chunks(a, x, p, at, memory, bonuses, first, step, count)
            chunk.transpose_state(memory, state)
            continue
        S = array(state, (N, N))
        for t in range(count):
            read_inputs(a, INPUTS, first + t * step, x, at)
            bonus, r = _prepare(x, p, at, row), array(x[X_R], (N,))
            if N == 64:  # LLVM compiles this call for the usual head size
                _update(S, scratch, r, 64)
            else:
                _update(S, scratch, r, N)
            _finish(at + Y * row, at + V * row, bonus, x[X_G], p, N, at + Y * row)
            write_output(at + Y * row, a[A_Y] + first + t * step, N)
    # numba frees an array after its last use by name. Without these, `at` and `memory` would point to freed memory.
    scratch[0, 0] = m[0, 0] = ZERO
