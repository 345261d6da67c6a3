"""Checkpoints: the user's weights, in any of the usual file formats.

`open_checkpoint` maps the file, detects its format and generation, and checks every name, shape and dtype. Tensors then
have BlinkDL's names and the shapes of spec.py. Weights are views of the mapped file, so the time and memory of opening
do not depend on their size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.detect import detect, refuse_unsupported, validate
from rwkv_npu.formats.files import is_folder
from rwkv_npu.formats.gguf import MAGIC, read_gguf
from rwkv_npu.formats.huggingface import (
    FLA6_VALUES,
    is_fla6,
    is_huggingface,
    looks_rescaled,
    read_config,
    to_blinkdl,
    weight_files,
)
from rwkv_npu.formats.layout import BLINKDL, check_layout, strip_prefixes, to_one_layout
from rwkv_npu.formats.pth import read_pth
from rwkv_npu.formats.safetensors import TensorFile, TensorPlan, map_file, replace_tensors
from rwkv_npu.models.spec import Kind, Spec, Tensor, tensors
from rwkv_npu.progress import progress

__all__ = ["Checkpoint", "all_finite", "check_finite", "open_checkpoint", "pieces", "read_tensors"]

_CHUNK = 1 << 20  # elements that check_finite reads at a time
_FP16_MAX = 65504.0
_SAMPLE_RUNS, _SAMPLE_RUN = 8, 512  # the fingerprint reads 8 runs of 512 elements of each tensor


class Checkpoint:
    """An open checkpoint. Made by `open_checkpoint`.

    path: the file or folder. spec: generation and dimensions. names: of the tensors that are present, layer by layer.
    stop_ids: tokens that end a text, from config.json. notes: warnings for the user about unlikely weights.
    """

    def __init__(self, path: Path, stored: dict[str, np.ndarray], logarithmic: frozenset[str]) -> None:
        self.path = path
        self.notes: list[str] = []
        self.stop_ids: list[int] = []
        self.spec: Spec = detect(stored)
        self._tensors: dict[str, Tensor] = validate(self.spec, stored)
        self._stored = stored
        self._logarithmic = logarithmic
        self._amended: dict[str, Callable[[], np.ndarray]] = {}
        self._fingerprint = ""
        self.names = tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def stored(self, name: str) -> np.ndarray:
        """A tensor in the dtype and shape of the file, projections (out, in); or as changed by `amend`."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self.producer(name)()

    def producer(self, name: str) -> Callable[[], np.ndarray]:
        """A function that returns `stored(name)` as it is now. A later `amend` does not change it."""
        return self._amended.get(name) or partial(self._stored.__getitem__, name)

    def is_logarithm(self, name: str) -> bool:
        """True if the file holds the logarithm of the values that `tensor` returns."""
        return name in self._logarithmic

    def amend(self, changes: Mapping[str, Callable[[], np.ndarray]], digest: str) -> None:
        """Give tensors other values, or add optional tensors. The values must fit the spec and be finite.

        changes: functions that make a value, called whenever the tensor is read. digest: of all changes, for the
        fingerprint.
        """
        self._fingerprint = hashlib.blake2b(
            f"{self.fingerprint} {digest}".encode(), digest_size=16
        ).hexdigest()
        self._amended |= changes
        every = {tensor.name: tensor for tensor in tensors(self.spec)}
        self._tensors = {n: t for n, t in every.items() if n in self._tensors or n in self._amended}
        self.names = tuple(self._tensors)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in `Tensor.used_shape`. Raises CheckpointError if it is absent.

        Projections (in, out) are views in their stored dtype: fp32, fp16 or bf16. Vectors are new fp32 arrays.
        """
        stored, tensor = self.stored(name), self._tensors.get(name)
        assert tensor is not None
        if tensor.kind is Kind.VECTOR:
            vector = np.array(stored, np.float32, order="C").reshape(tensor.shape)
            return np.exp(vector, out=vector) if name in self._logarithmic else vector
        if stored.dtype == np.float64:
            stored = stored.astype(np.float32)
        if not stored.flags.aligned:
            stored = np.require(stored, requirements="A")
        return tensor.used(stored)

    @property
    def fingerprint(self) -> str:
        """Digest of names, shapes, dtypes and a sample of every tensor, in 32 hex digits.

        Equal weights have the same fingerprint in every file format.
        """
        if not self._fingerprint:
            digest = hashlib.blake2b(self.spec.generation.encode(), digest_size=16)
            for name, tensor in self._tensors.items():
                array = self._stored[name]
                scale = "exp" if name in self._logarithmic else ""
                digest.update(f"{name} {tensor.shape} {array.dtype.name} {scale}\n".encode())
                for start in _sample_starts(array.size):
                    digest.update(array.flat[start : start + _SAMPLE_RUN].tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _sample_starts(size: int) -> list[int]:
    if size <= _SAMPLE_RUNS * _SAMPLE_RUN:
        return list(range(0, size, _SAMPLE_RUN))
    return [i * (size - _SAMPLE_RUN) // (_SAMPLE_RUNS - 1) for i in range(_SAMPLE_RUNS)]


# -- opening -----------------------------------------------------------------------------------------------


def open_checkpoint(path: Path | str, layout: str | None = None) -> Checkpoint:
    """Open a checkpoint: BlinkDL's `.pth` or `.safetensors`, web-rwkv's `.st`, GGUF, or Hugging Face's file or folder.

    layout: one of layout.LAYOUTS, for a file that can be read in two ways. None detects it from the tensors.
    Raises UsageError for an unknown layout. Raises CheckpointError for a file that is missing or damaged or has code in
    its pickle, for another kind of model, and for a tensor that is missing, unknown or of a wrong shape.
    """
    path = Path(path)
    check_layout(layout)
    files = weight_files(path)
    if len(files) == 1 and _start(files[0]).startswith(MAGIC):
        return _open_gguf(path, files[0])
    stored = read_tensors(path)
    try:
        return _open(path, stored, layout)
    except CheckpointError as e:
        raise e if str(path) in str(e) else CheckpointError(f"{path}: {e}") from None


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    found = read_gguf(file)
    try:
        arrays, logarithmic = _canonical(found.arrays, BLINKDL, pickled=False)
        checkpoint = Checkpoint(path, arrays, logarithmic)
        checkpoint.stop_ids = _stop_ids(found.stop_id, checkpoint.spec.V)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    computed = {name: produce for name, produce in found.computed.items() if name in arrays}
    if computed:
        checkpoint.amend(computed, found.digest)
    return checkpoint


def _open(path: Path, stored: dict[str, Any], layout: str | None) -> Checkpoint:
    stored = strip_prefixes(stored)
    refuse_unsupported(stored)
    for name, value in stored.items():
        if not isinstance(value, np.ndarray):
            raise CheckpointError(f"{name!r:.80} is a Python {type(value).__name__}, not a tensor")
    foreign = is_huggingface(list(stored))
    folder = path if is_folder(path) else path.parent
    # A folder with BlinkDL's files may hold the config.json of another program.
    config = read_config(folder) if foreign or (is_folder(path) and "emb.weight" not in stored) else {}
    arrays = to_blinkdl(stored, tied=config.get("tie_word_embeddings") is True)
    refuse_unsupported(arrays)
    pickled = any(_is_zip(file) for file in weight_files(path))
    arrays, logarithmic = _canonical(arrays, BLINKDL if foreign and layout is None else layout, pickled)
    checkpoint = Checkpoint(path, arrays, logarithmic)
    if is_fla6(stored):
        values = [name for name in checkpoint.names if name.endswith("att.value.weight")]
        larger = {
            name: partial(np.multiply, arrays[name], FLA6_VALUES, dtype=arrays[name].dtype) for name in values
        }
        checkpoint.amend(larger, "fla's epsilon")
    checkpoint.stop_ids = _stop_ids(config.get("eos_token_id"), checkpoint.spec.V)
    every = config.get("rescale_every", 6)
    if foreign and checkpoint.spec.generation[0] in "456" and type(every) is int:
        if looks_rescaled(arrays, checkpoint.spec.L, every):
            checkpoint.notes.append(
                f"{path}: weights of late layers look halved every {every} layers, as transformers leaves "
                "them after use; if the text makes no sense, save the model anew without having run it"
            )
    return checkpoint


def _stop_ids(eos: Any, V: int) -> list[int]:
    """The ids in eos_token_id of config.json or GGUF: a number, a list or none. Raises CheckpointError."""
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < V for token in ids):
        raise CheckpointError(f"eos_token_id is {eos!r:.40}, but the vocabulary has {V} tokens")
    return ids


def _canonical(
    arrays: dict[str, np.ndarray], layout: str | None, pickled: bool
) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Tensors in BlinkDL's layout, without unused ones, and the names of those that are stored as logarithms."""
    arrays, logarithmic = to_one_layout(arrays, layout, pickled=pickled)
    if "blocks.0.att.r_k" in arrays:
        # Layer 0 has no earlier value to mix with: some files have these tensors, none uses them.
        unused = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
        arrays = {name: array for name, array in arrays.items() if name not in unused}
    return arrays, logarithmic


