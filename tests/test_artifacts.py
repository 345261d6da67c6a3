"""Artifacts survive an interrupted conversion. A stand-in for the compiler counts its builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.conversion import converter
from rwkv_npu.conversion.artifacts import Build
from rwkv_npu.errors import ToolkitError, UsageError
from rwkv_npu.formats.bundle import MANIFEST, open_bundle
from rwkv_npu.models.spec import groups
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.toolkit import Environment, Job, schedule
from tests.fake_compiler import Compiler, stand_in
from tests.tiny import Run, V, write_model


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return stand_in(monkeypatch)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_model(tmp_path / "model.pth", vocabulary=False)
    return tmp_path / "model.pth"


def convert(checkpoint: Path, **options: Any) -> Path:
    return rwkv_npu.convert(checkpoint, checkpoint.parent / "out.rwkv", **{"rows": "1,16", **options})


def test_a_failed_build_keeps_the_finished_artifacts(checkpoint: Path, compiler: Compiler) -> None:
    compiler.fail_at = 4
    with pytest.raises(ToolkitError):
        convert(checkpoint)
    compiler.fail_at = None
    bundle = open_bundle(convert(checkpoint))
    expected = 2 * (len(groups(bundle.spec, "layer")) - 1) + 1
    assert len(compiler.built) == len(set(compiler.built)) == expected == len(bundle.manifest.artifacts)
    assert not list(bundle.path.glob("rknn/*/*.json"))


def test_an_interruption_after_the_last_build_keeps_all_artifacts(
    checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(converter, "record_files", interrupted)
        convert(checkpoint)
    built = len(compiler.built)
    convert(checkpoint)
    assert len(compiler.built) == built


def test_notes_of_another_conversion_are_not_trusted(
    checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion is killed after the compiler wrote a file, and before it is noted."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for where, version in (((converter, "record_files"), "2.5.0"), ((Build, "complete"), "2.3.2")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*where, interrupted)
            convert(checkpoint, toolkit=version)
    replaced = compiler.built[-1]
    bundle = open_bundle(convert(checkpoint, toolkit="2.5.0"))
    assert compiler.built[-1] == replaced
    for artifact in bundle.manifest.artifacts:
        assert (bundle.path / artifact.path).read_text().startswith("2.5.0 "), artifact.path


def test_another_version_of_the_compiler_builds_again(checkpoint: Path, compiler: Compiler) -> None:
    convert(checkpoint)
    built = list(compiler.built)
    convert(checkpoint, toolkit="2.3.2")
    assert compiler.built == built
    bundle = open_bundle(convert(checkpoint, toolkit="2.5.0"))
    assert sorted(compiler.built) == sorted(2 * built)
    assert {artifact.toolkit for artifact in bundle.manifest.artifacts} == {"2.5.0"}


@pytest.mark.parametrize(("options", "version"), [((), "2.3.2"), (("--toolkit", "2.5.0"), "2.5.0")])
def test_the_runtime_that_a_board_needs_is_named(
    checkpoint: Path, compiler: Compiler, run: Run, tmp_path: Path, options: tuple[str, ...], version: str
) -> None:
    status, _, err = run("convert", checkpoint, "-o", tmp_path / "named.rwkv", *options)
    assert status == 0 and f"that are missing, with rknn-toolkit2 {version}\n" in err
    assert f"a token, needs librknnrt {version} or later\n" in err
    status, out, _ = run("info", tmp_path / "named.rwkv")
    assert status == 0 and f"by toolkit {version}; needs librknnrt {version} or later\n" in out


@pytest.mark.parametrize("name", ["RK3588", "rk3588s", "RK3588S2", " Rk3588J "])
def test_variants_of_a_chip_are_the_chip(checkpoint: Path, compiler: Compiler, run: Run, name: str) -> None:
    out = checkpoint.parent / "variant.rwkv"
    assert run("convert", checkpoint, "-o", out, "--target", name)[0] == 0
    for bundle in (convert(checkpoint, target=name), out):
        assert {artifact.target for artifact in open_bundle(bundle).manifest.artifacts} == {"rk3588"}


@pytest.mark.parametrize("name", ["rk3399", "rk3588 s", "rk35", "3588", ""])
def test_other_names_are_refused(checkpoint: Path, compiler: Compiler, name: str) -> None:
    with pytest.raises(UsageError, match="is unknown: use one of rk3588, rk3576"):
        convert(checkpoint, target=name)


def test_row_counts_add_up_over_conversions(
    checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_npu.backends.memory.MAX_CONTEXTS", 8)  # the model has 4 groups
    convert(checkpoint, rows="1")
    convert(checkpoint, rows="16")  # with the head's, seven
    with pytest.raises(UsageError, match="10 contexts"):
        convert(checkpoint, rows="32")
    assert {a.rows for a in open_bundle(checkpoint.parent / "out.rwkv").manifest.artifacts} == {1, 16}


def test_artifacts_that_end_together_with_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_one(environment: Environment, job: Job, workers: object) -> str:
        if job.weight_bytes == 2:
            raise ToolkitError("this one")
        return job.out_path.name

    def all_done(futures: Any, **_: object) -> tuple[list[Any], list[Any]]:
        for future in futures:
            future.exception()
        return list(futures), []

    monkeypatch.setattr(schedule, "_compile", compile_one)
    monkeypatch.setattr(schedule, "wait", all_done)
    jobs = [Job(Path("a"), Path(f"{n}.rknn"), n) for n in (1, 2, 3)]
    kept = []
    with pytest.raises(ToolkitError, match="this one"):
        for _, result in schedule.compile_many(
            Environment(Path("python"), "2.5.0", False), jobs, parallel=3, memory_limit_bytes=10**12
        ):
            kept.append(result)
    assert sorted(kept) == ["1.rknn", "3.rknn"]


def test_leftovers_of_an_interrupted_conversion_are_removed(checkpoint: Path, compiler: Compiler) -> None:
    """An artifact of another precision, whose conversion was not finished."""
    compiler.fail_at = 3
    with pytest.raises(ToolkitError):
        convert(checkpoint, rows="1")
    compiler.fail_at = None
    out = convert(checkpoint, rows="16")
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == {MANIFEST, *open_bundle(out).manifest.files}


# -- another choice of int8, and defaults ----------------------------------------------------------------


def write_map(path: Path, *patterns: str) -> Path:
    path.write_text(json.dumps(dict.fromkeys(patterns, "w8a8")))
    return path


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, V, 64))
    return tmp_path / "ids.npy"


def test_another_int8_choice_removes_old_artifacts_of_all_row_counts(
    checkpoint: Path, compiler: Compiler, ids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rwkv_npu")
    options = {"precision": "mixed", "calibrate": ids}
    head = write_map(checkpoint.parent / "head.json", "head")
    more = write_map(checkpoint.parent / "more.json", "head", "blocks.*.ffn.key.weight")
    convert(checkpoint, rows="1,16", precision_map=head, **options)
    bundle = open_bundle(convert(checkpoint, rows="4", precision_map=more, **options))
    assert {(a.group == "head", a.rows) for a in bundle.manifest.artifacts} == {(True, 1), (False, 4)}
    assert len(list(bundle.path.glob("rknn/*/*.rknn"))) == len(bundle.manifest.artifacts)
    assert any("rows 1, 16. To have them again" in line for line in caplog.messages)
    # The head is the same in both choices: it was not built again.
    assert sum("head" in name for name in compiler.built) == 1


def test_mixed_that_equals_w8a8_is_stored_once(checkpoint: Path, compiler: Compiler, ids: Path) -> None:
    convert(checkpoint, rows="16", precision="w8a8", calibrate=ids)
    built = list(compiler.built)
    everything = write_map(checkpoint.parent / "all.json", "*")
    options = {"precision": "mixed", "calibrate": ids, "precision_map": everything}
    bundle = open_bundle(convert(checkpoint, rows="16", **options))
    assert compiler.built == built
    paths = {p: {a.path for a in bundle.manifest.artifacts if a.precision == p} for p in ("w8a8", "mixed")}
    assert paths["mixed"] == paths["w8a8"] and len(paths["mixed"]) == len(built)
    # Built again for another compiler it is still shared, and another choice of mixed leaves w8a8 its files.
    bundle = open_bundle(convert(checkpoint, rows="16", toolkit="2.5.0", **options))
    assert {(a.precision, a.toolkit) for a in bundle.manifest.artifacts} == {
        ("w8a8", "2.5.0"),
        ("mixed", "2.5.0"),
    }
    assert len(compiler.built) == 2 * len(built)
    options["precision_map"] = write_map(checkpoint.parent / "head.json", "head")
    bundle = open_bundle(convert(checkpoint, rows="16", toolkit="2.5.0", **options))
    assert {a.path for a in bundle.manifest.artifacts if a.precision == "w8a8"} == paths["w8a8"]
    assert len(compiler.built) == 3 * len(built) - 1  # but for the head


def test_the_default_precision_does_not_depend_on_list_order(
    checkpoint: Path, compiler: Compiler, ids: Path
) -> None:
    convert(checkpoint, rows="16")
    convert(checkpoint, rows="16", precision="w8a8", calibrate=ids)
    out = convert(checkpoint, rows="16", toolkit="2.5.0")  # fp16 again: behind w8a8 in the list
    bundle = open_bundle(out)
    assert bundle.manifest.npu_default == "fp16" and bundle.manifest.artifacts[0].precision == "w8a8"
    assert BundleSource(bundle).precision_on("rknn-sim") == "fp16"
    assert BundleSource(bundle).artifacts()[0].precision == "fp16"
    assert {a.precision for a in BundleSource(bundle, precision="w8a8").artifacts()} == {"w8a8"}
    bundle.manifest.npu_default = ""  # as in bundles of before
    assert BundleSource(bundle).precision_on("rknn-sim") == "w8a8"
