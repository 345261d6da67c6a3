"""Records the maths of a model as a list of instructions for the machine in `machine.py`.

The recorder implements `models.maths.Maths` and `models.network.Walk`: the formulas of `models/` run on it as they run
on NumPy, for one group or for all layers at once, and leave instructions behind. `schedule` puts them in an order in
which threads have to wait for each other seldom. Nothing here needs numba.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rwkv_npu.kernels.instructions import (
    ADD,
    ADD_VECTOR,
    KEEP,
    LAYER_NORM,
    LINEAR,
    MIX,
    MUL,
    MUL_VECTOR,
    QUANTISE,
    RECUR,
    RELU,
    ROW_MATMUL,
    SCALE,
    SHIFT,
    SIGMOID,
    SUB,
    TANH,
)
from rwkv_npu.models.maths import LAYER_NORM_EPS
from rwkv_npu.models.network import Program, walk
from rwkv_npu.models.spec import Group, att_outputs, walk_inputs
from rwkv_npu.quant.cpu import Packed

RECURRENCE = "recurrence"  # the section of its instructions; those of others are the roles of groups

# A layer's projections, by name, and what goes from layer to layer -> what the compiled recurrence reads, in order.
Inputs = Callable[[dict[str, Any], dict[str, Any]], tuple[Any, ...]]


class Value:
    """A symbolic array (rows, width). `quantised` ones hold int8, a scale and a sum for every block of a row; `state`
    ones are a part of the state of a layer, (B, width)."""

    __array_ufunc__ = None  # without this NumPy scalars would try to broadcast over a Value

    def __init__(
        self, recorder: Recorder, width: int, quantised: bool = False, state: tuple[str, int] | None = None
    ):
        self.recorder, self.width, self.quantised, self.state = recorder, width, quantised, state

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


@dataclass
class Entry:
    """An instruction before it has addresses. layer: of a recurrence."""

    op: int
    out: Value
    inputs: tuple[Value, ...]
    vectors: tuple[str, ...] = ()
    matrix: Matrix | None = None
    number: float = 0.0
    layer: int = -1
    section: str = ""
    level: int = 0


@dataclass
class Notes:
    """What has been recorded: all blocks of a recorder write into the same."""

    entries: list[Entry] = field(default_factory=list)
    quantised: dict[int, Value] = field(default_factory=dict)
    section: str = ""


@dataclass
class Recorder:
    """`maths.Maths` over `Value`s. weights: the matrices that will be multiplied, for their formats and sizes."""

    weights: Mapping[Matrix, Weight]
    prefix: str = ""
    notes: Notes = field(default_factory=Notes)

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
        return self.emit(ROW_MATMUL, x.width, x, s)

    def add(self, a: Value, b: Any) -> Value:
        if isinstance(b, Vector):
            return self.emit(ADD_VECTOR, a.width, a, vectors=(b.name,))
        entries = self.notes.entries
        if entries and entries[-1].op == MUL_VECTOR and entries[-1].out is b:
            # a + x * vector, the mix of every generation: one pass instead of two.
            last = entries.pop()
            return self.emit(MIX, a.width, a, *last.inputs, vectors=last.vectors)
        return self.emit(ADD, a.width, a, b)

    def multiply(self, a: Value, b: Any) -> Value:
        if isinstance(b, Vector):
            return self.emit(MUL_VECTOR, a.width, a, vectors=(b.name,))
        if isinstance(b, Value):
            return self.emit(MUL, a.width, a, b)
        return self.emit(SCALE, a.width, a, number=float(b))

    def emit(self, op: int, width: int, *inputs: Value, out: Value | None = None, **more: Any) -> Value:
        out = out or Value(self, width, quantised=op == QUANTISE)
        self.notes.entries.append(Entry(op, out, inputs, section=self.notes.section, **more))
        return out

    def _quantise(self, x: Value) -> Value:
        """Once for all matrices that read x."""
        known = self.notes.quantised
        if id(x) not in known:
            known[id(x)] = self.emit(QUANTISE, x.width, x)
        return known[id(x)]


class WalkRecorder:
    """`models.network.Walk` over `Value`s: groups, recurrences and the state, all on one list."""

    def __init__(self, program: Program, weights: Mapping[Matrix, Weight], recurrent: Inputs):
        self.program, self.maths = program, Recorder(weights)
        self.maths.notes.section = program.groups[0].role
        self.inputs = {port.name: Value(self.maths, port.width) for port in walk_inputs(program.spec)}
        self._recurrent, self._carry = recurrent, {}  # type: ignore[var-annotated]
        self._state: dict[tuple[str, int], Value] = {}

    def run(self, group: Group, x: dict[str, Any]) -> dict[str, Any]:
        self.maths.notes.section = group.role
        return self.program.evaluate(group, self.maths, x)

    def last(self, name: str, layer: int) -> Value:
        if (name, layer) not in self._state:
            self._state[name, layer] = Value(self.maths, self.program.spec.D, state=(name, layer))
        return self._state[name, layer]

    def keep(self, name: str, layer: int, rows: Value) -> None:
        self.maths.emit(KEEP, rows.width, rows, out=self.last(name, layer))

    def time_mix(self, layer: int, out: Mapping[str, Any]) -> Value:
        spec = self.program.spec
        x = {port.name: out[port.name] for port in att_outputs(spec, layer)}
        self.maths.notes.section = RECURRENCE
        return self.maths.emit(RECUR, spec.A, *self._recurrent(x, self._carry), layer=layer)

    def deep_embedding(self, layer: int) -> Value:
        return self.inputs[f"s.{layer}"]


@dataclass
class Recording:
    """Instructions in the order in which they run. inputs and outputs by name of the port."""

    entries: list[Entry]
    inputs: dict[str, Value]
    outputs: dict[str, Value]


def record(program: Program, group: Group, weights: Mapping[Matrix, Weight]) -> Recording:
    """The instructions of a group."""
    recorder = Recorder(weights)
    recorder.notes.section = group.role
    inputs = {port.name: Value(recorder, port.width) for port in group.inputs}
    values = program.evaluate(group, recorder, inputs)
    outputs: dict[str, Value] = {}
    for port in group.outputs:
        value = values[port.name]
        taken = value in inputs.values() or any(value is other for other in outputs.values())
        outputs[port.name] = recorder.multiply(value, 1.0) if taken else value
    return Recording(schedule(recorder.notes.entries), inputs, outputs)


def record_walk(program: Program, weights: Mapping[Matrix, Weight], recurrent: Inputs) -> Recording:
    """The instructions of all groups but the head, and of the recurrences between them."""
    recorder = WalkRecorder(program, weights, recurrent)
    x = walk(program, recorder, recorder.inputs["x"])
    return Recording(schedule(recorder.maths.notes.entries), recorder.inputs, {"x": x})


def schedule(entries: Sequence[Entry]) -> list[Entry]:
    """Entries by levels; between two levels all threads wait for each other.

    Odd levels are products and recurrences, whose columns and heads the threads share; even ones treat rows, each
    thread its own, so that one follows from another without waiting. SHIFT reads the row before, of another thread
    maybe, and begins a level. What a state held is replaced a level after it was read.
    """
    level: dict[int, int] = {}
    read: dict[int, int] = {}
    for entry in entries:
        latest = max((level.get(id(value), 0) for value in entry.inputs), default=0)
        if entry.op in (LINEAR, RECUR):
            entry.level = latest + 1 + latest % 2
        elif entry.op == SHIFT:
            entry.level = latest + 2 - latest % 2
        else:
            entry.level = latest + latest % 2
        if entry.op == KEEP:
            entry.level = max(entry.level, read.get(id(entry.out), 0) + 2)
        level[id(entry.out)] = entry.level
        read |= {id(value): max(entry.level, read.get(id(value), 0)) for value in entry.inputs}
    return sorted(entries, key=lambda entry: entry.level)
