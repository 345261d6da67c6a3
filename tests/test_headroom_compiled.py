"""Loud models in Rockchip's simulator, over a long context: what overflows without scales does not with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import rwkv_npu
from rwkv_npu import headroom
from rwkv_npu.bundle import open_bundle
from rwkv_npu.errors import BackendError
from rwkv_npu.evaluation import evaluate
from rwkv_npu.toolkit import Environment
from tools.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.compiler

LOUD = {"ffn.key.weight": 1000.0, "ffn.value.weight": 1e-3}
TOKENS = 1024


@pytest.fixture(scope="module", params=["4", "7"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toolkit_environment: Environment
) -> Path:
    path = tmp_path_factory.mktemp("loud") / f"{request.param}.pth"
    make_checkpoint(path, generation=request.param, D=128, L=2, N=64, V=256, seed=1, dtype="fp32")
    weights = torch.load(path, weights_only=True)
    factors = {k: next((f for end, f in LOUD.items() if k.endswith(end)), 1.0) for k in weights}
    torch.save({k: v * factors[k] for k, v in weights.items()}, path)
    return path


def test_chosen_scales_hold_over_a_long_context(checkpoint: Path) -> None:
    out = rwkv_npu.convert(checkpoint, checkpoint.with_suffix(".rwkv"), rows=64, cpu="fp16")
    assert open_bundle(out).manifest.headroom["largest"] <= 8188
    ids = np.random.default_rng(0).integers(1, 256, TOKENS)
    with (
        rwkv_npu.load(out, backend="rknn-sim") as model,
        rwkv_npu.load(checkpoint, backend="numpy") as reference,
    ):
        found = evaluate(model, ids, reference=reference)
    assert found.kl_mean is not None and found.kl_mean < 1e-3
    assert found.positions[-1].begin == 512


def test_without_them_it_overflows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "keep_in_range", lambda *arguments: None)
    out = rwkv_npu.convert(checkpoint, checkpoint.with_suffix(".plain.rwkv"), rows=64, cpu="fp16")
    ids = np.random.default_rng(0).integers(1, 256, 64)
    with rwkv_npu.load(out, backend="rknn-sim") as model, pytest.raises(BackendError, match="not finite"):
        evaluate(model, ids)
