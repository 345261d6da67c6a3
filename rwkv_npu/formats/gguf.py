"""Reads RWKV-6 and RWKV-7 from GGUF, llama.cpp's file format.

llama.cpp's converter renames tensors, transposes low-rank matrices, stacks the mixes of a layer in one tensor, flattens
r_k, and divides some matrices of late RWKV-6 layers by powers of two, because its graph halves the residual. All of it
is undone here. F32, F16 and BF16 are views of the mapped file. Q8_0 and divided matrices are computed whenever they are
asked for, so opening a file takes no memory for them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.safetensors import BFLOAT16
from rwkv_npu.models.spec import Kind, layer_table

MAGIC = b"GGUF"
ARCHITECTURES = {"rwkv6": "6", "rwkv7": "7"}
MIXES = {"6": "wkvrg", "7": "rwkvag"}  # the order within time_mix_lerp_fused
MIX_PREFIX = {"6": "att.time_maa_", "7": "att.x_"}
TRANSPOSED = (Kind.LOW_RANK, Kind.STACK)
NORM_EPS = 1e-5
_TOP = {
    "emb.weight": "token_embd.weight",
    "head.weight": "output.weight",
    **{f"blocks.0.ln0.{part}": f"token_embd_norm.{part}" for part in ("weight", "bias")},
    **{f"ln_out.{part}": f"output_norm.{part}" for part in ("weight", "bias")},
}
_STEMS = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    "att.time_faaaa": "time_mix_first",
    "ffn.x_k": "channel_mix_lerp_k",
}
_MOST_READS = 1_000_000  # of the header; a vocabulary of 65536 tokens takes 200,000
_SPLIT = "split.count"

Producer = Callable[[], np.ndarray]


class GgufTensors(NamedTuple):
    """Tensors of a GGUF file under BlinkDL's names.

    arrays: views of the file, or for computed tensors placeholders of the right shape and dtype.
    computed: functions that return the computed tensors. digest: of their stored values, "" if there are none.
    stop_id: the end-of-text token that the file names.
    """

    arrays: dict[str, np.ndarray]
    computed: dict[str, Producer]
    digest: str
    stop_id: int | None


@cache
def gguf_names(generation: str) -> dict[str, tuple[str, bool]]:
    """{BlinkDL's name within a layer: (llama.cpp's, True if it is transposed there)}."""
    names = {}
    for name, kind, _ in layer_table(generation):
        stem, _, part = name.rpartition(".")
        if part not in ("weight", "bias"):
            stem, part = name, "weight"
        leaf = _STEMS.get(stem)
        if leaf is None:
            leaf = stem.replace("att.time_maa_", "att.lerp_").replace("ffn.time_maa_", "ffn.lerp_")
            leaf = leaf.replace("att.", "time_mix_").replace("ffn.", "channel_mix_")
        names[name] = f"{leaf}.{part}", kind in TRANSPOSED
    return names


def gguf_name(name: str, generation: str) -> str:
    """llama.cpp's name of a tensor with BlinkDL's name: blocks.3.att.w1 -> blk.3.time_mix_w1.weight."""
    if name in _TOP:
        return _TOP[name]
    _, layer, leaf = name.split(".", 2)
    return f"blk.{layer}.{gguf_names(generation)[leaf][0]}"


# -- reading -----------------------------------------------------------------------------------------------


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufTensors:
    """Tensors of a GGUF file. Raises CheckpointError for a damaged file, or one of another model or precision."""
    reader = _open(path)
    generation = _generation(path, reader)
    every = _number(reader, "rwkv6.rescale_every_n_layers") if generation == "6" else 0
    arrays: dict[str, np.ndarray] = {}
    computed: dict[str, Producer] = {}
    digest = hashlib.blake2b(digest_size=16)
    for found in reader.tensors:
        value, produce = _values(path, found)
        layer = re.match(r"blk\.(\d{1,4})\.", found.name, re.ASCII)
        scale = 2.0 ** (int(layer[1]) // every) if every and layer else 1.0
        if scale != 1 and found.name.endswith(("time_mix_output.weight", "channel_mix_value.weight")):
            produce = partial(_scaled, produce or partial(np.asarray, value), scale)
            value = _placeholder(value.shape)
        if produce:
            stored = np.asarray(found.data).reshape(-1)
            digest.update(f"{found.name} {found.tensor_type.name} {scale}\n".encode())
            digest.update(stored[:: max(1, len(stored) // 4096)].tobytes())
        for name, part in _renamed(found.name, generation, value, _head_size(path, reader, generation)):
            if name in arrays:
                raise CheckpointError(f"{path} has tensor {name!r:.80} twice")
            arrays[name] = part(value)
            if produce:
                computed[name] = partial(_apply, part, produce)
    stop = _number(reader, "tokenizer.ggml.eos_token_id")
    return GgufTensors(arrays, computed, digest.hexdigest() if computed else "", stop)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{path} is a GGUF file, read by the gguf package: pip install gguf") from None

    class Bounded(GGUFReader):
        """Reads nothing beyond the end of the file, and gives up on a header without end."""

        reads = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            self.reads += 1
            size = int(count) * np.dtype(dtype).itemsize
            if not 0 <= int(offset) <= int(offset) + size <= len(self.data) or self.reads > _MOST_READS:
                raise ValueError("it is cut short, or its header is damaged")
            if type(self.data) is np.memmap:
                self.data: Any = np.asarray(self.data)  # its views take less memory than those of a memmap
            return super()._get(offset, dtype, count, override_order)

    try:
        return Bounded(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can cause any error in the package
        raise CheckpointError(
            f"{path} is a damaged GGUF file ({type(error).__name__}: {error!s:.100})"
        ) from None


def _generation(path: Path, reader: Any) -> str:
    """The generation of an RWKV file that can be read. Raises CheckpointError."""
    field = reader.fields.get("general.architecture")
    architecture = bytes(field.parts[-1]).decode("utf-8", "replace") if field else ""
    if architecture not in ARCHITECTURES:
        hybrid = (
            " (RWKV's attention in another model's body)" if architecture in ("rwkv6qwen2", "arwkv7") else ""
        )
        raise CheckpointError(
            f"{path} is a GGUF file of {architecture!r:.40}{hybrid}: rwkv6 and rwkv7 are read"
        )
    if (_number(reader, _SPLIT) or 1) > 1:
        raise CheckpointError(f"{path} is one of several files: join them with llama.cpp's llama-gguf-split")
    eps = _number(reader, f"{architecture}.attention.layer_norm_epsilon")
    shifts = _number(reader, f"{architecture}.token_shift_count")
    if (eps is not None and abs(eps - NORM_EPS) > 1e-8) or shifts not in (None, 2):
        raise CheckpointError(f"{path} is of another kind of {architecture}: epsilon {eps}, {shifts} shifts")
    return ARCHITECTURES[architecture]


def _number(reader: Any, key: str) -> Any:
    """A number of the metadata as Python's; None if it is absent or something else."""
    field = reader.fields.get(key)
    if field is None or len(field.data) != 1 or field.parts[field.data[0]].size != 1:
        return None
    return field.parts[field.data[0]][0].item()


