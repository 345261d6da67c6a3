"""RWKV-7 (Goose, arXiv 2503.14456) and 7a, its variant with DeepEmbed: a matrix state under the delta rule.

Letters: T tokens, B sequences, H heads, N head size, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rwkv_npu.models.common import CHUNK, Arrays, group_norm, heads, squared_relu_mix
from rwkv_npu.models.maths import Maths, sigmoid
from rwkv_npu.models.spec import Scaling, Spec

LOG_DECAY = np.float32(-np.exp(-0.5))  # log of the fastest decay
NORM_FLOOR = np.float32(1e-12)


def att_mix(f: Maths, h: Any, previous: Any, spec: Spec) -> dict[str, Any]:
    dx = previous - h
    return {f"x{c}": h + dx * f.vector(f"att.x_{c}") for c in "rwkvag"}


def att_in(f: Maths, x: dict[str, Any], layer: int) -> dict[str, Any]:
    out = {
        "r": f.linear(x["xr"], "att.receptance.weight"),
        "w": f.linear(f.tanh(f.linear(x["xw"], "att.w1")), "att.w2"),
        "k": f.linear(x["xk"], "att.key.weight"),
        "v": f.linear(x["xv"], "att.value.weight"),
        "a": f.sigmoid(f.linear(f.linear(x["xa"], "att.a1"), "att.a2") + f.vector("att.a0")),
        "g": f.linear(f.sigmoid(f.linear(x["xg"], "att.g1")), "att.g2"),
    }
    if layer > 0:
        out["vmix"] = f.sigmoid(f.linear(f.linear(x["xv"], "att.v1"), "att.v2") + f.vector("att.v0"))
    return out


def ffn_mix(f: Maths, h: Any, previous: Any) -> dict[str, Any]:
    return {"h": h, "xk": h + (previous - h) * f.vector("ffn.x_k")}


def ffn(f: Maths, x: dict[str, Any], layer: int, scaling: Scaling) -> Any:
    """The channel mix. Input `s`, in 7a only, is each token's (R, R) matrix; the gate is computed from it."""
    gate = None
    if "s" in x:
        embedded = f.row_matmul(f.linear(x["h"], "ffn.s1"), x["s"])
        gate = f.linear(embedded, "ffn.s2") + f.vector("ffn.s0")
    return squared_relu_mix(f, x["xk"], layer, scaling, gate)


def prepare(vector: Callable[[str], np.ndarray], spec: Spec) -> Arrays:
    """Parameters of a layer's recurrence: w0, k_k, k_a (A,), r_k (H, N), and the group norm's."""
    return {name: vector("att." + name) for name in ("w0", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")}


def time_mix(p: Arrays, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
    """r, w, k, v, a, g and vmix (T, B, A) -> y (T, B, A), normalised and gated.

    w is the low-rank part of the decay. `att.wkv` (B, H, N, N) is updated in place; `carry["v_first"]` holds
    the values of layer 0, which the later layers mix in.
    """
    H = len(p["r_k"])
    k, v, a = x["k"], x["v"], x["a"]
    if "vmix" in x:
        v = v + (carry["v_first"] - v) * x["vmix"]
    else:
        carry["v_first"] = v
    kappa = heads(k * p["k_k"], H)
    kappa = kappa / np.maximum(np.sqrt(np.square(kappa).sum(-1, keepdims=True)), NORM_FLOOR)
    k = k * (1 + (a - 1) * p["k_a"])
    w = heads(np.exp(LOG_DECAY * sigmoid(p["w0"] + x["w"])), H)
    r, k, v = heads(x["r"], H), heads(k, H), heads(v, H)
    y = wkv(r, w, k, v, kappa, kappa * heads(a, H), state["att.wkv"])
    y = group_norm(y, p["ln_x.weight"], p["ln_x.bias"])
    bonus = (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    return (y + bonus.reshape(y.shape)) * x["g"]


def wkv(
    r: np.ndarray,
    w: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kappa: np.ndarray,
    b: np.ndarray,
    S: np.ndarray,
) -> np.ndarray:
    """S = S diag(w) - (S kappa) b^T + v k^T; y = S r. All (T, B, H, N).

    S (B, H, N, N), in the order [v, k], is updated in place.
    """
    y = np.empty_like(v)
    for start in range(0, len(r), CHUNK):
        rows = slice(start, start + CHUNK)
        part = (r[rows], w[rows], k[rows], v[rows], kappa[rows], b[rows], S)
        y[rows] = _wkv_step(*part) if len(part[0]) == 1 else _wkv_chunk(*part)
    return y


def _wkv_step(
    r: np.ndarray,
    w: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kappa: np.ndarray,
    b: np.ndarray,
    S: np.ndarray,
) -> np.ndarray:
    r, w, k, v, kappa, b = r[0], w[0], k[0], v[0], kappa[0], b[0]
    removed = (S @ kappa[..., None])[..., 0]
    S *= w[..., None, :]
    # One product of rank 2: half the time of two outer products.
    S += np.stack([v, -removed], -1) @ np.stack([k, b], -2)
    return (S @ r[..., None])[None, ..., 0]


def _wkv_chunk(
    r: np.ndarray,
    w: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kappa: np.ndarray,
    b: np.ndarray,
    S: np.ndarray,
) -> np.ndarray:
    """`wkv` for C tokens at once. U, the values that the delta rule writes, solves a triangular system over time.

    Each decay is above exp(-e^-0.5): dividing by the product of CHUNK decays is safe in fp32.
    """
    gamma = np.cumprod(w, 0)
    by_head = (1, 2, 0, 3)  # (C, B, H, N) -> (B, H, C, N)
    alpha = (-kappa * (gamma / w)).transpose(by_head)
    beta, grown_k = ((x / gamma).transpose(by_head) for x in (b, k))
    decayed_r, values = (r * gamma).transpose(by_head), v.transpose(by_head)
    S_T, beta_T, k_T = S.swapaxes(-1, -2), beta.swapaxes(-1, -2), grown_k.swapaxes(-1, -2)
    mixing = np.tril(alpha @ beta_T, -1)
    U = alpha @ S_T + np.tril(alpha @ k_T, -1) @ values
    for t in range(1, len(r)):  # forward substitution: a third of the time of a general solver
        U[..., t, :] += (mixing[..., t, None, :t] @ U[..., :t, :])[..., 0, :]
    y = decayed_r @ S_T + np.tril(decayed_r @ beta_T) @ U + np.tril(decayed_r @ k_T) @ values
    S += U.swapaxes(-1, -2) @ beta + values.swapaxes(-1, -2) @ grown_k
    S *= gamma[-1][..., None, :]
    return y.transpose(2, 0, 1, 3)
