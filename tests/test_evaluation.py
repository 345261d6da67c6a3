"""Measuring quality: figures against independent ones, going on where a run was interrupted, and what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.evaluation import Evaluation, evaluate, journal, log_softmax, text
from rwkv_npu.evaluation.likelihood import compare, log_likelihood
from rwkv_npu.model import Model
from rwkv_npu.models.spec import Group
from tests.evaluations import IDS, stopping
from tests.tiny import write_model


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


def test_an_interrupted_chunk_is_read_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is still that of the last whole chunk."""
    whole, calls = evaluate(model, IDS), iter(range(10))
    start = model.engine._dispatcher.start

    def interrupted(group: Group, *arguments: Any, **options: Any) -> Any:
        if group.role == "head" and next(calls) == 4:
            raise KeyboardInterrupt
        return start(group, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine._dispatcher, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, IDS, resume=tmp_path / "file")
    told: list[int] = []
    assert evaluate(model, IDS, resume=tmp_path / "file", progress=told.append) == whole
    assert told[0] == 4 * text.CHUNK


def test_saved_scores_survive_a_kill(folder: Path, model: Model, tmp_path: Path) -> None:
    path, file = folder / "a" / "model.pth", tmp_path / "file"
    code = f"""
import os, rwkv_npu
from rwkv_npu.evaluation import Evaluation, evaluate, journal
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
    refused("text or another number of its tokens", model, IDS[1:])
    refused("text or another number of its tokens", model, IDS[:-1])
    refused("context", model, IDS, context=50)
    refused("reference", model, IDS, reference=other)


def test_the_same_weights_in_another_precision_are_another_model(folder: Path, tmp_path: Path) -> None:
    """The bundle's files are the same: the last choice of its precision is in its manifest only."""
    checkpoint, bundle, file = folder / "a" / "model.pth", tmp_path / "a.rwkv", tmp_path / "file"
    for cpu in ("int4", "int8"):  # both files are there from here on
        rwkv_npu.convert(checkpoint, bundle, target="none", cpu=cpu)

    def read() -> Evaluation:
        with rwkv_npu.load(bundle, backend="ort") as model:
            return evaluate(model, IDS[:64], resume=file)

    found = read()
    rwkv_npu.convert(checkpoint, bundle, target="none", cpu="int4")
    with pytest.raises(UsageError, match="belongs to an evaluation with another model"):
        read()
    rwkv_npu.convert(checkpoint, bundle, target="none", cpu="int8")
    assert read() == found


def test_other_projections_in_int8_are_another_model(folder: Path, model: Model, tmp_path: Path) -> None:
    """As a model that is measured, and as the one that it is compared with."""
    np.save(tmp_path / "ids.npy", IDS)
    bundle = tmp_path / "a.rwkv"

    def convert(pattern: str) -> None:
        (tmp_path / "map.json").write_text(json.dumps({pattern: "w8a8"}))
        given = {"precision_map": tmp_path / "map.json", "calibrate": [tmp_path / "ids.npy"]}
        rwkv_npu.convert(folder / "a" / "model.pth", bundle, target="none", precision="mixed", **given)

    def read() -> list[Evaluation]:
        with rwkv_npu.load(bundle, backend="numpy", precision="mixed") as mixed:
            return [
                evaluate(mixed, IDS[:64], resume=tmp_path / "measured"),
                evaluate(model, IDS[:64], reference=mixed, resume=tmp_path / "compared"),
            ]

    convert("head")
    found = read()
    convert("*.att.output.weight")
    for what, file in (("model", "measured"), ("reference", "compared")):
        with pytest.raises(UsageError, match=f"{file} belongs to an evaluation with another {what}"):
            read()
        (tmp_path / file).rename(tmp_path / f"{file} of before")
    other = read()
    assert other != found
    convert("head")
    for file in ("measured", "compared"):
        (tmp_path / f"{file} of before").rename(tmp_path / file)
    assert read() == found


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
        ("context=0", [3], {"context": 0}),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(model, ids, **options)
