"""Models of large activations in Rockchip's simulator, over a long context: only without scales do they overflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rwkv_npu
from rwkv_npu.backends.base import relative_error
from rwkv_npu.conversion.calibration import calibrate
from rwkv_npu.conversion.fp16_range import LARGEST, LIMIT, choose_scaling
from rwkv_npu.evaluation import evaluate
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import Scaling
from rwkv_npu.runtime.selftest import golden_vectors
from rwkv_npu.runtime.weights import CheckpointSource
from rwkv_npu.toolkit import Environment, Simulator
from tests.compiler_graphs import compiler_model
from tests.fake_compiler import stand_in
from tools.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.compiler

GROWTH = (300.0, 1e4, 2e5)  # of what each layer adds to the residual
KEY = 1e3  # and of the channel mix's pre-activation, whose square is the second thing that leaves fp16
ROWS = 64
IDS = np.random.default_rng(0).integers(1, 256, 1024)


@pytest.fixture(scope="module", params=["4", "5.2", "6", "7"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toolkit_environment: Environment
) -> Path:
    path = tmp_path_factory.mktemp("loud") / f"{request.param}.pth"
    sizes = {"D": 128, "L": len(GROWTH), "N": 64, "V": 256}
    make_checkpoint(path, generation=request.param, seed=1, dtype="fp32", **sizes)
    weights = torch.load(path, weights_only=True)
    for layer, growth in enumerate(GROWTH):
        weights[f"blocks.{layer}.att.output.weight"] *= growth
        weights[f"blocks.{layer}.ffn.key.weight"] *= KEY
        weights[f"blocks.{layer}.ffn.value.weight"] *= growth / KEY**2
    torch.save(weights, path)
    return path


def test_chosen_scales_hold_over_a_long_context(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales were chosen with another text."""
    stand_in(monkeypatch)  # the simulator compiles by itself
    out = rwkv_npu.convert(checkpoint, checkpoint.with_suffix(".rwkv"), rows=ROWS, cpu="fp16")
    manifest = open_bundle(out).manifest
    assert manifest.headroom["largest"] <= LIMIT
    squared, residual = zip(*manifest.scaling.layers, strict=True)
    assert min(squared) > 1 and residual[0] == 1 > residual[1] > residual[2]
    with (
        rwkv_npu.load(out, backend="rknn-sim") as model,
        rwkv_npu.load(checkpoint, backend="numpy") as reference,
    ):
        found = evaluate(model, IDS, reference=reference)
    assert [position.begin for position in found.positions] == [0, 64, 512]
    costs = [position.kl_mean or np.inf for position in found.positions]
    assert max(costs) < 1e-3 and costs[-1] < 2 * costs[0]  # and none of it adds up


@pytest.mark.parametrize("missing", ["squares", "residual", ""])
def test_each_of_the_scales_is_needed(
    checkpoint: Path, missing: str, toolkit_environment: Environment, tmp_path: Path
) -> None:
    """With all scales the last group equals NumPy's, and without the scales of one kind it does not."""
    source = CheckpointSource(open_checkpoint(checkpoint))
    scaling = choose_scaling(source.spec, calibrate(source, IDS, rows=ROWS, keep=2))
    pairs = [
        (1.0 if missing == "squares" else f, 1.0 if missing == "residual" else r) for f, r in scaling.layers
    ]
    source.program = replace(source.program, scaling=Scaling(layers=tuple(pairs)))
    last = source.program.group("last", source.spec.L - 1)
    recorded = golden_vectors(source, ROWS)[last.name]
    assert max(np.abs(array).max() for array in recorded.inputs.values()) < LARGEST  # it can be told
    file = tmp_path / "g.onnx"
    file.write_bytes(compiler_model(source.program, last, ROWS, source.tensor).SerializeToString())
    with Simulator(toolkit_environment, file) as simulator:
        error = relative_error(simulator.run(recorded.inputs), recorded.outputs)
    assert error > 0.5 if missing else error < 0.005
