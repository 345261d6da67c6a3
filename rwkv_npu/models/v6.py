"""RWKV-6 (Finch, arXiv 2404.05892): as v5, with mixes and decays that depend on the data.

Letters: T tokens, B sequences, H heads, N head size. The five mixes come in the order w, k, v, r, g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rwkv_npu.models.common import Arrays, group_norm, heads, wkv
from rwkv_npu.models.maths import Maths, sigmoid
from rwkv_npu.models.spec import Spec
from rwkv_npu.models.v4 import ffn

__all__ = ["att_in", "att_mix", "ffn", "ffn_mix", "prepare", "time_mix"]


def att_mix(f: Maths, h: Any, previous: Any, spec: Spec) -> dict[str, Any]:
    return {"h": h, "dx": previous - h}


def att_in(f: Maths, x: dict[str, Any], layer: int) -> dict[str, Any]:
    h, dx = x["h"], x["dx"]
    z = h + dx * f.vector("att.time_maa_x")

    def mixed(index: int, channel: str) -> Any:
        low = f.tanh(f.linear(z, "att.time_maa_w1", index))
        delta = f.linear(low, "att.time_maa_w2", index)
        return h + dx * (delta + f.vector(f"att.time_maa_{channel}"))

    xw, xk, xv, xr, xg = (mixed(index, channel) for index, channel in enumerate("wkvrg"))
    return {
        "r": f.linear(xr, "att.receptance.weight"),
        "w": f.linear(f.tanh(f.linear(xw, "att.time_decay_w1")), "att.time_decay_w2"),
        "k": f.linear(xk, "att.key.weight"),
        "v": f.linear(xv, "att.value.weight"),
        "g": f.linear(xg, "att.gate.weight"),
    }


def ffn_mix(f: Maths, h: Any, previous: Any) -> dict[str, Any]:
    dx = previous - h
    return {f"x{c}": h + dx * f.vector(f"ffn.time_maa_{c}") for c in "kr"}


def prepare(vector: Callable[[str], np.ndarray], spec: Spec) -> Arrays:
    """Parameters of a layer's recurrence: time_decay (A,), u (H, N), and the group norm's."""
    return {
        "time_decay": vector("att.time_decay"),
        "u": vector("att.time_faaaa"),
        "ln_x.weight": vector("att.ln_x.weight"),
        "ln_x.bias": vector("att.ln_x.bias"),
    }


def time_mix(p: Arrays, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
    """r, w, k, v, g (T, B, A) -> y (T, B, A), normalised and gated. `att.wkv` (B, H, N, N) is updated in place.

    w is the low-rank part of the decay: its sum with time_decay and both exponentials stay in fp32.
    """
    H = len(p["u"])
    r, k, v = (heads(x[c], H) for c in "rkv")
    log_w = heads(-np.exp(p["time_decay"] + x["w"]), H)
    y = group_norm(wkv(r, log_w, p["u"], k, v, state["att.wkv"]), p["ln_x.weight"], p["ln_x.bias"])
    return y * x["g"] * sigmoid(x["g"])
