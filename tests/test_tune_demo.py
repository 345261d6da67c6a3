"""The demo model fine-tuned in PyTorch: a bundle with the adapter writes what PyTorch writes, and learnt the text."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import rwkv_npu
from rwkv_npu.model import demo_model
from tests.conversions import convert

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TEXT = "Return the purple kettle to the seventh lighthouse before the parrots begin to sing. " * 2


def test_a_tuned_demo_model_writes_as_in_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("tune_demo")
    vocabulary = tool.Vocabulary.read(tool.DEMO / "vocab.txt")
    ids = vocabulary.encode(TEXT)
    tuned = tool.load_weights(demo_model())
    torch.save(tool.tune(tuned, ids, rank=4, scale=2.0, steps=30), tmp_path / "rwkv-0.pth")
    out = tmp_path / "out.rwkv"
    convert(demo_model(), out, cpu="fp32", adapter=tmp_path / "rwkv-0.pth", adapter_scale=2.0)

    with torch.no_grad():
        expected = tuned(torch.tensor([ids]))[0][0].numpy()
    with (
        rwkv_npu.load(out, backend="numpy") as model,
        rwkv_npu.load(demo_model(), backend="numpy") as base,
    ):
        found, before = (m.forward(ids, all_logits=True)[0] for m in (model, base))
        written = [step.token for step in model.generate(ids[:6], temperature=0, max_tokens=12)]
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)
    right = [float(np.mean(logits[:-1].argmax(-1) == ids[1:])) for logits in (before, found)]
    assert right[1] > right[0] + 0.3

    given = list(ids[:6])
    with torch.no_grad():
        for _ in range(12):
            given.append(int(tuned(torch.tensor([given]))[0][0, -1, : len(vocabulary)].argmax()))
    assert written == given[6:]
