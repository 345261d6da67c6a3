"""Records the maths of a group as a list of instructions for the machine in `machine.py`.

The recorder implements `rwkv_npu.maths.Maths`: the formulas of `models/` run on it as they run on NumPy, and leave
instructions behind. `schedule` puts them in an order in which threads have to wait for each other seldom; `bind`
gives every value a place in memory for a number of rows. Nothing here needs numba.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.maths import LAYER_NORM_EPS
from rwkv_npu.models.network import Program
from rwkv_npu.packing import BLOCK, PANEL, Packed
from rwkv_npu.spec import Group

TILE_ROWS = 4  # rows for which there is memory come in whole tiles
ALIGNMENT = 64

# What an instruction does. Those up to SHIFT treat each row for itself.
ADD, SUB, MUL, ADD_VECTOR, MUL_VECTOR, MIX, SCALE, TANH, SIGMOID, RELU = range(10)
LAYER_NORM, ROW_MATMUL, QUANTISE, SHIFT, LINEAR = range(10, 15)

INT4, INT8, FP16, BF16, FP32 = range(5)  # formats of a matrix

INSTRUCTION = np.dtype(
    [
        ("op", np.int64),
        ("wait", np.int64),  # 1: for all threads, before it
        ("rows", np.int64),
        ("width", np.int64),  # floats of a row of `out` that count
        ("stride", np.int64),  # floats from one row of `out` to the next
        # Addresses: the result, and two operands of the same stride unless it says otherwise.
        ("out", np.int64),
        ("a", np.int64),
        ("b", np.int64),
        ("vector", np.int64),  # (width,) fp32; of LAYER_NORM the weight
        ("bias", np.int64),
        (
            "number",
            np.float64,
        ),  # SCALE: the factor; LAYER_NORM: epsilon; SHIFT: rows to shift by; ROW_MATMUL: R
        # LINEAR: a (rows, k) fp32 of `a_stride`, or int8 with b its scales and `sums`; matrix (k, n) of `format`
        ("format", np.int64),
        ("k", np.int64),
        ("n", np.int64),
        ("a_stride", np.int64),
        ("sums", np.int64),
        ("weights", np.int64),
        ("scales", np.int64),
    ],
    align=True,
)


class Value:
    """A symbolic array (rows, width). `quantised` ones hold int8, a scale and a sum for every block of a row."""

    __array_ufunc__ = None  # without this NumPy scalars would try to broadcast over a Value

    def __init__(self, recorder: Recorder, width: int, quantised: bool = False):
        self.recorder, self.width, self.quantised = recorder, width, quantised

    def __add__(self, other: Any) -> Value:
        return self.recorder.add(self, other)

    def __sub__(self, other: Value) -> Value:
        return self.recorder.emit(SUB, self.width, self, other)

    def __mul__(self, other: Any) -> Value:
        return self.recorder.multiply(self, other)


@dataclass(frozen=True)
class Vector:
    """A vector of the model, by its full name."""

    name: str


@dataclass(frozen=True)
class Matrix:
    """A projection of the model, or number `index` of a stack."""

    name: str
    index: int | None = None


Weight = np.ndarray | Packed


class Bound(NamedTuple):
    """A matrix in memory: K is padded for quantised ones, N for all; addresses of the numbers and of their scales."""

    format: int
    k: int
    n: int
    data: int
    scales: int


@dataclass
class Entry:
    """An instruction before it has addresses."""

    op: int
    out: Value
    inputs: tuple[Value, ...]
    vectors: tuple[str, ...] = ()
    matrix: Matrix | None = None
    number: float = 0.0
    level: int = 0


@dataclass
class Recorder:
    """`maths.Maths` over `Value`s. weights: the matrices that will be multiplied, for their formats and sizes."""

    weights: Mapping[Matrix, Weight]
    prefix: str = ""
    entries: list[Entry] = field(default_factory=list)
    quantised: dict[int, Value] = field(default_factory=dict)

    def block(self, layer: int) -> Recorder:
        return replace(self, prefix=f"blocks.{layer}.")

    def vector(self, name: str) -> Vector:
        return Vector(self.prefix + name)

    def linear(self, x: Value, name: str, index: int | None = None) -> Value:
        matrix = Matrix(self.prefix + name, index)
        weight = self.weights[matrix]
        if isinstance(weight, Packed):
            x = self._quantise(x)
        return self.emit(LINEAR, weight.shape[1], x, matrix=matrix)

    def layer_norm(self, x: Value, name: str, eps: float = LAYER_NORM_EPS) -> Value:
        vectors = tuple(f"{self.prefix}{name}.{part}" for part in ("weight", "bias"))
        return self.emit(LAYER_NORM, x.width, x, vectors=vectors, number=eps)

    def tanh(self, x: Value) -> Value:
        return self.emit(TANH, x.width, x)

    def sigmoid(self, x: Value) -> Value:
        return self.emit(SIGMOID, x.width, x)

    def relu(self, x: Value) -> Value:
        return self.emit(RELU, x.width, x)

    def shift(self, h: Value, last: Value) -> Value:
        return self.emit(SHIFT, h.width, h, last)

    def row_matmul(self, x: Value, s: Value) -> Value:
        return self.emit(ROW_MATMUL, x.width, x, s, number=x.width)

    def add(self, a: Value, b: Any) -> Value:
        if isinstance(b, Vector):
            return self.emit(ADD_VECTOR, a.width, a, vectors=(b.name,))
        last = self.entries[-1] if self.entries else None
        if last is not None and last.op == MUL_VECTOR and last.out is b:
            # a + x * vector, the mix of every generation: one pass instead of two.
            self.entries.pop()
            return self.emit(MIX, a.width, a, *last.inputs, vectors=last.vectors)
        return self.emit(ADD, a.width, a, b)

    def multiply(self, a: Value, b: Any) -> Value:
        if isinstance(b, Vector):
            return self.emit(MUL_VECTOR, a.width, a, vectors=(b.name,))
        if isinstance(b, Value):
            return self.emit(MUL, a.width, a, b)
        return self.emit(SCALE, a.width, a, number=float(b))

    def emit(self, op: int, width: int, *inputs: Value, **more: Any) -> Value:
        out = Value(self, width, quantised=op == QUANTISE)
        self.entries.append(Entry(op, out, inputs, **more))
        return out

    def _quantise(self, x: Value) -> Value:
        """Once for all matrices that read x."""
        if id(x) not in self.quantised:
            self.quantised[id(x)] = self.emit(QUANTISE, x.width, x)
        return self.quantised[id(x)]


@dataclass
class Recording:
    """A group as instructions in the order in which they run. inputs and outputs by name of the port."""

    entries: list[Entry]
    inputs: dict[str, Value]
    outputs: dict[str, Value]


def record(program: Program, group: Group, weights: Mapping[Matrix, Weight]) -> Recording:
    """The instructions of a group."""
    recorder = Recorder(weights)
    inputs = {port.name: Value(recorder, port.width) for port in group.inputs}
    values = program.evaluate(group, recorder, inputs)
    outputs: dict[str, Value] = {}
    for port in group.outputs:
        value = values[port.name]
        taken = value in inputs.values() or any(value is other for other in outputs.values())
        outputs[port.name] = recorder.multiply(value, 1.0) if taken else value
    return Recording(schedule(recorder.entries), inputs, outputs)


def schedule(entries: Sequence[Entry]) -> list[Entry]:
    """Entries by levels; between two levels all threads wait for each other.

    Odd levels are products, whose columns the threads share; even ones treat rows, each thread its own, so that one
    follows from another without waiting. SHIFT reads the row before, of another thread maybe, and begins a level.
    """
    level: dict[int, int] = {}
    for entry in entries:
        latest = max((level.get(id(value), 0) for value in entry.inputs), default=0)
        if entry.op == LINEAR:
            entry.level = latest + 1 + latest % 2
        elif entry.op == SHIFT:
            entry.level = latest + 2 - latest % 2
        else:
            entry.level = latest + latest % 2
        level[id(entry.out)] = entry.level
    return sorted(entries, key=lambda entry: entry.level)


# -- memory ------------------------------------------------------------------------------------------------


def stride_of(width: int) -> int:
    """Floats from one row to the next: whole panels, so that products may write all of their columns."""
    return -(-width // PANEL) * PANEL


def tiled(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def aligned_bytes(count: int) -> np.ndarray:
    """Zeroed memory that begins on a whole vector."""
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count]


def allocate(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory for (rows, width) floats as the machine wants it: all of it, and the part that counts."""
    shape = tiled(rows), stride_of(width)
    whole = aligned_bytes(4 * shape[0] * shape[1]).view(np.float32).reshape(shape)
    return whole, whole[:rows, :width]


