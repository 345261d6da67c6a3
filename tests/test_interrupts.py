"""An interrupted conversion goes on where it was, whatever its stage; a dry run refuses what a conversion does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_npu.conversion import converter, quantise
from rwkv_npu.formats.bundle import INT8, open_bundle
from tests.conversions import contents, names
from tests.fake_compiler import Compiler, stand_in
from tests.tiny import Run, V, error_line, write_model

STAGES = {
    # by stage: (module, function) that is interrupted, at which of its calls; and how often each function of COUNTED
    # is called by the same command afterwards.
    "checking": ((converter, "check_finite", 1), {"check_finite": 1, "calibrate": 1, "choose": 13}),
    "weights": ((converter, "write_weights", 1), {"check_finite": 0, "calibrate": 1, "choose": 13}),
    "reading": ((converter, "calibrate", 1), {"check_finite": 0, "calibrate": 1, "choose": 13}),
    "graphs": ((converter, "write_graphs", 1), {"check_finite": 0, "calibrate": 0, "choose": 13}),
    "choosing": ((quantise, "choose", 5), {"check_finite": 0, "calibrate": 0, "choose": 9}),
    "writing": ((quantise, "replace_tensors", 1), {"check_finite": 0, "calibrate": 0, "choose": 0}),
    "selecting": ((converter, "select_projections", 1), {"check_finite": 0, "calibrate": 0, "choose": 0}),
    "compiling": ((converter, "build_artifacts", 1), {"check_finite": 0, "calibrate": 0, "choose": 0}),
    "finishing": ((converter, "record_files", 1), {"check_finite": 0, "calibrate": 0, "choose": 0}),
}
COUNTED = ((converter, "check_finite"), (converter, "calibrate"), (quantise, "choose"))


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(1, V, 64))
    return path


def counting(patch: pytest.MonkeyPatch, module: Any, name: str, stop_at: int | None = None) -> list[int]:
    """Counts the calls of a function; interrupts that of number `stop_at`."""
    function: Callable[..., Any] = getattr(module, name)
    calls = [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    patch.setattr(module, name, counted)
    return calls


@pytest.fixture(scope="module")
def uninterrupted(checkpoint: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        out = tmp_path_factory.mktemp("uninterrupted") / "out.rwkv"
        options: dict[str, Any] = {"rows": 16, "precision": "w8a8", "calibrate": ids}
        return contents(converter.convert(checkpoint, out, **options))


@pytest.mark.parametrize("stage", STAGES)
def test_finished_stages_are_not_repeated(
    stage: str,
    checkpoint: Path,
    ids: Path,
    uninterrupted: dict[str, bytes],
    out: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (module, name, at), expected = STAGES[stage]
    command = ("convert", checkpoint, "-o", out, "--rows", "16", "--precision", "w8a8", "--calibrate", ids)
    with monkeypatch.context() as patch:
        counting(patch, module, name, stop_at=at)
        status, printed, err = run(*command)
    assert (status, printed) == (130, "")
    assert err.splitlines()[-1] == "rwkv-npu: interrupted: the same command continues from here"
    assert names(out.parent) == ["out.rwkv.partial"]
    calls = {name: counting(monkeypatch, module, name) for module, name in COUNTED}
    assert run(*command)[0] == 0
    assert {name: count[0] for name, count in calls.items()} == expected
    assert contents(out) == uninterrupted and names(out.parent) == ["out.rwkv"]


def test_other_values_are_checked_and_read_again(
    checkpoint: Path, ids: Path, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The checkpoint was written to in the meantime, or the text is another."""
    model = tmp_path / "m" / "model.pth"
    write_model(model)
    np.save(tmp_path / "other.npy", np.arange(1, 65))
    command = ("convert", model, "-o", out, "--rows", "16", "--precision", "w8a8", "--calibrate")
    with monkeypatch.context() as patch:
        counting(patch, converter, "select_projections", stop_at=1)
        assert run(*command, ids)[0] == 130
    calls = {name: counting(monkeypatch, module, name) for module, name in COUNTED}
    with monkeypatch.context() as patch:
        counting(patch, converter, "select_projections", stop_at=1)
        assert run(*command, tmp_path / "other.npy")[0] == 130
    assert {name: count[0] for name, count in calls.items()} == {
        "check_finite": 0,
        "calibrate": 1,
        "choose": 13,
    }
    write_model(model, seed=1)
    assert run(*command, ids)[0] == 0
    assert calls["check_finite"] == [1] and calls["calibrate"] == [2] and calls["choose"] == [26]


