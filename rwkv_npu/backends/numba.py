"""The CPU backend that numba compiles. All threads execute one program, on quantised, 16-bit or fp32 weights.

A program is bound to memory for a capacity of rows, a power of two. It computes any number of rows up to its capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba  # noqa: F401  (a missing numba is reported before anything is opened)
import numpy as np

from rwkv_npu import kernels
from rwkv_npu.backends.base import Source
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError
from rwkv_npu.kernels import instructions, recurrence
from rwkv_npu.kernels.program import (
    Binder,
    Bound,
    Code,
    Layout,
    MachineProgram,
    aligned_bytes,
    fill_segments,
    segment_table,
)
from rwkv_npu.kernels.recorder import Matrix, Recording, Weight, record, record_forward
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import Group, Port, Spec, fused_inputs
from rwkv_npu.quant.cpu import LANES, Packed, pack_floats, padded

FORMATS = {"float16": instructions.FP16, "bfloat16": instructions.BF16, "float32": instructions.FP32}

FUSED = "fused forward"  # the key of its program; all other keys are names of groups

Ports = dict[str, np.ndarray]


class Memory:
    """The memory of a program's inputs or outputs, padded to whole tiles and panels."""

    def __init__(self, layout: Layout, ports: tuple[Port, ...], rows: int):
        self.whole: Ports = {}
        self._parts: Ports = {}
        for port in ports:
            self.whole[port.name], self._parts[port.name] = layout.allocate(rows, port.width)

    def first(self, rows: int) -> Ports:
        """Views of the first rows, without padding: (rows, width) each."""
        return {name: part[:rows] for name, part in self._parts.items()}

    def address(self, name: str) -> int:
        return int(self.whole[name].ctypes.data)


class BoundProgram:
    """A program, and the memory that it refers to by address."""

    def __init__(self, program: MachineProgram, inputs: Memory, outputs: Memory, arena: np.ndarray):
        self.program, self.inputs, self.outputs = program, inputs, outputs
        self._arena = arena


class NumbaRunner:
    """A bound program for a number of rows. Its inputs and outputs are views of its memory, without padding."""

    def __init__(self, pool: Any, bound: BoundProgram, rows: int):
        self._pool, self._bound, self._rows = pool, bound, rows
        self.inputs, self._outputs = bound.inputs.first(rows), bound.outputs.first(rows)

    def run(self) -> Mapping[str, np.ndarray]:
        program = self._bound.program
        program.set_rows(self._rows)
        self._pool.run(program.address, program.length)
        return self._outputs


class NumbaFused:
    """The fused forward for a number of rows."""

    def __init__(self, pool: Any, bound: BoundProgram, rows: int, spec: Spec):
        self._runner, self._program, self._spec = NumbaRunner(pool, bound, rows), bound.program, spec
        self.inputs = self._runner.inputs

    def run(self, rows: Rows) -> np.ndarray:
        fill_segments(self._program.segments, rows, self._spec)
        self._program.clocks[:] = 0
        return self._runner.run()["x"]

    def seconds(self) -> dict[str, float]:
        return dict(zip(self._program.sections, (self._program.clocks * 1e-9).tolist(), strict=True))


class Shared:
    """Memory that programs of one capacity share.

    Layers of one role use two sets of inputs and outputs in turn. All programs use one arena, which holds the values
    that are neither inputs nor outputs.
    """

    def __init__(self) -> None:
        self.bound: dict[str, BoundProgram] = {}
        self.memories: dict[tuple[str, int], tuple[Memory, Memory]] = {}
        self.arenas: list[np.ndarray] = []

    def arena(self, size: int) -> np.ndarray:
        """An arena of at least `size` bytes. Older arenas stay, because programs refer to them."""
        if not self.arenas or len(self.arenas[-1]) < size:
            self.arenas.append(aligned_bytes(size))
        return self.arenas[-1]


