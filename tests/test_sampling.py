"""Sampling against the rwkv package's own, and the properties that a caller relies on."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.text import sampling
from rwkv_npu.text.sampling import Choice, Sampler, SamplingOptions, adjusted, candidates, sample

DATA = Path(__file__).parent / "data"
NO_FILTER = SamplingOptions(top_p=1.0)


@pytest.fixture(params=["plain", "compiled"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, and the compiled code."""
    if request.param == "plain":
        monkeypatch.setattr(sampling, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
        assert sampling._compiled() is not None
    return str(request.param)


def drawn(sampler: Sampler, logits: np.ndarray, **options: Any) -> Choice:
    choice = sample(logits[None], [sampler], **options)[0]
    assert isinstance(choice, Choice)
    return choice


def dense(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """(V,) probabilities of `candidates`."""
    probabilities = np.zeros(len(logits))
    tokens, weights = candidates(logits, options)
    probabilities[tokens] = weights / weights.sum()
    return probabilities


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def marked(kept: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool for places."""
    assert (np.diff(kept) > 0).all()
    mask = np.zeros(count, dtype=bool)
    mask[kept] = True
    return mask


def logits_of(vocab_size: int, scale: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, vocab_size).astype(np.float32)


# Against the rwkv package


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """(torch, the package's PIPELINE)."""
    torch = pytest.importorskip("torch")
    return torch, pytest.importorskip("rwkv.utils").PIPELINE


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The probability vectors that the package draws from; its draw is always the most likely token."""
    vectors: list[np.ndarray] = []

    def choose(a: int, p: np.ndarray) -> int:
        vectors.append(np.array(p, dtype=np.float64))
        return int(np.argmax(p))

    monkeypatch.setattr(np.random, "choice", choose)
    return vectors


@pytest.mark.parametrize(("vocab_size", "scale"), [(50, 2.0), (1000, 1.0), (65536, 3.0), (65536, 0.5)])
def test_distribution_equals_the_package(
    vocab_size: int, scale: float, reference: tuple[Any, Any], drawn_from: list[np.ndarray]
) -> None:
    torch, pipeline = reference
    grid = itertools.product([0.3, 0.7, 1.0, 1.5], [0.0, 0.1, 0.5, 0.85, 0.99], [0, 1, 5, 40, 10**6])
    for seed, (temperature, top_p, top_k) in enumerate(grid):
        logits = logits_of(vocab_size, scale, seed)
        pipeline.sample_logits(None, torch.from_numpy(logits.copy()), temperature, top_p, top_k)
        ours = dense(logits, SamplingOptions(temperature=temperature, top_p=top_p, top_k=top_k))
        # Total variation: the package sums in float32, so a cut may fall a few of 65536 tokens elsewhere.
        assert 0.5 * np.abs(ours - drawn_from.pop()).sum() < 5e-4, (temperature, top_p, top_k)


def test_greedy_equals_the_package(reference: tuple[Any, Any], drawn_from: list[np.ndarray]) -> None:
    torch, pipeline = reference
    logits = logits_of(65536, 2.0)
    token = pipeline.sample_logits(None, torch.from_numpy(logits.copy()), temperature=0)
    assert drawn_from.pop()[token] == 1
    assert Sampler(SamplingOptions(temperature=0)).sample(logits)[0] == token


def test_ties_at_the_cut_equal_the_package(reference: tuple[Any, Any], drawn_from: list[np.ndarray]) -> None:
    torch, pipeline = reference
    logits = np.log(np.array([0.1, 0.3, 0.1, 0.2, 0.2, 0.1], dtype=np.float32))
    for top_p, kept in [(0.0, [1]), (0.31, [1, 3, 4]), (0.65, [1, 3, 4]), (0.75, [0, 1, 2, 3, 4, 5])]:
        pipeline.sample_logits(None, torch.from_numpy(logits.copy()), 1.0, top_p)
        ours = dense(logits, SamplingOptions(top_p=top_p))
        assert np.flatnonzero(ours).tolist() == kept
        np.testing.assert_allclose(ours, drawn_from.pop(), atol=1e-6)


def test_penalties_equal_the_package(reference: tuple[Any, Any], drawn_from: list[np.ndarray]) -> None:
    torch, pipeline = reference
    steps, vocab_size, banned = 60, 40, [3, 39]
    rows = [logits_of(vocab_size, 1.0, seed) for seed in range(steps)]
    texts = [*" \t0123456789", *"abcdefghijklmnopqrstuvwxyzABCD"][:vocab_size]

    outputs = iter(rows)
    fake = pipeline.__new__(pipeline)
    fake.model = SimpleNamespace(forward=lambda tokens, state: (torch.tensor(next(outputs)), None))
    fake.tokenizer = SimpleNamespace(
        encode=lambda text: [0], decode=lambda ids: "".join(texts[i] for i in ids)
    )
    options = SamplingOptions(
        top_p=0.7, temperature=0.8, presence_penalty=0.4, frequency_penalty=0.3, penalty_decay=0.9
    )
    fake.generate(
        "x",
        token_count=steps,
        args=SimpleNamespace(
            temperature=0.8,
            top_p=0.7,
            top_k=0,
            alpha_frequency=0.3,
            alpha_presence=0.4,
            alpha_decay=0.9,
            token_ban=banned,
            token_stop=[],
            chunk_len=256,
        ),
    )
    assert len(drawn_from) == steps

    mask = np.zeros(vocab_size, dtype=bool)
    mask[banned] = True
    sampler = Sampler(options, banned=mask, uncounted=lambda token: texts[token] in " \t0123456789")
    for row, theirs in zip(rows, drawn_from, strict=True):
        np.testing.assert_allclose(dense(adjusted(row, sampler), options), theirs, atol=1e-5)
        sampler.accept(int(np.argmax(theirs)))
    assert len(sampler.counts) > 5


# Filters

vectors = hnp.arrays(
    np.float32, st.integers(1, 2000), elements=st.floats(-20, 20, width=32), fill=st.floats(-20, 20, width=32)
)


@settings(deadline=None)
@given(logits=vectors, mass=st.floats(0, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(logits: np.ndarray, mass: float) -> None:
    kept = marked(sampling.top_p(logits, mass), len(logits))
    probabilities = softmax(logits)
    assert probabilities[kept].sum() >= mass - 1e-5
    smallest = probabilities[kept].min()
    assert probabilities[probabilities > smallest * (1 + 1e-5)].sum() < mass + 1e-5 or smallest == max(
        probabilities
    )
    assert probabilities[~kept].max(initial=0) <= smallest * (1 + 1e-5)


SHAPES = {
    "random": lambda rng, n: rng.normal(0, 2, n),
    "flat": lambda rng, n: rng.normal(0, 1e-3, n),
    "equal": lambda rng, n: np.zeros(n),
    "ties": lambda rng, n: np.round(rng.normal(0, 2, n)),
    "peaked": lambda rng, n: np.where(rng.random(n) < 1e-4, 12, 2 * rng.gumbel(0, 1, n)),
    "trained": lambda rng, n: np.where(rng.random(n) < 3e-3, 2, -6) + rng.normal(0, 2, n),
    "ordered": lambda rng, n: np.sort(rng.normal(0, 3, n))[::-1],
    "two": lambda rng, n: np.where(np.arange(n) < 2, 30, -30),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [4097, 65536])
def test_top_p_of_large_vocabularies(shape: str, size: int) -> None:
    """Narrowed down from samples, to what sorting all of it gives: up to the rounding of a sum."""
    for seed, mass in enumerate([0.0, 1e-3, 0.1, 0.5, 0.85, 0.99, 0.9999, 1 - 1e-7]):
        logits = SHAPES[shape](np.random.default_rng(seed), size).astype(np.float32)
        probabilities = np.sort(softmax(logits))[::-1]
        sums = np.cumsum(probabilities)
        last = [min(int(np.searchsorted(sums, mass + error)), size - 1) for error in (-2e-6, 2e-6)]
        fewest, most = last[0] + 1, np.count_nonzero(probabilities >= probabilities[last[1]] * (1 - 1e-6))
        kept = sampling.top_p(logits, mass)
        assert fewest <= len(kept) <= most, (seed, mass)
        left_out = logits[~marked(kept, size)]
        assert left_out.max(initial=-np.inf) < logits[kept].min()


@pytest.mark.parametrize("options", [{"presence_penalty": 900.0}, {"presence_penalty": -900.0}, {}], ids=str)
def test_log_probability_whatever_was_changed(options: dict[str, float]) -> None:
    """Penalties and bans of the likeliest tokens, and of all the likely ones."""
    for likely in (1, 5, 499):
        logits = logits_of(500, 1.0)
        logits[:likely] += 40
        sampler = Sampler(SamplingOptions(**options), seed=0, banned=np.arange(500) == likely)  # type: ignore[arg-type]
        for token in range(likely):
            sampler.accept(token)
        token, logprob = sampler.sample(logits)
        assert math.isclose(logprob, math.log(softmax(logits)[token]), abs_tol=1e-5)


@settings(deadline=None)
@given(logits=vectors, count=st.integers(1, 2500))
def test_top_k_keeps_exactly_k_largest(logits: np.ndarray, count: int) -> None:
    kept = marked(sampling.top_k(logits, count), len(logits))
    assert kept.sum() == min(count, len(logits))
    assert logits[~kept].max(initial=-np.inf) <= logits[kept].min()
    expected = np.argsort(-logits, kind="stable")[:count]  # of equals, the lowest ids
    assert np.flatnonzero(kept).tolist() == sorted(expected.tolist())


def test_top_k_counts_only_tokens_that_are_left() -> None:
    logits = np.array([-np.inf, 1, -np.inf, 2], dtype=np.float32)
    np.testing.assert_array_equal(candidates(logits, SamplingOptions(top_p=1.0, top_k=3))[0], [1, 3])


@settings(deadline=None)
@given(logits=vectors, least=st.floats(0.001, 1))
def test_min_p_is_relative_to_the_most_likely(logits: np.ndarray, least: float) -> None:
    kept = marked(sampling.min_p(logits, least), len(logits))
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    assert kept[np.argmax(logits)]
    assert ratio[kept].min() >= least * (1 - 1e-5)
    assert ratio[~kept].max(initial=0) <= least * (1 + 1e-5)


def test_filters_leave_their_input_alone() -> None:
    logits = logits_of(1000, 1.0)
    before = logits.copy()
    options = SamplingOptions(top_p=0.5, top_k=7, min_p=0.1, presence_penalty=1.0)
    sampler = Sampler(options, seed=0, banned=np.arange(1000) < 5)
    for _ in range(3):
        sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


def test_filters_that_are_off_keep_everything() -> None:
    logits = logits_of(5000, 4.0)
    np.testing.assert_allclose(dense(logits, NO_FILTER), softmax(logits), rtol=1e-5)


# Drawing


def test_frequencies_follow_the_probabilities(both: str) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))
    sampler = Sampler(NO_FILTER, seed=1)
    counts = np.bincount([sampler.sample(logits)[0] for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.25, 0.15, 0.1], atol=0.015)


def test_temperature_sharpens_what_the_filters_left(both: str) -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], dtype=np.float32))
    np.testing.assert_allclose(dense(logits, SamplingOptions(temperature=0.5, top_p=0.85)), [0.8, 0.2, 0])
    for tiny in [1e-6, 1e-300]:
        np.testing.assert_allclose(dense(logits, SamplingOptions(temperature=tiny, top_p=1.0)), [1, 0, 0])
    for huge in [1e20, 1e300]:
        np.testing.assert_allclose(dense(logits, SamplingOptions(temperature=huge, top_p=1.0)), [1 / 3] * 3)


def test_equal_seeds_give_equal_tokens(both: str) -> None:
    rows = [logits_of(500, 1.0, seed) for seed in range(30)]
    options = SamplingOptions(presence_penalty=0.2, frequency_penalty=0.2)

    def run(seed: int | np.random.Generator | None) -> list[int]:
        sampler = Sampler(options, seed=seed)
        return [sampler.sample(row)[0] for row in rows]

    assert run(7) == run(7) == run(np.random.default_rng(7))
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_greedy_takes_the_lowest_of_equals(both: str) -> None:
    logits = np.array([0, 2, 1, 2], dtype=np.float32)
    sampler = Sampler(SamplingOptions(temperature=0), seed=0)
    assert {sampler.sample(logits)[0] for _ in range(20)} == {1}


def test_banned_tokens_are_never_drawn(both: str) -> None:
    logits = np.array([9, 9, 1, 0], dtype=np.float32)
    for options in [NO_FILTER, SamplingOptions(temperature=0), SamplingOptions(top_k=3)]:
        sampler = Sampler(options, seed=0, banned=np.array([True, True, False, False]))
        assert {sampler.sample(logits)[0] for _ in range(50)} <= {2, 3}


def test_log_probability_is_of_the_logits_as_given(both: str) -> None:
    logits = logits_of(2000, 3.0) + 100
    options = SamplingOptions(temperature=0.5, top_k=3, presence_penalty=5.0)
    sampler = Sampler(options, seed=0, banned=np.arange(2000) == np.argmax(logits))
    for _ in range(5):
        token, logprob = sampler.sample(logits)
        assert math.isclose(logprob, math.log(softmax(logits)[token]), abs_tol=1e-5)
    _, logprob = sampler.sample(np.zeros(2000, dtype=np.float32))
    assert logprob == pytest.approx(-math.log(2000))


def test_counts_decay_and_grow(both: str) -> None:
    sampler = Sampler(SamplingOptions(frequency_penalty=0.5, penalty_decay=0.5), uncounted=lambda t: t == 2)
    for token in [1, 1, 2, 3]:
        sampler.accept(token)
    assert sampler.counts == {1: 0.375, 2: 0.0, 3: 1.0}
    np.testing.assert_allclose(adjusted(np.zeros(5, dtype=np.float32), sampler), [0, -0.1875, 0, -0.5, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=0), NO_FILTER])
def test_logits_that_are_not_finite_are_an_error(bad: float, options: SamplingOptions, both: str) -> None:
    logits = np.array([0, bad, 1], dtype=np.float32)
    with pytest.raises(BackendError, match="NaN or infinity"):
        Sampler(options, seed=0).sample(logits)


def test_no_token_left_is_an_error(both: str) -> None:
    with pytest.raises(BackendError, match="no token is left"):
        Sampler(seed=0, banned=np.ones(3, dtype=bool)).sample(np.zeros(3, dtype=np.float32))


# All sequences at once, and the compiled code against the reference


def recorded_draws() -> Iterator[tuple[Sampler, np.ndarray]]:
    """10,000 draws of a hundred sequences: samplers and the logits that each is to draw from next."""
    for number in range(100):
        rng = np.random.default_rng(number)
        shape, V = list(SHAPES)[number % 8], int(rng.integers(200, 3000))
        options = SamplingOptions(
            temperature=float(rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.5])),
            top_p=float(rng.choice([0.0, 0.3, 0.85, 0.85, 0.95, 1.0])),
            top_k=int(rng.choice([0, 0, 1, 40, 1000])),
            min_p=float(rng.choice([0.0, 0.0, 0.05])),
            presence_penalty=float(rng.choice([0.0, 0.3])),
            frequency_penalty=float(rng.choice([0.0, 0.5])),
        )
        banned = rng.random(V) < 0.01
        sampler = Sampler(options, seed=number, banned=banned, uncounted=lambda token: token % 7 == 0)
        for _ in range(100):
            yield sampler, SHAPES[shape](rng, V).astype(np.float32)


def test_recorded_draws(both: str) -> None:
    """The file holds what version 0.1 drew, whose sums were float32."""
    tokens = [sampler.sample(logits)[0] for sampler, logits in recorded_draws()]
    assert tokens == np.load(DATA / "draws.npy").tolist()


some_options = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 1e-9, 0.5, 1.0, 2.0, 1e30]),
    top_p=st.sampled_from([0.0, 1e-9, 0.3, 0.85, 0.999999, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 100, 10**9]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.5, -900.0, 900.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -3.0]),
)


@settings(deadline=None, max_examples=200)
@given(
    options=some_options,
    shape=st.sampled_from(sorted(SHAPES)),
    size=st.sampled_from([1, 2, 33, 63, 64, 65, 129, 1000, 5000]),
    scale=st.sampled_from([1e-30, 1.0, 30.0, 1e30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_compiled_equals_the_reference(
    options: SamplingOptions, shape: str, size: int, scale: float, seed: int
) -> None:
    """Token and log-probabilities, with bans, biases, masks and a past that penalties count."""
    pytest.importorskip("numba")
    rng = np.random.default_rng(seed)
    logits = (SHAPES[shape](rng, size) * scale).astype(np.float32)
    logits[rng.random(size) < 0.1] = -np.inf
    biased = {int(token): float(rng.normal(0, 9)) for token in rng.integers(0, size, 5)}
    samplers = [Sampler(options, seed=seed, logit_bias=biased, banned=rng.random(size) < 0.05)] * 3
    for token in rng.integers(0, size, 20):
        samplers[0].accept(int(token))
    masks = [None, None, rng.integers(0, 2**32, -(-size // 32), dtype=np.uint32)]
    numbers = [0.0, 1 - 2**-53, rng.random()]
    compiled = sampling._compiled()
    assert compiled is not None
    rows = np.stack([logits] * 3)
    found = sampling._choose_compiled(compiled, rows, samplers, numbers, masks, min(size, 4))
    for ours, sampler, number, mask in zip(found, samplers, numbers, masks, strict=True):
        try:
            theirs = sampling.choose(logits, sampler, number, mask, min(size, 4))
        except BackendError as error:
            assert isinstance(ours, BackendError) and str(ours) == str(error)
            continue
        assert isinstance(ours, Choice)
        # Exponentials differ by 1e-11, which decides a draw at the edge between two tokens.
        low, high = (
            sampling.choose(logits, sampler, min(max(edge, 0.0), 1.0), mask)
            for edge in (number - 1e-9, number + 1e-9)
        )
        assert low.token <= ours.token <= high.token
        if low.token == high.token:
            assert ours.token == theirs.token
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        for a, b in zip([ours[:2], *ours.top], [theirs[:2], *theirs.top], strict=True):
            assert a[1] == b[1] or abs(a[1] - b[1]) <= 2e-7 * (1 + abs(b[1]))


def test_every_token_is_drawn_by_its_own_numbers() -> None:
    """The compiled code at both ends of the numbers that draw a token, over all tokens of a distribution."""
    pytest.importorskip("numba")
    logits = logits_of(3000, 2.0)
    for options in (NO_FILTER, SamplingOptions(), SamplingOptions(temperature=0.7, top_k=50, min_p=0.01)):
        tokens, weights = candidates(logits, options)
        ends = np.cumsum(weights) / weights.sum()
        numbers = np.concatenate([np.append(0, ends[:-1]) + 1e-9, ends - 1e-9])
        rows, samplers = np.stack([logits] * len(numbers)), [Sampler(options)] * len(numbers)
        compiled = sampling._compiled()
        assert compiled is not None
        nothing = [None] * len(numbers)
        found = sampling._choose_compiled(compiled, rows, samplers, numbers.tolist(), nothing, 0)
        assert [choice.token for choice in found if isinstance(choice, Choice)] == [*tokens, *tokens]


def test_sequences_do_not_affect_each_other(both: str) -> None:
    """Options, penalties, numbers and masks of eight sequences: each draws what it draws alone."""
    options = [
        SamplingOptions(temperature=0),
        SamplingOptions(presence_penalty=0.5, frequency_penalty=0.5),
        SamplingOptions(top_k=3),
        SamplingOptions(top_p=0.2, temperature=2.0),
    ]

    def eight() -> list[Sampler]:
        return [Sampler(options[i % 4], seed=i, logit_bias={i: 2.0}) for i in range(8)]

    mask = np.full(20, 0x0F0F0F0F, np.uint32)
    masks = [mask if i % 3 == 0 else None for i in range(8)]
    together, alone = eight(), eight()
    for step in range(20):
        rows = np.stack([logits_of(640, 2.0, 8 * step + i) for i in range(8)])
        found = sample(rows, together, allowed=masks, top=2)
        assert found == [drawn(alone[i], rows[i], allowed=[masks[i]], top=2) for i in range(8)]
        assert all(c.token % 8 < 4 for i, c in enumerate(found) if masks[i] is not None)  # type: ignore[union-attr]


def test_one_bad_sequence_leaves_the_others_alone(both: str) -> None:
    rows = np.stack([logits_of(100, 1.0)] * 3)
    rows[1, 50] = np.nan
    samplers = [Sampler(SamplingOptions(presence_penalty=0.1), seed=0) for _ in range(3)]
    first, bad, last = sample(rows, samplers)
    assert isinstance(bad, BackendError) and "NaN or infinity" in str(bad)
    assert first == last and isinstance(first, Choice)
    assert [list(sampler.counts) for sampler in samplers] == [[first.token], [], [first.token]]


def test_logit_bias_and_allowed_tokens(both: str) -> None:
    logits = np.zeros(70, np.float32)
    logits[3] = 5
    greedy = SamplingOptions(temperature=0)
    assert drawn(Sampler(greedy), logits).token == 3
    assert drawn(Sampler(greedy, logit_bias={69: 6.0}), logits).token == 69
    assert drawn(Sampler(greedy, logit_bias={3: -6.0}), logits).token == 0
    mask = np.zeros(3, np.uint32)
    mask[2] = 1 << 5  # token 69
    for options in (greedy, SamplingOptions(), SamplingOptions(top_p=0.0, top_k=1)):
        assert drawn(Sampler(options, seed=0), logits, allowed=[mask]).token == 69
        assert drawn(Sampler(options, seed=0), logits, allowed=[mask.view(np.int32)]).token == 69
    nothing = sample(logits[None], [Sampler()], allowed=[np.zeros(3, np.uint32)])[0]
    assert isinstance(nothing, BackendError) and "no token is left" in str(nothing)


def test_the_most_likely_tokens_and_their_log_probabilities(both: str) -> None:
    """Log-probabilities are those of the given logits, before bans and penalties."""
    logits = logits_of(500, 2.0)
    logits[[7, 300]] = 9
    probabilities = softmax(logits)
    choice = drawn(Sampler(seed=0, banned=np.arange(500) == 7), logits, top=5)
    expected = np.argsort(-logits, kind="stable")[:5]
    assert [token for token, _ in choice.top] == expected.tolist() and expected[:2].tolist() == [7, 300]
    np.testing.assert_allclose(
        [logprob for _, logprob in choice.top], np.log(probabilities[expected]), atol=1e-6
    )
    assert len(drawn(Sampler(seed=0), logits[:3], top=9).top) == 3


def test_logits_may_be_read_only_and_of_any_order(both: str) -> None:
    rows = np.asfortranarray(np.stack([logits_of(100, 1.0, seed) for seed in range(3)]))
    rows.flags.writeable = False
    samplers = [Sampler(SamplingOptions(presence_penalty=1.0), seed=seed) for seed in range(3)]
    twins = [Sampler(SamplingOptions(presence_penalty=1.0), seed=seed) for seed in range(3)]
    for _ in range(3):
        expected = [twin.sample(row) for twin, row in zip(twins, rows, strict=True)]
        read_only = rows.copy("C")
        read_only.flags.writeable = False
        assert [choice[:2] for choice in sample(read_only, samplers)] == expected  # type: ignore[index]


def test_ids_outside_the_vocabulary_are_not_read(both: str) -> None:
    logits = np.zeros(10, np.float32)
    past = Sampler(SamplingOptions(presence_penalty=1.0))
    past.accept(10)
    for sampler in (Sampler(logit_bias={10: 1.0}), Sampler(logit_bias={-1: 1.0}), past):
        with pytest.raises(UsageError, match="none of the 10 of the vocabulary"):
            sampler.sample(logits)
    with pytest.raises(UsageError, match="finite"):
        Sampler(logit_bias={1: math.nan})
    for mask in (np.zeros(2, np.uint32), np.zeros(1, np.uint8)):
        with pytest.raises(UsageError, match="mask of allowed tokens"):
            sample(logits[None], [Sampler()], allowed=[mask])


def test_without_numba_numpy_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert sampling._compiled.__wrapped__() is None


# Validation


@pytest.mark.parametrize(
    ("allowed", "wrong"),
    [
        ("at least 0", {"temperature": -0.1}),
        ("at least 0", {"temperature": math.inf}),
        ("at least 0", {"temperature": math.nan}),
        ("a number", {"temperature": "hot"}),
        ("between 0 and 1", {"top_p": 1.01}),
        ("a whole number of at least 0", {"top_k": -1}),
        ("a whole number of at least 0", {"top_k": 1.5}),
        ("between 0 and 1", {"min_p": -0.5}),
        ("between -1000 and 1000", {"presence_penalty": math.nan}),
        ("between -1000 and 1000", {"frequency_penalty": 1001}),
        ("between 0 and 1", {"penalty_decay": 1.1}),
    ],
)
def test_options_out_of_range(allowed: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingOptions(**wrong)
    message = str(caught.value)
    assert message.startswith(f"{next(iter(wrong))}=") and allowed in message and "\n" not in message


def test_numpy_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(4), "min_p": 0}
    SamplingOptions(**numbers)


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_seed_out_of_range(seed: Any) -> None:
    with pytest.raises(UsageError, match="^seed=.*: it must be a whole number of at least 0"):
        Sampler(seed=seed)
