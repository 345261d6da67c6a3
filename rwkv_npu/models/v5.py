"""RWKV-5 (Eagle, arXiv 2404.05892): a matrix state per head with a fixed decay.

5.0 has one decay per head and no gate, 5.1 a gate, 5.2 a decay per channel; they differ in nothing else.
Letters: T tokens, B sequences, H heads, N head size, A = H*N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rwkv_npu.models.common import Arrays, group_norm, heads, wkv
from rwkv_npu.models.maths import Maths, sigmoid
from rwkv_npu.models.spec import Spec, att_inputs
from rwkv_npu.models.v4 import ffn, ffn_mix

__all__ = ["att_in", "att_mix", "ffn", "ffn_mix", "prepare", "time_mix"]


def att_mix(f: Maths, h: Any, previous: Any, spec: Spec) -> dict[str, Any]:
    d = h - previous
    return {x.name: previous + d * f.vector(f"att.time_mix_{x.name[1]}") for x in att_inputs(spec)}


def att_in(f: Maths, x: dict[str, Any], layer: int) -> dict[str, Any]:
    out = {
        "r": f.linear(x["xr"], "att.receptance.weight"),
        "k": f.linear(x["xk"], "att.key.weight"),
        "v": f.linear(x["xv"], "att.value.weight"),
    }
    if "xg" in x:
        out["g"] = f.linear(x["xg"], "att.gate.weight")
    return out


def prepare(vector: Callable[[str], np.ndarray], spec: Spec) -> Arrays:
    """Parameters of a layer's recurrence: log_w = -exp(time_decay) and u, both (H, N), and the group norm's."""

    def per_channel(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x.reshape(spec.H, -1), (spec.H, spec.N))

    return {
        "log_w": -np.exp(per_channel(vector("att.time_decay")).astype(np.float64)),
        "u": per_channel(vector("att.time_faaaa")),
        "ln_x.weight": vector("att.ln_x.weight"),
        "ln_x.bias": vector("att.ln_x.bias"),
    }


def time_mix(p: Arrays, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
    """r, k, v, g (T, B, A) -> y (T, B, A), normalised and gated. `att.wkv` (B, H, N, N) is updated in place."""
    H = len(p["u"])
    r, k, v = (heads(x[c], H) for c in "rkv")
    log_w = np.broadcast_to(p["log_w"], r.shape)
    y = group_norm(wkv(r, log_w, p["u"], k, v, state["att.wkv"]), p["ln_x.weight"], p["ln_x.bias"])
    return y * x["g"] * sigmoid(x["g"]) if "g" in x else y
