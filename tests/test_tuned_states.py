"""Tuned states: in a bundle, and between the files of BlinkDL's programs, web-rwkv and this one."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkv_npu
from rwkv_npu.errors import StateError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.state import new_state
from tests.conversions import convert, outputs
from tests.tiny import Run, error_line, write_model


def tuned_state(path: Path, spec: Any, size: float = 0.5) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shape = (spec.H, spec.N, spec.N)
    state = {f"blocks.{i}.att.time_state": size * torch.randn(shape) for i in range(spec.L)}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("generation", ["5.2", "6", "7"])
def test_a_tuned_state_in_a_bundle(generation: str, tmp_path: Path) -> None:
    base, together = tmp_path / "base.pth", tmp_path / "together.pth"
    tuned = tuned_state(tmp_path / "tuned.pth", write_model(base, generation))
    torch.save(torch.load(base) | tuned, together)
    bundle = convert(base, tmp_path / "out.rwkv", cpu="fp32", initial_state=tmp_path / "tuned.pth")
    found = outputs(bundle, backend="numpy")
    np.testing.assert_allclose(found, outputs(together, backend="numpy"), atol=1e-5, rtol=1e-5)
    assert np.abs(found - outputs(base, backend="numpy")).max() > 0.01
    assert open_bundle(bundle).manifest.initial_state["file"] == "tuned.pth"


def test_a_state_of_a_text_cannot_begin_every_text(tmp_path: Path) -> None:
    state = new_state(write_model(tmp_path / "base.pth"), "", {})
    state.parts["att.shift"][:] = 1
    state.tokens_seen = 7
    state.save(tmp_path / "talk.st")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(StateError, match="has read 7 tokens"):
            convert(tmp_path / "base.pth", tmp_path / "out", initial_state=tmp_path / "talk.st")
    assert not (tmp_path / "out").exists()


def test_all_three_files_of_a_state_are_interchangeable(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.pth"
    tuned = tuned_state(tmp_path / "tuned.pth", write_model(base))
    first, ours, web, last = (tmp_path / name for name in ("tuned.pth", "ours.st", "web.st", "last.pth"))
    steps = (
        (first, ours, "rwkv-npu", ("-m", base)),
        (ours, web, "web-rwkv", ()),
        (web, last, "blinkdl", ("--layout", "web-rwkv")),
    )
    for file, out, to, more in steps:
        assert run("state", "convert", file, "-o", out, "--to", to, *more)[0] == 0
    theirs, again = load_file(web), torch.load(last)
    for name, array in tuned.items():
        assert theirs[name].dtype == torch.float16
        torch.testing.assert_close(theirs[name].float(), array.transpose(1, 2), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(again[name], array, atol=1e-3, rtol=1e-3)
    model = rwkv_npu.load(base, backend="numpy")
    expected = model.forward([1, 2, 3], model.load_state(first))[0]
    np.testing.assert_array_equal(model.forward([1, 2, 3], model.load_state(ours))[0], expected)


def test_show(run: Run, tmp_path: Path) -> None:
    tuned_state(tmp_path / "tuned.pth", write_model(tmp_path / "base.pth"))
    status, said, _ = run("state", "show", tmp_path / "tuned.pth")
    assert status == 0 and "tuned state" in said and "2 layers and 4 heads of 16 channels" in said
    talk = tmp_path / "talk.st"
    assert run("generate", "-m", tmp_path / "base.pth", "-p", "the ", "-n", 3, "--state", talk)[0] == 0
    status, said, _ = run("state", "show", talk)
    assert status == 0 and "RWKV-7, D 64, L 2" in said and "has read" in said


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ("tuned.pth", ("--to", "rwkv-npu"), "name it with -m"),
        ("tuned.pth", ("--to", "blinkdl", "-o", "base.pth"), "exists"),
        ("tuned.safetensors", ("--to", "blinkdl"), "--layout"),
        ("talk.st", ("--to", "blinkdl"), "has read"),
        ("large.pth", ("--to", "web-rwkv"), "fp16"),
        ("nan.pth", ("--to", "blinkdl"), "NaN"),
        ("base.pth", ("--to", "blinkdl"), "no tuned state: it lacks blocks.0"),
        ("other.pth", ("--to", "rwkv-npu", "-m", "base.pth"), "the model needs"),
        ("missing.pth", ("--to", "blinkdl"), "no file"),
        ("notes.txt", ("--to", "blinkdl"), "state"),
        ("forged.st", ("--to", "blinkdl"), "what model"),
    ],
)
def test_refusals(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = write_model(Path("base.pth"))
    tuned = tuned_state(Path("tuned.pth"), spec)
    save_file(tuned, "tuned.safetensors")
    tuned_state(Path("large.pth"), spec, size=1e6)
    tuned_state(Path("nan.pth"), spec, size=float("nan"))
    torch.save({name: array[:, :8, :8].clone() for name, array in tuned.items()}, "other.pth")
    Path("notes.txt").write_text("notes of mine")
    state = new_state(spec, "", {})
    state.tokens_seen = 3
    state.save("talk.st")
    forged = {"format": "rwkv_npu state 1", "spec": json.dumps({**spec.to_json(), "L": "2" * 9})}
    save_file(tuned, "forged.st", forged)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = () if "-o" in flags else ("-o", "out")
    assert message in error_line(run("state", "convert", file, *flags, *out))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_states_are_listed_copied_and_deleted(run: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "m" / "base.pth")
    talk, other = tmp_path / "talk.safetensors", tmp_path / "other.safetensors"
    (tmp_path / "notes.txt").write_text("no state")
    assert run("state", "list", tmp_path)[1:] == ("", f"no states in {tmp_path}\n")
    command = ("generate", "-m", tmp_path / "m" / "base.pth", "-p", "the ", "-n", 3, "--state", talk)
    assert run(*command)[0] == 0
    assert run("state", "fork", talk, "-o", other) == (0, f"{other}\n", "")
    assert other.read_bytes() == talk.read_bytes()
    os.utime(talk, (1, 1))
    status, said, count = run("state", "list", tmp_path)
    head, *lines = said.splitlines()
    assert status == 0 and head.split() == ["NAME", "TOKENS", "MODEL", "WEIGHTS", "SIZE", "USED"]
    assert [line.split()[0] for line in lines] == [other.name, talk.name] and "RWKV-7" in lines[0]
    assert count.startswith("2 states, ")
    assert "nothing was deleted" in error_line(run("state", "delete", talk, tmp_path / "notes.txt"))
    assert "exists" in error_line(run("state", "fork", talk, "-o", other))
    assert run("state", "delete", talk, other) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.txt"]
    other.write_bytes(b"damaged")
    assert "is no state file" in error_line(run("state", "fork", other, "-o", talk)) and not talk.exists()
    assert "cannot read the folder" in error_line(run("state", "list", tmp_path / "none"))
