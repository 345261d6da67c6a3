"""fp16 range scaling: no value exceeds an eighth of fp16's largest number, and no result changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_npu.conversion.calibration import calibrate
from rwkv_npu.conversion.fp16_range import LIMIT, choose_scaling, magnitudes, too_large
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.state import new_state
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.network import Network
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Scaling
from rwkv_npu.runtime.weights import CheckpointSource
from tests.tiny import V, write_model

IDS = np.random.default_rng(2).integers(0, V, 64)


class Louder(CheckpointSource):
    """A model in which the tensors whose names have these ends are multiplied."""

    def __init__(self, path: Path, fusion: str, factors: dict[str, float]):
        super().__init__(open_checkpoint(path), fusion)
        self._factors = factors

    def tensor(self, name: str) -> np.ndarray:
        factor = next((factor for end, factor in self._factors.items() if name.endswith(end)), 1.0)
        return super().tensor(name) * np.float32(factor)

    def scaled(self, scaling: Scaling) -> Louder:
        self.program = replace(self.program, scaling=scaling)
        return self


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for generation in GENERATIONS:
        write_model(path / f"{generation}.pth", generation, vocabulary=False, L=3)
    return path


def logits(source: CheckpointSource) -> np.ndarray:
    network, maths = Network(source.program, source.tensor), NumpyMaths(source.tensor)
    state = new_state(source.spec, source.fingerprint, {})

    def run(group, inputs):  # type: ignore[no-untyped-def]
        return source.program.evaluate(group, maths, dict(inputs))

    return network.logits(run, network.hidden(run, Rows([IDS], [state.parts])))


def in_the_graphs(source: CheckpointSource) -> dict[str, float]:
    """The magnitudes of a pass with the source's own scaling."""
    seen = calibrate(source, IDS, rows=16, keep=2)
    return {**seen.absmax, **{f"{label}.in": float(s.absmax.max()) for label, s in seen.projections.items()}}


def check(path: Path, factors: dict[str, float]) -> Scaling:
    plain = Louder(path, "layer", factors)
    seen = calibrate(plain, IDS, rows=16, keep=2)
    scaling = choose_scaling(plain.spec, seen)
    assert too_large(magnitudes(plain.spec, seen, scaling)) == {}
    expected = logits(plain)
    for fusion in FUSIONS:
        source = Louder(path, fusion, factors).scaled(scaling)
        assert max(in_the_graphs(source).values()) <= LIMIT
        assert np.abs(logits(source) - expected).max() < 1e-4 * np.abs(expected).max()
    return scaling


@pytest.mark.parametrize("generation", GENERATIONS)
def test_scaled_activations_stay_below_the_limit(folder: Path, generation: str) -> None:
    factors = {"ffn.key.weight": 400.0, "ffn.value.weight": 0.3, "att.output.weight": 3e4, "ln0.weight": 3e4}
    loud = Louder(folder / f"{generation}.pth", "layer", factors)
    before = too_large(magnitudes(loud.spec, calibrate(loud, IDS, rows=16, keep=2), Scaling()))
    assert {"blocks.0.square", "blocks.0.ln1", "blocks.2.ln2"} <= before.keys()
    assert list(before.values()) == sorted(before.values(), reverse=True)
    check(folder / f"{generation}.pth", {**factors, "ln0.weight": 1.0})


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_model_of_small_activations_is_not_scaled(folder: Path, generation: str) -> None:
    assert check(folder / f"{generation}.pth", {}) == Scaling(layers=((1.0, 1.0),) * 3)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(-3, 3), st.floats(-3, 4), st.floats(-3, 5))
def test_the_limit_holds_for_any_large_activation(
    folder: Path, key: float, value: float, output: float
) -> None:
    factors = {"ffn.key.weight": 10**key, "ffn.value.weight": 10**value, "att.output.weight": 10**output}
    check(folder / "6.pth", factors)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_magnitudes_under_a_scaling_are_predicted(folder: Path, generation: str) -> None:
    """The prediction equals the magnitudes of a pass with this scaling."""
    path, scaling = folder / f"{generation}.pth", Scaling(layers=((2.0, 0.5), (1.0, 2.0), (8.0, 0.125)))
    plain = Louder(path, "layer", {})
    foretold = magnitudes(plain.spec, calibrate(plain, IDS, rows=16, keep=2), scaling)
    found = in_the_graphs(Louder(path, "layer", {}).scaled(scaling))
    assert found.keys() == {name for name in foretold if not name.endswith(".out") or "ln" in name}
    for name, magnitude in found.items():
        assert magnitude == pytest.approx(foretold[name], rel=1e-3), name


def test_the_scales_are_the_nearest_to_one(folder: Path) -> None:
    """If a scale is not 1, half of it would let an intermediate exceed the limit."""
    plain = Louder(folder / "7.pth", "layer", {"ffn.key.weight": 300.0, "ffn.value.weight": 0.1})
    seen = calibrate(plain, IDS, rows=16, keep=2)
    layers = choose_scaling(plain.spec, seen).layers
    assert any(ffn > 1 for ffn, _ in layers) and any(residual < 1 for _, residual in layers)
    for i, (ffn, residual) in enumerate(layers):
        for part in [(ffn / 2, residual)] * (ffn > 1) + [(ffn, residual * 2)] * (residual < 1):
            nearer = Scaling(layers=(*layers[:i], part, *layers[i + 1 :]))
            assert too_large(magnitudes(plain.spec, seen, nearer))


def test_a_limit_of_an_eighth() -> None:
    assert LIMIT == float(np.finfo(np.float16).max) / 8


def test_scalings_come_back_from_json() -> None:
    for scaling in (Scaling(ffn=4.0, residual_every=6), Scaling(layers=((2.0, 1.0), (1.0, 0.5)))):
        data = {"ffn": scaling.ffn, "residual_every": scaling.residual_every}
        data["layers"] = [list(pair) for pair in scaling.layers]
        assert Scaling.from_json(data) == scaling
    assert Scaling.from_json({"ffn": 4.0, "residual_every": 6}) == Scaling(4.0, 6)
