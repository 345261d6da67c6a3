"""GGUF files, laid out here as llama.cpp's converter lays them out, give the logits of the `.pth` they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import rwkv_npu
from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.gguf import gguf_name
from rwkv_npu.formats.gguf_writer import write_gguf
from tests.checkpoints import refused
from tests.tiny import HEAD_SIZE, Run, V, error_line, write_model

L, EVERY = 3, 2  # layers; llama.cpp halves the residual of RWKV-6 after so many
IDS = [1, 5, 200, 17, 3]
TYPES = {"F32": None, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": None}
Weights = dict[str, torch.Tensor]


def q8_0(matrix: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Blocks of 32 as (scale in fp16, 32 bytes), and the values that they stand for."""
    blocks = matrix.reshape(*matrix.shape[:-1], -1, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    whole = torch.where(scale > 0, blocks / scale.float(), 0).round().clamp(-127, 127)
    raw = np.concatenate([scale.numpy().view(np.uint8), whole.to(torch.int8).numpy().view(np.uint8)], -1)
    return raw.reshape(*matrix.shape[:-1], -1), (whole * scale.float()).reshape(matrix.shape)


def as_llama_cpp(weights: Weights, generation: str, kind: str) -> tuple[dict[str, np.ndarray], Weights]:
    """Arrays by llama.cpp's names, and the weights that they hold under BlinkDL's."""
    arrays: dict[str, np.ndarray] = {}
    held: Weights = {}
    prefix, mixes = ("att.time_maa_", "wkvrg") if generation == "6" else ("att.x_", "rwkvag")
    for name, tensor in weights.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        leaf = name.split(".", 2)[-1]
        if leaf in [prefix + mix for mix in mixes]:
            held[name] = tensor
            fused = f"blk.{layer}.time_mix_lerp_fused.weight"
            rows = [weights[f"blocks.{layer}.{prefix}{mix}"].reshape(1, 1, -1) for mix in mixes]
            arrays[fused] = torch.stack(rows).numpy()
            continue
        low_rank = leaf in ("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2")
        low_rank |= leaf in [f"att.{c}{i}" for c in "wavg" for i in "12"]
        theirs = tensor.transpose(-1, -2) if low_rank else tensor
        theirs = theirs.flatten() if leaf == "att.r_k" else theirs
        theirs = theirs if leaf == "att.time_faaaa" or theirs.ndim > 1 and low_rank else theirs.squeeze()
        divided = generation == "6" and leaf in ("att.output.weight", "ffn.value.weight")
        factor = 2.0 ** (layer // EVERY) if divided else 1.0
        theirs = (theirs / factor).contiguous()
        exact = low_rank or theirs.ndim == 1 or leaf == "att.time_faaaa"
        dtype = None if exact else TYPES[kind]
        if kind == "Q8_0" and not exact:
            arrays[gguf_name(name, generation)], values = q8_0(theirs)
            held[name] = values * factor
        elif dtype is not None:
            cast = theirs.to(dtype)
            arrays[gguf_name(name, generation)] = cast.view(torch.int16).numpy().view(np.uint16)
            held[name] = cast.float() * factor
        else:
            arrays[gguf_name(name, generation)] = theirs.numpy()
            held[name] = tensor
    return arrays, held


def write(path: Path, generation: str, arrays: dict[str, np.ndarray], kind: str, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", f"rwkv{generation}"))
    for key, value in {"wkv.head_size": HEAD_SIZE, "rescale_every_n_layers": EVERY, **metadata}.items():
        writer.add_uint32(key if "." in key and key[0] == "s" else f"rwkv{generation}.{key}", value)
    for name, array in arrays.items():
        if array.dtype == np.uint16:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])
        elif array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["6", "7"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    path = tmp_path_factory.mktemp("base") / "model.pth"
    write_model(path, request.param, L=L)
    return request.param, torch.load(path, weights_only=True)


def logits(path: Path) -> np.ndarray:
    with rwkv_npu.load(path, backend="numpy") as model:
        return model.forward(IDS)[0]


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_the_pth(weights: tuple[str, Weights], kind: str, tmp_path: Path) -> None:
    generation, tensors = weights
    arrays, held = as_llama_cpp(tensors, generation, kind)
    torch.save(held, tmp_path / "held.pth")
    path = write(tmp_path / "model.gguf", generation, arrays, kind)
    expected = logits(tmp_path / "held.pth")
    np.testing.assert_allclose(logits(path), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    torch.save(tensors, tmp_path / "whole.pth")
    loss = np.abs(expected - logits(tmp_path / "whole.pth")).max() / np.abs(expected).max()
    assert loss == 0 if kind == "F32" else 0 < loss < 0.1


def test_commands_read_it(weights: tuple[str, Weights], tmp_path: Path, run: Run) -> None:
    """Computed tensors too: a bundle and a merged file hold their values, not their placeholders."""
    generation, tensors = weights
    arrays, _ = as_llama_cpp(tensors, generation, "Q8_0")
    (tmp_path / "model").mkdir()
    path = write(tmp_path / "model" / "model.gguf", generation, arrays, "Q8_0")
    assert f"RWKV-{generation}" in run("info", path)[1]
    status, out, _ = run(
        "convert", tmp_path / "model", "--target", "none", "--cpu", "fp32", "-o", tmp_path / "b.rwkv"
    )
    assert status == 0
    np.testing.assert_allclose(logits(Path(out.strip())), logits(path), atol=1e-5)


@pytest.mark.parametrize("generation", ["6", "7"])
def test_an_exported_file_reads_back(generation: str, tmp_path: Path, run: Run) -> None:
    write_model(tmp_path / "model.pth", generation, L=L)
    out = tmp_path / "model.gguf"
    assert run("export", tmp_path / "model.pth", "--gguf", out)[:2] == (0, f"{out}\n")
    expected, found = logits(tmp_path / "model.pth"), logits(out)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3 * np.abs(expected).max())
    field = gguf.GGUFReader(out).fields["tokenizer.ggml.tokens"]
    texts = [bytes(field.parts[i]) for i in field.data]
    assert (
        len(texts) == V and texts[0] == b"<s>" and texts[1] == b"\\x00" and texts[-1] == b"[PAD%d]" % (V - 1)
    )
    assert "exists" in error_line(run("export", tmp_path / "model.pth", "--gguf", out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.pth", "vocab.txt"]


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "4.pth", "4")
    write_model(tmp_path / "tuned.pth", "6", time_state=True)
    with pytest.raises(UsageError, match="RWKV-4"):
        write_gguf(open_checkpoint(tmp_path / "4.pth"), tmp_path / "out.gguf", None)
    with pytest.raises(UsageError, match="tuned state"):
        write_gguf(open_checkpoint(tmp_path / "tuned.pth"), tmp_path / "out.gguf", None)
    write_model(tmp_path / "large.pth", "7")
    tensors = torch.load(tmp_path / "large.pth", weights_only=True)
    tensors["head.weight"][3, 5] = 1e5
    torch.save(tensors, tmp_path / "large.pth")
    with pytest.raises(CheckpointError, match="head.weight holds values beyond float16"):
        write_gguf(open_checkpoint(tmp_path / "large.pth"), tmp_path / "out.gguf", None)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "llama"}, "GGUF file of 'llama'"),
        ({"architecture": "rwkv6qwen2"}, "another model's body"),
        ({"split.count": 3}, "one of several files"),
        ({"token_shift_count": 1}, "another kind of rwkv7"),
        ({"wkv.head_size": 0}, "names no head size"),
    ],
)
def test_other_files_are_named(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    arrays = {"token_embd.weight": np.zeros((4, 32), np.float32)}
    refused(write(tmp_path / "model.gguf", "7", arrays, "F32", **options), said)


def test_other_precisions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    arrays = {"output.weight": gguf.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q4_0)}
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_uint32("rwkv7.wkv.head_size", HEAD_SIZE)
    writer.add_tensor("output.weight", arrays["output.weight"], raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "is in Q4_0, which is not read: use a file in F16")


@pytest.mark.parametrize("damage", ["cut", "count", "array"])
def test_damaged_files_are_refused_at_once(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "7", {"token_embd.weight": np.zeros((4, 32), np.float32)}, "F32")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "count":
        data[8:16] = b"\xff" * 8  # tensors
    else:  # an array of 2^60 empty strings
        data[24:] = (
            (3).to_bytes(8, "little") + b"abc" + b"\x09\0\0\0\x08\0\0\0" + (1 << 60).to_bytes(8, "little")
        )
        data += bytes(4096)
    path.write_bytes(data)
    refused(path, "damaged GGUF file")
