"""Bundles that somebody has forged: refused before a backend sees them, and nothing outside them is touched."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.errors import BundleError, RwkvNpuError, UsageError
from rwkv_npu.formats.bundle import HOST, MANIFEST, SELF_TEST, WEIGHTS, open_bundle
from rwkv_npu.formats.files import cache_dir, remove_unlisted, remove_within, write_atomically
from rwkv_npu.runtime.selftest import self_test
from rwkv_npu.runtime.weights import BundleSource
from tests.conversions import contents, convert
from tests.forgery import rewrite_tensors, sign

PACKED = "cpu/int8.safetensors"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A bundle to be forged."""
    return Path(shutil.copytree(whole, tmp_path / "copy.rwkv"))


def resized(name: str, axis: int, difference: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        shape = list(arrays[name].shape)
        shape[axis] += difference
        arrays[name] = np.resize(arrays[name], shape)

    return change


def as_type(name: str, dtype: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


def dropped(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.pop(name)


TENSORS = {
    "a wider head": (WEIGHTS, "head.weight", resized("head.weight", 1, 64)),
    "a narrower head": (WEIGHTS, "head.weight", resized("head.weight", 1, -64)),
    "a shorter matrix": (WEIGHTS, "ffn.value", resized("blocks.1.ffn.value.weight", 0, -1)),
    "a matrix in fp32": (WEIGHTS, "att.key", as_type("blocks.0.att.key.weight", np.float32)),
    "a vector of the host": (HOST, "ln_out.weight", resized("ln_out.weight", 0, -1)),
    "an embedding of fewer rows": (HOST, "emb.weight", resized("emb.weight", 0, -1)),
    "an embedding of integers": (HOST, "emb.weight", as_type("emb.weight", np.int32)),
    "a missing norm": (HOST, "ln1.bias", dropped("blocks.1.ln1.bias")),
    "a head among the vectors": (HOST, "head.weight", lambda a: a.update({"head.weight": a["emb.weight"].T})),
    "wider packed data": (PACKED, "head.weight.data", resized("head.weight.data", 0, 4)),
    "fewer packed data": (PACKED, "head.weight.data", resized("head.weight.data", 0, -4)),
    "shorter strips": (PACKED, "att.w2.data", resized("blocks.0.att.w2.data", 1, -64)),
    "fewer scales": (PACKED, "head.weight.scales", resized("head.weight.scales", 0, -1)),
    "scales in fp32": (PACKED, "head.weight.scales", as_type("head.weight.scales", np.float32)),
    "rows of a self-test": (SELF_TEST, "layer/head/in/x", resized("layer/head/in/x", 1, 1)),
}


@pytest.mark.parametrize("forged", TENSORS)
def test_tensors_are_refused_before_a_backend_sees_them(copy: Path, forged: str) -> None:
    file, named, change = TENSORS[forged]
    rewrite_tensors(copy, file, change)
    with pytest.raises(BundleError) as raised:
        bundle = open_bundle(copy)
        bundle.packed("int8", "head.weight")
        self_test(BundleSource(bundle))
    assert named in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("backend", ["numpy", "ort", "numba", "torch"])
@pytest.mark.parametrize("file", [WEIGHTS, PACKED])
def test_no_backend_computes_with_a_forged_head(copy: Path, backend: str, file: str) -> None:
    if backend == "numpy" and file == PACKED:
        pytest.skip("numpy multiplies with the weights in fp16")
    label = "head.weight" if file == WEIGHTS else "head.weight.data"
    rewrite_tensors(copy, file, resized(label, 1, -64))
    if backend == "torch" and file == PACKED:
        pytest.skip("torch multiplies with the weights in fp16")
    with pytest.raises(RwkvNpuError, match="head.weight"):
        with rwkv_npu.load(copy, backend=backend) as model:
            model.forward([1, 2, 3])


def test_tensors_that_a_kernel_could_not_load_aligned_are_refused(copy: Path) -> None:
    path = copy / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 2).to_bytes(8, "little") + data[8 : 8 + length] + b"  " + data[8 + length :])
    sign(copy)
    with pytest.raises(BundleError, match="multiple of 64"):
        open_bundle(copy)


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "has L": lambda m: m["spec"].update(L=2**53),
    "spec.V": lambda m: m["spec"].update(V="272"),
    "spec.D": lambda m: m["spec"].update(D=64.0),
    "spec.N": lambda m: m["spec"].update(N=True),
    "heads": lambda m: m["spec"].update(H=3),
    "rank": lambda m: m["spec"]["ranks"].update(w=0),
    "ranks": lambda m: m["spec"]["ranks"].update(q=8),
    "generation": lambda m: m["spec"].update(generation="9"),
    "scaling": lambda m: m["scaling"].update(ffn="4"),
    "scaling has a factor": lambda m: m["scaling"].update(ffn=-1.0),
    "size": lambda m: m["files"][HOST].update(size="100"),
    "files": lambda m: m.update(files=[HOST]),
    "packed": lambda m: m.update(packed=["../int8"]),
    "cpu precision": lambda m: m.update(cpu="int9"),
    "cpu_default": lambda m: m.update(cpu_default="fp64"),
    "fusion": lambda m: m.update(fusion="../layer"),
    "groups": lambda m: m["groups"]["layer"][0].update(name="../first"),
    "tokenizer": lambda m: m.update(tokenizer=["vocab.txt"]),
    "fingerprint": lambda m: m.update(fingerprint=7),
    "checkpoint": lambda m: m.update(checkpoint="x" * 5000),
    "artifact": lambda m: m.update(artifacts=[{"path": "x"}]),
    "graph_errors": lambda m: m.update(graph_errors={"x": "small"}),
    "int8": lambda m: m.update(int8={"w8a8": {"projections": ["emb.weight"], "share": 1.0, "kl": 0.0}}),
    "int4": lambda m: m.update(rounding={"auto": {"four_bits": ["emb.weight"]}}),
    "sensitivity": lambda m: m.update(sensitivity=[{"name": "head.weight"}]),
    "lists": lambda m: m["files"].update({"../victim": m["files"][HOST]}),
}


