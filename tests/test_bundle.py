"""Bundles: what is in one, and that nothing wrong with one goes unnoticed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import BackendError, BundleError, RwkvNpuError
from rwkv_npu.formats import bundle as bundle_module
from rwkv_npu.formats.bundle import (
    HOST,
    MANIFEST,
    SELF_TEST,
    WEIGHTS,
    Bundle,
    _checksum,
    open_bundle,
    verify_files,
)
from rwkv_npu.formats.safetensors import TensorFile
from rwkv_npu.models.spec import FUSIONS, Scaling, groups, tensors
from tests.fake_rknnlite import become_a_board
from tests.tiny import run_main, write_model

IDS = [5, 6, 7, 101, 102]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a v6 model, whose matrices include stacks. Not to be changed."""
    folder = tmp_path_factory.mktemp("bundle")
    write_model(folder / "model" / "model.pth", "6", time_state=True)
    return rwkv_npu.convert(folder / "model" / "model.pth", folder / "made.rwkv", target="none")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A bundle to be broken."""
    return Path(shutil.copytree(made, tmp_path / "copy.rwkv"))


def files(bundle: Path) -> list[str]:
    return sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())


def logits(path: Path, backend: str = "numpy") -> np.ndarray:
    with rwkv_npu.load(path, backend=backend) as model:
        return model.forward(IDS)[0]


def refused(path: Path, name: str = "") -> str:
    """The line with which opening fails, which names the file."""
    with pytest.raises(BundleError) as raised:
        open_bundle(path)
    line = str(raised.value)
    assert "\n" not in line and name in line and len(line) < 400
    return line


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and put a checksum on it, as another version of the program would."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = _checksum(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


# What is in a bundle


def test_every_file_is_in_the_manifest(made: Path) -> None:
    manifest = open_bundle(made).manifest
    assert sorted([*manifest.files, MANIFEST]) == files(made)
    graphs = {f"graphs/{fusion}.{g.name}.onnx" for fusion in FUSIONS for g in groups(manifest.spec, fusion)}
    assert set(manifest.files) == graphs | {HOST, WEIGHTS, SELF_TEST, "cpu/int8.safetensors", "vocab.txt"}
    for name, record in manifest.files.items():
        assert (made / name).stat().st_size == record.size


def test_groups_of_the_manifest_are_those_of_the_spec(made: Path) -> None:
    listed = json.loads((made / MANIFEST).read_text())["groups"]
    spec = open_bundle(made).spec
    assert set(listed) == set(FUSIONS)
    for fusion in FUSIONS:
        assert [entry["name"] for entry in listed[fusion]] == [group.name for group in groups(spec, fusion)]
        for entry, group in zip(listed[fusion], groups(spec, fusion), strict=True):
            graph = onnx.load(made / f"graphs/{fusion}.{group.name}.onnx", load_external_data=False).graph
            ports = (
                (entry["inputs"], group.inputs, graph.input),
                (entry["outputs"], group.outputs, graph.output),
            )
            for listed_ports, spec_ports, values in ports:
                described = [(port["name"], port["shape"]) for port in listed_ports]
                rows = ["M"] * len(spec_ports)
                assert described == [(p.name, [r, p.width]) for p, r in zip(spec_ports, rows, strict=True)]
                assert described == [
                    (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
                    for v in values
                ]
                assert {port["dtype"] for port in listed_ports} == {"float32"}


def test_tensors_are_those_of_the_checkpoint(made: Path) -> None:
    """Each once, in the file of its kind, in the shape of the maths."""
    bundle = open_bundle(made)
    host, weights = TensorFile(made / HOST), TensorFile(made / WEIGHTS)
    for tensor in tensors(bundle.spec):
        holder, other = (weights, host) if tensor.kind.is_projection else (host, weights)
        assert tensor.name in holder and tensor.name not in other
        assert bundle.tensor(tensor.name).shape == tensor.used_shape
        if tensor.kind.is_projection:
            assert bundle.tensor(tensor.name).dtype == np.float16
    assert "no.such" not in bundle
    with pytest.raises(BundleError, match="no.such"):
        bundle.tensor("no.such")


def test_arrays_are_aligned_views(made: Path) -> None:
    bundle = open_bundle(made)
    for name in (HOST, WEIGHTS):
        for tensor in TensorFile(made / name).names:
            array = bundle.tensor(tensor)
            assert array.ctypes.data % 64 == 0, tensor
            assert not array.flags.owndata and not array.flags.writeable, tensor


def test_graphs_refer_to_the_weights_by_offset(made: Path) -> None:
    bundle = open_bundle(made)
    data = (made / WEIGHTS).read_bytes()
    seen = set()
    for path in sorted(made.glob("graphs/*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        for proto in graph.initializer:
            if proto.data_location != onnx.TensorProto.EXTERNAL:
                continue
            where = {entry.key: entry.value for entry in proto.external_data}
            assert where["location"] == Path(WEIGHTS).name
            offset, length = int(where["offset"]), int(where["length"])
            stacked = proto.name not in bundle
            name, _, index = proto.name.rpartition(".") if stacked else (proto.name, "", "")
            expected = bundle.tensor(name)[int(index)] if stacked else bundle.tensor(name)
            assert tuple(proto.dims) == expected.shape
            found = np.frombuffer(data[offset : offset + length], np.float16).reshape(proto.dims)
            np.testing.assert_array_equal(found, expected)
            seen.add((path.name.split(".")[0], name))
    projections = {tensor.name for tensor in tensors(bundle.spec) if tensor.kind.is_projection}
    assert seen == {(fusion, name) for fusion in FUSIONS for name in projections}


def test_a_bundle_can_be_moved(made: Path, tmp_path: Path) -> None:
    before = logits(made, "ort")
    moved = tmp_path / "deep" / "er" / "x"
    shutil.copytree(made, moved)
    np.testing.assert_array_equal(logits(moved, "ort"), before)
    (tmp_path / "link").symlink_to(moved)
    np.testing.assert_array_equal(logits(tmp_path / "link", "ort"), before)
    moved.rename(tmp_path / "y")
    np.testing.assert_array_equal(logits(tmp_path / "y", "ort"), before)


def test_a_relative_path_outlives_a_change_of_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is looked for after loading."""
    monkeypatch.chdir(made.parent)
    with rwkv_npu.load(made.name, backend="ort") as model:
        monkeypatch.chdir(tmp_path)
        np.testing.assert_array_equal(model.forward(IDS)[0], logits(made, "ort"))


