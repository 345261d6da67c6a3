"""Converting to a bundle for the CPU: what comes out, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.errors import CheckpointError, RwkvNpuError, TokenizerError, UsageError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.safetensors import TensorFile
from rwkv_npu.models.spec import FUSIONS, GENERATIONS
from tests.conversions import contents, convert, names, outputs
from tests.tiny import run_main, write_model, write_vocabulary

# -- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_runs_as_its_checkpoint(generation: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth", generation, L=3)
    expected = outputs(tmp_path / "model.pth", backend="numpy")
    bundle = convert(tmp_path / "model.pth", tmp_path / "out", cpu="fp32")
    for fusion in FUSIONS:
        found = outputs(bundle, backend="ort", fusion=fusion)
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("cpu", "tolerance"), [("fp16", 0.03), ("fp32", 2e-4)])
@pytest.mark.parametrize("backend", ["numpy", "ort", "numba", "torch"])
def test_every_backend_runs_every_precision(
    checkpoint: Path, out: Path, cpu: str, tolerance: float, backend: str
) -> None:
    bundle = convert(checkpoint, out, cpu=cpu)
    expected = outputs(checkpoint, backend="numpy")
    difference = np.abs(outputs(bundle, backend=backend) - expected).max()
    assert difference < tolerance
    if cpu == "fp16":
        assert difference > 2e-4, "fp16 has a price: were the weights not rounded?"
    assert open_bundle(bundle).manifest.cpu == cpu


def test_what_the_manifest_says(checkpoint: Path, whole: Path) -> None:
    manifest = open_bundle(whole).manifest
    model = rwkv_npu.load(checkpoint, backend="numpy")
    assert (manifest.spec, manifest.fingerprint) == (model.spec, model.fingerprint)
    assert manifest.checkpoint == "model.pth" and manifest.artifacts == []
    assert rwkv_npu.__version__ in manifest.made_by
    assert names(whole.parent) == ["whole.rwkv"]


def test_converting_twice_gives_the_same_bytes(checkpoint: Path, whole: Path, out: Path) -> None:
    assert contents(convert(checkpoint, out)) == contents(whole)


def test_verify_keeps_the_errors(checkpoint: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rwkv_npu")
    errors = open_bundle(convert(checkpoint, out, verify=True)).manifest.graph_errors
    assert set(errors) == {f"graphs/{path.name}" for path in out.glob("graphs/*.onnx")}
    assert max(errors.values()) < 1e-5
    assert sum("graphs/layer.mid.0.onnx" in line for line in "\n".join(caplog.messages).splitlines()) == 1


def test_default_output_is_the_stem_in_the_current_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rwkv_npu.convert(checkpoint, target="none") == Path("model.rwkv")
    write_model(tmp_path / "hub-model-7b", hf=True)
    assert rwkv_npu.convert(tmp_path / "hub-model-7b", target="none") == Path("hub-model-7b.rwkv")
    monkeypatch.chdir(tmp_path / "hub-model-7b")
    with pytest.raises(UsageError, match="contains the model itself"):
        rwkv_npu.convert(".", "../hub-model-7b", target="none", force=True)


# -- what is refused -------------------------------------------------------------------------------------


def with_value(path: Path, name: str, value: float) -> Path:
    """A checkpoint with one wrong number in the middle of a tensor."""
    write_model(path)
    entry = TensorFile(path).entry(name)
    with path.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes // 8 * 4)
        file.write(np.float32(value).tobytes())
    return path


@pytest.mark.parametrize("target", ["none", "rk3588"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path: Path, out: Path, target: str, value: float) -> None:
    for name in ("emb.weight", "blocks.1.att.key.weight", "blocks.0.ln1.bias"):
        path = with_value(tmp_path / "m" / "model.safetensors", name, value)
        for cpu in ("fp16", "fp32"):
            with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
                rwkv_npu.convert(path, out, target=target, cpu=cpu)
        shutil.rmtree(tmp_path / "m")
    assert names(tmp_path) == []


def test_weights_beyond_fp16(tmp_path: Path, out: Path) -> None:
    name = "blocks.1.att.key.weight"
    path = with_value(tmp_path / "m" / "model.safetensors", name, -70000)
    for options in ({"cpu": "fp16", "target": "none"}, {"cpu": "fp32", "target": "rk3588"}):
        with pytest.raises(CheckpointError, match=f"{name} holds 7e\\+04, beyond"):
            rwkv_npu.convert(path, out, **options)  # type: ignore[arg-type]
    assert names(tmp_path) == ["m"]
    np.testing.assert_allclose(
        outputs(convert(path, out, cpu="fp32"), backend="ort"), outputs(path, backend="numpy"), atol=1e-3
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target": "rk9999"},
        {"target": ""},
        {"precision": "int4"},
        {"fusion": "cold"},
        {"cpu": "bf16"},
        {"jobs": 0},
        {"jobs": -1},
        *({"rows": rows} for rows in (0, -1, 1025, "", "1,", "1;2", "all", [], [0, 1], None, 1.5)),
    ],
)
def test_values_that_do_not_exist(checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        convert(checkpoint, out, **options)
    assert names(out.parent) == []


# -- vocabularies ----------------------------------------------------------------------------------------


def text_of(path: Path, **options: Any) -> str:
    with rwkv_npu.load(path, backend="numpy", **options) as model:
        return "".join(step.text for step in model.generate("the turning", temperature=0, max_tokens=5))


def test_the_vocabulary_beside_the_checkpoint_goes_along(tmp_path: Path, out: Path) -> None:
    write_model(tmp_path / "m" / "model.pth")
    expected = text_of(tmp_path / "m" / "model.pth")
    assert open_bundle(convert(tmp_path / "m" / "model.pth", out)).manifest.tokenizer == "vocab.txt"
    shutil.rmtree(tmp_path / "m")
    assert text_of(out) == expected


def test_a_builtin_vocabulary_is_named(tmp_path: Path, out: Path) -> None:
    write_model(tmp_path / "model.safetensors", D=16, L=1, V=65536, vocabulary=False)
    manifest = open_bundle(convert(tmp_path / "model.safetensors", out)).manifest
    assert manifest.tokenizer == "builtin:world"
    assert not [name for name in manifest.files if "vocab" in name or "tokenizer" in name]
    assert isinstance(text_of(out), str)


def test_a_vocabulary_that_is_given(tmp_path: Path, out: Path, capsys: Any) -> None:
    """With --tokenizer, to a new bundle and to one that is there."""
    write_model(tmp_path / "m" / "model.pth", vocabulary=False)
    write_vocabulary(tmp_path / "words.txt")
    expected = text_of(tmp_path / "m" / "model.pth", tokenizer=tmp_path / "words.txt")
    assert open_bundle(convert(tmp_path / "m" / "model.pth", out)).manifest.tokenizer is None
    with pytest.raises(TokenizerError, match="tokenizer=FILE"):
        text_of(out)
    given = (
        "convert",
        tmp_path / "m" / "model.pth",
        "--target",
        "none",
        "--tokenizer",
        tmp_path / "words.txt",
    )
    assert run_main(capsys, *given, "-o", out)[0] == 0
    assert run_main(capsys, *given, "-o", tmp_path / "new")[0] == 0
    (tmp_path / "words.txt").unlink()
    assert contents(out) == contents(tmp_path / "new")
    assert text_of(out) == expected
    convert(tmp_path / "m" / "model.pth", out)
    assert contents(out) == contents(tmp_path / "new"), "a bundle keeps its vocabulary"
    convert(tmp_path / "m" / "model.pth", out, tokenizer=out / "vocab.txt")
    assert contents(out) == contents(tmp_path / "new"), "its own was given"


def test_a_tokenizer_json_goes_along(tmp_path: Path, out: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"the": 1, "turning": 2, "<unk>": 3}, "unk_token": "<unk>"}
    described = {
        "version": "1.0",
        "model": model,
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
    }
    described |= {key: None for key in ("truncation", "padding", "normalizer", "post_processor", "decoder")}
    (tmp_path / "my words.json").write_text(json.dumps(described))
    write_model(tmp_path / "m" / "model.pth", vocabulary=False)
    convert(tmp_path / "m" / "model.pth", out, tokenizer=tmp_path / "my words.json")
    assert open_bundle(out).manifest.tokenizer == "tokenizer.json"
    with rwkv_npu.load(out, backend="numpy") as loaded:
        assert loaded.encode("the turning") == [1, 2]


def test_a_vocabulary_that_does_not_fit(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("1 'a' 7\n")
    for given in ("world", tmp_path / "words", tmp_path / "missing", tmp_path):
        with pytest.raises(RwkvNpuError):
            convert(checkpoint, out, tokenizer=given)
    assert names(tmp_path) == ["words"]
