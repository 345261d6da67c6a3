"""Checkpoints of every generation and form, against torch's own reading."""

import io
import json
import pickletools
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.checkpoint import Checkpoint, check_finite, open_checkpoint, read_tensors
from rwkv_npu.models.spec import GENERATIONS, Kind, tensors
from tests.checkpoints import SMALL, refused, saved, small, weights
from tools.make_checkpoint import SIZES, main, make_checkpoint, make_spec


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


# -- good checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_pth_against_torch(tmp_path: Path, generation: str, dtype: str) -> None:
    path = small(tmp_path / "m.pth", generation, dtype=dtype, time_state=generation != "4")
    theirs = torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.spec == make_spec(generation, **SMALL)
    assert len(checkpoint.names) == len(theirs)
    by_name = {tensor.name: tensor for tensor in tensors(checkpoint.spec)}
    for stored_name, expected in theirs.items():
        name, logarithm = stored_name, False
        if generation != "4" and stored_name.endswith("att.time_first"):
            name, logarithm = stored_name.replace("time_first", "time_faaaa"), True
        array, tensor = checkpoint.tensor(name), by_name[name]
        assert array.shape == tensor.used_shape
        if tensor.kind is Kind.VECTOR:
            assert array.dtype == np.float32
            expected = expected.float().exp() if logarithm else expected.float()
            np.testing.assert_allclose(array.ravel(), expected.numpy().ravel(), rtol=1e-6 * logarithm)
            continue
        assert as_torch(array).dtype == expected.dtype and not array.flags.owndata
        if tensor.kind is Kind.STACK:
            expected = torch.stack(expected.chunk(5, dim=1))
        assert torch.equal(as_torch(array), expected.T if tensor.kind is Kind.LINEAR else expected)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_torch_saves_what_we_read(tmp_path: Path, generation: str) -> None:
    """Written by torch itself, as a state dict of parameters, with its metadata attribute."""
    expected = weights(tmp_path, generation)
    state = OrderedDict(
        (k, torch.nn.Parameter(v, requires_grad=i % 2 == 0)) for i, (k, v) in enumerate(expected.items())
    )
    state._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    fingerprint = open_checkpoint(tmp_path / f"good-{generation}.pth").fingerprint
    assert open_checkpoint(saved(tmp_path / "a.pth", state)).fingerprint == fingerprint
    assert (
        open_checkpoint(saved(tmp_path / "b.pth", {"model": expected, "epoch": 3})).fingerprint == fingerprint
    )
    save_file(expected, tmp_path / "c.st")
    assert open_checkpoint(tmp_path / "c.st").fingerprint == fingerprint


@pytest.mark.parametrize("generation", GENERATIONS)
def test_forms_agree(tmp_path: Path, generation: str) -> None:
    reference = open_checkpoint(small(tmp_path / "m.pth", generation))
    others = [small(tmp_path / "m.safetensors", generation), small(tmp_path / "m.bin", generation)]
    if generation != "7a":
        others.append(small(tmp_path / "hf", generation, hf=True))
        others.append(small(tmp_path / "shards", generation, hf=True, shards=3))
        others.append(tmp_path / "shards/model.safetensors.index.json")
        others.append(tmp_path / "hf/model.safetensors")
    if generation == "7":
        others.append(small(tmp_path / "stacked", generation, hf=True, stacked_mixes=True))
    for path in others:
        other = open_checkpoint(path)
        assert other.spec == reference.spec and other.names == reference.names
        assert other.fingerprint == reference.fingerprint and not other.notes
        for name in reference.names:
            assert np.array_equal(other.tensor(name), reference.tensor(name)), name


def test_transformers_own_rwkv4(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=3, attention_hidden_size=32, context_length=8
    )
    model = transformers.RwkvForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.spec.generation == "4" and (checkpoint.spec.A, checkpoint.spec.F) == (32, 256)
    block = model.rwkv.blocks[2]
    assert np.array_equal(
        checkpoint.tensor("blocks.2.att.output.weight"), block.attention.output.weight.detach().numpy().T
    )
    assert np.array_equal(
        checkpoint.tensor("blocks.2.ffn.time_mix_r"),
        block.feed_forward.time_mix_receptance.detach().numpy().ravel(),
    )
    assert np.array_equal(
        checkpoint.tensor("blocks.0.ln0.bias"), model.rwkv.blocks[0].pre_ln.bias.detach().numpy()
    )


