"""The CPU, compiled: tapes that all threads execute, on quantised or 16-bit weights where they lie."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numba  # noqa: F401  (said to be missing before anything is opened)
import numpy as np

from rwkv_npu import kernels
from rwkv_npu.backends.base import Source
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError
from rwkv_npu.kernels import instructions, recurrence
from rwkv_npu.kernels.recorder import Matrix, Recording, Weight, record, record_walk
from rwkv_npu.kernels.tape import Binder, Bound, Code, Layout, Tape, aligned_bytes
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import Group, Port, walk_inputs
from rwkv_npu.quant.cpu import LANES, Packed, pack_floats, padded

FORMATS = {"float16": instructions.FP16, "bfloat16": instructions.BF16, "float32": instructions.FP32}

# Numbers of rows whose memory is kept: those of whole chunks and of the last, of two kinds of prompts.
KEPT_CHUNKS = 4

WALK = "walk"  # what all groups but the head are called together

Ports = dict[str, np.ndarray]


class Memory:
    """What ports lie in: whole tiles and panels, and the part of each that counts."""

    def __init__(self, layout: Layout, ports: tuple[Port, ...], rows: int, batch: int):
        self.parts: Ports = {}
        self.whole: Ports = {}
        for port in ports:
            count = batch if port.per_sequence else rows
            self.whole[port.name], self.parts[port.name] = layout.allocate(count, port.width)

    def address(self, name: str) -> int:
        return int(self.whole[name].ctypes.data)


class NumbaRunner:
    """A group bound to its memory. Inputs and outputs are views of it, without padding."""

    def __init__(self, pool: Any, tape: Tape, inputs: Memory, outputs: Memory, arena: np.ndarray):
        self._pool, self.tape, self._outputs = pool, tape, outputs
        self.inputs = inputs.parts
        self._kept = inputs, arena

    def run(self) -> Mapping[str, np.ndarray]:
        self._pool.run(self.tape.address, self.tape.length)
        return self._outputs.parts


class NumbaWalk:
    """All groups but the head, and the recurrences between them, as one tape."""

    def __init__(self, runner: NumbaRunner):
        self._runner = runner
        self.inputs = runner.inputs

    def run(self, state: dict[str, np.ndarray]) -> np.ndarray:
        self._runner.tape.attach(state)
        self._runner.tape.clocks[:] = 0
        return self._runner.run()["x"]

    def seconds(self) -> dict[str, float]:
        tape = self._runner.tape
        return dict(zip(tape.sections, (tape.clocks * 1e-9).tolist(), strict=True))


class Chunk:
    """What groups have in common that are run on so many rows: layers of a kind take turns in two sets of ports, and
    all share one memory for what lies between inputs and outputs."""

    def __init__(self) -> None:
        self.runners: dict[str, NumbaRunner] = {}
        self.memories: dict[tuple[str, int], tuple[Memory, Memory]] = {}
        self.arenas: list[np.ndarray] = []

    def arena(self, size: int) -> np.ndarray:
        """So many bytes, or more. What was handed out stays as it is, since tapes refer to it."""
        if not self.arenas or len(self.arenas[-1]) < size:
            self.arenas.append(aligned_bytes(size))
        return self.arenas[-1]


class NumbaBackend:
    name = "numba"

    def __init__(self, source: Source, *, threads: int | None = None):
        self._source, self._layout = source, Layout.of(source.spec)
        pool = kernels.load("pool", "products of matrices")
        self._pool = pool.shared_pool(threads or len(hardware.big_cores()))
        self._recordings: dict[str, Recording] = {}
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()
        self._kept: list[np.ndarray] = []  # tapes know addresses only
        self._vectors: dict[str, int] = {}
        self._matrices: dict[Matrix, Bound] = {}
        self._code: Code | None = None

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int, batch: int = 1) -> NumbaRunner:
        if group.name not in self._recordings:
            weights = Weights(self._source)
            self._recordings[group.name] = self._hold(record(self._source.program, group, weights), weights)
        chunk = self._chunk(rows, batch)
        if group.name not in chunk.runners:
            # Layer 0 stands apart: later layers read its values.
            shared = rows > batch and group.layer > 0
            kind = (group.role, group.layer % 2) if shared else (group.name, 0)
            ports = group.inputs, group.outputs
            chunk.runners[group.name] = self._bind(group.name, kind, ports, rows, batch)
        return chunk.runners[group.name]

    def open_walk(self, rows: int, batch: int) -> NumbaWalk:
        program = self._source.program
        if WALK not in self._recordings:
            weights = Weights(self._source)
            inputs = recurrence.kernel(program.spec).inputs
            self._recordings[WALK] = self._hold(record_walk(program, weights, inputs), weights)
            self._code = self._compiled_recurrence()
        chunk = self._chunk(rows, batch)
        if WALK not in chunk.runners:
            ports = walk_inputs(program.spec), (Port("x", program.spec.D),)
            chunk.runners[WALK] = self._bind(WALK, (WALK, 0), ports, rows, batch)
        return NumbaWalk(chunk.runners[WALK])

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

    def _bind(
        self,
        name: str,
        kind: tuple[str, int],
        ports: tuple[tuple[Port, ...], tuple[Port, ...]],
        rows: int,
        batch: int,
    ) -> NumbaRunner:
        """A recording on memory for its ports, which all of a kind share."""
        recording, chunk, layout = self._recordings[name], self._chunks[rows, batch], self._layout
        if kind not in chunk.memories:
            inputs, outputs = (Memory(layout, some, rows, batch) for some in ports)
            chunk.memories[kind] = inputs, outputs
        inputs, outputs = chunk.memories[kind]
        offsets, size = layout.place(recording, rows)
        arena = chunk.arena(size)
        addresses = {key: int(arena.ctypes.data) + offset for key, offset in offsets.items()}
        addresses |= {id(value): inputs.address(name) for name, value in recording.inputs.items()}
        addresses |= {id(value): outputs.address(name) for name, value in recording.outputs.items()}
        binder = Binder(
            self._source.spec, layout, rows, batch, addresses, self._vectors, self._matrices, self._code
        )
        return NumbaRunner(self._pool, binder.bind(recording), inputs, outputs, arena)

    def _hold(self, recording: Recording, weights: Weights) -> Recording:
        """Have in memory whatever a recording refers to."""
        for matrix, weight in weights.items():
            if matrix not in self._matrices:
                self._matrices[matrix] = self._matrix(weight)
                if not isinstance(weight, Packed):
                    self._source.release(matrix.name)
        for name in {name for entry in recording.entries for name in entry.vectors} - self._vectors.keys():
            array = self._source.tensor(name).reshape(1, -1)
            whole, part = self._layout.allocate(1, array.shape[1])
            part[:] = array
            self._vectors[name] = self._keep(whole)
        return recording

    def _matrix(self, weight: Weight) -> Bound:
        if isinstance(weight, Packed):
            format_ = instructions.INT4 if weight.bits == 4 else instructions.INT8
            return Bound(format_, *padded(*weight.shape), self._keep(weight.data), self._keep(weight.scales))
        if weight.dtype.name not in FORMATS:
            raise BackendError(f"numba has no product with {weight.dtype} weights: use --backend ort")
        strips = pack_floats(weight)
        return Bound(FORMATS[weight.dtype.name], strips.shape[1], len(strips) * LANES, self._keep(strips), 0)

    def _compiled_recurrence(self) -> Code:
        spec, maths = self._source.spec, NumpyMaths(self._source.tensor)
        kernel = recurrence.kernel(spec)
        tables = [
            self._keep(recurrence.parameters(maths.block(layer).vector, spec)) for layer in range(spec.L)
        ]
        return Code(kernel.run.address, tables, kernel.STATES)

    def _keep(self, array: np.ndarray) -> int:
        """The address of an array that stays as long as the backend."""
        self._kept.append(array)
        return int(array.ctypes.data)


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
