"""Measuring quality: figures against independent ones, going on where a run was interrupted, and what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.evaluation import evaluate, evaluate_lambada, journal, log_softmax, read_lambada, text
from rwkv_npu.evaluation.lambada import _score, split
from rwkv_npu.evaluation.likelihood import compare, log_likelihood
from rwkv_npu.model import Model
from tests.tiny import one_line, run_main, write_model

IDS = np.random.default_rng(5).integers(1, 264, 700)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_model(folder / "a" / "model.pth", D=32)
    write_model(folder / "b" / "model.pth", D=32, seed=1)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with rwkv_npu.load(folder / "a" / "model.pth", backend="numpy") as model:
        yield model


@pytest.fixture(scope="module")
def other(folder: Path) -> Iterator[Model]:
    with rwkv_npu.load(folder / "b" / "model.pth", backend="numpy") as model:
        yield model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_main(capsys, *arguments)


def stopping(after: int) -> Callable[[int], None]:
    """A progress that is interrupted at its call number `after`."""
    calls = iter(range(after))

    def progress(_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


# -- figures ---------------------------------------------------------------------------------------------


def test_figures_by_position(model: Model, other: Model) -> None:
    found = evaluate(model, IDS, reference=other, text_bytes=1000)
    inputs = [0, *IDS[:-1].tolist()]
    log_p, log_q = (log_softmax(one.forward(inputs, all_logits=True)[0]) for one in (model, other))
    nats = -log_p[np.arange(len(IDS)), IDS]
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    assert found.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / 1000, rel=1e-4)
    assert [(part.begin, part.end) for part in found.positions] == [(0, 64), (64, 512), (512, 4096)]
    for part in (found, *found.positions):
        rows = slice(getattr(part, "begin", 0), getattr(part, "end", None))
        assert part.tokens == len(nats[rows])
        assert part.bits_per_token == pytest.approx(nats[rows].mean() / np.log(2), rel=1e-4)
        assert part.perplexity == pytest.approx(2**part.bits_per_token)
        assert part.kl_mean == pytest.approx(kl[rows].mean(), rel=1e-4)
        assert part.kl_p99 == pytest.approx(np.quantile(kl[rows], 0.99), rel=1e-3)
        assert part.top1 == pytest.approx(same[rows].mean())


def test_documents_begin_anew(model: Model) -> None:
    """Contexts of 100 tokens are as many texts of their own; positions count within each."""
    found = evaluate(model, IDS, context=100)
    parts = [evaluate(model, IDS[start : start + 100]) for start in range(0, len(IDS), 100)]
    assert found.bits_per_token == pytest.approx(np.mean([part.bits_per_token for part in parts]))
    assert [(part.begin, part.tokens) for part in found.positions] == [(0, 7 * 64), (64, 7 * 36)]
    late = np.mean([part.positions[1].bits_per_token for part in parts])
    assert found.positions[1].bits_per_token == pytest.approx(late)
    assert (
        found.context == 100
        and evaluate(model, IDS, context=7000).positions == evaluate(model, IDS).positions
    )


def test_a_model_is_at_no_distance_from_itself(model: Model) -> None:
    found = evaluate(model, IDS[:80], reference=model)
    assert (found.kl_mean, found.kl_p99, found.top1) == (0, 0, 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), spread=st.floats(0, 30), apart=st.floats(0, 3))
def test_likelihoods_and_divergences(seed: int, rows: int, spread: float, apart: float) -> None:
    random = np.random.default_rng(seed)
    logits = (spread * random.standard_normal((rows, 50)) + 100 * random.standard_normal()).astype(np.float32)
    theirs = logits + (apart * random.standard_normal(logits.shape)).astype(np.float32)
    targets = random.integers(0, 50, rows)
    log_p, log_q = log_softmax(logits), log_softmax(theirs)
    found, kl = compare(logits, targets, theirs)
    assert np.allclose(found, log_p[np.arange(rows), targets], rtol=1e-12)
    assert np.allclose(kl, (np.exp(log_q) * (log_q - log_p)).sum(-1), rtol=1e-9, atol=1e-13)
    assert (log_likelihood(logits, targets) == found).all() and (kl >= -1e-13).all()


def test_large_vocabularies_take_little_memory() -> None:
    """Beside the logits, 64 rows of 65536 need a few rows, not a few times as much as they have themselves."""
    logits = np.random.default_rng(0).standard_normal((64, 65536)).astype(np.float32)
    tracemalloc.start()
    try:
        compare(logits, np.zeros(64, np.int64), logits[::-1])
        assert tracemalloc.get_traced_memory()[1] < 10 * 8 * 65536
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(wrong: float) -> None:
    good, bad = np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32)
    bad[1, 3] = wrong
    for pair in ((bad, good), (good, bad), (bad, None)):
        with pytest.raises(BackendError, match="not finite"):
            compare(pair[0], np.zeros(2, np.int64), pair[1])


# -- going on --------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 90),
    context=st.none() | st.integers(1, 40),
    stops=st.lists(st.integers(0, 6), max_size=3),
    compared=st.booleans(),
)
def test_interrupted_and_resumed_is_the_same_as_in_one_go(
    model: Model,
    other: Model,
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    context: int | None,
    stops: list[int],
    compared: bool,
) -> None:
    """To the last bit, wherever it is interrupted, and however often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", 8)
        options = {"reference": other if compared else None, "context": context, "text_bytes": 7}
        whole = evaluate(model, IDS[:count], **options)
        file = tmp_path_factory.mktemp("resume") / "file"
        for stop in stops:
            try:
                evaluate(model, IDS[:count], resume=file, progress=stopping(stop), **options)
            except KeyboardInterrupt:
                continue
        told: list[int] = []
        assert evaluate(model, IDS[:count], resume=file, progress=told.append, **options) == whole
        assert sum(told) == count


