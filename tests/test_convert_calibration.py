"""`convert --calibrate`: which ids a conversion reads, what it chooses by them, and what it says of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_npu.conversion import fp16_range
from rwkv_npu.conversion.calibration import SAMPLED, TOKENS, default_ids, read_ids, sample_ids
from rwkv_npu.formats.bundle import Manifest, open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import GENERATIONS, Scaling
from rwkv_npu.runtime.weights import CheckpointSource
from rwkv_npu.text.tokenizer import find_tokenizer
from tests.fake_compiler import Compiler, stand_in
from tests.tiny import V, one_line, run_main, write_model, write_vocabulary


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return stand_in(monkeypatch)


def convert(capsys: Any, checkpoint: Path, out: Path, *options: object) -> tuple[int, str, str]:
    return run_main(capsys, "convert", checkpoint, "-o", out, "--rows", "16", "--cpu", "fp16", *options)


def manifest_of(out: Path) -> Manifest:
    return open_bundle(out).manifest


# -- what is read ----------------------------------------------------------------------------------------


def test_the_default_is_the_text_of_the_package(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    assert convert(capsys, checkpoint, tmp_path / "o")[0] == 0
    manifest = manifest_of(tmp_path / "o")
    assert manifest.headroom["tokens"] == fp16_range.TOKENS and 0 < manifest.headroom["largest"] < 8188
    assert manifest.scaling == Scaling(layers=((1.0, 1.0),) * 2)


@pytest.mark.parametrize("kind", ["txt", "json", "npy"])
def test_a_text_and_its_ids_are_the_same(kind: str, checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    text = "the turn and the return of the über, €uro by €uro\n" * 3
    ids = find_tokenizer(vocab_size=V, beside=checkpoint).encode(text)
    (tmp_path / "c.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps(ids))
    np.save(tmp_path / "c.npy", np.array(ids))
    assert convert(capsys, checkpoint, tmp_path / "o", "--calibrate", tmp_path / f"c.{kind}")[0] == 0
    found = manifest_of(tmp_path / "o").headroom
    assert convert(capsys, checkpoint, tmp_path / "p", "--calibrate", tmp_path / "c.txt")[0] == 0
    assert found == manifest_of(tmp_path / "p").headroom and found["tokens"] == len(ids)


def test_several_files_share(tmp_path: Path) -> None:
    spec = CheckpointSource(open_checkpoint(_model(tmp_path))).spec
    for number, count in ((1, 20_000), (2, 100), (3, 20_000)):
        np.save(tmp_path / f"{number}.npy", np.full(count, number))
    files = [str(tmp_path / f"{number}.npy") for number in (1, 2, 3)]
    ids = read_ids(files, None, spec)
    assert ids is not None and len(ids) == TOKENS
    assert [(ids == number).sum() for number in (1, 2, 3)] == [4046, 100, 4046]


def _model(folder: Path) -> Path:
    write_model(folder / "m.pth", vocabulary=False)
    return folder / "m.pth"


def test_without_a_vocabulary_the_model_writes_its_own(wordless: Path, tmp_path: Path, capsys: Any) -> None:
    status, _, err = convert(capsys, wordless, tmp_path / "o")
    assert status == 0 and "calibrated on tokens sampled from it" in err
    assert manifest_of(tmp_path / "o").headroom["tokens"] == SAMPLED


@pytest.mark.parametrize("generation", GENERATIONS)
def test_sampled_ids_come_from_the_model_and_are_reproducible(generation: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m.pth", generation, vocabulary=False)
    source = CheckpointSource(open_checkpoint(tmp_path / "m.pth"))
    steps: list[int] = []
    ids = sample_ids(source, 70, progress=steps.append)
    assert ids.shape == (70,) and ids.dtype == np.int64 and sum(steps) == 80
    assert len(set(ids.tolist())) > 20 and 0 <= ids.min() and ids.max() < V
    np.testing.assert_array_equal(sample_ids(source, 70), ids)
    assert (sample_ids(source, 70, seed=1) != ids).any()


def test_sampled_ids_follow_the_model(tmp_path: Path) -> None:
    """A head that always says the same."""
    source = CheckpointSource(open_checkpoint(_model(tmp_path)))
    whole = source.tensor

    def certain(name: str) -> np.ndarray:
        if name == "ln_out.weight":
            return np.zeros_like(whole(name))
        if name == "ln_out.bias":
            return np.ones_like(whole(name))
        if name == "head.weight":
            return np.where(np.arange(V) == 7, np.float32(10), np.float32(0)) * np.ones((64, 1), np.float32)
        return whole(name)

    source.tensor = certain  # type: ignore[method-assign]
    assert (sample_ids(source, 40) == 7).all()
    assert len(default_ids(None, source)) == SAMPLED


def test_a_language_of_single_bytes_is_noted_and_read(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.txt").write_text("Утром снег лежал до самых окон.\n" * 5, encoding="utf-8")
    status, _, err = convert(capsys, checkpoint, tmp_path / "o", "--calibrate", tmp_path / "c.txt")
    assert status == 0 and "only single bytes for this text" in err
    assert manifest_of(tmp_path / "o").headroom["tokens"] > 200


def test_for_the_cpu_alone_nothing_is_read(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    assert convert(capsys, checkpoint, tmp_path / "o", "--target", "none")[0] == 0
    assert manifest_of(tmp_path / "o").headroom == {}


# -- what is chosen --------------------------------------------------------------------------------------


def _louder(folder: Path, **factors: float) -> Path:
    """A model some of whose matrices are larger, by the last parts of their names: its squares leave fp16, unless told
    otherwise."""
    import torch

    factors = factors or {"ffn.key": 300, "ffn.value": 1 / 3000}
    write_model(folder / "loud" / "model.pth")
    weights = torch.load(folder / "loud" / "model.pth", weights_only=True)
    for end, factor in factors.items():
        weights = {k: v * factor if k.endswith(f"{end}.weight") else v for k, v in weights.items()}
    torch.save(weights, folder / "loud" / "model.pth")
    return folder / "loud" / "model.pth"


def test_a_loud_model_is_scaled_and_keeps_its_scales(tmp_path: Path, capsys: Any, compiler: Compiler) -> None:
    loud, out = _louder(tmp_path), tmp_path / "o"
    status, _, err = convert(capsys, loud, out)
    assert status == 0 and "intermediates pass" not in err
    first = manifest_of(out)
    assert all(ffn > 1 for ffn, _ in first.scaling.layers) and first.headroom["largest"] <= 8188
    # Added to, the bundle keeps them, though another text would have others.
    np.save(tmp_path / "c.npy", np.arange(64))
    status, _, err = convert(capsys, loud, out, "--fusion", "projection", "--calibrate", tmp_path / "c.npy")
    assert status == 0 and manifest_of(out).scaling == first.scaling
    assert manifest_of(out).headroom["tokens"] == 64


def test_a_bundle_that_was_never_calibrated_is_warned_of(tmp_path: Path, capsys: Any) -> None:
    loud, out = _louder(tmp_path), tmp_path / "o"
    assert convert(capsys, loud, out, "--target", "none")[0] == 0
    status, _, err = convert(capsys, loud, out)
    assert status == 0 and "intermediates exceed 8188" in err and "--force chooses the scales anew" in err
    assert manifest_of(out).scaling == Scaling(ffn=4.0)
    assert convert(capsys, loud, out, "--force")[0] == 0
    assert manifest_of(out).headroom["largest"] <= 8188


@pytest.mark.parametrize(("fusion", "advised"), [("layer", True), ("projection", False)])
def test_projection_fusion_is_advised_in_layer_fusion_only(
    fusion: str, advised: bool, tmp_path: Path, capsys: Any
) -> None:
    """An intermediate that no scale changes is too large."""
    loud = _louder(tmp_path, **{"att.key": 1e5})
    status, _, err = convert(capsys, loud, tmp_path / "o", "--fusion", fusion)
    assert status == 0 and "intermediates exceed 8188" in err
    assert ("--fusion projection" in err) == advised


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.txt", b"", "is empty"),
        ("c.txt", b"\x00\x01\x02binary", "zero bytes"),
        ("c.txt", b"\xff\xfe\xfd", "not UTF-8"),
        ("c.txt", b"the the the ", "has 3 tokens: at least 8"),
        ("c.json", b"[1, 2, 3]", "has 3 tokens: at least 8"),
        ("c.json", json.dumps([V] * 20).encode(), f"contain {V}, which is outside"),
        ("c.json", b"{}", "one list of whole numbers"),
        ("c.npy", b"no array", "holds no token ids"),
    ],
)
def test_files_that_do_not_serve(
    name: str, content: bytes, said: str, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    status, out, err = convert(capsys, checkpoint, tmp_path / "o", "--calibrate", tmp_path / name)
    assert status == 1 and out == "" and one_line(err) and said in err
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("options", [("--rows", "1"), ("--target", "none")])
def test_a_text_too_short_for_int8_is_refused_before_writing(
    options: tuple[str, ...], checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    """The graphs alone would need fewer tokens."""
    np.save(tmp_path / "c.npy", np.arange(1, 8))
    asked = ("--precision", "w8a8", "--calibrate", tmp_path / "c.npy", *options)
    status, _, err = convert(capsys, checkpoint, tmp_path / "o", *asked)
    assert status == 1 and one_line(err) and "has 7 tokens: at least 8" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.npy"]
    np.save(tmp_path / "c.npy", np.arange(1, 9))
    assert convert(capsys, checkpoint, tmp_path / "o", *asked)[0] == 0


def test_text_without_a_vocabulary(wordless: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.txt").write_text("words, many words, more words than that")
    status, _, err = convert(capsys, wordless, tmp_path / "o", "--calibrate", tmp_path / "c.txt")
    assert status == 1 and one_line(err) and "no vocabulary is known" in err
    write_vocabulary(tmp_path / "vocab.txt")
    options = "--calibrate", tmp_path / "c.txt", "--tokenizer", tmp_path / "vocab.txt"
    assert convert(capsys, wordless, tmp_path / "o", *options)[0] == 0


def test_a_file_that_is_not_there(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    status, _, err = convert(capsys, checkpoint, tmp_path / "o", "--calibrate", tmp_path / "none.txt")
    assert status == 1 and one_line(err) and "No such file" in err
