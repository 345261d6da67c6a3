"""Writes RWKV-6 and RWKV-7 as GGUF in F16, as llama.cpp's own converter lays them out.

Matrices are F16; vectors, mixes and the low-rank matrices that feed the decay are F32, as in llama.cpp's files, so that
its quantiser treats the file as any other. RWKV-6 is written without the division of late layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.checkpoint import Checkpoint, all_finite
from rwkv_npu.formats.files import replacing
from rwkv_npu.formats.gguf import MIX_PREFIX, MIXES, NORM_EPS, TRANSPOSED, gguf_name
from rwkv_npu.models.spec import Kind, Tensor, tensors

CONTEXT = 1 << 20  # RWKV has no limit; the key is required
_EXACT = ("time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_first")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's types of tokens


class Entry(NamedTuple):
    """A tensor of the GGUF file; shape is NumPy's, ggml's is its reverse."""

    name: str
    shape: tuple[int, ...]
    dtype: type
    read: Callable[[], np.ndarray]


def entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    """Every tensor of the file, in the order of the layers."""
    generation = checkpoint.spec.generation
    prefix, mixes = MIX_PREFIX[generation], MIXES[generation]
    fused = {f"{prefix}{mix}" for mix in mixes}
    for tensor in tensors(checkpoint.spec):
        name = tensor.name
        leaf = name.split(".", 2)[-1]
        if leaf in fused or name not in checkpoint:
            if leaf == prefix + mixes[0]:
                yield _fused_mixes(checkpoint, name)
            continue
        entry = _entry(checkpoint, tensor)
        yield entry
        if generation == "7" and name.startswith("blocks.0.att.a"):
            # llama.cpp wants v0, v1 and v2 of layer 0, in the shapes of a0, a1 and a2, and never uses them.
            yield entry._replace(name=entry.name.replace("time_mix_a", "time_mix_v"))


def _entry(checkpoint: Checkpoint, tensor: Tensor) -> Entry:
    name, stored = tensor.name, checkpoint.producer(tensor.name)
    new = gguf_name(name, checkpoint.spec.generation)
    flat = tensor.kind is Kind.VECTOR and not name.endswith("time_faaaa")
    shape = (prod(tensor.shape),) if flat else tensor.shape
    transposed = tensor.kind in TRANSPOSED
    exact = len(shape) == 1 or new.split(".")[-2] in _EXACT
    dtype = np.float32 if exact else np.float16

    def read() -> np.ndarray:
        array = np.asarray(stored(), np.float32).reshape(shape)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array.swapaxes(-1, -2) if transposed else array).astype(dtype)
        if not all_finite(array):
            raise CheckpointError(f"{name} holds values beyond float16's range, NaN or infinity")
        return array

    return Entry(new, (*shape[:-2], shape[-1], shape[-2]) if transposed else shape, dtype, read)


def _fused_mixes(checkpoint: Checkpoint, first: str) -> Entry:
    spec = checkpoint.spec
    stem, mixes = first[:-1], MIXES[spec.generation]

    def read() -> np.ndarray:
        return np.stack([checkpoint.tensor(f"{stem}{mix}").reshape(1, 1, spec.D) for mix in mixes])

    layer = first.split(".")[1]
    return Entry(f"blk.{layer}.time_mix_lerp_fused.weight", (len(mixes), 1, 1, spec.D), np.float32, read)


def metadata(checkpoint: Checkpoint) -> dict[str, float | int]:
    """Keys and values, apart from the vocabulary and those that the `gguf` package writes for every file."""
    spec = checkpoint.spec
    common: dict[str, float | int] = {
        "context_length": CONTEXT,
        "embedding_length": spec.D,
        "block_count": spec.L,
        "feed_forward_length": spec.F,
        "vocab_size": spec.V,
        "wkv.head_size": spec.N,
        "attention.head_count": 0,  # required, unused
        "attention.layer_norm_epsilon": NORM_EPS,
    }
    if spec.generation == "6":
        own = {
            "time_mix_extra_dim": spec.ranks["mix"],
            "time_decay_extra_dim": spec.ranks["decay"],
            "rescale_every_n_layers": 0,
        }
    else:
        own = {
            "attention.decay_lora_rank": spec.ranks["w"],
            "attention.iclr_lora_rank": spec.ranks["a"],
            "attention.value_residual_mix_lora_rank": spec.ranks["v"],
            "attention.gate_lora_rank": spec.ranks["g"],
        }
    return {f"rwkv{spec.generation}.{key}": value for key, value in {**common, **own}.items()}


def vocabulary(tokens: Sequence[bytes | None]) -> tuple[list[bytes], list[int]]:
    """Tokens by id, as llama.cpp's tokenizer `rwkv` reads them, and their types. None: an id without a token."""
    padded = [repr(token)[2:-1].encode() if token else b"[PAD%d]" % i for i, token in enumerate(tokens)]
    types = [_NORMAL if token else _UNUSED for token in tokens]
    return [b"<s>", *padded[1:]], [_CONTROL, *types[1:]]


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    tokens: Sequence[bytes | None] | None,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Write `path`, one tensor in memory at a time; it appears whole.

    tokens: the bytes of each id of a World vocabulary, None for ids without a token; None for no vocabulary.
    progress() is called after each tensor. Raises UsageError for a generation that llama.cpp does not run, an existing
    file or a missing package; CheckpointError for values that F16 cannot hold; OSError.
    """
    spec = checkpoint.spec
    if spec.generation not in MIXES or spec.A != spec.D:
        raise UsageError(f"llama.cpp runs RWKV-6 and RWKV-7: this checkpoint is RWKV-{spec.generation}")
    if any(name.endswith("time_state") for name in checkpoint.names):
        raise UsageError(f"{checkpoint.path} holds a tuned state, which GGUF has no place for")
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists: name another file, or remove it first")
    try:
        import gguf
    except ImportError:
        raise UsageError("writing GGUF needs the gguf package: pip install gguf") from None
    with replacing(path) as aside:
        writer = gguf.GGUFWriter(aside, f"rwkv{spec.generation}")
        try:
            for key, value in metadata(checkpoint).items():
                if isinstance(value, float):
                    writer.add_float32(key, value)
                else:
                    writer.add_uint32(key, value)
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
            if tokens is None:
                writer.add_tokenizer_model("no_vocab")
            else:
                texts, types = vocabulary(tokens)
                writer.add_tokenizer_model("rwkv")
                writer.add_token_list(texts)
                writer.add_token_types(types)
                writer.add_eos_token_id(0)
            found = list(entries(checkpoint))
            for entry in found:
                dtype = np.dtype(entry.dtype)
                size = int(np.prod(entry.shape)) * dtype.itemsize
                writer.add_tensor_info(entry.name, entry.shape, dtype, size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in found:
                writer.write_tensor_data(entry.read())
                progress()
        finally:
            writer.close()
        with aside.open("rb") as file:
            os.fsync(file.fileno())
