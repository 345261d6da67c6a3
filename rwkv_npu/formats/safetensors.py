"""Reads safetensors files by mapping them into memory, and writes them as a stream. This module knows no models.

A file (https://github.com/huggingface/safetensors#format) has 8 bytes with the length of the header, little-endian; a
JSON header with dtype, shape and byte range of each tensor, padded with spaces; the tensors, row-major, without holes.
Tensors written here start on a multiple of 64 bytes of the file, so that kernels can use the mapped memory. Because the
format forbids holes, the bytes between two tensors are a tensor `_pad.N`, which reading hides.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rwkv_npu.errors import CheckpointError, RwkvNpuError
from rwkv_npu.formats.files import replacing

ALIGNMENT = 64
_MAX_HEADER = 100_000_000  # bytes; the bound of the reference implementation
_MAX_RANK = 8
_MAX_SIZE = 2**56  # elements of one tensor, so that NumPy's index arithmetic cannot overflow
# Opening a pipe must not wait for its writer (Windows has no such pipes).
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_PAD = re.compile(r"_pad\.\d+")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"BOOL": np.dtype("?"), "BF16": BFLOAT16} | {
    kind.upper() + str(8 * size): np.dtype(f"<{kind}{size}")
    for kind, sizes in (("u", (1, 2, 4, 8)), ("i", (1, 2, 4, 8)), ("f", (2, 4, 8)))
    for size in sizes
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """A tensor's dtype and shape, its offset from the start of the file, and its size in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write. Its values are cast to `dtype`.

    produce: returns the whole tensor, or an iterable of arrays that follow each other in row-major order.
    """

    name: str
    dtype: Any
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray | Iterable[np.ndarray]]


def map_file(path: Path, error: Callable[[str], RwkvNpuError] = CheckpointError) -> mmap.mmap:
    """Map a whole file read-only. Raises `error` unless it is a regular, readable file that is not empty."""
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | _NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is not a regular file")
            if status.st_size == 0:
                raise error(f"{path} is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise error(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None


class TensorFile:
    """A safetensors file, mapped. Opening reads and checks the header only.

    names: tensors in the order of the file. metadata: its `__metadata__`.
    Raises `error` for anything wrong with the file.
    """

    def __init__(self, path: Path | str, *, error: Callable[[str], RwkvNpuError] = CheckpointError) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = map_file(self.path, error)
        try:
            self.metadata, entries = _parse_header(self._map)
        except ValueError as e:
            self.close()
            raise error(f"{self.path} is not a valid safetensors file: {e}") from None
        self._error = error
        self._entries = {name: entry for name, entry in entries.items() if not _PAD.fullmatch(name)}
        self.names = tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        """dtype, shape, offset in the file and size of a tensor. Raises `error` if it has no such tensor."""
        if name not in self._entries:
            raise self._error(f"{self.path} has no tensor {name!r:.80}")
        return self._entries[name]

    def array(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the mapped file. The mapping lives as long as any view of it."""
        dtype, shape, offset, nbytes = self.entry(name)
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        if nbytes == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self._map, np.uint8, nbytes, offset).view(dtype).reshape(shape)

    def release(self, name: str) -> None:
        """Free the memory of a tensor's pages. Reading it again reads the file."""
        _, _, offset, nbytes = self.entry(name)
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)

    def close(self) -> None:
        """Close the mapping now, or when its last view is gone."""
        mapped, self._map = self._map, None
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                pass  # a view is still in use

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _parse_header(data: mmap.mmap) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata, and entries in the order of the file. Raises ValueError with the problem."""
    if len(data) < 8:
        raise ValueError("it is shorter than its header")
    (length,) = struct.unpack("<Q", data[:8])
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
        raise ValueError(f"its header would have {length} bytes")
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    start = 8 + length
    entries = {name: _parse_entry(name, value, start, len(data)) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    for name, entry in ordered.items():
        if entry.offset != start:
            raise ValueError(f"tensor {name!r:.80} overlaps another, or leaves a hole before it")
        start += entry.nbytes
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes at its end belong to no tensor")
    return metadata, ordered


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header names something twice")
    return result


def _parse_entry(name: str, value: Any, start: int, file_size: int) -> Entry:
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.80} lacks dtype, shape or data_offsets")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise ValueError(f"tensor {name!r:.80} has the unsupported dtype {str(dtype_name)[:20]!r}")
    if not (
        _natural_numbers(shape) and len(shape) <= _MAX_RANK and math.prod(n or 1 for n in shape) < _MAX_SIZE
    ):
        raise ValueError(f"tensor {name!r:.80} has an invalid shape")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r:.80} has invalid offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise ValueError(
            f"tensor {name!r:.80} has {end - begin} bytes, but its shape and dtype make {nbytes}"
        )
    if start + end > file_size:
        raise ValueError(
            f"it is truncated: tensor {name!r:.80} ends {start + end - file_size} bytes after it"
        )
    return Entry(dtype, tuple(shape), start + begin, nbytes)


def _natural_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


# -- writing ---------------------------------------------------------------------------------------------


def replace_tensors(
    path: Path, tensors: Iterable[TensorPlan], metadata: dict[str, str] | None = None
) -> None:
    """Like `write_tensors`, but atomic: a reader sees the old file or the new one."""
    with replacing(path) as aside:
        write_tensors(aside, tensors, metadata)


def write_tensors(
    path: Path | str,
    tensors: Iterable[TensorPlan | tuple[str, Any, tuple[int, ...], Callable[[], Any]]],
    metadata: dict[str, str] | None = None,
) -> dict[str, tuple[int, int]]:
    """Write and sync a safetensors file, with one tensor or chunk in memory at a time.

    Tensors whose size is a multiple of 64 bytes come first, so that few need padding. Returns the (offset, size) of
    each tensor in the file. After an error, an OSError or one of a producer, the unfinished file is removed.
    """
    plans = [plan if isinstance(plan, TensorPlan) else TensorPlan(*plan) for plan in tensors]
    plans.sort(key=lambda plan: _nbytes(plan) % ALIGNMENT != 0)
    names = {plan.name for plan in plans if not _PAD.fullmatch(plan.name)} - {"__metadata__"}
    if len(names) != len(plans):
        raise ValueError("two tensors have the same name, or one has a name that the file itself needs")
    padded = list(_with_padding(plans))
    header = _header(padded, metadata or {})
    places = {}
    with open(path, "wb") as file:
        try:
            file.write(header)
            for plan in padded:
                if not _PAD.fullmatch(plan.name):
                    places[plan.name] = (file.tell(), _nbytes(plan))
                _write_tensor(file, plan)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # not a device or a pipe
                os.unlink(path)
            raise
    return places


def _nbytes(plan: TensorPlan) -> int:
    return math.prod(plan.shape) * np.dtype(plan.dtype).itemsize


def _with_padding(plans: list[TensorPlan]) -> Iterator[TensorPlan]:
    for i, plan in enumerate(plans):
        yield plan
        missing = -_nbytes(plan) % ALIGNMENT
        if missing and i + 1 < len(plans):
            yield TensorPlan(f"_pad.{i}", np.uint8, (missing,), partial(np.zeros, missing, np.uint8))


def _header(plans: list[TensorPlan], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for plan in plans:
        name, shape = _DTYPE_NAMES[np.dtype(plan.dtype)], [int(n) for n in plan.shape]
        header[plan.name] = {"dtype": name, "shape": shape, "data_offsets": [offset, offset + _nbytes(plan)]}
        offset += _nbytes(plan)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: Any, plan: TensorPlan) -> None:
    produced, written = plan.produce(), 0
    for chunk in [produced] if isinstance(produced, (np.ndarray, np.generic)) else produced:
        data = np.ascontiguousarray(chunk, np.dtype(plan.dtype)).reshape(-1).view(np.uint8)
        written += file.write(data.data)
    if written != _nbytes(plan):
        raise ValueError(f"tensor {plan.name}: {written} bytes produced, {_nbytes(plan)} expected")
