"""The CPU, compiled: groups as tapes that all threads execute, on quantised or 16-bit weights where they lie."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import numba  # noqa: F401  (said to be missing before anything is opened)
import numpy as np

from rwkv_npu import board, kernels
from rwkv_npu.backends.base import Source
from rwkv_npu.errors import BackendError
from rwkv_npu.kernels import tape as _tape
from rwkv_npu.kernels.tape import Bound, Matrix, Recording, Weight
from rwkv_npu.packing import LANES, Packed, pack_floats, padded
from rwkv_npu.spec import Group, Port

FORMATS = {"float16": _tape.FP16, "bfloat16": _tape.BF16, "float32": _tape.FP32}

# Numbers of rows whose memory is kept: those of whole chunks and of the last, of two kinds of prompts.
KEPT_CHUNKS = 4

Ports = dict[str, np.ndarray]


class Memory:
    """What the ports of a group lie in: whole tiles and panels, and the part of each that counts."""

    def __init__(self, ports: tuple[Port, ...], rows: int, batch: int):
        self.parts: Ports = {}
        self._whole: Ports = {}
        for port in ports:
            count = batch if port.per_sequence else rows
            self._whole[port.name], self.parts[port.name] = _tape.allocate(count, port.width)

    def address(self, name: str) -> int:
        return int(self._whole[name].ctypes.data)


class NumbaRunner:
    """A group bound to its memory. Inputs and outputs are views of it, without padding."""

    def __init__(
        self, execute: Callable[[np.ndarray, int], None], tape: np.ndarray, inputs: Memory, outputs: Memory
    ):
        self._execute, self._tape, self._address = execute, tape, tape.ctypes.data
        self._outputs = outputs
        self.inputs = inputs.parts
        self._kept = inputs

    def run(self) -> Mapping[str, np.ndarray]:
        self._execute(self._tape, self._address)
        return self._outputs.parts


class Chunk:
    """What groups have in common that are run on so many rows: layers of a kind take turns in two sets of ports, and
    all share one memory for what lies between inputs and outputs."""

    def __init__(self) -> None:
        self.runners: dict[str, NumbaRunner] = {}
        self.memories: dict[tuple[str, int], tuple[Memory, Memory]] = {}
        self.arenas: list[np.ndarray] = []

    def arena(self, size: int) -> int:
        """The address of so many bytes. One that was handed out stays, since tapes refer to it."""
        if not self.arenas or len(self.arenas[-1]) < size:
            self.arenas.append(_tape.aligned_bytes(size))
        return int(self.arenas[-1].ctypes.data)


class NumbaBackend:
    name = "numba"

    def __init__(self, source: Source, *, threads: int | None = None):
        self._source = source
        pool = kernels.load("pool", "products of matrices")
        self._pool = pool.shared_pool(threads or len(board.big_cores()))
        self._recordings: dict[str, Recording] = {}
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()
        self._kept: list[np.ndarray] = []  # tapes know addresses only
        self._vectors: dict[str, int] = {}
        self._matrices: dict[Matrix, Bound] = {}

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int, batch: int = 1) -> NumbaRunner:
        if group.name not in self._recordings:
            self._recordings[group.name] = self._record(group)
        chunk = self._chunk(rows, batch)
        if group.name not in chunk.runners:
            chunk.runners[group.name] = self._bind(group, rows, batch, chunk)
        return chunk.runners[group.name]

    def close(self) -> None:
        self._chunks.clear()
        self._recordings.clear()
        self._kept.clear()

    def _chunk(self, rows: int, batch: int) -> Chunk:
        key = rows, batch
        self._chunks.setdefault(key, Chunk())
        self._chunks.move_to_end(key)
        several = [key for key in self._chunks if key[0] > key[1]]
        if len(several) > KEPT_CHUNKS:
            del self._chunks[several[0]]
        return self._chunks[key]

    def _bind(self, group: Group, rows: int, batch: int, chunk: Chunk) -> NumbaRunner:
        recording = self._recordings[group.name]
        # Layer 0 stands apart: later layers read its values.
        shared = rows > batch and group.layer > 0
        kind = (group.role, group.layer % 2) if shared else (group.name, 0)
        if kind not in chunk.memories:
            chunk.memories[kind] = Memory(group.inputs, rows, batch), Memory(group.outputs, rows, batch)
        inputs, outputs = chunk.memories[kind]
        offsets, size = _tape.place(recording, rows)
        arena = chunk.arena(size)
        addresses = {key: arena + offset for key, offset in offsets.items()}
        addresses |= {id(value): inputs.address(name) for name, value in recording.inputs.items()}
        addresses |= {id(value): outputs.address(name) for name, value in recording.outputs.items()}
        tape = _tape.bind(recording, rows, batch, addresses, self._vectors, self._matrices)
        return NumbaRunner(self._pool.run, tape, inputs, outputs)

    def _record(self, group: Group) -> Recording:
        weights = Weights(self._source)
        recording = _tape.record(self._source.program, group, weights)
        for matrix, weight in weights.items():
            self._matrices[matrix] = self._matrix(weight)
        for name in {name for entry in recording.entries for name in entry.vectors} - self._vectors.keys():
            array = self._source.tensor(name).reshape(1, -1)
            whole, part = _tape.allocate(1, array.shape[1])
            part[:] = array
            self._kept.append(whole)
            self._vectors[name] = whole.ctypes.data
        return recording

    def _matrix(self, weight: Weight) -> Bound:
        if isinstance(weight, Packed):
            self._kept += [weight.data, weight.scales]
            format_ = _tape.INT4 if weight.bits == 4 else _tape.INT8
            return Bound(format_, *padded(*weight.shape), weight.data.ctypes.data, weight.scales.ctypes.data)
        if weight.dtype.name not in FORMATS:
            raise BackendError(f"numba has no product with {weight.dtype} weights: use --backend ort")
        strips = pack_floats(weight)
        self._kept.append(strips)
        return Bound(FORMATS[weight.dtype.name], strips.shape[1], len(strips) * LANES, strips.ctypes.data, 0)


class Weights(dict[Matrix, Weight]):
    """Matrices of a model, looked up when they are asked for."""

    def __init__(self, source: Source):
        super().__init__()
        self._source = source

    def __missing__(self, matrix: Matrix) -> Weight:
        weight: Weight | None = self._source.packed(matrix.name, matrix.index)
        if weight is None:
            tensor = self._source.tensor(matrix.name)
            weight = tensor if matrix.index is None else tensor[matrix.index]
        self[matrix] = weight
        return weight
