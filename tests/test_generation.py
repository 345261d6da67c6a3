"""From ids to steps to text: stop strings, states between steps, and what ends a generation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import TokenizerError, UsageError
from rwkv_npu.formats.state import State
from rwkv_npu.model import Model
from rwkv_npu.text.generation import Step, TextStream
from rwkv_npu.text.tokenizer import END_OF_TEXT, StreamDecoder
from tests.tiny import VOCABULARY, WITHOUT_TEXT, V, write_model

PROMPT = "the turning über"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generation")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    write_model(folder / "with" / "model.pth")
    return rwkv_npu.load(folder / "with" / "model.pth", backend="numpy")


@pytest.fixture(scope="module")
def bare(folder: Path) -> Model:
    """The same weights without a vocabulary."""
    write_model(folder / "without" / "model.pth", vocabulary=False)
    return rwkv_npu.load(folder / "without" / "model.pth", backend="numpy")


class Always:
    """A sampler that draws the ids it was given."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens = iter(tokens)

    def sample(self, logits: np.ndarray) -> tuple[int, float]:
        return next(self.tokens), 0.0


@pytest.fixture
def forced(model: Model, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Generate as if these bytes, one token each, and then the end of text had been sampled."""

    def generate(text: str | bytes, **options: Any) -> list[Step]:
        data = text.encode() if isinstance(text, str) else text
        ids = [1 + byte for byte in data] + [END_OF_TEXT]
        monkeypatch.setattr("rwkv_npu.model.sampling.Sampler", lambda *_, **__: Always(ids))
        return list(model.generate("a", **options))

    return generate


def ids_of(steps: Iterable[Step]) -> list[int]:
    return [step.token for step in steps]


def text_of(steps: Iterable[Step]) -> str:
    return "".join(step.text for step in steps)


def assert_same_state(a: State, b: State, tolerance: float = 0.0) -> None:
    assert a.tokens_seen == b.tokens_seen
    assert a.logits is not None and b.logits is not None
    for name, part in a.parts.items():
        np.testing.assert_allclose(part, b.parts[name], atol=tolerance, rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(a.logits, b.logits, atol=tolerance, rtol=tolerance)


# Text and stop strings


class Pieces:
    """A vocabulary whose id i + 1 is the bytes `pieces[i]`; enough of a tokenizer for a stream."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = pieces

    def decoder(self) -> StreamDecoder:
        return StreamDecoder(lambda token: self.pieces[token - 1])


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """`data` in pieces that end at `places`, wherever in a character those are."""
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The expected text of a stream, found letter by letter."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def stream_text(pieces: Sequence[bytes], stops: Sequence[str]) -> tuple[str, bool]:
    """All that a stream gives, checked on the way: nothing is held that no stop string can begin with."""
    stream = TextStream(Pieces(pieces), stops)  # type: ignore[arg-type]
    out, longest = "", max(map(len, stops), default=1)
    for number in range(1, len(pieces) + 1):
        text, stopped = stream.push(number)
        out += text
        if stopped:
            return out + stream.finish(), True
        so_far = b"".join(pieces[:number]).decode(errors="ignore")
        assert len(so_far) - len(out) < longest, "more is held back than a stop string is long"
    return out + stream.finish(), False


# Letters that overlap in many ways, of one, two, three and four bytes.
texts = st.text("abé€😀", max_size=30)
stop_strings = st.lists(st.text("abé€😀", min_size=1, max_size=5), max_size=3)
places = st.lists(st.integers(0, 200), max_size=40)


@given(texts, stop_strings, places)
@example("xabcd", ["abcd", "b"], [])  # the stop string that ends first counts, in one token or in many
@example("xabcd", ["abcd", "b"], [2, 3])
@example("aab", ["ab"], [1, 2])
@example("ababac", ["abac"], [3])
@settings(max_examples=300, deadline=None)
def test_text_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    assert stream_text(cut(text.encode(), cuts), stops) == before_stop(text, stops)


@given(st.binary(max_size=20), places)
@settings(max_examples=200, deadline=None)
def test_invalid_utf8_decodes_like_in_python(data: bytes, cuts: list[int]) -> None:
    assert stream_text(cut(data, cuts), [])[0] == data.decode("utf-8", "replace")


def test_a_character_comes_out_with_its_last_byte() -> None:
    stream = TextStream(Pieces([b"\xe2", b"\x82", b"\xac", b"\xe2"]), [])  # type: ignore[arg-type]
    assert [stream.push(token)[0] for token in (1, 2, 3, 4)] == ["", "", "€", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_text_that_may_begin_a_stop_string_is_not_lost_at_the_end(forced: Any) -> None:
    """A text that ends within a stop string, at the end of text and at the length."""
    assert text_of(forced("one STO", stop=["STOP"])) == "one STO"
    steps = forced("one STOP", stop=["STOP"], max_tokens=7)
    assert (text_of(steps), steps[-1].finish_reason) == ("one STO", "length")
    assert text_of(forced("caf\u00e9".encode()[:-1])) == "caf\ufffd"


def test_stop_string_ends_the_generation_and_is_left_out(forced: Any) -> None:
    steps = forced("one STOP two", stop="STOP")
    assert text_of(steps) == "one "
    assert [step.finish_reason for step in steps] == [None] * 7 + ["stop"]
    assert text_of(forced("one STOP two", stop=["two", "OP"])) == "one ST"


# What ends a generation


def test_end_of_text(forced: Any) -> None:
    steps = forced("hi")
    assert ids_of(steps)[-1] == END_OF_TEXT
    assert (text_of(steps), [step.finish_reason for step in steps]) == ("hi", [None, None, "stop"])


@pytest.mark.parametrize("count", [1, 2, 17])
def test_max_tokens(model: Model, count: int) -> None:
    steps = list(model.generate(PROMPT, max_tokens=count, seed=1))
    assert len(steps) == count
    assert [step.finish_reason for step in steps] == [None] * (count - 1) + ["length"]


def test_closing_the_generator_stops_it(model: Model) -> None:
    steps = model.generate(PROMPT, max_tokens=1000, seed=1)
    for _ in range(3):
        next(steps)
    calls = model.engine.counters.calls
    steps.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(steps)
    assert model.engine.counters.calls == calls


def test_tokens_are_sampled_when_they_are_asked_for(model: Model) -> None:
    """Step by step: the model is not run for a token that nobody has asked for."""
    steps = model.generate(PROMPT, max_tokens=10, seed=1)
    calls = []
    for _ in range(3):
        next(steps)
        calls.append(model.engine.counters.calls)
    per_token = len(model.engine.program.groups)
    assert np.diff(calls).tolist() == [per_token, per_token]


# What is sampled


def test_ids_without_text_are_never_sampled(model: Model, bare: Model) -> None:
    hot: dict[str, Any] = {"temperature": 100.0, "top_p": 1.0, "seed": 3, "max_tokens": 400}

    def sampled(of: Model) -> set[int]:
        tokens: set[int] = set()
        for seed in range(4):
            tokens |= set(ids_of(of.generate([5], **{**hot, "seed": seed})))
        return tokens

    assert max(sampled(model)) < V - WITHOUT_TEXT
    assert max(sampled(bare)) >= V - WITHOUT_TEXT, "the test must be able to fail"


def test_seed_makes_a_run_reproducible(model: Model) -> None:
    def run(seed: int | None) -> list[int]:
        return ids_of(model.generate(PROMPT, max_tokens=30, seed=seed))

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in (7, 8, None)}) == 3


