"""RWKV-5.0 to 5.2: `models.v5.time_mix`, compiled; v6.py shares most of it.

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
    inlined,
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
    at_most,
    div,
    floats,
    fma,
    largest,
    load_floats,
    mul,
    sigmoid,
    store_floats,
    sub,
    total,
)
from rwkv_npu.models.common import Arrays

P_W, P_U, P_WEIGHT, P_BIAS, PARAMETERS = range(5)
X_R, X_K, X_V, X_G, INPUTS = range(5)

# Rows of scratch: one for each input and parameter of a head, used if its columns need padding, then one for y.
Y = INPUTS + PARAMETERS
SCRATCH = Y + 1

# e^-40. Keys are divided by the product of a chunk's decays. A chunk ends before the product falls below this, so the
# quotients stay well inside fp32.
LEAST_DECAY = np.float32(4.2e-18)


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    return np.exp(p["log_w"]), p["u"], p["ln_x.weight"], p["ln_x.bias"]


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    return tuple(x[name] for name in "rkvg" if name in x)


# -- shared with v6. Arguments are addresses of rows of whole vectors; row: bytes of a row ------------------


@inlined
def own_score(r: Any, u: Any, k: Any, row: Any) -> Any:
    """The sum of r * u * k: the weight of a token's own value in its output."""
    own = floats(ZERO)
    for j in range(0, row, 64):
        own = fma(mul(load_floats(r + j), load_floats(u + j)), load_floats(k + j), own)
    return total(own)


@called
def step(S: Any, r: Any, w: Any, k: Any, v: Any, y: Any) -> None:
    """y = S r; S = S diag(w) + v k^T, in one pass over S (N, N). The others are arrays (N,)."""
    N = len(S)
    for i in range(N):
        value, out = v[i], ZERO
        for j in range(N):
            old = S[i, j]
            out += old * r[j]
            S[i, j] = old * w[j] + value * k[j]
        y[i] = out


@inlined
def fits(m: Any, w: Any) -> Any:
    """True if one more token, of decay w, fits the chunk in memory m: the decay stays above LEAST_DECAY."""
    least = floats(ONE)
    for j in range(0, chunk.ROW, 64):
        least = at_most(mul(load_floats(m + chunk.DECAY * chunk.ROW + j), load_floats(w + j)), least)
    # The smallest number is minus the largest of the negated ones. `not <` lets NaN pass.
    return not -largest(mul(least, floats(-ONE))) < LEAST_DECAY


@called
def enter(m: Any, t: Any, r: Any, w: Any, k: Any, v: Any, alone: Any) -> None:
    """Write token t of the chunk in memory m: queries times the decay before the token, keys over that after it."""
    for j in range(0, chunk.ROW, 64):
        before = load_floats(m + chunk.DECAY * chunk.ROW + j)
        decay = mul(before, load_floats(w + j))
        store_floats(decay, m + chunk.DECAY * chunk.ROW + j)
        place = m + (chunk.C + t) * chunk.ROW + j
        store_floats(mul(load_floats(r + j), before), place + chunk.QUERIES * chunk.ROW)
        key = load_floats(k + j)
        store_floats(key if alone else div(key, decay), place + chunk.KEYS * chunk.ROW)
        store_floats(load_floats(v + j), place + chunk.VALUES * chunk.ROW)


@called
def finish(out: Any, own: Any, v: Any, weight: Any, bias: Any, gate: Any, N: Any, y: Any) -> None:
    """y = group norm of (out + own * v), times silu(gate) unless the address of gate is 0. out is overwritten."""
    row = 4 * padded(N)
    for j in range(0, row, 64):
        store_floats(fma(floats(own), load_floats(v + j), load_floats(out + j)), out + j)
    mean, scale = moments(out, N)
    for j in range(0, row, 64):
        normal = mul(sub(load_floats(out + j), floats(mean)), floats(scale))
        normal = fma(normal, load_floats(weight + j), load_floats(bias + j))
        if gate:
            g = load_floats(gate + j)
            normal = mul(normal, mul(g, sigmoid(g)))
        store_floats(normal, y + j)


# -- v5 ------------------------------------------------------------------------------------------------------


@called
def _chunks(
    a: Any, given: Any, x: Any, p: Any, at: Any, m: Any, own: Any, first: Any, stride: Any, count: Any
) -> None:
    """Compute a unit, `count` rows of a head, in chunks. The memory m of a chunk holds the head's state, transposed."""
    begin = 0
    while begin < count:
        chunk.start(m)
        tokens, alone = 0, not fits(m, p[P_W])
        while tokens < min(chunk.C, count - begin) and (tokens == 0 or fits(m, p[P_W])):
            place = first + (begin + tokens) * stride
            prefetch_inputs(a, given, place + chunk.C * stride if begin + tokens + chunk.C < count else place)
            read_inputs(a, given, place, x, at)
            own[tokens] = own_score(x[X_R], p[P_U], x[X_K], chunk.ROW)
            enter(m, tokens, x[X_R], p[P_W], x[X_K], x[X_V], alone)
            tokens += 1
        chunk.advance_v5(m, tokens, alone)
        for t in range(tokens):
            place = first + (begin + t) * stride
            out, v = m + (chunk.OUT + chunk.C + t) * chunk.ROW, m + (chunk.VALUES + chunk.C + t) * chunk.ROW
            gate = a[A_VALUES + X_G] + place if given == INPUTS else 0
            finish(out, own[t], v, p[P_WEIGHT], p[P_BIAS], gate, chunk.N, a[A_Y] + place)
        begin += tokens


@recurrence
def run(where: Any, begin: Any, end: Any) -> None:
    """Write y and update the states of units `begin` to `end`, which are heads of segments."""
    a = arguments(where)
    N = a[A_N]
    given = INPUTS if a[A_VALUES + X_G] else X_G  # 5.0 has no gate
    scratch, m = np.zeros((SCRATCH, padded(N)), np.float32), np.empty((chunk.ROWS, chunk.N), np.float32)
    at, memory, row = np.int64(scratch.ctypes.data), np.int64(m.ctypes.data), 4 * padded(N)
    # Addresses of a token's inputs and of a head's parameters; the own scores of a chunk's tokens.
    x, p, own = np.zeros(INPUTS, np.int64), np.empty(PARAMETERS, np.int64), np.empty(chunk.C, np.float32)
    for unit in range(begin, end):
        first, stride, count, h, state = head_at(a, unit)
        read_parameters(a, PARAMETERS, h, p, at + INPUTS * row)
        if N == chunk.N and count >= chunk.SHORTEST:
            chunk.transpose_state(state, memory)
            _chunks(a, given, x, p, at, memory, own, first, stride, count)
            chunk.transpose_state(memory, state)
            continue
        S, w, y = array(state, (N, N)), array(p[P_W], (N,)), scratch[Y]
        for t in range(count):
            read_inputs(a, given, first + t * stride, x, at)
            step(S, array(x[X_R], (N,)), w, array(x[X_K], (N,)), array(x[X_V], (N,)), y)
            score = own_score(x[X_R], p[P_U], x[X_K], row)
            finish(at + Y * row, score, x[X_V], p[P_WEIGHT], p[P_BIAS], x[X_G], N, at + Y * row)
            write_output(at + Y * row, a[A_Y] + first + t * stride, N)
    # numba frees an array after its last use by name. Without these, `at` and `memory` would point to freed memory.
    scratch[0, 0] = m[0, 0] = ZERO
