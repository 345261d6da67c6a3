"""The same logits and the same state as the rwkv package and as transformers, which compute them in this run.

Every generation, on every backend that needs no more than a PC, with both fusions, however the tokens are cut
into calls. References: `references.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends import open_backend
from rwkv_npu.formats.checkpoint import open_checkpoint, read_tensors
from rwkv_npu.model import Model
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Scaling, default_scaling, groups
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.weights import CheckpointSource
from tests.faulty import plain_engine
from tests.references import CASES, DEEP_CASES, TOKENS, TRANSFORMERS, Case, Reference, References, V
from tools.make_checkpoint import make_checkpoint

# Largest difference to a reference: of logits that are spread by about 2, and of a part of the state over its
# largest value. Both sides compute in fp32. What is left comes from
#   - the exponential: NumPy's is 1e-7 off for a decay just below 1, torch's 4e-8, and a state of long memory adds
#     that up over all its tokens (v5 and v6; the largest of all differences, some 5e-6);
#   - the package's 0.606531 for e^-1/2 in v7, 3e-7 of a logarithm;
#   - its sequence mode for v5.0 and v5.1, another formula than its token mode, with powers of the decay.
LOGITS_BOUND, STATE_BOUND = 1e-4, 1e-5

# How the tokens are cut into calls; the lengths end, fall into and go beyond the chunks of a recurrence.
CUTS = {"tokens": [1] * len(TOKENS), "sequence": [len(TOKENS)], "ragged": [1, 5, 33, 2, 1, 30]}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[References]:
    references = References(tmp_path_factory.mktemp("references"))
    yield references
    references.close()


def read(engine: Engine | Model, lengths: list[int]) -> Reference:
    """All logits, and the last state, after reading TOKENS in calls of these lengths."""
    logits, state, start = [], None, 0
    for length in lengths:
        some, state = engine.forward(TOKENS[start : start + length], state, all_logits=True)
        logits.append(some)
        start += length
    assert start == len(TOKENS) and state is not None
    return Reference(np.concatenate(logits), state.parts)


def assert_close(ours: Reference, theirs: Reference, slack: float = 1.0) -> None:
    assert 1.5 < theirs.logits.std() < 2.5, "the bound is meant for logits that are spread by 2"
    assert ours.logits.shape == theirs.logits.shape == (len(TOKENS), V)
    assert np.abs(ours.logits - theirs.logits).max() < LOGITS_BOUND * slack
    for name, part in theirs.state.items():
        assert ours.state[name].shape == part.shape, name
        assert np.abs(ours.state[name] - part).max() < STATE_BOUND * slack * np.abs(part).max(), name


# -- the rwkv package ------------------------------------------------------------------------------------

MODELS = [
    (case, backend, fusion)
    for case in CASES
    for backend in ("numpy", "ort", "numba", "torch")
    for fusion in FUSIONS
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0].name}-{param[1]}-{param[2]}")
def model(request: pytest.FixtureRequest, references: References) -> Iterator[tuple[Case, Model]]:
    case, backend, fusion = request.param
    # ONNX Runtime's threads are the process's, and settled by whichever test loads a model first.
    threads = 1 if backend == "torch" else None
    with rwkv_npu.load(references.path(case), backend=backend, fusion=fusion, threads=threads) as model:
        yield case, model


@pytest.mark.parametrize("cut", CUTS)
def test_equals_the_package(model: tuple[Case, Model], cut: str, references: References) -> None:
    case, ours = model
    assert ours.spec.generation == case.generation
    theirs = references.package(case, "one" if cut == "tokens" else "seq")
    assert_close(read(ours, CUTS[cut]), theirs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_package_agrees_with_itself(case: Case, references: References) -> None:
    """The package agrees with itself better than the tolerance of these tests."""
    one, seq = references.package(case, "one"), references.package(case, "seq")
    assert np.abs(one.logits - seq.logits).max() < LOGITS_BOUND / 4
    for name, part in one.state.items():
        assert np.abs(part - seq.state[name]).max() < STATE_BOUND / 4 * np.abs(part).max(), name


# -- scaling against fp16's range ------------------------------------------------------------------------


def scaled_engine(path: Path, backend: str, fusion: str, scaling: Scaling) -> Engine:
    source = CheckpointSource(open_checkpoint(path), fusion)
    source.program = replace(source.program, scaling=scaling)
    return plain_engine(source, open_backend(backend, source))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("backend", ["numpy", "ort", "numba"])
@pytest.mark.parametrize("case", DEEP_CASES, ids=lambda case: case.name)
def test_scaling_changes_no_result(case: Case, backend: str, fusion: str, references: References) -> None:
    # Every generation with a scaled residual as well, whatever the default of its own.
    spec = _spec(references.path(case))
    uneven = Scaling(layers=tuple((2.0 ** (i % 3), 2.0 ** -(1 + 2 * i % 5)) for i in range(spec.L)))
    for scaling in (default_scaling(spec), Scaling(ffn=8.0, residual_every=6), uneven):
        engine = scaled_engine(references.path(case), backend, fusion, scaling)
        assert_close(read(engine, CUTS["ragged"]), references.package(case, "seq"))
        engine.close()


def _spec(path: Path) -> rwkv_npu.Spec:
    return open_checkpoint(path).spec


class Recorder(NumpyMaths):
    """Records the inputs of projections and norms."""

    def __init__(self, weight, prefix="", seen=None):  # type: ignore[no-untyped-def]
        super().__init__(weight, prefix)
        self.seen: dict[str, np.ndarray] = {} if seen is None else seen

    def block(self, layer: int) -> Recorder:
        return Recorder(self._weight, f"blocks.{layer}.", self.seen)

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        self.seen[self._prefix + name] = x
        return super().linear(x, name, index)

    def layer_norm(self, x: np.ndarray, name: str, eps: float = 1e-5) -> np.ndarray:
        self.seen[self._prefix + name] = x
        return super().layer_norm(x, name, eps)


@pytest.mark.parametrize("generation", ["4", "7"])
def test_scaling_makes_smaller_what_overflows(generation: str, references: References) -> None:
    """The squares by 4^2 and the residual of layers 6 and 7 by 2, to the last bit: powers of two are exact."""
    case = next(case for case in DEEP_CASES if case.generation == generation)
    source = CheckpointSource(open_checkpoint(references.path(case)), "layer")
    mid = next(group for group in groups(source.spec, "layer") if group.name == "mid.6")
    rng = np.random.default_rng(0)
    inputs = {port.name: rng.standard_normal((4, port.width)).astype(np.float32) for port in mid.inputs}
    plain, scaled = Recorder(source.tensor), Recorder(source.tensor)
    Program(source.spec, "layer").evaluate(mid, plain, inputs)
    scaling = Scaling(ffn=4.0, residual_every=6)
    Program(source.spec, "layer", scaling).evaluate(mid, scaled, {**inputs, "x": inputs["x"] / 2})
    assert (scaled.seen["blocks.6.ffn.value.weight"] * 16 == plain.seen["blocks.6.ffn.value.weight"]).all()
    assert (scaled.seen["blocks.6.ln2"] * 2 == plain.seen["blocks.6.ln2"]).all()
    assert (scaled.seen["blocks.7.ln1"] * 2 == plain.seen["blocks.7.ln1"]).all()


# -- transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equals_transformers(name: str, fusion: str, references: References) -> None:
    """RWKV-4 from a folder that transformers saved.

    `rescaled` has its default rescale_every of 6: in eval mode it halves the residual after that many layers,
    but leaves the epsilon of its norms as it is.
    """
    folder, theirs = references.transformers(name)
    with rwkv_npu.load(folder, backend="ort", fusion=fusion) as ours:
        assert ours.spec.generation == "4"
        for lengths in CUTS.values():
            assert_close(read(ours, lengths), theirs, slack=4.0 if name == "rescaled" else 1.0)


# -- the same weights in other files ---------------------------------------------------------------------

SMALL = {"D": 96, "N": 32, "L": 3, "V": V, "dtype": "fp32"}
RANKS = {"w": 16, "a": 24, "v": 8, "g": 40}


@pytest.mark.parametrize("form", [{}, {"stacked_mixes": True}, {"shards": 3}], ids=["plain", "x_x", "shards"])
def test_flash_linear_attention_names_are_the_same_model(form: dict[str, bool | int], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "blinkdl.safetensors", generation="7", ranks=RANKS, **SMALL)
    make_checkpoint(tmp_path / "fla", generation="7", ranks=RANKS, hf=True, **SMALL, **form)
    stored = read_tensors(tmp_path / "fla")
    assert stored["model.layers.1.attn.g_lora.lora.0.weight"].shape == (40, 96)  # as nn.Linear(96, 40) has it
    assert ("model.layers.1.attn.x_x" in stored) == ("stacked_mixes" in form)
    with rwkv_npu.load(tmp_path / "blinkdl.safetensors", backend="numpy") as one:
        with rwkv_npu.load(tmp_path / "fla", backend="numpy") as other:
            assert np.abs(read(one, [72]).logits - read(other, [72]).logits).max() < 1e-5


@pytest.mark.parametrize("generation", ["4", "6"])
def test_hugging_face_names_are_the_same_model(generation: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "blinkdl.pth", generation=generation, **SMALL)
    make_checkpoint(tmp_path / "hf", generation=generation, hf=True, **SMALL)
    with rwkv_npu.load(tmp_path / "blinkdl.pth", backend="numpy") as one:
        with rwkv_npu.load(tmp_path / "hf", backend="numpy") as other:
            assert (read(one, [72]).logits == read(other, [72]).logits).all()