def test_time_first_means_the_same_everywhere(tmp_path: Path) -> None:
    for generation in ("5.0", "5.1", "5.2", "6"):
        stored = weights(tmp_path, generation, time_first=True, dtype="fp32")
        first = open_checkpoint(tmp_path / f"good-{generation}.pth")
        u = torch.exp(stored["blocks.1.att.time_first"]).numpy()
        np.testing.assert_allclose(first.tensor("blocks.1.att.time_faaaa"), u, rtol=1e-6)
        plain = {k.replace("time_first", "time_faaaa"): v for k, v in stored.items()}
        second = open_checkpoint(saved(tmp_path / "plain.pth", plain))
        raw = stored["blocks.1.att.time_first"].numpy()
        assert np.array_equal(second.tensor("blocks.1.att.time_faaaa"), raw)
        assert first.fingerprint != second.fingerprint
    assert open_checkpoint(small(tmp_path / "4.pth", "4")).tensor("blocks.0.att.time_first").max() < 1


def test_strides_offsets_and_shared_storages(tmp_path: Path) -> None:
    state = weights(tmp_path, "7", dtype="fp32")
    expected = open_checkpoint(tmp_path / "good-7.pth")
    key = "blocks.0.att.key.weight"
    shared = torch.zeros(3, 64, 64)
    shared[1], shared[2] = state[key], state["blocks.1.att.key.weight"]
    state[key] = state["blocks.1.att.key.weight"] = torch.zeros(0)
    state[key], state["blocks.1.att.key.weight"] = shared[1], shared[2]
    state["blocks.0.att.value.weight"] = state["blocks.0.att.value.weight"].T.contiguous().T
    state["blocks.0.att.w0"] = torch.stack([state["blocks.0.att.w0"]] * 2, -1)[..., 1]
    state["head.weight"] = state["head.weight"].double()
    checkpoint = open_checkpoint(saved(tmp_path / "m.pth", state))
    for name in expected.names:
        assert np.array_equal(checkpoint.tensor(name), expected.tensor(name)), name
    assert checkpoint.tensor("head.weight").dtype == np.float32
    check_finite(checkpoint)


def test_unaligned_data(tmp_path: Path) -> None:
    """Old safetensors headers were not padded."""
    path = small(tmp_path / "m.safetensors", "7")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    header += b" " * ((len(header) + 1) % 2)
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    aligned, odd = open_checkpoint(path), open_checkpoint(tmp_path / "odd.safetensors")
    assert odd.fingerprint == aligned.fingerprint
    check_finite(odd)
    for name in aligned.names:
        array = odd.tensor(name)
        assert array.flags.aligned and np.array_equal(array, aligned.tensor(name))


def test_layer_0_of_v7_needs_no_value_mix(tmp_path: Path) -> None:
    state = weights(tmp_path)
    plain = open_checkpoint(tmp_path / "good-7.pth")
    for name in ("v0", "v1", "v2"):
        state[f"blocks.0.att.{name}"] = torch.zeros(3)
    checkpoint = open_checkpoint(saved(tmp_path / "m.pth", state))
    assert checkpoint.fingerprint == plain.fingerprint and "blocks.0.att.v0" not in checkpoint
    assert open_checkpoint(small(tmp_path / "1.pth", "7", L=1)).spec.ranks["v"] == 0


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    state = weights(tmp_path)
    first = open_checkpoint(tmp_path / "good-7.pth").fingerprint
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "good-7.pth", tmp_path / "elsewhere/other.pth")
    assert open_checkpoint(tmp_path / "elsewhere/other.pth").fingerprint == first
    assert open_checkpoint(small(tmp_path / "seed.pth", "7", seed=1)).fingerprint != first
    assert open_checkpoint(small(tmp_path / "fp32.pth", "7", dtype="fp32")).fingerprint != first
    state["blocks.1.ln2.bias"] = state["blocks.1.ln2.bias"] + 1
    assert open_checkpoint(saved(tmp_path / "m.pth", state)).fingerprint != first


def test_tied_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", generation="4", hf=True, **SMALL)
    state = {k: torch.tensor(v.astype(np.float32)) for k, v in read_tensors(tmp_path / "hf").items()}
    del state["head.weight"]
    save_file(state, tmp_path / "hf/model.safetensors")
    refused(tmp_path / "hf", "lacks tensor head.weight")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert np.array_equal(checkpoint.tensor("head.weight").T, checkpoint.tensor("emb.weight"))