@pytest.mark.parametrize("named", MANIFESTS)
def test_a_manifest_of_wrong_values_is_refused_in_one_line(copy: Path, named: str) -> None:
    sign(copy, MANIFESTS[named])
    with pytest.raises(BundleError, match="damaged") as raised:
        open_bundle(copy)
    assert named in str(raised.value) and len(str(raised.value)) < 400


def test_entries_of_artifacts_must_fit_the_model(copy: Path) -> None:
    good = {"path": HOST, "group": "head", "target": "rk3588", "precision": "fp16", "fusion": "layer"}
    good |= {"rows": 1, "weight_bytes": 10}
    sign(copy, lambda m: m.update(artifacts=[good]))
    open_bundle(copy)
    for wrong in (
        {"group": "mid.7"},
        {"rows": 0},
        {"path": "rknn/x"},
        {"rows": "1"},
        {"cycles": {"npu": "1"}},
    ):
        sign(copy, lambda m, wrong=wrong: m.update(artifacts=[{**good, **wrong}]))
        with pytest.raises(BundleError, match="artifact"):
            open_bundle(copy)


# Links


@pytest.mark.parametrize("link", ["calib", "lnk", "graphs", "tune.json", "cpu/int8.safetensors"])
def test_a_link_within_a_bundle_is_refused_by_name(copy: Path, checkpoint: Path, link: str) -> None:
    victim = copy.parent / "victim"
    if (copy / link).is_dir():
        shutil.move(copy / link, victim)
    else:
        victim.mkdir()
        (copy / link).unlink(missing_ok=True)
    (victim / "doc.txt").write_text("precious")
    (copy / link).symlink_to(victim if "." not in link else victim / "doc.txt")
    before = contents(victim)
    with pytest.raises(BundleError, match=link):
        open_bundle(copy)
    with pytest.raises(BundleError, match=link):
        convert(checkpoint, copy, cpu="int4")
    assert contents(victim) == before


def test_a_link_within_an_unfinished_conversion_is_refused(copy: Path, checkpoint: Path) -> None:
    victim = copy.parent / "victim"
    victim.mkdir()
    (victim / "doc.txt").write_text("precious")
    partial = copy.with_name("out.rwkv.partial")
    partial.mkdir()
    (partial / "conversion").write_text('{"key": "rwkv_npu something", "notes": {}}')
    (partial / "calib").symlink_to(victim)
    with pytest.raises(BundleError, match="calib"):
        convert(checkpoint, copy.with_name("out.rwkv"))
    assert (victim / "doc.txt").read_text() == "precious"


def test_a_bundle_holds_no_pipes(copy: Path) -> None:
    os.mkfifo(copy / "graphs" / "pipe")
    with pytest.raises(BundleError, match="graphs/pipe"):
        open_bundle(copy)


def test_removal_stays_within_its_folder(tmp_path: Path) -> None:
    root, victim = tmp_path / "root", tmp_path / "victim"
    (root / "calib").mkdir(parents=True)
    victim.mkdir()
    for path in (victim / "doc.txt", root / "calib" / "old", root / "calib" / "kept", root / "a.1.writing"):
        path.write_text("x")
    (root / "link").symlink_to(victim)
    (root / "calib" / "inner").symlink_to(victim)
    for name in ("link/doc.txt", "calib/inner/doc.txt"):
        with pytest.raises(OSError):
            remove_within(root, name)
    for name in ("../victim/doc.txt", "/etc/passwd", ""):
        with pytest.raises(ValueError):
            remove_within(root, name)
    remove_unlisted(root, ("calib", "link", "missing"), {"calib/kept"})
    assert (victim / "doc.txt").exists() and sorted(os.listdir(root / "calib")) == ["inner", "kept"]
    assert sorted(os.listdir(root)) == ["calib", "link"]
    remove_within(root, "calib/kept")
    remove_within(root, "calib/kept")
    assert os.listdir(root / "calib") == ["inner"]


# Writing


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, errors = tmp_path / "state", []

    def write(letter: bytes) -> None:
        try:
            for _ in range(100):
                write_atomically(path, letter * 4096)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 4096 and len(set(content)) == 1
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["state"]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "one", b"")
    (tmp_path / "two").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "two").stat().st_mode


# Messages and names


def test_messages_are_one_printable_line() -> None:
    line = str(RwkvNpuError("a\nb\x1b[31m" + "x" * 5000))
    assert line.isprintable() and line.startswith("a\\nb\\x1b[31m") and len(line) < 1300


@pytest.mark.parametrize("path", ["x" * 5000, "x/" * 3000, "a\0b"])
def test_an_impossible_name_is_refused(path: str) -> None:
    with pytest.raises(RwkvNpuError) as raised:
        rwkv_npu.load(path)
    assert len(str(raised.value)) < 1400


def test_a_user_without_a_home_has_a_private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RWKV_NPU_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_dir()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="RWKV_NPU_CACHE"):
        cache_dir()


def test_a_manifest_is_read_within_bounds(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_npu.formats.bundle._LARGEST_MANIFEST", 100)
    assert json.loads((copy / MANIFEST).read_text())
    with pytest.raises(BundleError, match="more than 100 bytes"):
        open_bundle(copy)