def _value_bytes(value: Value, rows: int) -> int:
    stride = stride_of(value.width)
    row = stride + 8 * stride // BLOCK if value.quantised else 4 * stride
    return -(-tiled(rows) * row // ALIGNMENT) * ALIGNMENT


def place(recording: Recording, rows: int) -> tuple[dict[int, int], int]:
    """Offsets in bytes of the values between inputs and outputs, by id, and the bytes that they take together.

    Memory is used again once a level has passed in which a value was read last: within a level threads are apart.
    """
    named = {id(value) for value in (*recording.inputs.values(), *recording.outputs.values())}
    last_use: dict[int, int] = {}
    for entry in recording.entries:
        for value in (entry.out, *entry.inputs):
            last_use[id(value)] = entry.level
    offsets: dict[int, int] = {}
    live: list[tuple[int, int, int]] = []  # (offset, end, level of the last use)
    for entry in recording.entries:
        if id(entry.out) in named:
            continue
        live = [piece for piece in live if piece[2] >= entry.level]
        size, offset = _value_bytes(entry.out, rows), 0
        for begin, end, _ in sorted(live):
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[id(entry.out)] = offset
        live.append((offset, offset + size, last_use[id(entry.out)]))
    sizes = {id(entry.out): _value_bytes(entry.out, rows) for entry in recording.entries}
    return offsets, max((offset + sizes[key] for key, offset in offsets.items()), default=0)


def bind(
    recording: Recording,
    rows: int,
    batch: int,
    addresses: Mapping[int, int],
    vectors: Mapping[str, int],
    matrices: Mapping[Matrix, Bound],
) -> np.ndarray:
    """Instructions with addresses for M = `rows` of which `batch` sequences.

    addresses: of every value, by id. vectors: addresses by name.
    """
    tape = np.zeros(len(recording.entries), INSTRUCTION)
    level = 0
    for instruction, entry in zip(tape, recording.entries, strict=True):
        instruction["op"], instruction["rows"] = entry.op, rows
        instruction["wait"], level = entry.level != level, entry.level
        instruction["width"], instruction["stride"] = entry.out.width, stride_of(entry.out.width)
        instruction["out"] = addresses[id(entry.out)]
        instruction["number"] = batch if entry.op == SHIFT else entry.number
        for name, value in zip("ab", entry.inputs, strict=False):
            instruction[name] = addresses[id(value)]
        for name, vector in zip(("vector", "bias"), entry.vectors, strict=False):
            instruction[name] = vectors[vector]
        if entry.op == QUANTISE:
            instruction["b"], instruction["sums"] = _parts(entry.out, addresses, rows)
        if entry.op == ROW_MATMUL:
            instruction["a_stride"] = stride_of(entry.inputs[1].width)
        if entry.op == LINEAR:
            assert entry.matrix is not None
            (x,) = entry.inputs
            matrix = matrices[entry.matrix]
            instruction["format"], instruction["k"], instruction["n"] = matrix.format, matrix.k, matrix.n
            instruction["weights"], instruction["scales"] = matrix.data, matrix.scales
            instruction["a_stride"] = stride_of(x.width)
            if x.quantised:
                instruction["b"], instruction["sums"] = _parts(x, addresses, rows)
    return tape


def _parts(value: Value, addresses: Mapping[int, int], rows: int) -> tuple[int, int]:
    """Where the scales and the sums of a quantised value lie: after its bytes."""
    stride = stride_of(value.width)
    scales = addresses[id(value)] + tiled(rows) * stride
    return scales, scales + tiled(rows) * stride // BLOCK * 4