def test_rescaled_layers_are_noted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", generation="4", hf=True, dtype="fp32", **{**SMALL, "L": 13})
    assert not open_checkpoint(tmp_path / "hf").notes
    state = {k: torch.tensor(v) for k, v in read_tensors(tmp_path / "hf").items()}
    for name in state:
        if name.endswith(("attention.output.weight", "feed_forward.value.weight")):
            state[name] = state[name] / 2 ** (int(name.split(".")[2]) // 6)
    save_file(state, tmp_path / "hf/model.safetensors")
    (note,) = open_checkpoint(tmp_path / "hf").notes
    assert "halved every 6 layers" in note


def test_time_state(tmp_path: Path) -> None:
    state = weights(tmp_path, "6", time_state=True)
    assert open_checkpoint(tmp_path / "good-6.pth").tensor("blocks.1.att.time_state").shape == (2, 32, 32)
    del state["blocks.0.att.time_state"]
    refused(saved(tmp_path / "m.pth", state), "1 of 2 layers")
    tuned = {"blocks.1.att.time_state": state["blocks.1.att.time_state"]}
    refused(saved(tmp_path / "m.pth", tuned), "tuned state only")
    assert list(read_tensors(tmp_path / "m.pth")) == ["blocks.1.att.time_state"]


def test_official_sizes() -> None:
    """Parameters in millions, as published."""
    published = {
        "v4-169m": 169,
        "v4-430m": 430,
        "v6-1.6b": 1600,
        "v6-7b": 7636,
        "v7-0.1b": 191,
        "v7-0.4b": 451,
    }
    for name, millions in published.items():
        assert round(make_spec(**SIZES[name]).parameters / 1e6) == millions


def test_tool_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--generation 7 -D 64 -L 2 -N 32 -V 96 --ranks w=16,g=24 --dtype fp16 --seed 3".split()
    for name in ("a", "b"):
        assert main([str(tmp_path / f"{name}.safetensors"), *arguments]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert open_checkpoint(tmp_path / "a.safetensors").spec.ranks == {"w": 16, "a": 32, "v": 32, "g": 24}
    assert "RWKV-7" in capsys.readouterr().err


# -- without torch, without memory -----------------------------------------------------------------------

PROBE = """
import resource, sys
from rwkv_npu.formats.checkpoint import check_finite, open_checkpoint
def anonymous():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
before = anonymous()
checkpoint = open_checkpoint(sys.argv[1])
checkpoint.fingerprint
for name in checkpoint.names:
    checkpoint.tensor(name)
check_finite(checkpoint)
assert not {"torch", "safetensors", "transformers", "onnx"} & set(sys.modules), "a heavy import"
print(anonymous() - before)
"""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_opening_imports_no_torch_and_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    make_checkpoint(path, generation="7", D=512, L=8, V=60000, dtype="bf16")
    assert path.stat().st_size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert int(done.stdout) < 24_000, f"{done.stdout} kB grown"


# -- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights(tmp_path, V=20000).items()}
    check_finite(open_checkpoint(saved(tmp_path / "m.pth", state)), fp16=True)
    state["emb.weight"][17000, 3] = value
    with pytest.raises(CheckpointError, match="emb.weight holds NaN or infinity"):
        check_finite(open_checkpoint(saved(tmp_path / "m.pth", state)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_beyond_float16(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights(tmp_path).items()}
    state["blocks.1.ffn.key.weight"][3, 5] = 65280
    state["blocks.1.ln1.weight"][3] = -1e6  # stays in float32 on the host
    check_finite(open_checkpoint(saved(tmp_path / "m.pth", state)), fp16=True)
    state["blocks.1.ffn.key.weight"][3, 5] = -65536
    checkpoint = open_checkpoint(saved(tmp_path / "m.pth", state))
    check_finite(checkpoint)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.key\.weight holds 6\.554e\+04"):
        check_finite(checkpoint, fp16=True)


def torch_program(path: Path, state: Any) -> bytes:
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/data.pkl")


def test_real_pickles_use_only_known_opcodes(tmp_path: Path) -> None:
    """Guards against a torch that writes something new: then this says so before users do."""
    program = torch_program(tmp_path / "m.pth", OrderedDict(x=torch.nn.Parameter(torch.zeros(2))))
    assert any(op.name == "BINPERSID" for op, _, _ in pickletools.genops(io.BytesIO(program)))
    assert read_tensors(tmp_path / "m.pth")["x"].tolist() == [0, 0]


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(small(tmp_path / "m.pth", "7"))
    with pytest.raises(CheckpointError, match="has no tensor nonsense"):
        checkpoint.tensor("nonsense")
