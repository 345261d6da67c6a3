"""The CPU, compiled: groups as tapes that all threads execute, on quantised or 16-bit weights where they lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from rwkv_npu.backends.base import Source
from rwkv_npu.errors import BackendError
from rwkv_npu.kernels import tape as _tape
from rwkv_npu.kernels.pool import Pool, shared_pool
from rwkv_npu.kernels.tape import Matrix, Recording, Weight
from rwkv_npu.packing import LANES, Packed, pack_floats, padded
from rwkv_npu.spec import Group

FORMATS = {"float16": _tape.FP16, "bfloat16": _tape.BF16, "float32": _tape.FP32}


class NumbaRunner:
    """A group bound to its memory. Inputs and outputs are views of it, without padding."""

    def __init__(self, backend: NumbaBackend, recording: Recording, rows: int, batch: int):
        self._pool = backend.pool
        addresses, self._memory = {}, []
        self.inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        ports = [(self.inputs, recording.inputs), (self._outputs, recording.outputs)]
        for arrays, values in ports:
            for name, value in values.items():
                count = batch if name in backend.per_sequence else rows
                whole, arrays[name] = _tape.allocate(count, value.width)
                addresses[id(value)] = whole.ctypes.data
                self._memory.append(whole)
        offsets, size = _tape.place(recording, rows)
        arena = backend.arena(rows, size)
        self._memory.append(arena)
        addresses |= {key: arena.ctypes.data + offset for key, offset in offsets.items()}
        self._tape = _tape.bind(recording, rows, batch, addresses, backend.vectors, backend.matrices)
        self._address = self._tape.ctypes.data

    def run(self) -> Mapping[str, np.ndarray]:
        self._pool.run(self._tape, self._address)
        return self._outputs


class NumbaBackend:
    name = "numba"

    def __init__(self, source: Source, *, threads: int | None = None):
        self._source = source
        self.pool: Pool = shared_pool(threads or len(os.sched_getaffinity(0)))
        self._recordings: dict[str, Recording] = {}
        self._arenas: dict[int, np.ndarray] = {}
        self._kept: list[np.ndarray] = []
        self.vectors: dict[str, int] = {}
        self.matrices: dict[Matrix, tuple[int, int, int, int, int]] = {}
        self.per_sequence = {"att_last", "ffn_last"}

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int, batch: int = 1) -> NumbaRunner:
        if group.name not in self._recordings:
            self._recordings[group.name] = self._record(group)
        return NumbaRunner(self, self._recordings[group.name], rows, batch)

    def close(self) -> None:
        self._recordings.clear()

    def arena(self, rows: int, size: int) -> np.ndarray:
        """Memory for what lies between inputs and outputs, shared by all groups: one runs at a time."""
        if rows not in self._arenas or len(self._arenas[rows]) < size:
            self._arenas[rows] = _tape.aligned_bytes(size)
        return self._arenas[rows]

    def _record(self, group: Group) -> Recording:
        weights = _Weights(self._source)
        recording = _tape.record(self._source.program, group, weights)
        for matrix, weight in weights.found.items():
            self.matrices[matrix] = self._matrix(weight)
        for entry in recording.entries:
            for name in entry.vectors:
                if name not in self.vectors:
                    array = self._source.tensor(name).reshape(1, -1)
                    whole, part = _tape.allocate(1, array.shape[1])
                    part[:] = array
                    self._kept.append(whole)
                    self.vectors[name] = whole.ctypes.data
        return recording

    def _matrix(self, weight: Weight) -> tuple[int, int, int, int, int]:
        """format, K, N, address of the numbers and of their scales, as `tape.bind` wants them."""
        if isinstance(weight, Packed):
            format_ = _tape.INT4 if weight.bits == 4 else _tape.INT8
            self._kept += [weight.data, weight.scales]
            k, n = padded(*weight.shape)
            return format_, k, n, weight.data.ctypes.data, weight.scales.ctypes.data
        if weight.dtype.name not in FORMATS:
            raise BackendError(f"numba has no product with {weight.dtype} weights")
        strips = pack_floats(weight)
        self._kept.append(strips)
        return FORMATS[weight.dtype.name], strips.shape[1], len(strips) * LANES, strips.ctypes.data, 0


class _Weights(dict[Matrix, Weight]):
    """Matrices of a model as they are asked for; `found` has them all afterwards."""

    def __init__(self, source: Any):
        super().__init__()
        self._source, self.found = source, self

    def __missing__(self, matrix: Matrix) -> Weight:
        packed = self._source.packed(matrix.name, matrix.index)
        if packed is None:
            array = self._source.tensor(matrix.name)
            packed = array if matrix.index is None else array[matrix.index]
        self[matrix] = packed
        return packed
