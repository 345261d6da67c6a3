"""Checkpoints that are wrong: each is refused in one line, runs nothing and allocates nothing."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.checkpoint import open_checkpoint, read_tensors
from tests.checkpoints import SMALL, refused, saved, small, weights
from tools.make_checkpoint import make_checkpoint

# -- wrong tensors ---------------------------------------------------------------------------------------

KEY = "blocks.1.att.key.weight"
BREAKS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "missing": ("7", lambda s: s.pop(KEY), rf"\(RWKV-7\) lacks tensor {KEY}"),
    "missing several": ("6", lambda s: [s.pop(KEY), s.pop("ln_out.bias")], r"lacks tensor .* \(and 1 more\)"),
    "no head": ("4", lambda s: s.pop("head.weight"), "lacks tensor head.weight"),
    "surplus": ("4", lambda s: s.update(head_q=s["emb.weight"]), "unknown tensor head_q"),
    "surplus name": ("4", lambda s: s.update({"a\nb\ud800": s["emb.weight"]}), "unknown tensor"),
    "layer": ("4", lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.0")], "tensors of layer 0"),
    "far layer": ("4", lambda s: s.update({"blocks.9999.ln1.bias": s["ln_out.bias"]}), "tensors of layer 2"),
    "endless layer": (
        "4",
        lambda s: s.update({f"blocks.{'9' * 5000}.x": s["ln_out.bias"]}),
        "unknown tensor",
    ),
    "shape": (
        "7",
        lambda s: s.update({KEY: torch.zeros(64, 63)}),
        rf"{KEY} has shape \(64, 63\): expected \(64, 64\)",
    ),
    "transposed": ("6", lambda s: s.update({"blocks.1.ffn.key.weight": torch.zeros(64, 224)}), "has shape"),
    "vector": ("5.2", lambda s: s.update({"blocks.1.ln1.bias": torch.zeros(65)}), r"expected \(64\)"),
    "heads": (
        "5.2",
        lambda s: s.update({"blocks.1.att.time_faaaa": torch.zeros(32, 2)}),
        r"expected \(2, 32\)",
    ),
    "rank": ("7", lambda s: s.update({"emb.weight": torch.zeros(96)}), "expected 2 dimensions"),
    "no dimensions": (
        "7",
        lambda s: s.update({"blocks.0.att.r_k": torch.zeros(())}),
        "expected 2 dimensions",
    ),
    "zero": ("7", lambda s: s.update({"emb.weight": torch.zeros(0, 64)}), "dimension of 0"),
    "odd heads": ("7", lambda s: s.update({"blocks.0.att.r_k": torch.zeros(3, 32)}), "3 heads of 32"),
    "no rank": ("7", lambda s: s.update({"blocks.0.att.w1": torch.zeros(64, 0)}), "dimension of 0"),
    "low rank": ("6", lambda s: s.update({"blocks.0.att.time_maa_w1": torch.zeros(64, 13)}), "has shape"),
    "dtype": (
        "7",
        lambda s: s.update({KEY: torch.zeros(64, 64, dtype=torch.int64)}),
        "dtype int64: expected bfloat16",
    ),
    "int8": ("4", lambda s: s.update({KEY: torch.zeros(64, 64, dtype=torch.int8)}), "dtype int8"),
    "no tensor": ("4", lambda s: s.update(epoch=3), "'epoch' is a Python int"),
    "both": (
        "6",
        lambda s: s.update({"blocks.0.att.time_first": torch.zeros(2, 32)} | s),
        "both time_first and",
    ),
    "converted": ("4", lambda s: s.update(_strategy="cpu fp32", _version="0.7"), "rwkv package .* original"),
    "7b": ("7", lambda s: s.update({"blocks.0.qkv.qq.weight": torch.zeros(4)}), "RWKV-7b"),
    "v8": ("7", lambda s: s.update({"blocks.0.ffn.enn.weight": torch.zeros(4)}), "RWKV-8"),
    "rosa": ("7", lambda s: s.update({"blocks.0.ROSA_qkv.emb": torch.zeros(4)}), "ROSA"),
    "v6a": ("6", lambda s: s.update({"blocks.0.att.gate_w1": torch.zeros(4)}), "variant of RWKV-6"),
    "v6b": ("6", lambda s: s.update({"blocks.0.att.time_maa_rkvw_w1": torch.zeros(4)}), "variant of RWKV-6"),
    "lora": (
        "7",
        lambda s: s.update({"blocks.0.att.key.lora_A": torch.zeros(4)}),
        "is an adapter, not a model",
    ),
    "quantised": ("7", lambda s: s.update({"blocks.0.att.key.qweight": torch.zeros(4)}), "quantised"),
    "other model": (
        "7",
        lambda s: [s.clear(), s.update({"layers.0.wq.weight": torch.zeros(4)})],
        "not an RWKV",
    ),
    "old": (
        "4",
        lambda s: [s.pop(k) for k in list(s) if "time_decay" in k],
        "not an RWKV checkpoint of a known",
    ),
}


@pytest.mark.parametrize(("generation", "change", "message"), BREAKS.values(), ids=BREAKS.keys())
def test_wrong_tensors(tmp_path: Path, generation: str, change: Any, message: str) -> None:
    state = weights(tmp_path, generation)
    change(state)
    refused(saved(tmp_path / "m.pth", state), message)
    if all(isinstance(v, torch.Tensor) and "\ud800" not in k for k, v in state.items()):
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / "m.safetensors")
        refused(tmp_path / "m.safetensors", message)


def test_foreign_folders(tmp_path: Path) -> None:
    llama = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
        "model.embed_tokens.weight": torch.zeros(2),
    }
    save_file(llama, tmp_path / "model.safetensors")
    refused(tmp_path, "not an RWKV checkpoint: it has tensors such as 'model.embed_tokens.weight'")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "config.json says 'llama'")
    for name in ("attn.q_proj.weight", "self_attn.time_mixer.w0", "self_attn.time_maa_x"):
        save_file({f"model.layers.1.{name}": torch.zeros(4)}, tmp_path / "model.safetensors")
        refused(tmp_path / "model.safetensors", "a hybrid of RWKV with attention")
    make_checkpoint(tmp_path / "hf", generation="7", hf=True, **SMALL)
    for text, message in (
        ("nope", "JSON"),
        ("[]", "JSON object"),
        ("[" * 100_000, "JSON"),
        ('{"model_type": "rwkv7", "norm_eps": 1e-6}', "norm_eps"),
    ):
        (tmp_path / "hf/config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "hf")


def test_folders(tmp_path: Path) -> None:
    refused(tmp_path, "holds no checkpoint")
    small(tmp_path / "a.pth", "7")
    assert open_checkpoint(tmp_path).path == tmp_path
    small(tmp_path / "b.pth", "7")
    refused(tmp_path, r"2 weight files \(a.pth, b.pth\)")
    (tmp_path / "manifest.json").touch()
    refused(tmp_path, "is a bundle")
    folder = small(tmp_path / "shards", "7", hf=True, shards=2)
    index = folder / "model.safetensors.index.json"
    first = folder / "model-00001-of-00002.safetensors"
    whole = json.loads(index.read_text())
    with pytest.raises(CheckpointError):
        open_checkpoint(first)
    for weight_map in ({}, None, {"x": "../a.pth"}, {"x": 3}, {"x": "missing.safetensors"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
    shutil.copy(first, folder / "again.safetensors")
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"x": "again.safetensors"}}))
    refused(folder, "in two of its files")


# -- wrong files -----------------------------------------------------------------------------------------


def test_wrong_files(tmp_path: Path) -> None:
    contents = {
        "empty": b"",
        "short": b"\x80",
        "random": np.random.default_rng(0).bytes(5000),
        "text": b"hello world, this is not a checkpoint",
        "zip": b"PK\x05\x06" + bytes(18),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
        "gguf": b"GGUF" + bytes(100),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)
    refused(tmp_path / "missing", "No such file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")


def test_legacy_pth(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", "torch older than 1.6")


def test_truncated_pth(tmp_path: Path) -> None:
    data = small(tmp_path / "m.pth", "4").read_bytes()
    for cut in (10, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:cut])
        refused(tmp_path / "cut.pth", "interrupted|neither")


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pth(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m/data.pkl", program)
        for name, data in entries.items():
            archive.writestr(f"m/data/{name[1:]}", data)
    return path


def tensor_program(
    storage: bytes = b"", offset: bytes = b"K\x00", shape: bytes = b"K\x02", stride: bytes = b"K\x01"
) -> bytes:
    """The pickle of {"x": a tensor}, with parts replaced."""
    storage = storage or b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02tQ"
    return (
        b"\x80\x02}U\x01xctorch._utils\n_rebuild_tensor_v2\n("
        + storage + offset + b"(" + shape + b"t(" + stride + b"t\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def test_malicious_pickles_do_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    calls = [
        Evil(os.system, f"touch {marker}"),
        Evil(eval, f"open({str(marker)!r}, 'w')"),
        Evil(exec, f"open({str(marker)!r}, 'w')"),
        Evil(subprocess.Popen, ["touch", str(marker)]),
        Evil(getattr, Path, "touch"),
        Evil(Path.touch, marker),
        Evil(pickle.loads, pickle.dumps(Evil(os.system, f"touch {marker}"))),
    ]
    for protocol in range(5):
        for call in calls:
            for value in (call, {"x": call}, {"model": [call]}, {"x": (torch.Size, call)}):
                refused(pth(tmp_path / "m.pth", pickle.dumps(value, protocol)))
    names = [
        b"os\nsystem",
        b"builtins\neval",
        b"torch._utils\n_rebuild_tensor_v2.__globals__",
        b"torch\nload",
    ]
    for name in names:
        refused(pth(tmp_path / "m.pth", b"\x80\x02c" + name + b"\nU\x04true\x85R."), "refused")
        refused(pth(tmp_path / "m.pth", b"\x80\x02c" + name + b"\nU\x04true\x85\x81."), "NEWOBJ")
    instance = b"(ios\nsystem\n."
    refused(pth(tmp_path / "m.pth", instance))
    assert not marker.exists()


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no stop": b"\x80\x02}",
    "only stop": b".",
    "unknown opcode": b"\x80\x02\xff.",
    "huge memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "huge string": b"\x80\x02X\xff\xff\xff\x7fx.",
    "huge long": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "negative long": b"\x80\x02\x8b\xff\xff\xff\xffx.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "missing memo": b"\x80\x02h\x07.",
    "no mark": b"\x80\x02}t.",
    "mark": b"\x80\x02(.",
    "short stack": b"\x80\x02R.",
    "short tuple": b"\x80\x02K\x01\x87.",
    "odd items": b"\x80\x02}(K\x01u.",
    "number as a name": b"\x80\x02}K\x01K\x02s.",
    "no target": b"\x80\x02(K\x01K\x02u.",
    "build": b"\x80\x02K\x01}b.",
    "reduce a number": b"\x80\x02K\x01)R.",
    "reduce without arguments": b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
    "list": b"\x80\x02].",
    "self": b"\x80\x02}q\x00U\x05modelh\x00s.",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "doubled tuples": b"\x80\x04K\x01" + b"\x94h\x00\x86\x94" * 60 + b"U\x01x\x93.",
    "persistent number": b"\x80\x02K\x01Q.",
    "persistent text": b"\x80\x02Pstorage\n.",
    "storage fields": tensor_program(b"(U\x07storageK\x00tQ"),
    "storage count": tensor_program(b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ"),
    "storage type": tensor_program(b"(U\x07storagectorch\nQInt8Storage\nU\x010U\x03cpuK\x02tQ"),
    "storage module": tensor_program(b"(U\x07storagecos\nFloatStorage\nU\x010U\x03cpuK\x02tQ"),
    "storage missing": tensor_program(b"(U\x07storagectorch\nFloatStorage\nU\x019U\x03cpuK\x02tQ"),
    "storage small": tensor_program(b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuM\x00\x10tQ"),
    "storage is a number": tensor_program(b"K\x01"),
    "offset": tensor_program(offset=b"K\x01"),
    "negative offset": tensor_program(offset=b"J\xff\xff\xff\xff"),
    "offset type": tensor_program(offset=b"U\x010"),
    "shape": tensor_program(shape=b"K\x03"),
    "negative shape": tensor_program(shape=b"J\xff\xff\xff\xff"),
    "huge shape": tensor_program(shape=b"\x8a\x09" + b"\xff" * 8 + b"\x00"),
    "expanded": tensor_program(shape=b"J\xff\xff\xff\x7f", stride=b"K\x00"),
    "negative stride": tensor_program(stride=b"J\xff\xff\xff\xff"),
    "huge stride": tensor_program(stride=b"J\xff\xff\xff\x7f"),
    "rank": tensor_program(shape=b"K\x01K\x02"),
    "ranks": tensor_program(shape=b"K\x01" * 20, stride=b"K\x01" * 20),
}  # fmt: skip


@pytest.mark.parametrize("program", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_pickles(tmp_path: Path, program: bytes) -> None:
    refused(pth(tmp_path / "m.pth", program, s0=bytes(8)))


def test_the_damaged_tensors_are_sound_otherwise(tmp_path: Path) -> None:
    refused(pth(tmp_path / "m.pth", tensor_program(), s0=bytes(8)), "not an RWKV checkpoint")
    assert read_tensors(tmp_path / "m.pth")["x"].tolist() == [0, 0]


def test_wrong_zips(tmp_path: Path) -> None:
    path, program = tmp_path / "m.pth", tensor_program()
    refused(pth(path, program, zipfile.ZIP_DEFLATED, s0=bytes(8)), "compressed")
    refused(pth(path, program), "data/'0' is missing")
    refused(pth(path, b"." * (9 << 20)), "larger than")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/other", b"x")
    refused(path, "not one that torch.save wrote")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", program)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("m/data.pkl", program)
    refused(path, "two entries named")
    for extra, message in (("constants.pkl", "TorchScript"), ("byteorder", "big-endian")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", program)
            archive.writestr(f"m/{extra}", b"big")
        refused(path, message)
    good = pth(path, program, s0=bytes(8)).read_bytes()
    for field, value in ((20, 2**31), (24, 2**31), (42, 2**31), (42, 7), (8, 1)):
        data = bytearray(good)
        directory = data.index(b"PK\x01\x02")  # sizes, offset and flags of the first entry
        struct.pack_into("<I" if field > 8 else "<H", data, directory + field, value)
        path.write_bytes(data)
        refused(path)


def test_data_bounds_are_those_of_the_file(tmp_path: Path) -> None:
    """A directory that points one entry at the end of the file must not map past it."""
    state = weights(tmp_path, "4")
    data = bytearray(saved(tmp_path / "m.pth", state).read_bytes())
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        struct.pack_into("<I", data, at + 42, len(data) - 20)
        at += 4
    (tmp_path / "m.pth").write_bytes(data)
    refused(tmp_path / "m.pth")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_flipped_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], in_pickle: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flips"
    if not folder.exists():
        folder.mkdir()
        make_checkpoint(folder / "good.pth", generation="4", D=16, L=1, V=20)
    data = bytearray((folder / "good.pth").read_bytes())
    start = data.index(b"\x80\x02") if in_pickle else data.index(b"PK\x01\x02")
    for position, value in flips:
        data[start + position % (4000 if in_pickle else len(data) - start)] = value
    (folder / "m.pth").write_bytes(data)
    try:
        checkpoint = open_checkpoint(folder / "m.pth")
        for name in checkpoint.names:
            checkpoint.tensor(name).tobytes()
    except CheckpointError as e:
        assert "\n" not in str(e)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_pickle_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, program: bytes) -> None:
    path = pth(tmp_path_factory.getbasetemp() / "any.pth", b"\x80\x02" + program, s0=bytes(8))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
