"""Calibration covers every projection of both fusions, takes a uniform sample, and records the absmax."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.conversion import calibration
from rwkv_npu.conversion.calibration import Reservoir, Statistics, calibrate, contexts
from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.state import new_state
from rwkv_npu.graphs.trace import trace_group
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.network import Network
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Group
from rwkv_npu.quant.ranges import Samples
from rwkv_npu.runtime.weights import CheckpointSource
from rwkv_npu.text.tokenizer import END_OF_TEXT
from tests.tiny import V, write_model

ROWS = 8
CONTEXTS = 3  # that some_ids make, each with an end of text before it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def source_of(folder: Path, generation: str, fusion: str = "layer") -> CheckpointSource:
    path = folder / f"{generation}.pth"
    if not path.exists():
        write_model(path, generation, vocabulary=False)
    return CheckpointSource(open_checkpoint(path), fusion)


def some_ids(count: int = 200) -> np.ndarray:
    return np.random.default_rng(1).integers(0, V, count)


@pytest.fixture(scope="module")
def seven(folder: Path) -> Statistics:
    return calibrate(source_of(folder, "7"), some_ids(), rows=ROWS)


# -- what is seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_both_fusions_see_the_same_under_the_labels_of_the_graphs(folder: Path, generation: str) -> None:
    found = []
    for fusion in FUSIONS:
        source = source_of(folder, generation, fusion)
        seen = calibrate(source, some_ids(96), rows=ROWS, keep=20)
        groups = source.program.groups
        labels = {label for group in groups for label in trace_group(source.program, group).projections}
        assert seen.projections.keys() == labels
        found.append(seen.projections)
    for label, samples in found[0].items():
        np.testing.assert_allclose(samples.rows, found[1][label].rows, rtol=1e-3, atol=1e-3, err_msg=label)
        np.testing.assert_allclose(samples.absmax, found[1][label].absmax, rtol=1e-3, atol=1e-3)


def test_rows_are_what_a_pass_gives_the_groups(folder: Path) -> None:
    source, keys = source_of(folder, "7", "projection"), []
    network, maths = Network(source.program, source.tensor), NumpyMaths(source.tensor)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        if group.name == "att.in.1":
            keys.append(inputs["xk"].copy())
        return source.evaluate(group, maths, dict(inputs))

    for context in contexts(some_ids()):
        state = new_state(source.spec, "", {})
        network.hidden(run, Rows([context], [state.parts]))
    rows = calibrate(source, some_ids()).projections["blocks.1.att.key.weight"].rows
    np.testing.assert_allclose(rows, np.concatenate(keys), rtol=1e-5, atol=1e-5)


def test_extremes_are_those_of_all_rows(folder: Path, seven: Statistics) -> None:
    few = calibrate(source_of(folder, "7"), some_ids(), rows=ROWS, keep=10)
    for label, samples in seven.projections.items():
        assert len(samples.rows) == 200 + CONTEXTS
        np.testing.assert_array_equal(samples.low, samples.rows.min(0))
        np.testing.assert_array_equal(samples.absmax, np.abs(samples.rows).max(0))
        assert few.projections[label].rows.shape == (10, samples.rows.shape[1])
        np.testing.assert_array_equal(few.projections[label].absmax, samples.absmax)
    assert few.absmax == seven.absmax


def test_rows_of_all_projections_are_the_same_tokens(folder: Path) -> None:
    few = calibrate(source_of(folder, "7"), some_ids(), rows=ROWS, keep=10).projections
    # Of layer 1, v1 reads what the value reads.
    np.testing.assert_array_equal(few["blocks.1.att.v1"].rows, few["blocks.1.att.value.weight"].rows)


def test_peaks_hold_products_and_norms(folder: Path, seven: Statistics) -> None:
    source = source_of(folder, "7")
    for label, samples in seven.projections.items():
        products = samples.rows @ source.tensor(label).astype(np.float32)
        assert seven.absmax[label] >= np.abs(products).max() * (1 - 1e-5), label
    assert seven.absmax["blocks.1.ln1"] > 0 and seven.absmax["ln_out"] > 0 and seven.absmax["mid.0.y"] > 0


def test_partial_sums_count(folder: Path, monkeypatch: pytest.MonkeyPatch, seven: Statistics) -> None:
    """They can be larger than what they add up to, and are never smaller at their largest."""
    monkeypatch.setattr(calibration, "SLICE", 4)
    sliced = calibrate(source_of(folder, "7"), some_ids(), rows=ROWS).absmax
    assert all(sliced[name] >= peak * (1 - 1e-4) for name, peak in seven.absmax.items())
    assert any(sliced[label] > seven.absmax[label] * 1.01 for label in seven.projections)


def test_rows_are_in_the_order_of_the_text(folder: Path, seven: Statistics) -> None:
    few = calibrate(source_of(folder, "7"), some_ids(), rows=ROWS, keep=50).projections["head.weight"].rows
    everything = [row.tobytes() for row in seven.projections["head.weight"].rows]
    # But for the first tokens of contexts, which are the same.
    numbers = [everything.index(row.tobytes()) for row in few if everything.count(row.tobytes()) == 1]
    assert len(numbers) >= 47 and numbers == sorted(numbers)


def test_halves_take_turns_in_stretches() -> None:
    rows = np.arange(32, dtype=np.float32)[:, None]
    fitted, held = Samples(rows, rows[0], rows[-1], 32).halves()
    assert fitted[:, 0].tolist() == [n for n in range(32) if n // 4 % 2 == 0]
    assert held[:, 0].tolist() == [n for n in range(32) if n // 4 % 2 == 1]
    assert [len(half) for half in Samples(rows[:2], rows[0], rows[1], 2).halves()] == [1, 1]


def test_the_same_seed_keeps_the_same_rows(folder: Path) -> None:
    one, same, other = (
        calibrate(source_of(folder, "4"), some_ids(), rows=ROWS, keep=10, seed=seed).projections[
            "head.weight"
        ]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.rows, same.rows)
    assert (one.rows != other.rows).any()


def test_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 100_000
    monkeypatch.setattr(calibration, "MEMORY", bound)
    seen = calibrate(source_of(folder, "6"), some_ids(), rows=ROWS)
    rows = sum(samples.rows.nbytes for samples in seen.projections.values())
    assert bound / 2 < rows <= bound


def test_progress_counts_every_token(folder: Path) -> None:
    steps: list[int] = []
    calibrate(source_of(folder, "4"), some_ids(101), rows=ROWS, progress=steps.append)
    assert sum(steps) == 101


# -- the sample ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(0, 9))
def test_a_reservoir_is_bounded_and_full(keep: int, steps: list[int], seed: int) -> None:
    reservoir, kept, start = Reservoir(keep, np.random.default_rng(seed)), {}, 0
    for count in steps:
        chosen, places = reservoir.admit(count)
        assert len(set(places.tolist())) == len(places) and (chosen < count).all()
        kept.update(zip(places.tolist(), (chosen + start).tolist(), strict=True))
        start += count
    assert sorted(kept) == list(range(min(keep, start)))
    assert len(set(kept.values())) == len(kept)


def test_a_reservoir_is_uniform() -> None:
    """4000 draws of 10 out of 100: each item 400 times, give or take five standard deviations."""
    rng, counts = np.random.default_rng(0), np.zeros(100)
    for _ in range(4000):
        reservoir, kept = Reservoir(10, rng), np.zeros(10, np.int64)
        for start, count in ((0, 7), (7, 1), (8, 60), (68, 32)):
            chosen, places = reservoir.admit(count)
            kept[places] = chosen + start
        counts[kept] += 1
    assert counts.sum() == 40_000
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000))
def test_contexts_are_all_the_tokens_once(count: int) -> None:
    pieces = list(contexts(np.arange(count)))
    np.testing.assert_array_equal(np.concatenate([piece[1:] for piece in pieces]), np.arange(count))
    assert all(piece[0] == END_OF_TEXT and len(piece) > 1 for piece in pieces) and len(pieces[-1]) > count / 2


def test_contexts_are_short_and_long() -> None:
    lengths = [len(piece) for piece in contexts(np.zeros(8192, np.int64))]
    assert (lengths.count(64), lengths.count(512), lengths.count(4097)) == (32, 4, 1)


# -- what cannot be calibrated with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "has 0 tokens: at least 2"),
        ([1], "has 1 tokens: at least 2"),
        ([1] * 9 + [V], f"contain {V}, which is outside"),
        ([-1] + [1] * 9, "contain -1, which is outside"),
    ],
)
def test_ids_that_are_refused(folder: Path, ids: list[int], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        calibrate(source_of(folder, "7"), ids, rows=ROWS)
    assert "\n" not in str(raised.value)


def test_a_model_that_does_not_stay_finite_is_named(folder: Path) -> None:
    source = source_of(folder, "7")
    whole = source.tensor
    source.tensor = lambda name: whole(name) * np.float32(1e30 if name.endswith("ffn.key.weight") else 1)
    with np.errstate(all="ignore"), pytest.raises(CheckpointError, match="do not stay finite"):
        calibrate(source, some_ids(), rows=ROWS)