def test_an_interruption_within_a_chunk_is_made_good(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is still that of the last whole chunk."""
    whole, calls = evaluate(model, IDS), iter(range(10))
    logits = model.engine._network.logits

    def interrupted(*arguments: object) -> np.ndarray:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return logits(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(model.engine._network, "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, IDS, resume=tmp_path / "file")
    told: list[int] = []
    assert evaluate(model, IDS, resume=tmp_path / "file", progress=told.append) == whole
    assert told[0] == 4 * text.CHUNK


def test_what_was_saved_outlives_a_kill(folder: Path, model: Model, tmp_path: Path) -> None:
    path, file = folder / "a" / "model.pth", tmp_path / "file"
    code = f"""
import os, rwkv_npu
from rwkv_npu.evaluation import evaluate, journal
journal.SAVE_S, done = 0, []
def progress(count):
    done.append(count)
    if len(done) == 3:
        os._exit(9)
evaluate(rwkv_npu.load({str(path)!r}, backend="numpy"), {IDS.tolist()}, progress=progress, resume={str(file)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    told: list[int] = []
    assert evaluate(model, IDS, progress=told.append, resume=file) == evaluate(model, IDS)
    assert told[0] == 3 * text.CHUNK and [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_finished_one_is_only_read(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(model, IDS, resume=tmp_path / "file")
    monkeypatch.setattr(model, "forward", None)
    assert evaluate(model, IDS, resume=tmp_path / "file") == whole


def test_another_evaluation_is_refused(model: Model, other: Model, tmp_path: Path) -> None:
    file = tmp_path / "file"
    evaluate(model, IDS, resume=file)
    kept = file.read_bytes()

    def refused(what: str, *arguments: object, **options: object) -> None:
        with pytest.raises(
            UsageError, match=f"{file} belongs to an evaluation with another {what}: name"
        ) as error:
            evaluate(*arguments, resume=file, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value) and file.read_bytes() == kept

    refused("model", other, IDS)
    refused("text", model, IDS[1:])
    refused("text", model, IDS[:-1])
    refused("context", model, IDS, context=50)
    refused("reference", model, IDS, reference=other)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(
    model: Model, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever byte of it is another: one line, or figures (a score may have any value), never a traceback."""
    file = tmp_path_factory.mktemp("damaged") / "file"
    evaluate(model, IDS[:70], resume=file)
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, 8 + header - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    cut = data.draw(st.booleans())
    file.write_bytes(content[:place] if cut and place else content)
    try:
        evaluate(model, IDS[:70], resume=file)
    except UsageError as error:
        assert str(file) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content", [b"x", b"\0" * 4096, b"PK\x03\x04" + bytes(500)])
def test_other_files_are_refused(content: bytes, model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match="file"):
        evaluate(model, IDS, resume=tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_a_state_file_is_no_evaluation(model: Model, tmp_path: Path) -> None:
    model.new_state().save(tmp_path / "state")
    with pytest.raises(UsageError, match="is not from an evaluation that was interrupted: name another"):
        evaluate(model, IDS, resume=tmp_path / "state")


def test_a_full_disk(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    evaluate(model, IDS[:64], resume=tmp_path / "file")
    kept = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(journal, "replace_tensors", full)
    with pytest.raises(UsageError, match="cannot write .*file2: No space left"):
        evaluate(model, IDS[:64], resume=tmp_path / "file2")
    assert (tmp_path / "file").read_bytes() == kept and len(list(tmp_path.iterdir())) == 1


def test_what_makes_no_sense(model: Model) -> None:
    for message, ids, options in (
        ("the text is empty", [], {}),
        ("token id 273 is outside the model's vocabulary of 273", [3, 273], {}),
        ("token id -1 is outside", [3, -1], {}),
        ("context is 0", [3], {"context": 0}),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(model, ids, **options)


# -- LAMBADA ---------------------------------------------------------------------------------------------

TEXTS = [
    "the turning and the turn",
    "re and the über",
    "a b  c",
    "turning the and\nre turn",
    "and and and and",
]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("\n".join(json.dumps({"text": one, "more": 1}) for one in texts) + "\n", encoding="utf-8")
    return path


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
def test_every_token_of_the_word_has_to_be_foretold(content: str, right: int) -> None:
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
    with pytest.raises(UsageError, match="name another file"):
        evaluate(model, IDS, resume=tmp_path / "file")


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
    assert read_lambada(str(tmp_path / "l.jsonl")) == [("a\u2028b", " c"), ("d", " e")]


# -- the command -----------------------------------------------------------------------------------------


def test_the_command_measures_lambada(run: Run, folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "l.jsonl")
    flags = ("eval", "-m", folder / "a" / "model.pth", "--backend", "numpy", "--lambada", file)
    figures = json.loads(run(*flags, "--json")[1])
    assert figures["texts"] == 5 and 0 <= figures["accuracy"] <= 1 and figures["reference"] is None
    status, table, err = run(*flags, "--against", folder / "b" / "model.pth", "--against-backend", "numpy")
    assert (status, err) == (0, "") and f"{figures['perplexity']:.3f} per last word" in table
    assert table.count("accuracy") == 2 and "compared with  fp32 weights" in table


def test_the_command_reads_ids(run: Run, folder: Path, tmp_path: Path, model: Model) -> None:
    flags = ("eval", "-m", folder / "a" / "model.pth", "--backend", "numpy", "--json", "--text")
    (tmp_path / "text").write_text("the turning and über", encoding="utf-8")
    from_text = json.loads(run(*flags, tmp_path / "text")[1])
    np.save(tmp_path / "ids.npy", np.array(model.encode("the turning and über"), np.int32))
    assert json.loads(run(*flags, tmp_path / "ids.npy")[1]) == from_text
    (tmp_path / "ids.json").write_text("[5, 6000]")
    status, out, err = run(*flags, tmp_path / "ids.json")
    assert (status, out) == (1, "") and one_line(err) and "token id 6000 is outside" in err


def test_the_command_goes_on_after_ctrl_c(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    flags = ("eval", "-m", folder / "a" / "model.pth", "--backend", "numpy", "--text", tmp_path / "ids.npy")
    whole = run(*flags)[1]
    forward, calls = Model.forward, iter(range(100))

    def interrupted(*arguments: object, **options: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward", interrupted)
        status, out, err = run(*flags, "--resume", tmp_path / "file")
    assert (status, out) == (130, "") and f"the same command goes on from {tmp_path / 'file'}" in err
    assert run(*flags, "--resume", tmp_path / "file") == (0, whole, "")


def test_a_bundle_is_compared_with_its_own_unquantised_weights(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """The reference of a bundle is what it stores whole, though it runs in int8 unless told otherwise."""
    np.save(tmp_path / "ids.npy", IDS[:100])
    rwkv_npu.convert(folder / "a" / "model.pth", tmp_path / "a.rwkv", target="none", cpu="int8")
    flags = ("eval", "-m", tmp_path / "a.rwkv", "--text", tmp_path / "ids.npy", "--json")
    found = json.loads(run(*flags, "--against-backend", "numpy")[1])
    assert found["model"].startswith("int8 weights") and found["compared_with"].startswith(
        "fp16 weights, numpy"
    )
    assert 1e-7 < found["kl_mean"] < 0.1
    same = json.loads(run(*flags, "--precision", "fp16", "--against", tmp_path / "a.rwkv")[1])
    assert same["kl_mean"] < 1e-9 and "fp16 weights" in same["compared_with"]
    int8 = json.loads(run(*flags, "--against-precision", "int8")[1])
    assert int8["kl_mean"] < 1e-9 and "int8 weights" in int8["compared_with"]
    exact = json.loads(run(*flags, "--precision", "fp16", "--against", folder / "a" / "model.pth")[1])
    assert "fp32 weights" in exact["compared_with"] and 0 < exact["kl_mean"] < 1e-3
    stored = json.loads(run(*flags, "--backend", "numpy", "--against-backend", "ort")[1])
    assert stored["model"].startswith("fp16 weights") and stored["kl_mean"] < 1e-9
    status, _, err = run(*flags, "--against-precision", "int3")
    assert status == 1 and one_line(err) and "no int3 weights" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "t", "--lambada", "l"], "--text or --lambada, not both"),
        (["--lambada", "l", "--context", "5"], "--context is for --text"),
        (["--lambada", "l", "-n", "5"], "--max-tokens is for --text"),
        (["--context", "0"], "--context is 0"),
        (["--resume", "/no/such/folder/file"], "cannot write there"),
        (["--lambada", "/none/l.jsonl"], "cannot read /none/l.jsonl"),
        (["--text", "/none/ids.npy"], "cannot read /none/ids.npy"),
    ],
)
def test_the_command_refuses(flags: list[str], message: str, run: Run) -> None:
    status, out, err = run("eval", "-m", "/no/such/model", *flags)
    assert (status, out) == (1, "") and one_line(err) and message in err


@pytest.mark.compiler
def test_the_simulator_goes_on_too(
    run: Run, board_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after each chunk, Rockchip's simulator ends with the figures of one go."""
    np.save(tmp_path / "ids.npy", IDS[:40] % 256)
    monkeypatch.setattr(text, "CHUNK", 16)
    flags = ("eval", "-m", board_bundles["6"], "--backend", "rknn-sim", "--against-backend", "numpy")
    flags = (*flags, "--text", tmp_path / "ids.npy", "--json")
    forward, calls = Model.forward, iter(range(1000))

    def interrupted(model: Model, *arguments: object, **options: object) -> object:
        if "rknn-sim" in model.describe() and next(calls) in (1, 3):
            raise KeyboardInterrupt
        return forward(model, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "forward", interrupted)
    resumed = (*flags, "--resume", tmp_path / "file")
    assert [run(*resumed)[0] for _ in range(2)] == [130, 130]
    status, out, _ = run(*resumed)
    figures = json.loads(out)
    assert status == 0 and figures["tokens"] == 40 and 0 < figures["kl_mean"] < 1e-3
    assert figures["model"].startswith("fp16 weights, rknn-sim") and figures["compared_with"].startswith(
        "fp16 weights, numpy"
    )
    monkeypatch.setattr(Model, "forward", forward)
    assert json.loads(run(*flags)[1]) == figures
