"""RWKV-6 of flash-linear-attention: read to the logits of its own maths, written here in PyTorch over its own names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import group_norm, layer_norm, linear, silu

import rwkv_npu
from tests.checkpoints import refused

D, L, H, V, F, MIX, DECAY = 64, 2, 4, 96, 96, 8, 16
EPS = 1e-5
IDS = [3, 17, 90, 5, 5, 41]
Weights = dict[str, torch.Tensor]


def random_weights() -> Weights:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * size

    w = {"model.embeddings.weight": normal(V, D), "lm_head.weight": normal(V, D)}
    norms = ["model.norm", "model.layers.0.pre_norm"]
    for i in range(L):
        p = f"model.layers.{i}."
        norms += [f"{p}attn_norm", f"{p}ffn_norm", f"{p}attn.g_norm"]
        w |= {f"{p}attn.{c}_proj.linear.weight": normal(D, D) for c in "rkvg"}
        w |= {
            f"{p}attn.o_proj.weight": normal(D, D),
            f"{p}attn.x_proj.0.mu": normal(D),
            f"{p}attn.x_proj.0.linear.weight": normal(5 * MIX, D),
            f"{p}attn.x_proj.2.weight": normal(D, 5 * MIX),
            f"{p}attn.x_bias": normal(5, D),
            f"{p}attn.w_proj.linear.lora.0.weight": normal(DECAY, D),
            f"{p}attn.w_proj.linear.lora.2.weight": normal(D, DECAY),
            f"{p}attn.w_proj.linear.lora.2.bias": normal(D) - 2,
            f"{p}attn.bonus": normal(H, D // H),
            f"{p}ffn.key.linear.weight": normal(F, D),
            f"{p}ffn.key.mu": normal(D),
            f"{p}ffn.receptance.linear.weight": normal(D, D),
            f"{p}ffn.receptance.mu": normal(D),
            f"{p}ffn.value.weight": normal(D, F),
        }
    w |= {f"{name}.weight": 1 + normal(D) for name in norms} | {f"{name}.bias": normal(D) for name in norms}
    for i in range(L):  # small values, beside which the epsilon of the group norm matters
        w[f"model.layers.{i}.attn.v_proj.linear.weight"] *= 0.02
    return w


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], EPS)


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, D), x[:-1]]) - x


def attention(w: Weights, p: str, x: torch.Tensor) -> torch.Tensor:
    """x (T, D). The low ranks choose how much of the token before is mixed into the inputs of r, w, k, v and g."""
    delta, T = shifted(x), len(x)
    low = torch.tanh(linear(x + delta * w[p + "x_proj.0.mu"], w[p + "x_proj.0.linear.weight"]))
    mu = torch.einsum("tnr,hnr->tnh", low.view(T, 5, MIX), w[p + "x_proj.2.weight"].view(D, 5, MIX))
    inputs = (x + delta * (mu[:, n] + w[p + "x_bias"][n]) for n in range(5))
    xr, xw, xk, xv, xg = inputs
    r, k, v, g = (
        linear(input_, w[f"{p}{c}_proj.linear.weight"])
        for c, input_ in zip("rkvg", (xr, xk, xv, xg), strict=True)
    )
    decay = torch.tanh(linear(xw, w[p + "w_proj.linear.lora.0.weight"]))
    decay = linear(decay, w[p + "w_proj.linear.lora.2.weight"], w[p + "w_proj.linear.lora.2.bias"])
    decay = torch.exp(-torch.exp(decay))
    r, k, v, decay = (a.view(T, H, D // H) for a in (r, k, v, decay))
    state, out = torch.zeros(H, D // H, D // H), []
    for t in range(T):
        pair = k[t, :, :, None] * v[t, :, None, :]  # (H, key, value)
        out.append((r[t, :, :, None] * (w[p + "bonus"][:, :, None] * pair + state)).sum(1))
        state = decay[t, :, :, None] * state + pair
    y = group_norm(torch.stack(out).view(T, D), H, w[p + "g_norm.weight"], w[p + "g_norm.bias"], EPS)
    return linear(y * silu(g), w[p + "o_proj.weight"])


def channel_mix(w: Weights, p: str, x: torch.Tensor) -> torch.Tensor:
    delta = shifted(x)
    key = linear(x + delta * w[p + "key.mu"], w[p + "key.linear.weight"]).relu().square()
    gate = linear(x + delta * w[p + "receptance.mu"], w[p + "receptance.linear.weight"]).sigmoid()
    return gate * linear(key, w[p + "value.weight"])


def reference(w: Weights) -> np.ndarray:
    x = norm(w, "model.layers.0.pre_norm", w["model.embeddings.weight"][IDS])
    for i in range(L):
        p = f"model.layers.{i}."
        x = x + attention(w, p + "attn.", norm(w, p + "attn_norm", x))
        x = x + channel_mix(w, p + "ffn.", norm(w, p + "ffn_norm", x))
    return linear(norm(w, "model.norm", x), w["lm_head.weight"]).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_flas_maths(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in random_weights().items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "rwkv6", "expand_k": 1.0, "norm_eps": 1e-5})
    )
    expected = reference({name: tensor.float() for name, tensor in weights.items()})
    with rwkv_npu.load(tmp_path, backend="numpy", tokenizer=None) as model:
        assert model.spec.generation == "6" and model.spec.ranks == {"mix": MIX, "decay": DECAY}
        found, _ = model.forward(IDS, all_logits=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attn": {"layers": [1], "num_heads": 4}}, "a hybrid, whose layers with attention"),
        ({"expand_k": 0.5}, "sets expand_k to 0.5"),
    ],
)
def test_other_maths_is_refused(tmp_path: Path, config: dict[str, object], said: str) -> None:
    save_file(random_weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv6", **config}))
    refused(tmp_path, said)
