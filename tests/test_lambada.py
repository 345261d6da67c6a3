"""LAMBADA: passages as others split them, scores as by hand, and files that hold none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import UsageError
from rwkv_npu.evaluation import evaluate, evaluate_lambada, read_lambada
from rwkv_npu.evaluation.lambada import _score, split
from rwkv_npu.model import Model
from rwkv_npu.text.tokenizer import WorldTokenizer
from tests.evaluations import IDS, TEXTS, stopping, write_jsonl
from tests.tiny import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    yield from opened(tmp_path_factory, seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    yield from opened(tmp_path_factory, seed=1)


def opened(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("lambada") / "model.pth"
    write_model(path, D=32, seed=seed)
    with rwkv_npu.load(path, backend="numpy") as model:
        yield model


@given(st.text(alphabet=st.sampled_from("ab \n\t\u2028.")).map(str.strip).filter(lambda one: " " in one))
def test_passages_are_those_of_the_harness(content: str) -> None:
    """Its templates `text.split(' ')[:-1]|join(' ')` and `' ' + text.split(' ')[-1]`, and the spaces that it moves."""
    *words, last = content.split(" ")
    context, target = " ".join(words), " " + last
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, target = context[:-spaces], context[-spaces:] + target
    assert split(content) == (context, target)


def test_lambada_is_scored_as_by_hand(model: Model, tmp_path: Path) -> None:
    """Greedily and token by token, on a model that reads one at a time."""
    assert model.tokenizer
    right, nats = [], []
    for content in TEXTS:
        context, target = split(content)
        alone, ids = model.encode(context), model.encode(context + target)
        if ids[: len(alone)] != alone:  # "the " is one token, which no boundary parts
            ids = alone + model.encode(target)
        start = len(alone)
        logits, state = model.forward([0])
        total, foretold = 0.0, True
        for position, token in enumerate(ids):
            if position >= start:
                values = logits.astype(np.float64)
                total -= values[token] - np.log(np.exp(values).sum())
                foretold &= int(values.argmax()) == token
            logits, state = model.forward([token], state)
        right.append(foretold)
        nats.append(total)
    found = evaluate_lambada(model, read_lambada(str(write_jsonl(tmp_path / "l.jsonl"))))
    assert found.texts == len(TEXTS) and found.accuracy == np.mean(right)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    p = np.mean(right)
    assert found.accuracy_error == pytest.approx(np.sqrt(p * (1 - p) / (len(TEXTS) - 1)))


class Parrot:
    """A model over bytes that foretells one text: the next byte's logit is 9, all others are 0."""

    def __init__(self, text: str):
        self.text = text.encode()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def forward(
        self, ids: list[int], state: int | None = None, all_logits: bool = False, inplace: bool = False
    ) -> tuple[np.ndarray, int]:
        start = -1 if state is None else state  # the end-of-text token comes before the text
        logits = np.zeros((len(ids), 256), np.float32)
        for row in range(len(ids)):
            logits[row, self.text[start + row + 1]] = 9
        return (logits if all_logits else logits[-1]), start + len(ids)


@pytest.mark.parametrize(
    ("content", "right"), [("so it goes", 1), ("so it does", 0), ("so it goep", 0), ("so iX goes", 1)]
)
def test_every_token_of_the_last_word_must_be_predicted(content: str, right: int) -> None:
    passage = split(content)
    log_p, foretold = _score(Parrot("so it goes."), passage)  # type: ignore[arg-type]
    assert foretold == right
    hits = sum(a == b for a, b in zip(" goes", passage.target, strict=True))
    assert log_p == pytest.approx(9 * hits - 5 * np.log(255 + np.exp(9)))


def test_lambada_goes_on(model: Model, other: Model, tmp_path: Path) -> None:
    passages = read_lambada(str(write_jsonl(tmp_path / "l.jsonl")))
    whole = evaluate_lambada(model, passages, reference=other)
    alone = evaluate_lambada(other, passages)
    assert whole.reference == alone
    with pytest.raises(KeyboardInterrupt):
        evaluate_lambada(model, passages, reference=other, resume=tmp_path / "file", progress=stopping(2))
    told: list[int] = []
    again = evaluate_lambada(model, passages, reference=other, resume=tmp_path / "file", progress=told.append)
    assert again == whole and told == [3, 1, 1]
    with pytest.raises(UsageError, match="another set of texts"):
        evaluate_lambada(model, passages[1:], reference=other, resume=tmp_path / "file")


def test_with_another_tokenizer_it_is_another_evaluation(model: Model, other: Model, tmp_path: Path) -> None:
    """For both models: with another tokenizer the same weights score other tokens."""
    passages = read_lambada(str(write_jsonl(tmp_path / "l.jsonl")))
    letters = {1 + byte: bytes([byte]) for byte in range(256)}
    spelling = Model(other.engine, WorldTokenizer(letters, name="x", source="x"), other.source)
    evaluate_lambada(other, passages, resume=tmp_path / "file")
    evaluate_lambada(model, passages, reference=other, resume=tmp_path / "compared")
    assert evaluate_lambada(spelling, passages) != evaluate_lambada(other, passages)
    with pytest.raises(UsageError, match="belongs to an evaluation with another tokenizer: name another"):
        evaluate_lambada(spelling, passages, resume=tmp_path / "file")
    with pytest.raises(UsageError, match="belongs to an evaluation with another tokenizer: name another"):
        evaluate_lambada(model, passages, reference=spelling, resume=tmp_path / "compared")


def test_texts_and_passages_are_not_mixed_up(model: Model, tmp_path: Path) -> None:
    """A file of either is no damaged one of the other."""
    passages = read_lambada(str(write_jsonl(tmp_path / "l.jsonl")))
    evaluate_lambada(model, passages, resume=tmp_path / "passages")
    evaluate(model, IDS, resume=tmp_path / "text")
    with pytest.raises(UsageError, match="passages is of another kind of evaluation: name another file"):
        evaluate(model, IDS, resume=tmp_path / "passages")
    with pytest.raises(UsageError, match="text is of another kind of evaluation: name another file"):
        evaluate_lambada(model, passages, resume=tmp_path / "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no texts"),
        ("\n \n", "holds no texts"),
        ('{"text": "two words"}\n{"text": "one"}', "line 2: a text of two words"),
        ('{"text": 7}', "line 1"),
        ('{"words": "two words"}', "line 1"),
        ('["two words"]', "line 1"),
        ("two words", "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_files_that_are_no_lambada(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        read_lambada(str(tmp_path / "l.jsonl"))
    assert "\n" not in str(error.value)


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"text": "a\u2028b c"}\r\n\r\n{"text": "d e"}', encoding="utf-8")
    with pytest.warns(UserWarning, match="without carriage returns"):
        assert read_lambada(str(tmp_path / "l.jsonl")) == [("a\u2028b", " c"), ("d", " e")]
