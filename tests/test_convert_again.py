"""Conversions that meet something: what an interrupted one left, a full disk, a bundle that is there already."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.conversion import converter, prepare, workspace
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.formats.bundle import INT8, MANIFEST, WEIGHTS, open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.files import write_atomically
from tests.conversions import contents, convert, names
from tests.tiny import one_line, run_main

# -- interrupted conversions -----------------------------------------------------------------------------


_KILLED = """
import os, signal, sys
from pathlib import Path
import rwkv_npu
from rwkv_npu.formats import safetensors

checkpoint, out, where = sys.argv[1:]
replace, write_tensor = os.replace, safetensors._write_tensor

def die_on_replace(source, target):
    if str(target).endswith(where):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

def die_on_tensor(file, plan):
    if plan.name == where:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write_tensor(file, plan)

os.replace, safetensors._write_tensor = die_on_replace, die_on_tensor
rwkv_npu.convert(checkpoint, out, target="none")
"""


def test_a_killed_conversion_goes_on(checkpoint: Path, whole: Path, out: Path) -> None:
    """Killed again and again, later each time; what was done is kept, and the result is the same."""
    partial = out.with_name("out.rwkv.partial")
    kept: dict[str, int] = {}
    for where in ("blocks.1.ffn.key.weight", "host.safetensors", "layer.mid.0.onnx", MANIFEST, "out.rwkv"):
        arguments = [sys.executable, "-c", _KILLED, str(checkpoint), str(out), where]
        assert subprocess.run(arguments, capture_output=True, timeout=60).returncode == -signal.SIGKILL
        assert names(out.parent) == ["out.rwkv.partial"]
        done = {str(p): p.stat().st_mtime_ns for p in partial.rglob("*.*") if p.suffix != ".writing"}
        done = {name: stamp for name, stamp in done.items() if "graphs/" in name or "host" in name}
        assert kept.items() <= done.items(), "a file that was there was written again"
        kept = done
    assert len(kept) == len(list(whole.glob("graphs/*"))) + 1
    assert contents(convert(checkpoint, out)) == contents(whole)
    assert names(out.parent) == ["out.rwkv"]


def test_ctrl_c_leaves_what_is_done_and_no_output(
    checkpoint: Path, whole: Path, out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converter, "write_graphs", interrupted)
        status, printed, err = run_main(capsys, "convert", checkpoint, "--target", "none", "-o", out)
    assert (status, printed) == (130, "") and "interrupted" in err.splitlines()[-1]
    assert names(out.parent) == ["out.rwkv.partial"]
    stamp = (out.parent / "out.rwkv.partial" / WEIGHTS).stat().st_mtime_ns
    assert run_main(capsys, "convert", checkpoint, "--target", "none", "-o", out)[:2] == (0, f"{out}\n")
    assert (out / WEIGHTS).stat().st_mtime_ns == stamp
    assert contents(out) == contents(whole)


def test_leftovers_of_another_conversion_are_not_used(
    checkpoint: Path, other: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for left in ({"checkpoint": other}, {"checkpoint": checkpoint, "cpu": "fp32"}):
        with monkeypatch.context() as patch:
            patch.setattr(workspace, "_replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                convert(out=out, **left)  # type: ignore[arg-type]
        assert names(out.parent) == ["out.rwkv.partial"]
        assert contents(convert(checkpoint, out)) == contents(whole)
        shutil.rmtree(out)


def test_a_folder_that_only_looks_like_a_leftover_is_not_touched(checkpoint: Path, out: Path) -> None:
    mine = out.with_name("out.rwkv.partial")
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="not from an interrupted conversion"):
        convert(checkpoint, out)
    assert contents(mine) == {"notes.txt": b"mine"} and not out.exists()


# -- disks -----------------------------------------------------------------------------------------------


def failed(capsys: Any, *arguments: object) -> str:
    """The last line of a conversion that failed."""
    status, printed, err = run_main(capsys, "convert", "--target", "none", *arguments)
    assert (status, printed) == (1, "")
    line = err.splitlines(keepends=True)[-1]
    assert one_line(line) and line.startswith("rwkv-npu: error: ") and "Traceback" not in err
    return line


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 40 kB: the kernel refuses the rest of a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_write_that_the_kernel_refuses(checkpoint: Path, out: Path, capsys: Any) -> None:
    line = failed(capsys, checkpoint, "-o", out)
    assert "File too large" in line and "the same command continues" in line
    assert names(out.parent) == ["out.rwkv.partial"]
    assert not list(out.parent.rglob("*.safetensors*"))


def test_full_disk(
    checkpoint: Path, whole: Path, out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one file after the other: at each attempt there is room for one more."""
    synced = os.fsync
    room = 0

    def fsync(descriptor: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for attempt in range(len(contents(whole)) + 1):  # the first only marks what the folder is for
        room = 1 if attempt else 0
        line = failed(capsys, checkpoint, "-o", out)
        assert "No space left on device" in line and str(out) in line
        assert ("the same command continues" in line) == (attempt > 0)
        assert not out.exists() and not list(out.parent.rglob("*.writing"))
    room = 100
    assert contents(convert(checkpoint, out)) == contents(whole)


def test_places_that_cannot_be_written_to(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", Path("/proc/out.rwkv"), Path("/dev/null/out")):
        line = failed(capsys, checkpoint, "-o", place)
        assert str(place) in line and "continues" not in line

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who may run the tests, may write everywhere
    assert "Permission denied" in failed(capsys, checkpoint, "-o", tmp_path / "out")
    assert names(tmp_path) == ["file"]


# -- what is there already -------------------------------------------------------------------------------


def test_same_weights_again_changes_nothing(
    checkpoint: Path, whole: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != MANIFEST}
    with caplog.at_level("INFO", "rwkv_npu"):
        assert convert(checkpoint, out) == out
        assert caplog.messages[-1].startswith("nothing to do")
        convert(checkpoint, out, cpu="fp16")
        convert(checkpoint, out, cpu="int8")
        assert sum("nothing" in message for message in caplog.messages) == 1  # the default was another
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in stamps if path.is_file()} == {
        path: stamp for path, stamp in stamps.items() if path.is_file()
    }
    assert names(out.parent) == ["out.rwkv"]


def test_other_weights_need_force(checkpoint: Path, other: Path, whole: Path, out: Path, capsys: Any) -> None:
    shutil.copytree(whole, out)
    assert "other weights" in failed(capsys, other, "-o", out)
    assert "--cpu fp16" in failed(capsys, checkpoint, "-o", out, "--cpu", "fp32")
    assert contents(out) == contents(whole)
    convert(other, out, force=True)
    assert open_bundle(out).manifest.fingerprint == rwkv_npu.load(other, backend="numpy").fingerprint
    convert(checkpoint, out, force=True, cpu="fp32")
    assert open_bundle(out).manifest.cpu == "fp32"
    assert names(out.parent) == ["out.rwkv"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link", "dangling link", "other's mark"])
def test_only_bundles_are_replaced(checkpoint: Path, tmp_path: Path, kind: str, force: bool) -> None:
    out, real = tmp_path / "out", tmp_path / "real"
    real.mkdir()
    (real / "notes.txt").write_text("mine")
    (real / "manifest.json").write_text('{"name": "an application"}')
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        shutil.copytree(real, out)
    elif kind == "empty folder":
        out.mkdir()
    elif kind == "other's mark":
        out.mkdir()
        (out / "conversion").write_text("of miles to kilometres")
    else:
        out.symlink_to(real if kind == "link" else tmp_path / "nowhere")
    before = names(tmp_path), contents(tmp_path)
    with pytest.raises(
        BundleError, match="is not a bundle|is an unfinished|damaged" if not force else "is not a bundle"
    ):
        convert(checkpoint, out, force=force)
    assert (names(tmp_path), contents(tmp_path)) == before and out.is_symlink() == ("link" in kind)


@pytest.mark.parametrize("left", ["link", "of another version", "without a manifest", "unfinished"])
def test_force_replaces_a_damaged_bundle(checkpoint: Path, whole: Path, tmp_path: Path, left: str) -> None:
    out, real = tmp_path / "out", tmp_path / "real"
    shutil.copytree(whole, real if left == "link" else out)
    if left == "link":
        out.symlink_to(real)
    elif left == "of another version":
        text = (out / MANIFEST).read_text().replace('"format": [\n  2,', '"format": [\n  9,')
        (out / MANIFEST).write_text(text)
    elif left == "without a manifest":
        (out / MANIFEST).unlink()
    else:
        shutil.rmtree(out)
        out.mkdir()
        (out / "conversion").write_text('{"key": "rwkv_npu 0.1", "stages": {}}')
    with pytest.raises(BundleError) if left != "link" else contextlib.nullcontext():
        convert(checkpoint, out)
    convert(checkpoint, out, force=True)
    assert contents(out) == contents(whole) and not out.is_symlink()
    assert names(tmp_path) == (["out", "real"] if left == "link" else ["out"])


def test_an_old_bundle_stays_until_the_new_one_is_complete(
    checkpoint: Path, other: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion with --force may fail at any point, also at the last rename."""
    shutil.copytree(whole, out)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(converter, "write_graphs", fails)
        with pytest.raises(BundleError, match="Input/output"):
            convert(other, out, force=True)
    assert contents(out) == contents(whole)
    replace = os.replace

    def last_fails(source: Any, target: Any) -> None:
        if str(source).endswith(".partial") and Path(target) == out:
            fails()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", last_fails)
        with pytest.raises(BundleError, match="Input/output"):
            convert(other, out, force=True)
    assert contents(out) == contents(whole)
    assert names(out.parent) == ["out.rwkv", "out.rwkv.partial"]
    convert(other, out, force=True)
    assert names(out.parent) == ["out.rwkv"] and contents(out) != contents(whole)


def test_the_checkpoint_is_never_replaced(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(checkpoint.parent, tmp_path / "model")
    before = contents(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    for place in (".", "..", "/", "", "model.pth", "../model", "../model/../model", str(tmp_path)):
        with pytest.raises(UsageError, match="output"):
            convert(Path("model.pth"), place, force=True)  # type: ignore[arg-type]
    assert contents(tmp_path / "model") == before and names(tmp_path) == ["model"]


def test_converting_again_repairs_a_bundle(checkpoint: Path, whole: Path, out: Path) -> None:
    """As the message says that opening a damaged one gives."""
    damages: dict[str, Callable[[bytes], bytes | None]] = {
        WEIGHTS: lambda data: data[:-1],
        "host.safetensors": lambda data: None,
        "graphs/layer.first.onnx": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        "vocab.txt": lambda data: data + b"\n",
    }
    for name, damage in damages.items():
        shutil.copytree(whole, out)
        data = damage((out / name).read_bytes())
        (out / name).unlink()
        if data is not None:
            (out / name).write_bytes(data)
        with pytest.raises(BundleError, match="convert again|missing"):
            open_bundle(out)
        convert(checkpoint, out)
        assert contents(open_bundle(out).path) == contents(whole), name
        shutil.rmtree(out)


def test_damaged_files_that_are_not_made_again_are_forgotten(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    ids, out = tmp_path / "ids.npy", tmp_path / "out"
    np.save(ids, np.arange(1, 200))
    int8 = ("--precision", "w8a8", "--calibrate", ids)
    for options in (("--cpu", "int8", *int8), ("--cpu", "int4")):
        assert run_main(capsys, "convert", checkpoint, "-o", out, "--target", "none", *options)[0] == 0
    for name, again, cpu in (("cpu/int4.safetensors", ("--cpu", "int4"), "int8"), (INT8, int8, "int4")):
        (out / name).write_bytes(b"damaged")
        status, _, err = run_main(capsys, "convert", checkpoint, "-o", out, "--target", "none", "--cpu", cpu)
        assert (
            status == 0
            and f"{name} is missing or damaged: convert with {again[0]} {again[1]} to have it" in err
        )
        assert not (out / name).exists() and run_main(capsys, "info", out, "--check")[0] == 0
        assert run_main(capsys, "convert", checkpoint, "-o", out, "--target", "none", *again)[0] == 0
        assert (out / name).is_file() and run_main(capsys, "info", out, "--check")[0] == 0
    manifest = open_bundle(out).manifest
    assert set(manifest.packed) == {"int8", "int4"} and list(manifest.int8) == ["w8a8"]


# -- others at the same time -----------------------------------------------------------------------------


def test_a_bundle_is_held_also_when_its_manifest_was_replaced(whole: Path, out: Path) -> None:
    shutil.copytree(whole, out)
    manifest = open_bundle(out).manifest
    with workspace.workspace(out, "key", adding=True, before=workspace.stamp(out)):
        write_atomically(out / MANIFEST, manifest.to_json().encode())
        with pytest.raises(BundleError, match="another conversion is writing"):
            with workspace.workspace(out, "key", adding=True, before=workspace.stamp(out)):
                pass


def test_a_bundle_that_is_written_to_is_not_replaced(checkpoint: Path, whole: Path, out: Path) -> None:
    """Nor removed under who writes to it, with --force."""
    shutil.copytree(whole, out)
    with workspace.workspace(out, "key", adding=True, before=workspace.stamp(out)):
        with pytest.raises(BundleError, match="another conversion is writing"):
            convert(checkpoint, out, force=True)
        assert contents(out) == contents(whole) and names(out.parent) == ["out.rwkv"]
    assert contents(convert(checkpoint, out, force=True)) == contents(whole)


@pytest.mark.parametrize("adding", [True, False])
def test_a_bundle_that_another_conversion_made_meanwhile_is_not_lost(
    adding: bool, checkpoint: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between the moment in which this one looks at the output and the one in which it takes it."""
    if adding:
        shutil.copytree(whole, out)
    read_ids = prepare.read_ids

    def meanwhile(*arguments: Any) -> np.ndarray | None:
        monkeypatch.setattr(prepare, "read_ids", read_ids)
        convert(checkpoint, out, cpu="int4")
        return read_ids(*arguments)

    monkeypatch.setattr(prepare, "read_ids", meanwhile)
    with pytest.raises(BundleError, match="has written to .*: run the command again"):
        convert(checkpoint, out, cpu="int8")
    assert names(out.parent) == ["out.rwkv"]
    assert "int4" in open_bundle(out).manifest.packed
    convert(checkpoint, out, cpu="int8")
    assert {"int4", "int8"} <= set(open_bundle(out).manifest.packed)


def test_a_leftover_of_weights_that_differ_in_one_value_is_not_used(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sample does not tell them apart, of which the fingerprint is made."""
    import torch

    shutil.copytree(checkpoint.parent, tmp_path / "m")
    edited, out = tmp_path / "m" / checkpoint.name, tmp_path / "out"
    weights = torch.load(edited, weights_only=True)
    monkeypatch.setattr("rwkv_npu.formats.checkpoint._SAMPLE_RUN", 1)
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(edited, out)
    weights["blocks.0.ffn.key.weight"][3, 5] += 1
    torch.save(weights, edited)
    assert open_checkpoint(edited).fingerprint == open_checkpoint(checkpoint).fingerprint
    convert(edited, out)
    stored = open_bundle(out).tensor("blocks.0.ffn.key.weight")[5, 3]
    assert stored == np.float16(weights["blocks.0.ffn.key.weight"][3, 5].item())


def test_a_damaged_manifest_needs_force(checkpoint: Path, whole: Path, out: Path) -> None:
    shutil.copytree(whole, out)
    (out / MANIFEST).write_text("{}")
    with pytest.raises(BundleError, match="force=True"):
        convert(checkpoint, out)
    assert contents(convert(checkpoint, out, force=True)) == contents(whole)
