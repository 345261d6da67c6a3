"""`rwkv-npu eval`: what it prints, what it compares with, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.evaluation import text
from rwkv_npu.model import Model
from tests.evaluations import IDS, write_jsonl
from tests.tiny import Run, V, error_line, one_line, write_model


def test_eval(run: Run, checkpoint: Path, model: Model, tmp_path: Path) -> None:
    text = "the turning and über the turning"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    flags = ("eval", "-m", checkpoint, "--backend", "numpy", "--text", tmp_path / "text")
    status, out, err = run(*flags, "--json")
    figures = json.loads(out)
    assert (status, err) == (0, "")
    ids = model.encode(text)
    logits, _ = model.forward([0, *ids[:-1]], all_logits=True)
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    nats = -log_p[range(len(ids)), ids].sum()
    assert figures["tokens"] == len(ids) and figures["bytes"] == len(text.encode())
    assert figures["perplexity"] == pytest.approx(np.exp(nats / len(ids)), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-4)
    assert figures["kl_mean"] is None
    status, table, _ = run(*flags)
    assert status == 0 and f"{figures['bits_per_byte']:.4f}" in table and "KL" not in table
    assert json.loads(run(*flags, "-n", "5", "--json")[1])["tokens"] == 5


def test_eval_has_a_model_and_a_text_of_its_own(run: Run) -> None:
    status, out, err = run("eval", "-n", "40", "--backend", "numpy", "--json")
    assert (status, json.loads(out)["tokens"]) == (0, 40)
    assert one_line(err) and "demo model" in err


def test_eval_against_another_model_and_backend(
    run: Run, checkpoint: Path, other: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("the turning and the " * 5)
    flags = ("eval", "-m", checkpoint, "--text", tmp_path / "text", "--json")
    same = json.loads(run(*flags, "--backend", "ort", "--against-backend", "numpy")[1])
    assert abs(same["kl_mean"]) < 1e-6 and abs(same["kl_p99"]) < 1e-5 and same["top1"] == 1
    apart = json.loads(run(*flags, "--backend", "numpy", "--against", other)[1])
    assert apart["kl_mean"] > 0.1 and apart["kl_p99"] >= apart["kl_mean"] and apart["top1"] < 1
    table = run(*flags[:-1], "--backend", "numpy", "--against-backend", "numpy")[1]
    assert "KL" in table and "top-1 agrees   100.00 %" in table


def test_eval_refuses(run: Run, checkpoint: Path, wordless: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the turning")
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"\xfc")
    write_model(tmp_path / "wide" / "model.pth", V=V + 8)
    flags = ("eval", "-m", checkpoint, "--backend", "numpy")
    text = ("--text", tmp_path / "text")
    assert "max-tokens" in error_line(run(*flags, *text, "-n", "0"))
    assert "empty" in error_line(run(*flags, "--text", tmp_path / "empty"))
    assert "UTF-8" in error_line(run(*flags, "--text", tmp_path / "latin"))
    assert "missing" in error_line(run(*flags, "--text", tmp_path / "missing"))
    assert "missing" in error_line(run(*flags, *text, "--against", tmp_path / "missing"))
    assert "vocabular" in error_line(run(*flags, *text, "--against", tmp_path / "wide" / "model.pth"))
    assert "--tokenizer" in error_line(run("eval", "-m", wordless, "--backend", "numpy", *text))


def test_the_command_measures_lambada(run: Run, checkpoint: Path, other: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "l.jsonl")
    flags = ("eval", "-m", checkpoint, "--backend", "numpy", "--lambada", file)
    figures = json.loads(run(*flags, "--json")[1])
    assert figures["texts"] == 5 and 0 <= figures["accuracy"] <= 1 and figures["reference"] is None
    status, table, err = run(*flags, "--against", other, "--against-backend", "numpy")
    assert (status, err) == (0, "") and f"{figures['perplexity']:.3f} per last word" in table
    assert table.count("accuracy") == 2 and "compared with  fp32 weights" in table


def test_the_command_reads_ids(run: Run, checkpoint: Path, tmp_path: Path, model: Model) -> None:
    flags = ("eval", "-m", checkpoint, "--backend", "numpy", "--json", "--text")
    (tmp_path / "text").write_text("the turning and über", encoding="utf-8")
    from_text = json.loads(run(*flags, tmp_path / "text")[1])
    np.save(tmp_path / "ids.npy", np.array(model.encode("the turning and über"), np.int32))
    assert json.loads(run(*flags, tmp_path / "ids.npy")[1]) == from_text
    (tmp_path / "ids.json").write_text("[5, 6000]")
    status, out, err = run(*flags, tmp_path / "ids.json")
    assert (status, out) == (1, "") and one_line(err) and "token id 6000 is outside" in err


def test_the_command_goes_on_after_ctrl_c(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    flags = ("eval", "-m", checkpoint, "--backend", "numpy", "--text", tmp_path / "ids.npy")
    whole = run(*flags)[1]
    forward, calls = Model.forward, iter(range(100))

    def interrupted(*arguments: object, **options: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward", interrupted)
        status, out, err = run(*flags, "--resume", tmp_path / "file")
    assert (status, out) == (130, "") and f"the same command continues from {tmp_path / 'file'}" in err
    assert run(*flags, "--resume", tmp_path / "file") == (0, whole, "")


def test_a_bundle_is_compared_with_its_own_unquantised_weights(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """The reference of a bundle is what it stores whole, though it runs in int8 unless told otherwise."""
    np.save(tmp_path / "ids.npy", IDS[:100])
    rwkv_npu.convert(checkpoint, tmp_path / "a.rwkv", target="none", cpu="int8")
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
    exact = json.loads(run(*flags, "--precision", "fp16", "--against", checkpoint)[1])
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
        (["--context", "0"], "--context 0: it must be at least 1"),
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