def read_tensors(path: Path | str) -> dict[str, Any]:
    """Read the tensors of a file or folder, under the names in the file, as read-only views. Nothing is checked.

    A `.pth` may also hold plain Python values. Raises CheckpointError.
    """
    path = Path(path)
    result: dict[str, Any] = {}
    for file in weight_files(path):
        for name, value in _read_file(file).items():
            if name in result:
                raise CheckpointError(f"{path} has tensor {name!r:.80} in two of its files")
            result[name] = value
    if not result:
        raise CheckpointError(f"{path} holds no tensors")
    return result


_ZIP = b"PK\x03\x04"
_FOREIGN = (
    (MAGIC, "a GGUF file"),
    (b"fmgg", "an rwkv.cpp file"),
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the file itself)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"{", "a JSON file"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
)


def _start(path: Path) -> bytes:
    with map_file(path) as data:
        return data[:64]


def _is_zip(path: Path) -> bool:
    return _start(path).startswith(_ZIP)


def _read_file(path: Path) -> dict[str, Any]:
    start = _start(path)
    if start.startswith(_ZIP):
        return read_pth(path)
    if start[8:9] == b"{":
        file = TensorFile(path)
        return {name: file.array(name) for name in file.names}
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint: download the file itself (its raw form)"
        )
    for magic, what in _FOREIGN:
        if start.startswith(magic):
            raise CheckpointError(f"{path} is {what}, not a checkpoint (.pth or .safetensors)")
    if start.startswith((b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", b"sys_info")):
        raise CheckpointError(
            f"{path} was saved by a torch older than 1.6: load it with a current one and torch.save it again"
        )
    raise CheckpointError(f"{path} is neither a .pth (zip) nor a safetensors file")


# -- writing -----------------------------------------------------------------------------------------------


def write_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    metadata: dict[str, str],
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint as safetensors, with BlinkDL's names and the dtypes of the original file.

    The file appears complete. progress: called after each tensor. Raises UsageError if the file exists or has another
    suffix, CheckpointError for a value that its dtype cannot hold, OSError.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is not called *.safetensors, the only format that is written")
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists: name another file, or remove it first")
    replace_tensors(path, [_plan(checkpoint, name, progress) for name in checkpoint.names], metadata)


def _plan(checkpoint: Checkpoint, name: str, progress: Callable[[], object]) -> TensorPlan:
    # A bonus is written itself, not its logarithm: a reader of safetensors could not tell which one it is.
    bonus = checkpoint.is_logarithm(name)
    on_disk = checkpoint._stored.get(name)
    dtype = np.dtype(np.float32) if bonus or on_disk is None else on_disk.dtype

    def produce() -> np.ndarray:
        array = checkpoint.tensor(name) if bonus else checkpoint.stored(name)
        with np.errstate(over="ignore", invalid="ignore"):
            array = array.astype(dtype, copy=False)
        if not all_finite(array):
            raise CheckpointError(f"{name} is beyond the numbers of {dtype.name}, or holds NaN or infinity")
        progress()
        return array

    shape = checkpoint._tensors[name].shape if bonus or on_disk is None else on_disk.shape
    return TensorPlan(name, dtype, shape, produce)


# -- values ------------------------------------------------------------------------------------------------


def check_finite(checkpoint: Checkpoint, *, fp16: bool = False) -> str:
    """Read every value once. Returns a digest of all values, unlike the fingerprint, which reads a sample.

    Raises CheckpointError for a tensor with NaN or infinity, and with `fp16` for a projection beyond fp16's range.
    """
    digest = hashlib.blake2b(checkpoint.fingerprint.encode(), digest_size=16)
    for name in progress("check values", "tensor", over=checkpoint.names):
        array = checkpoint.stored(name)
        largest = 0.0
        for piece in map(np.ascontiguousarray, pieces(array)):
            digest.update(piece.reshape(-1).view(np.uint8).data)
            largest = float(np.max([largest, _largest(piece)]))  # NaN if any value is NaN
        if not np.isfinite(largest):
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or infinity")
        if fp16 and largest > _FP16_MAX and checkpoint._tensors[name].kind.is_projection:
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds {largest:.4g}, beyond the {_FP16_MAX:.0f} of float16"
            )
    return digest.hexdigest()


def pieces(array: np.ndarray) -> list[np.ndarray]:
    """Split an array into views of about a million elements, by rows."""
    if array.size <= _CHUNK:
        return [array]
    rows = max(1, _CHUNK * len(array) // array.size)
    return [array[i : i + rows] for i in range(0, len(array), rows)]


def all_finite(array: np.ndarray) -> bool:
    """True if no value is NaN or infinity."""
    return all(np.isfinite(_largest(piece)) for piece in pieces(array))


def _largest(piece: np.ndarray) -> float:
    """The largest magnitude, infinity and NaN included. Without the sign, the bits of floats sort like the floats."""
    if piece.dtype == np.float64:
        with np.errstate(over="ignore"):
            piece = piece.astype(np.float32)
    bits = np.dtype(f"u{piece.dtype.itemsize}")
    magnitudes = np.ascontiguousarray(piece).view(bits) & bits.type(np.iinfo(bits).max >> 1)
    return float(np.array(magnitudes.max(initial=0), bits).view(piece.dtype))
