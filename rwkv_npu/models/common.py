"""Maths that several generations share: the core of the channel mix, the recurrence of v5 and v6, norms over heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_npu.models.maths import Maths
from rwkv_npu.models.spec import Scaling

Arrays = dict[str, np.ndarray]

# BlinkDL's constant for every head size: 1e-5 * head_size_divisor^2 with a divisor of 8.
GROUP_NORM_EPS = np.float32(64e-5)

CHUNK = 32  # tokens in one chunk of a recurrence: see `wkv` here and in v7

# A chunk divides by its cumulative decay. Above e^-40 the quotients stay well inside fp32.
_MAX_LOG_DECAY = 40.0


def squared_relu_mix(f: Maths, xk: Any, layer: int, scaling: Scaling, gate: Any = None) -> Any:
    """Wv(relu(Wk xk)^2 [* gate]), times the layer's factor on the residual: (M, D) -> (M, D).

    The pre-activation is divided by the layer's `channel_mix` scale s, and the second product is multiplied by s^2.
    So neither the square nor the sums of the second product leave fp16's range. s is a power of two: this is exact.
    """
    s = scaling.channel_mix(layer)
    k = f.relu(f.linear(scale(xk, 1 / s), "ffn.key.weight"))
    k = k * k
    if gate is not None:
        k = k * gate
    return scale(f.linear(k, "ffn.value.weight"), s**2 * scaling.residual(layer))


def scale(x: Any, factor: float) -> Any:
    """x * factor. A factor of 1 adds no operation to a graph."""
    return x if factor == 1 else x * factor


def group_norm(y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(T, B, H, N) -> (T, B, H*N): each head is normalised, then scaled and shifted by weight and bias (H*N,)."""
    T, B, H, N = y.shape
    centred = y - y.mean(-1, keepdims=True)
    centred /= np.sqrt(np.square(centred).mean(-1, keepdims=True) + GROUP_NORM_EPS)
    return centred.reshape(T, B, H * N) * weight + bias


def heads(x: np.ndarray, H: int) -> np.ndarray:
    """(T, B, A) -> (T, B, H, N)."""
    return x.reshape(*x.shape[:2], H, -1)


def outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(..., I), (..., J) -> (..., I, J)."""
    return a[..., :, None] * b[..., None, :]


def wkv(
    r: np.ndarray, log_w: np.ndarray, u: np.ndarray, k: np.ndarray, v: np.ndarray, S: np.ndarray
) -> np.ndarray:
    """Recurrence of v5 and v6 (Eagle and Finch, arXiv 2404.05892): y_t = S r + v (u*k . r); S = S w + v k^T.

    r, k, v (T, B, H, N); log_w (T, B, H, N), the logarithm of the decay; u (H, N).
    S (B, H, N, N), in the order [v, k], is updated in place. Returns (T, B, H, N).
    """
    y = np.empty_like(v)
    start = 0
    while start < len(r):
        stop = _safe_chunk(log_w, start)
        rows = slice(start, stop)
        part = (r[rows], log_w[rows], u, k[rows], v[rows], S)
        y[rows] = _wkv_step(*part) if stop - start == 1 else _wkv_chunk(*part)
        start = stop
    return y


def _safe_chunk(log_w: np.ndarray, start: int) -> int:
    """End of the chunk from `start`: CHUNK tokens, halved until dividing by their cumulative decay is safe."""
    length = min(CHUNK, len(log_w) - start)
    while length > 1 and log_w[start : start + length].sum(0).min() < -_MAX_LOG_DECAY:
        length //= 2
    return start + length


def _exp(log_w: np.ndarray) -> np.ndarray:
    """exp, rounded to fp32 from fp64. The state accumulates the error of a decay near 1 over thousands of tokens."""
    return np.exp(log_w, dtype=np.float64).astype(np.float32)


def _wkv_step(
    r: np.ndarray, log_w: np.ndarray, u: np.ndarray, k: np.ndarray, v: np.ndarray, S: np.ndarray
) -> np.ndarray:
    r, w, k, v = r[0], _exp(log_w[0]), k[0], v[0]
    y = (S @ r[..., None])[..., 0] + v * (u * k * r).sum(-1, keepdims=True)
    S *= w[..., None, :]
    S += outer(v, k)
    return y[None]


def _wkv_chunk(
    r: np.ndarray, log_w: np.ndarray, u: np.ndarray, k: np.ndarray, v: np.ndarray, S: np.ndarray
) -> np.ndarray:
    """`wkv` for C tokens at once, as matrix products over time within each head."""
    by_head = (1, 2, 0, 3)  # (C, B, H, N) -> (B, H, C, N)
    log_gamma = np.cumsum(log_w, 0, dtype=np.float64)
    gamma = _exp(log_gamma)
    decayed_r = (r * _exp(log_gamma - log_w)).transpose(by_head)
    grown_k = (k / gamma).transpose(by_head)
    values = v.transpose(by_head)
    scores = np.tril(decayed_r @ grown_k.swapaxes(-1, -2), -1)
    bonus = (r * u * k).sum(-1).transpose(1, 2, 0)[..., None]  # (B, H, C, 1): each token's own term
    y = scores @ values + bonus * values + decayed_r @ S.swapaxes(-1, -2)
    S += values.swapaxes(-1, -2) @ grown_k
    S *= gamma[-1][..., None, :]
    return y.transpose(2, 0, 1, 3)