def test_a_conversion_that_adds_goes_on(
    checkpoint: Path, ids: Path, whole: Path, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("convert", checkpoint, "-o", out, "--rows", "16", "--calibrate", ids)
    assert run(*command)[0] == 0
    with monkeypatch.context() as patch:
        counting(patch, quantise, "choose", stop_at=5)
        assert run(*command, "--precision", "w8a8")[0] == 130
    assert open_bundle(out).manifest.int8 == {}  # the bundle is what it was
    calls = {name: counting(monkeypatch, module, name) for module, name in COUNTED}
    assert run(*command, "--precision", "w8a8")[0] == 0
    assert {name: count[0] for name, count in calls.items()} == {
        "check_finite": 0,
        "calibrate": 0,
        "choose": 9,
    }
    assert (out / INT8).is_file() and not (out / "conversion").exists()


def test_bad_values_leave_nothing(checkpoint: Path, tmp_path: Path, out: Path, run: Run) -> None:
    import torch

    weights = torch.load(checkpoint, weights_only=True)
    weights["blocks.1.ffn.key.weight"][3, 5] = float("nan")
    torch.save(weights, tmp_path / "bad.pth")
    status, printed, err = run("convert", tmp_path / "bad.pth", "-o", out, "--target", "none")
    assert (status, printed) == (1, "") and "holds NaN or infinity" in err.splitlines()[-1]
    assert names(tmp_path) == ["bad.pth"]


# -- dry runs, and what a bundle has ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-kl", "0.1"), "--max-kl is for --cpu auto"),
        (("--precision", "mixed", "--precision-map", "nowhere.json"), "cannot read nowhere.json"),
        (("--precision", "w8a8", "--toolkit", "2.2.0"), "has no precision 'w8a8'"),
        (("--calibrate", "nowhere.txt"), "nowhere.txt"),
        (("--tokenizer", "nowhere.txt"), "nowhere.txt"),
        (("--remedies", "prayer"), "--remedies prayer is unknown"),
        (("-o", "OTHER"), "other weights"),
        (("-o", "FOLDER"), "is not a bundle"),
        (("-o", "FOLDER", "--force"), "is not a bundle"),
        (("-o", "OTHER", "--cpu", "fp32"), "other weights"),
        (("-o", "."), "the name of a folder"),
    ],
)
def test_a_dry_run_refuses_what_a_conversion_refuses(
    options: tuple[str, ...], said: str, checkpoint: Path, other: Path, whole: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "folder").mkdir()
    words = [{"OTHER": whole, "FOLDER": tmp_path / "folder"}.get(word, word) for word in options]
    model = other if "OTHER" in options else checkpoint
    if "-o" not in options:
        words += ["-o", tmp_path / "out"]
    refused = error_line(run("convert", model, *words))
    assert said in refused
    assert error_line(run("convert", model, *words, "--dry-run")) == refused
    assert names(tmp_path) == ["folder"]


def test_adding_keeps_the_precision_of_the_cpu(checkpoint: Path, ids: Path, out: Path, run: Run) -> None:
    for given, expected in ((("--cpu", "fp32"), "fp32"), ((), "fp32")):
        assert run("convert", checkpoint, "-o", out, "--target", "none", *given)[0] == 0
        assert open_bundle(out).manifest.cpu_precisions[0] == expected
    assert not list(out.glob("cpu/*"))
    assert run("convert", checkpoint, "-o", out, "--target", "none", "--force")[0] == 0
    assert open_bundle(out).manifest.cpu_default == "int8"  # of a new one
    for given, expected in ((("--cpu", "int4"), "int4"), ((), "int4"), (("--rows", "16"), "int4")):
        target = () if "--rows" in given else ("--target", "none")
        assert run("convert", checkpoint, "-o", out, *target, "--calibrate", ids, *given)[0] == 0
        assert open_bundle(out).manifest.cpu_default == expected


def test_a_text_may_be_shorter_than_the_rows(checkpoint: Path, out: Path, ids: Path, run: Run) -> None:
    assert run("convert", checkpoint, "-o", out, "--rows", "1,1024", "--calibrate", ids)[0] == 0
    assert {artifact.rows for artifact in open_bundle(out).manifest.artifacts} == {1, 1024}
