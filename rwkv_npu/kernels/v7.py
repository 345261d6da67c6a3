"""RWKV-7 and 7a: `models.v7.time_mix`, compiled.

Letters: t of M rows, h of H heads, N head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.kernels.parts import (
    ONE,
    ZERO,
    arguments,
    exp,
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
from rwkv_npu.models.v7 import LOG_DECAY, NORM_FLOOR

P_W0, P_K_K, P_K_A, P_R_K, P_WEIGHT, P_BIAS, PARAMETERS = range(7)
X_R, X_W, X_K, X_V, X_A, X_G, X_VMIX, X_FIRST = range(8)
TURN = 16  # tokens for which it pays to turn a state and to turn it back

# Rows of the scratch array: what a token brings to the state of a head, and what it gets.
R, W, K, V, KAPPA, B, Y, REMOVED = range(8)


def parameters(p: Arrays) -> tuple[np.ndarray, ...]:
    names = ("w0", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")
    return tuple(p[name] for name in names)


def inputs(x: Arrays, carry: Arrays) -> tuple[np.ndarray, ...]:
    """Layer 0 mixes nothing in: v + (v - v) * v is v."""
    if "vmix" not in x:
        carry["v_first"] = x["v"]
    return *(x[name] for name in "rwkvag"), x.get("vmix", x["v"]), carry["v_first"]


@inlined
def _bring(x: Any, p: Any, c: Any, t: Any, h: Any, N: Any) -> None:
    square = ZERO
    for j in range(N):
        kappa = x[X_K][t, h, j] * p[P_K_K, h, j]
        c[KAPPA, j] = kappa
        square += kappa * kappa
    norm = np.sqrt(square)
    scale = ONE / (NORM_FLOOR if norm < NORM_FLOOR else norm)
    for j in range(N):
        c[W, j] = exp(LOG_DECAY * sigmoid(p[P_W0, h, j] + x[X_W][t, h, j]))
    for j in range(N):
        a = x[X_A][t, h, j]
        kappa = c[KAPPA, j] * scale
        c[KAPPA, j] = kappa
        c[B, j] = kappa * a
        c[K, j] = x[X_K][t, h, j] * (ONE + (a - ONE) * p[P_K_A, h, j])
    for j in range(N):
        v = x[X_V][t, h, j]
        c[V, j] = v + (x[X_FIRST][t, h, j] - v) * x[X_VMIX][t, h, j]
        c[R, j] = x[X_R][t, h, j]


@inlined
def _update(S: Any, c: Any, N: Any) -> None:
    """S = S diag(w) - (S kappa) b^T + v k^T; y = S r. One row of S (N, N) after the other."""
    for i in range(N):
        removed = ZERO
        for j in range(N):
            removed += S[i, j] * c[KAPPA, j]
        v, y = c[V, i], ZERO
        for j in range(N):
            new = S[i, j] * c[W, j] - removed * c[B, j] + v * c[K, j]
            S[i, j] = new
            y += new * c[R, j]
        c[Y, i] = y


@inlined
def _transpose(source: Any, target: Any) -> None:
    for i in range(len(source)):
        for j in range(len(source)):
            target[j, i] = source[i, j]


@inlined
def _update_turned(S: Any, c: Any, N: Any) -> None:
    """The same over S^T: sums run down the columns, so that nothing is added up across a vector."""
    for i in range(N):
        c[REMOVED, i] = ZERO
        c[Y, i] = ZERO
    half = N // 2
    for j in range(half):
        kappa, kappa_ = c[KAPPA, j], c[KAPPA, j + half]
        for i in range(N):
            c[REMOVED, i] += S[j, i] * kappa + S[j + half, i] * kappa_
    for j in range(half):
        w, b, k, r = c[W, j], c[B, j], c[K, j], c[R, j]
        w_, b_, k_, r_ = c[W, j + half], c[B, j + half], c[K, j + half], c[R, j + half]
        for i in range(N):
            v, removed = c[V, i], c[REMOVED, i]
            new = S[j, i] * w - removed * b + v * k
            new_ = S[j + half, i] * w_ - removed * b_ + v * k_
            S[j, i] = new
            S[j + half, i] = new_
            c[Y, i] += new * r + new_ * r_


@inlined
def _get(x: Any, p: Any, c: Any, y: Any, t: Any, h: Any, N: Any) -> None:
    """Group norm, bonus and gate."""
    mean, scale = moments(c[Y], N)
    bonus = ZERO
    for j in range(N):
        bonus += c[R, j] * c[K, j] * p[P_R_K, h, j]
    for j in range(N):
        normal = (c[Y, j] - mean) * scale * p[P_WEIGHT, h, j] + p[P_BIAS, h, j]
        y[t, h, j] = (normal + bonus * c[V, j]) * x[X_G][t, h, j]


@recurrence
def run(at: Any, begin: Any, end: Any) -> None:
    """Units `begin` to `end`: heads of segments. y is written, the states are updated."""
    a = arguments(at)
    x = (
        values(a, X_R),
        values(a, X_W),
        values(a, X_K),
        values(a, X_V),
        values(a, X_A),
        values(a, X_G),
        values(a, X_VMIX),
        values(a, X_FIRST),
    )
    p, y = table(a, PARAMETERS), result(a)
    H, N = p.shape[1:]
    c = np.empty((8, N), np.float32)
    turned = np.empty((N, N), np.float32)
    for unit in range(begin, end):
        number, h = unit // H, unit % H
        first, last = segment(a, number)
        S = matrices(a, number)[h]
        turn = N == 64 and last - first >= TURN
        if turn:
            _transpose(S, turned)
        for t in range(first, last):
            _bring(x, p, c, t, h, N)
            if turn:
                _update_turned(turned, c, 64)
            elif N == 64:
                _update(S, c, 64)
            else:
                _update(S, c, N)
            _get(x, p, c, y, t, h, N)
        if turn:
            _transpose(turned, S)
