"""RWKV-4 (Dove, arXiv 2305.13048): scalar attention per channel, kept in range by its running maximum.

Letters: T tokens, B sequences, A attention width. Names of tensors are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rwkv_npu.models.common import Arrays, squared_relu_mix
from rwkv_npu.models.maths import Maths, sigmoid
from rwkv_npu.models.spec import Scaling, Spec


def att_mix(f: Maths, h: Any, previous: Any, spec: Spec) -> dict[str, Any]:
    d = h - previous
    return {f"x{c}": previous + d * f.vector(f"att.time_mix_{c}") for c in "rkv"}


def att_in(f: Maths, x: dict[str, Any], layer: int) -> dict[str, Any]:
    return {
        "r": f.linear(x["xr"], "att.receptance.weight"),
        "k": f.linear(x["xk"], "att.key.weight"),
        "v": f.linear(x["xv"], "att.value.weight"),
    }


def ffn_mix(f: Maths, h: Any, previous: Any) -> dict[str, Any]:
    d = h - previous
    return {f"x{c}": previous + d * f.vector(f"ffn.time_mix_{c}") for c in "kr"}


def ffn(f: Maths, x: dict[str, Any], layer: int, scaling: Scaling) -> Any:
    receptance = f.sigmoid(f.linear(x["xr"], "ffn.receptance.weight"))
    return receptance * squared_relu_mix(f, x["xk"], layer, scaling)


def prepare(vector: Callable[[str], np.ndarray], spec: Spec) -> Arrays:
    """Parameters of a layer's recurrence: w = -exp(time_decay) and u, both (A,)."""
    return {"w": -np.exp(vector("att.time_decay")), "u": vector("att.time_first")}


def time_mix(p: Arrays, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
    """r, k, v (T, B, A) -> y (T, B, A), gated. `att.{a,b,q}` (B, A) of the state are updated in place."""
    a, b, q = state["att.a"], state["att.b"], state["att.q"]
    y = np.empty_like(x["v"])
    for t, (k, v) in enumerate(zip(x["k"], x["v"], strict=True)):
        top = np.maximum(q, p["u"] + k)
        old, new = np.exp(q - top), np.exp(p["u"] + k - top)
        y[t] = (old * a + new * v) / (old * b + new)
        top = np.maximum(q + p["w"], k)
        old, new = np.exp(q + p["w"] - top), np.exp(k - top)
        a[:] = old * a + new * v
        b[:] = old * b + new
        q[:] = top
    return sigmoid(x["r"]) * y