def _head_size(path: Path, reader: Any, generation: str) -> int:
    size = _number(reader, f"rwkv{generation}.wkv.head_size")
    if not isinstance(size, int) or not 0 < size < 1 << 20:
        raise CheckpointError(f"{path} names no head size (wkv.head_size is {size!r:.40})")
    return size


def _values(path: Path, found: Any) -> tuple[np.ndarray, Producer | None]:
    """The values of a tensor, in NumPy's order of dimensions. Q8_0: a placeholder, and a function to compute them."""
    kind, shape = found.tensor_type.name, tuple(int(n) for n in reversed(found.shape))
    if kind in ("F32", "F16"):
        return found.data, None
    if kind == "BF16":
        return found.data.view(BFLOAT16).reshape(shape), None
    if kind == "Q8_0":
        from gguf import dequantize

        return _placeholder(shape), partial(dequantize, found.data, found.tensor_type)
    raise CheckpointError(
        f"{path}: {found.name!r:.60} is in {kind}, which is not read: use a file in F16, BF16, F32 or Q8_0"
    )


def _placeholder(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.float32(0), shape)


def _scaled(produce: Producer, scale: float) -> np.ndarray:
    return produce().astype(np.float32) * np.float32(scale)


def _apply(part: Callable[[np.ndarray], np.ndarray], produce: Producer) -> np.ndarray:
    return part(produce())


def _renamed(
    name: str, generation: str, value: np.ndarray, head_size: int
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Yield BlinkDL's name of each part of a tensor, and a function that extracts the part from the tensor."""
    top = {theirs: ours for ours, theirs in _TOP.items()}
    found = re.fullmatch(r"blk\.(\d{1,4})\.(.+)", name, re.ASCII | re.DOTALL)
    if not found:
        yield top.get(name, name), np.asarray
        return
    layer, leaf = found.groups()
    mixes, prefix = MIXES[generation], MIX_PREFIX[generation]
    if leaf == "time_mix_lerp_fused.weight" and len(value) == len(mixes):
        for index, mix in enumerate(mixes):
            yield f"blocks.{layer}.{prefix}{mix}", partial(_row, index)
        return
    names = {theirs: (ours, transposed) for ours, (theirs, transposed) in gguf_names(generation).items()}
    ours, transposed = names.get(leaf, (leaf, False))
    take: Callable[[np.ndarray], np.ndarray] = _transposed if transposed and value.ndim > 1 else np.asarray
    if ours == "att.r_k" and value.ndim == 1 and value.size % head_size == 0:
        take = partial(_heads, head_size)
    yield f"blocks.{layer}.{ours}", take


def _row(index: int, value: np.ndarray) -> np.ndarray:
    return value[index].reshape(-1)


def _transposed(value: np.ndarray) -> np.ndarray:
    return value.swapaxes(-1, -2)


def _heads(head_size: int, value: np.ndarray) -> np.ndarray:
    return value.reshape(-1, head_size)