class NumbaBackend:
    """Compiled kernels on the CPU: groups, and the fused forward."""

    name = "numba"

    def __init__(self, source: Source, *, threads: int | None = None):
        self._source, self._layout = source, Layout.of(source.spec)
        self._pool = kernels.load("pool").shared_pool(threads or len(hardware.big_cores()))
        self.close()

    def close(self) -> None:
        """Free all memory and forget every address in it. Groups opened later read the weights again."""
        self._recordings: dict[str, Recording] = {}
        self._shared: dict[int, Shared] = {}  # by capacity
        self._kept: list[np.ndarray] = []  # keeps the arrays of the addresses below alive
        self._vectors: dict[str, int] = {}
        self._matrices: dict[Matrix, Bound] = {}
        self._code: Code | None = None

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int) -> NumbaRunner:
        if group.name not in self._recordings:
            weights = Weights(self._source)
            self._hold(group.name, record(self._source.program, group, weights), weights)
        # Layer 0 shares no memory: v7's later layers read its outputs.
        shared = rows > 1 and group.layer > 0
        kind = (group.role, group.layer % 2) if shared else (group.name, 0)
        bound = self._bound(group.name, kind, group.inputs, group.outputs, rows)
        return NumbaRunner(self._pool, bound, rows)

    def open_fused(self, rows: int) -> NumbaFused:
        spec = self._source.spec
        if FUSED not in self._recordings:
            weights = Weights(self._source)
            recording = record_forward(self._source.program, weights, recurrence.kernel(spec).inputs)
            self._code = self._compiled_recurrence()
            self._hold(FUSED, recording, weights)
        bound = self._bound(FUSED, (FUSED, 0), fused_inputs(spec), (Port("x", spec.D),), rows)
        return NumbaFused(self._pool, bound, rows, spec)

    def _bound(
        self,
        name: str,
        kind: tuple[str, int],
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        rows: int,
    ) -> BoundProgram:
        """The bound program of a recording for at least `rows` rows. Programs of one kind share inputs and outputs."""
        capacity = 1 << (rows - 1).bit_length()
        shared = self._shared.setdefault(capacity, Shared())
        if name in shared.bound:
            return shared.bound[name]
        recording, layout = self._recordings[name], self._layout
        if kind not in shared.memories:
            shared.memories[kind] = Memory(layout, inputs, capacity), Memory(layout, outputs, capacity)
        ends = shared.memories[kind]
        offsets, size = layout.place(recording, capacity)
        arena = shared.arena(size)
        addresses = [int(arena.ctypes.data) + (offset or 0) for offset in offsets]
        for memory, values in zip(ends, (recording.inputs, recording.outputs), strict=True):
            for port, value in values.items():
                addresses[value] = memory.address(port)
        table = segment_table(capacity if name == FUSED else 0)
        binder = Binder(
            self._source.spec,
            layout,
            capacity,
            addresses,
            self._vectors,
            self._matrices,
            self._products,
            table,
            self._code,
        )
        shared.bound[name] = BoundProgram(binder.bind(recording), *ends, arena)
        return shared.bound[name]

    def _hold(self, name: str, recording: Recording, weights: Weights) -> None:
        """Load every weight and vector that a recording refers to, and compile its kernels."""
        for matrix, weight in weights.items():
            if matrix not in self._matrices:
                self._matrices[matrix] = self._matrix(weight)
                if not isinstance(weight, Packed):
                    self._source.release(matrix.name)
        for vector in {vector for op in recording.ops for vector in op.vectors} - self._vectors.keys():
            array = self._source.tensor(vector).reshape(1, -1)
            whole, part = self._layout.allocate(1, array.shape[1])
            part[:] = array
            self._vectors[vector] = self._keep(whole)
        self._recordings[name] = recording
        self._prepare({self._matrices[matrix].format for matrix in weights})

    def _prepare(self, formats: set[int]) -> None:
        """Compile the kernels of text generation: products in these matrix formats, the recurrence and the sampler.

        They are compiled together, in as many processes as there are cores.
        """
        pool, linear, compiler = (kernels.load(name) for name in ("pool", "linear", "compiler"))
        kernels.load("sampling")
        products = [table[format_] for format_ in sorted(formats) for table in (linear.GEMV, linear.GEMM)]
        others = compiler.KERNELS["sampling.choose"], pool.work, recurrence.kernel(self._source.spec).run
        compiler.prepare([*others, *products])

    def _products(self, format_: int) -> tuple[int, int]:
        """Addresses of the gemv and gemm kernels of a matrix format."""
        linear = kernels.load("linear")
        return linear.GEMV[format_].address, linear.GEMM[format_].address

    def _matrix(self, weight: Weight) -> Bound:
        if isinstance(weight, Packed):
            format_ = instructions.INT4 if weight.bits == 4 else instructions.INT8
            return Bound(format_, *padded(*weight.shape), self._keep(weight.data), self._keep(weight.scales))
        if weight.dtype.name not in FORMATS:
            raise BackendError(f"numba has no product with {weight.dtype} weights: use backend ort")
        strips = pack_floats(weight)
        return Bound(FORMATS[weight.dtype.name], strips.shape[1], len(strips) * LANES, self._keep(strips), 0)

    def _compiled_recurrence(self) -> Code:
        spec, maths = self._source.spec, NumpyMaths(self._source.tensor)
        tables = [
            self._keep(recurrence.parameters(maths.block(layer).vector, spec)) for layer in range(spec.L)
        ]
        return Code(recurrence.kernel(spec).run.address, tables)

    def _keep(self, array: np.ndarray) -> int:
        """Keep an array until the backend is closed, and return its address."""
        self._kept.append(array)
        return int(array.ctypes.data)


class Weights(dict[Matrix, Weight]):
    """Matrices of a model, loaded at first use."""

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