_MEASURE = """
import sys, rwkv_npu
def resident(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
small, path = sys.argv[1:]
rwkv_npu.load(small, backend="numpy").forward([5, 6])  # whatever is allocated once
before = resident("VmRSS"), resident("RssAnon")
model = rwkv_npu.load(path, backend="numpy")
opened = resident("VmRSS")
model.forward([5, 6])
print(opened - before[0], resident("RssAnon") - before[1])
"""


def test_opening_maps_the_weights(made: Path, tmp_path: Path) -> None:
    """A bundle of about 100 MB: opening reads nothing, and running copies nothing."""
    checkpoint = tmp_path / "model.safetensors"
    write_model(checkpoint, D=128, L=1, V=196_608, F=256, N=64, dtype="bf16", vocabulary=False)
    path = rwkv_npu.convert(checkpoint, tmp_path / "large.rwkv", target="none")
    checkpoint.unlink()
    assert sum((path / name).stat().st_size for name in files(path)) > 95e6
    arguments = [sys.executable, "-c", _MEASURE, str(made), str(path)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout
    opened, running = map(int, out.split())
    assert opened < 10e6, "opening reads the weights"
    assert running < 15e6, "running copies the weights"
    shutil.rmtree(path)


# What is wrong with a bundle


def test_a_flipped_bit_in_any_file_is_found_on_opening(made: Path, tmp_path: Path) -> None:
    for name in files(made):
        size = (made / name).stat().st_size
        for place in (0, size // 3, size - 1):
            copy = Path(shutil.copytree(made, tmp_path / "copy"))
            flip(copy / name, place, place % 8)
            refused(copy, name)
            shutil.rmtree(copy)


def test_missing_truncated_and_grown_files(made: Path, tmp_path: Path) -> None:
    for name in files(made):
        data = (made / name).read_bytes()
        for wrong in (None, b"", data[:-2], data[: len(data) // 2], data + b"\0", "folder"):
            copy = Path(shutil.copytree(made, tmp_path / "copy"))
            (copy / name).unlink()
            if isinstance(wrong, bytes):
                (copy / name).write_bytes(wrong)
            elif wrong:
                (copy / name).mkdir()
            refused(copy, name)
            shutil.rmtree(copy)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        refused(path, str(path))


@pytest.fixture
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every file as one that is too large to be read on opening."""
    monkeypatch.setattr(bundle_module, "_SMALL", -1)


def test_check_finds_a_flipped_bit_in_large_files(
    copy: Path, as_if_large: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy / WEIGHTS, (copy / WEIGHTS).stat().st_size // 2)
    open_bundle(copy)
    assert run_main(capsys, "info", copy)[0] == 0
    status, out, err = run_main(capsys, "info", copy, "--check")
    assert (status, out) == (1, "")
    assert WEIGHTS in err and err.count("\n") == 1
    with pytest.raises(BundleError, match=WEIGHTS):
        list(verify_files(open_bundle(copy)))


@pytest.mark.usefixtures("as_if_large")
def test_large_files_are_checked_by_their_size(copy: Path) -> None:
    name = "graphs/layer.first.onnx"
    data = (copy / name).read_bytes()
    for wrong in (data[:-1], data + b"\0", b""):
        (copy / name).write_bytes(wrong)
        assert f"{len(wrong)} bytes instead of {len(data)}" in refused(copy, name)


@pytest.mark.usefixtures("as_if_large")
@pytest.mark.parametrize("name", [HOST, WEIGHTS])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_of_a_large_file_is_no_traceback(made: Path, name: str, data: Any) -> None:
    """Damage that opening cannot see is a BundleError when the tensor is used, or in `verify_files`."""
    original = (made / name).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    place, bit = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 7))
    copy = made.parent / "damaged.rwkv"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(made, copy, copy_function=os.link)
    (copy / name).unlink()
    (copy / name).write_bytes(original)
    flip(copy / name, place, bit)
    try:
        opened = open_bundle(copy)
        with pytest.raises(BundleError):
            list(verify_files(opened))
        logits(copy)
    except RwkvNpuError as error:
        assert "\n" not in str(error)


# Versions


def test_a_newer_minor_opens(copy: Path) -> None:
    expected = logits(copy)

    def newer(manifest: dict[str, Any]) -> None:
        manifest["format"] = [1, 7]
        manifest["news"] = {"from": "the future"}
        manifest["scaling"]["news"] = 1.0
        manifest["spec"]["news"] = [1]
        for record in manifest["files"].values():
            record["news"] = "x"
        path = "rknn/rk3588/head.layer.fp16.m1.rknn"
        (copy / path).parent.mkdir(parents=True)
        (copy / path).write_bytes(b"x")
        manifest["files"][path] = {"size": 1, "digest": bundle_module.file_digest(copy / path)}
        artifact = {"path": path, "group": "head", "target": "rk3588", "precision": "fp16", "rows": 1}
        artifact |= {"fusion": "layer", "weight_bytes": 7, "on_cpu": ["x"], "news": None}
        manifest["artifacts"] = [artifact]

    rewrite(copy, newer)
    bundle = open_bundle(copy)
    assert bundle.manifest.format == (1, 7)
    assert [artifact.on_cpu for artifact in bundle.manifest.artifacts] == [("x",)]
    np.testing.assert_array_equal(logits(copy), expected)


def test_a_bundle_from_before_scales_of_layers_opens(copy: Path) -> None:
    expected = logits(copy)

    def older(manifest: dict[str, Any]) -> None:
        del manifest["scaling"]["layers"]
        for group in itertools.chain.from_iterable(manifest["groups"].values()):
            group["maths"] = 1

    rewrite(copy, older)
    assert open_bundle(copy).manifest.scaling == Scaling(ffn=4.0, residual_every=6)
    np.testing.assert_array_equal(logits(copy), expected)


@pytest.mark.parametrize("version", [[0, 9], [3, 0], [4, 1]])
def test_another_major_is_refused(copy: Path, version: list[int]) -> None:
    rewrite(copy, lambda manifest: manifest.update(format=version))
    line = refused(copy, str(copy))
    assert f"format {version[0]}.{version[1]}" in line and "damaged" not in line


def test_groups_of_another_meaning_are_refused(copy: Path) -> None:
    rewrite(copy, lambda manifest: manifest["groups"]["layer"][1].update(maths=4))
    line = refused(copy, str(copy))
    assert "maths 4" in line and "damaged" not in line


def test_a_bundle_without_its_manifest_is_named(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(BundleError, match="without its manifest.json"):
        rwkv_npu.load(copy)


def test_another_major_is_refused_whatever_it_looks_like(copy: Path) -> None:
    (copy / MANIFEST).write_text('{"format": [3, 0]}')
    assert "format 3.0" in refused(copy, str(copy))


# Manifests that nobody has written


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"[" * 3000)
@example(b'{"a":' * 3000)
@example(b"1" * 5000)
@example(b"\xef\xbb\xbf{}")
@example(b'{"format": [1, 0]}')
@example(b'{"format": 1, "checksum": null}')
@example(b'{"format": [[], {}], "checksum": 5}')
@settings(max_examples=100, deadline=None)
def test_garbage_for_a_manifest(made: Path, data: bytes) -> None:
    folder = made.parent / "garbage"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(data)
    refused(folder, str(folder))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**25) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON values."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    ):
        yield value, key
        yield from places(value[key])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_manifest_with_something_else_in_any_place(made: Path, data: Any) -> None:
    """With a right checksum: opening finds it, or it makes no difference to opening."""
    folder = made.parent / "changed.rwkv"
    if not folder.exists():
        shutil.copytree(made, folder, copy_function=os.link)
        shutil.copyfile(folder / MANIFEST, folder / "original")
        (folder / MANIFEST).unlink()
    shutil.copyfile(folder / "original", folder / MANIFEST)

    def change(manifest: dict[str, Any]) -> None:
        container, key = data.draw(st.sampled_from(list(places(manifest))))
        if data.draw(st.booleans()):
            container[key] = data.draw(json_values)
        elif isinstance(container, dict) and data.draw(st.booleans()):
            container[data.draw(st.text(max_size=8))] = container.pop(key)
        else:
            del container[key]

    rewrite(folder, change)
    try:
        assert isinstance(open_bundle(folder), Bundle)
    except BundleError as error:
        assert "\n" not in str(error)


def test_a_manifest_that_names_files_elsewhere(copy: Path) -> None:
    """A bundle is a folder: its manifest must not make the program read others."""
    original = (copy / MANIFEST).read_bytes()
    for name in ("../copy.rwkv/vocab.txt", str(copy / "vocab.txt"), "two\nlines"):

        def add(manifest: dict[str, Any], name: str = name) -> None:
            manifest["files"][name] = manifest["files"]["vocab.txt"]

        (copy / MANIFEST).write_bytes(original)
        rewrite(copy, add)
        refused(copy, MANIFEST)


def test_a_bundle_of_the_first_version_opens(tmp_path: Path) -> None:
    """`data/bundle-0.1.zip` was made by commit a983d45: RWKV-7, D 32, L 2, rk3588, rows 1, mixed, int8 for the CPU."""
    path = tmp_path / "old"
    shutil.unpack_archive(Path(__file__).parent / "data" / "bundle-0.1.zip", path)
    expected = {
        ("numpy", None): [0.4674, 0.6855, -1.7663, -1.1463, -1.0535, 1.4252],
        ("numpy", "mixed"): [0.5011, 0.6891, -1.754, -1.1902, -1.0023, 1.3781],
        ("ort", None): [0.4674, 0.6855, -1.7663, -1.1463, -1.0535, 1.4252],
    }
    for (backend, precision), logits in expected.items():
        with rwkv_npu.load(path, backend=backend, precision=precision) as model:
            found, _ = model.forward([5, 6, 7, 8, 9])
        np.testing.assert_allclose(found[:6], logits, atol=5e-2 if backend == "ort" else 1e-3)


def test_the_artifacts_of_the_first_version_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their inputs are the rows of one sequence. The CPU runs such a bundle in every fusion and precision."""
    path = tmp_path / "old"
    shutil.unpack_archive(Path(__file__).parent / "data" / "bundle-0.1.zip", path)
    states = [[5, 6, 7], [8]]
    found = []
    for backend, fusion, precision in itertools.product(("numpy", "ort"), FUSIONS, ("fp16", "int8")):
        with rwkv_npu.load(path, backend=backend, fusion=fusion, precision=precision) as model:
            logits, _ = model.forward_batch(states, [model.new_state(), model.new_state()])
            found.append(np.asarray(logits))
    assert all(np.abs(logits - found[0]).max() < 0.1 for logits in found)
    line = "bundle of format 1.1 .* convert the checkpoint again with force=True$"
    become_a_board(monkeypatch, tmp_path)
    for backend in ("rknn", "rknn-sim"):
        with pytest.raises(BackendError, match=line):
            rwkv_npu.load(path, backend=backend)
    with rwkv_npu.load(path) as model:
        assert re.search(line.removesuffix("$"), model.reason) and model.engine.backends in (
            ["numba"],
            ["ort"],
        )