def test_greedy_takes_the_likeliest_token(model: Model) -> None:
    logits, state = model.forward(model.encode(PROMPT))
    allowed = V - WITHOUT_TEXT
    for step in model.generate(PROMPT, temperature=0, max_tokens=8):
        assert step.token == int(logits[:allowed].argmax())
        shifted = logits.astype(np.float64) - logits.max()
        expected = shifted[step.token] - np.log(np.exp(shifted).sum())
        assert step.logprob == pytest.approx(expected, abs=1e-5)
        logits, state = model.forward([step.token], state)


def test_text_of_the_steps_is_the_text_of_their_tokens(model: Model) -> None:
    assert model.tokenizer is not None
    steps = list(model.generate(PROMPT, temperature=2.0, top_p=1.0, max_tokens=100, seed=5))
    assert text_of(steps) == model.tokenizer.decode(ids_of(steps))


# States


def test_state_of_a_step_has_read_its_token(model: Model) -> None:
    ids = model.encode(PROMPT)
    read = list(ids)
    for step in model.generate(PROMPT, max_tokens=5, seed=2):
        read.append(step.token)
        _, expected = model.forward(read)
        assert_same_state(step.state, expected, 1e-4)
    assert step.state.tokens_seen == len(ids) + 5


def test_state_of_the_last_step_has_read_the_stop_string(model: Model, forced: Any) -> None:
    for text, options in (("one STOP two", {"stop": "STOP"}), ("hi", {})):
        steps = forced(text, **options)
        _, expected = model.forward([*model.encode("a"), *ids_of(steps)])
        assert_same_state(steps[-1].state, expected, 1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_asking_for_states_changes_nothing(model: Model, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": 20, "seed": 4}
    silent = ids_of(model.generate(PROMPT, **options))
    asked = []
    for step in model.generate(PROMPT, **options):
        assert step.state.tokens_seen == step.state.tokens_seen
        asked.append(step.token)
    assert asked == silent


def test_two_runs_joined_by_a_state_equal_one(model: Model, tmp_path: Path) -> None:
    whole = list(model.generate(PROMPT, temperature=0, max_tokens=24))
    first = list(model.generate(PROMPT, temperature=0, max_tokens=10))
    first[-1].state.save(tmp_path / "state")
    second = list(model.generate("", model.load_state(tmp_path / "state"), temperature=0, max_tokens=14))
    assert ids_of(first) + ids_of(second) == ids_of(whole)
    assert_same_state(second[-1].state, whole[-1].state)


def test_two_runs_of_ids_joined_by_a_state_equal_one(model: Model) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, V, 40).tolist()
    first = list(model.generate(ids[:13], temperature=0, max_tokens=3))
    kept = first[-1].state.copy()
    joined = list(model.generate(ids[13:], kept, temperature=0, max_tokens=5))
    whole = list(model.generate(ids[:13] + ids_of(first) + ids[13:], temperature=0, max_tokens=5))
    assert ids_of(joined) == ids_of(whole)
    assert_same_state(joined[-1].state, whole[-1].state, 1e-4)


def test_state_argument_is_untouched(model: Model) -> None:
    _, state = model.forward(model.encode(PROMPT))
    before = state.copy()
    assert state.logits is not None
    logits = state.logits.copy()
    for prompt in ("", "and"):
        runs = [list(model.generate(prompt, state, max_tokens=6, seed=1)) for _ in range(2)]
        assert ids_of(runs[0]) == ids_of(runs[1])
        assert runs[0][-1].state is not state
    assert_same_state(state, before)
    assert np.array_equal(state.logits, logits)


def test_empty_prompt_needs_a_state_that_has_read_something(model: Model) -> None:
    for prompt in ("", [], np.empty(0, np.int64)):
        for state in (None, model.new_state()):
            with pytest.raises(UsageError, match="prompt is empty and there is no state"):
                model.generate(prompt, state)  # type: ignore[arg-type]


# Without a vocabulary


def test_ids_work_without_a_tokenizer(model: Model, bare: Model) -> None:
    ids = model.encode(PROMPT)
    steps = list(bare.generate(ids, temperature=0, max_tokens=12))
    assert text_of(steps) == ""
    logits, state = bare.forward(ids)
    for step in steps:
        assert step.token == int(logits.argmax())  # nothing is banned where no vocabulary says what has text
        logits, state = bare.forward([step.token], state)


def test_text_asks_for_a_tokenizer(bare: Model) -> None:
    with pytest.raises(TokenizerError, match="tokenizer=FILE"):
        bare.generate(PROMPT)
    with pytest.raises(TokenizerError, match="tokenizer=FILE"):
        bare.generate([1, 2], stop=["x"])


# Arguments


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"temperature": -0.1}, "temperature="),
        ({"temperature": float("nan")}, "temperature="),
        ({"top_p": 1.1}, "top_p="),
        ({"top_k": -1}, "top_k="),
        ({"min_p": 2}, "min_p="),
        ({"penalty_decay": 1.5}, "penalty_decay="),
        ({"presence_penalty": float("inf")}, "presence_penalty="),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop string"),
        ({"stop": ""}, "stop string"),
    ],
)
def test_values_out_of_range_are_refused_before_the_prompt_is_read(
    model: Model, options: dict[str, Any], names: str
) -> None:
    calls = model.engine.counters.calls
    with pytest.raises(UsageError, match=names):
        model.generate(PROMPT, **options)
    assert model.engine.counters.calls == calls


@pytest.mark.parametrize("ids", [[-1], [V], [0, 10**30], [1.5], [[1, 2]]])
def test_ids_outside_the_vocabulary_are_refused(model: Model, ids: Any) -> None:
    with pytest.raises(UsageError):
        model.generate(ids)


def test_every_token_of_the_vocabulary_can_be_read(model: Model) -> None:
    logits, _ = model.forward(range(V))  # type: ignore[arg-type]
    assert np.isfinite(logits).all() and len(VOCABULARY) + 1 + WITHOUT_TEXT == V
