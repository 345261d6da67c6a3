"""Writes an RWKV-7 checkpoint as GGUF, F16, as llama.cpp's own converter lays it out.

    python bench/peers/export_gguf.py model.pth model.gguf

What is F32 and what is F16, names, orientations and metadata follow llama.cpp's conventions for the architecture
`rwkv7`, so that its quantiser treats the file as it would any other. There is no vocabulary in it: ids go in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_npu.formats.checkpoint import Checkpoint, open_checkpoint

MIXES = "rwkvag"  # order in which llama.cpp's graph takes the six mixes apart
CONTEXT = 1 << 20  # RWKV has no limit; the key is required

_TOP = {
    "emb": "token_embd",
    "blocks.0.ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "head": "output",
}
_LAYER = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln"}


class Entry(NamedTuple):
    """A tensor of the GGUF file; shape is NumPy's, ggml's is its reverse."""

    name: str
    shape: tuple[int, ...]
    dtype: type
    read: Callable[[], np.ndarray]


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor with BlinkDL's name: blocks.3.att.w1 -> blk.3.time_mix_w1.weight."""
    stem, dot, end = name.rpartition(".")
    if end not in ("weight", "bias"):
        stem, end = name, "weight"
    if stem in _TOP:
        return f"{_TOP[stem]}.{end}"
    _, layer, leaf = stem.split(".", 2)
    if leaf in _LAYER:
        leaf = _LAYER[leaf]
    elif leaf == "ffn.x_k":
        leaf = "channel_mix_lerp_k"
    else:
        leaf = leaf.replace("att.", "time_mix_").replace("ffn.", "channel_mix_")
    return f"blk.{layer}.{leaf}.{end}"


def entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    """Every tensor of the file, in the order of the layers."""
    for name in checkpoint.names:
        leaf = name.rpartition(".")[2]
        if ".att.x_" in name:
            if leaf == "x_" + MIXES[0]:
                yield _fused_mixes(checkpoint, name)
            continue
        entry = _entry(checkpoint, name)
        yield entry
        if name.startswith("blocks.0.att.a"):
            # llama.cpp wants v0, v1 and v2 of layer 0, in the shapes of a0, a1 and a2, and never uses them.
            yield entry._replace(name=entry.name.replace("time_mix_a", "time_mix_v"))


def _entry(checkpoint: Checkpoint, name: str) -> Entry:
    stored, new = checkpoint.stored(name), gguf_name(name)
    shape = tuple(size for size in stored.shape if size != 1)
    if name.endswith("att.r_k"):
        shape = (stored.size,)
    # The low-rank pairs lie (in, out) in the checkpoint; ggml multiplies by (out, in).
    turned = len(shape) == 2 and name[-2:] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
    exact = len(shape) == 1 or name[-2:] in ("w1", "w2")
    dtype = np.float32 if exact else np.float16

    def read() -> np.ndarray:
        array = stored.reshape(shape).astype(np.float32).astype(dtype)
        return np.ascontiguousarray(array.T if turned else array)

    return Entry(new, shape[::-1] if turned else shape, dtype, read)


def _fused_mixes(checkpoint: Checkpoint, first: str) -> Entry:
    prefix = first[: -len("x_r")]
    D = checkpoint.spec.D

    def read() -> np.ndarray:
        mixes = [checkpoint.tensor(f"{prefix}x_{c}").reshape(1, 1, D) for c in MIXES]
        return np.stack(mixes)

    layer = first.split(".")[1]
    return Entry(f"blk.{layer}.time_mix_lerp_fused.weight", (len(MIXES), 1, 1, D), np.float32, read)


def metadata(checkpoint: Checkpoint) -> dict[str, float | int | str]:
    """Keys and values, apart from those that the `gguf` package writes for every file."""
    spec = checkpoint.spec
    return {
        "rwkv7.context_length": CONTEXT,
        "rwkv7.embedding_length": spec.D,
        "rwkv7.block_count": spec.L,
        "rwkv7.feed_forward_length": spec.F,
        "rwkv7.vocab_size": spec.V,
        "rwkv7.wkv.head_size": spec.N,
        "rwkv7.attention.head_count": 0,  # required, unused
        "rwkv7.attention.layer_norm_epsilon": 1e-5,
        "rwkv7.attention.decay_lora_rank": spec.ranks["w"],
        "rwkv7.attention.iclr_lora_rank": spec.ranks["a"],
        "rwkv7.attention.value_residual_mix_lora_rank": spec.ranks["v"],
        "rwkv7.attention.gate_lora_rank": spec.ranks["g"],
        "tokenizer.ggml.model": "no_vocab",
    }


def export(source: Path, target: Path) -> None:
    """Write `target`, one tensor in memory at a time."""
    import gguf

    checkpoint = open_checkpoint(source)
    if checkpoint.spec.generation != "7":
        raise SystemExit(f"{source} is RWKV-{checkpoint.spec.generation}: only RWKV-7 is exported")
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, "rwkv7")
    for key, value in metadata(checkpoint).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    found = list(entries(checkpoint))
    for entry in found:
        dtype = np.dtype(entry.dtype)
        writer.add_tensor_info(entry.name, entry.shape, dtype, int(np.prod(entry.shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in found:
        writer.write_tensor_data(entry.read())
    writer.close()
    partial.replace(target)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
