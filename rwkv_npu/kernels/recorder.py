"""Records the maths of a model as a list of operations for the machine in `machine.py`.

The recorders implement `models.maths.Maths` and `models.network.Forward`. The formulas of `models/` run on them as they
run on NumPy, for one group or for all layers, and every step is recorded as an operation. A value is an input or the
result of one operation, and is known by its number. `schedule` orders the operations in stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.kernels.instructions import (
    ADD,
    ADD_VECTOR,
    LAYER_NORM,
    LINEAR,
    MIX,
    MUL,
    MUL_VECTOR,
    QUANTISE,
    RELU,
    ROW_MATMUL,
    SCALE,
    SHIFT,
    SHIFT_STATE,
    SIGMOID,
    STORE_STATE,
    SUB,
    TANH,
    WKV,
)
from rwkv_npu.models.maths import LAYER_NORM_EPS
from rwkv_npu.models.network import Program, forward, run_in_order
from rwkv_npu.models.spec import Group, att_outputs, fused_inputs
from rwkv_npu.quant.cpu import Packed

RECURRENCE = "recurrence"  # the section of its operations; other operations have the role of their group

# (a layer's projections by name, what layers pass to the next one) -> the values that the compiled recurrence reads.
Inputs = Callable[[dict[str, Any], dict[str, Any]], tuple[Any, ...]]

Weight = np.ndarray | Packed


class Vector(NamedTuple):
    """A vector of the model, by its full name."""

    name: str


@dataclass(frozen=True)
class Matrix:
    """A projection of the model, or number `index` of a stack."""

    name: str
    index: int | None = None


class StateRows(NamedTuple):
    """One part of the states in one layer: a row (D,) of every sequence."""

    part: str
    layer: int


class Shape(NamedTuple):
    """The width of a value. If quantised, it is int8 rows with a scale and a sum for every block."""

    width: int
    quantised: bool = False


@dataclass
class Op:
    """One operation, without addresses. out, inputs: numbers of values; out is None if it has no result."""

    code: int
    out: int | None
    inputs: tuple[int, ...]
    vectors: tuple[str, ...] = ()
    matrix: Matrix | None = None
    number: float = 0.0
    state: StateRows | None = None  # read by SHIFT_STATE, written by STORE_STATE
    layer: int = -1  # of a WKV
    section: str = ""
    stage: int = 0


@dataclass
class Recording:
    """Operations in the order of execution; shapes of the values; numbers of inputs and outputs by port name."""

    ops: list[Op]
    values: list[Shape]
    inputs: dict[str, int]
    outputs: dict[str, int]


class Value:
    """A symbolic array (rows, width): the number of a value. Arithmetic with it is recorded."""

    __array_ufunc__ = None  # otherwise a NumPy scalar on the left would try to broadcast over a Value

    def __init__(self, recorder: Recorder, number: int, width: int):
        self.recorder, self.number, self.width = recorder, number, width

    def __add__(self, other: Any) -> Value:
        vector = isinstance(other, Vector)
        return self.recorder.emit(ADD_VECTOR if vector else ADD, self.width, self, other)

    def __sub__(self, other: Value) -> Value:
        return self.recorder.emit(SUB, self.width, self, other)

    def __mul__(self, other: Any) -> Value:
        if isinstance(other, Value | Vector):
            vector = isinstance(other, Vector)
            return self.recorder.emit(MUL_VECTOR if vector else MUL, self.width, self, other)
        return self.recorder.emit(SCALE, self.width, self, number=float(other))


@dataclass
class Notes:
    """Everything recorded so far; `Recorder.block` shares it. quantised: a value -> its quantised form, by number."""

    ops: list[Op] = field(default_factory=list)
    values: list[Shape] = field(default_factory=list)
    quantised: dict[int, int] = field(default_factory=dict)
    section: str = ""

    def new_value(self, width: int, quantised: bool = False) -> int:
        self.values.append(Shape(width, quantised))
        return len(self.values) - 1


@dataclass
class Recorder:
    """`maths.Maths` over `Value`s. weights: the matrices; only their formats and sizes are used."""

    weights: Mapping[Matrix, Weight]
    prefix: str = ""
    notes: Notes = field(default_factory=Notes)

    def block(self, layer: int) -> Recorder:
        return replace(self, prefix=f"blocks.{layer}.")

    def input(self, width: int) -> Value:
        return Value(self, self.notes.new_value(width), width)

    def vector(self, name: str) -> Vector:
        return Vector(self.prefix + name)

    def linear(self, x: Value, name: str, index: int | None = None) -> Value:
        matrix = Matrix(self.prefix + name, index)
        weight = self.weights[matrix]
        if isinstance(weight, Packed):
            x = self._quantise(x)
        return self.emit(LINEAR, weight.shape[1], x, matrix=matrix)

    def layer_norm(self, x: Value, name: str, eps: float = LAYER_NORM_EPS) -> Value:
        vectors = [Vector(f"{self.prefix}{name}.{part}") for part in ("weight", "bias")]
        return self.emit(LAYER_NORM, x.width, x, *vectors, number=eps)

    def tanh(self, x: Value) -> Value:
        return self.emit(TANH, x.width, x)

    def sigmoid(self, x: Value) -> Value:
        return self.emit(SIGMOID, x.width, x)

    def relu(self, x: Value) -> Value:
        return self.emit(RELU, x.width, x)

    def shift(self, h: Value, previous: Value | StateRows, mask: Value | None) -> Value:
        if isinstance(previous, StateRows):
            return self.emit(SHIFT_STATE, h.width, h, state=previous)
        assert mask is not None
        return self.emit(SHIFT, h.width, h, previous, mask)

    def row_matmul(self, x: Value, s: Value) -> Value:
        return self.emit(ROW_MATMUL, x.width, x, s)

    def emit(self, code: int, width: int, *operands: Value | Vector, **more: Any) -> Value:
        """Record an operation with a result of `width`, and return the result."""
        out = self.notes.new_value(width, quantised=code == QUANTISE)
        self.note(code, out, *operands, **more)
        return Value(self, out, width)

    def note(self, code: int, out: int | None, *operands: Value | Vector, **more: Any) -> None:
        """Record an operation. more: other fields of `Op`."""
        values = tuple(x.number for x in operands if isinstance(x, Value))
        vectors = tuple(x.name for x in operands if isinstance(x, Vector))
        self.notes.ops.append(Op(code, out, values, vectors, section=self.notes.section, **more))

    def _quantise(self, x: Value) -> Value:
        """The quantised form of x, recorded once for all matrices that read it."""
        known = self.notes.quantised
        if x.number not in known:
            known[x.number] = self.emit(QUANTISE, x.width, x).number
        return Value(self, known[x.number], x.width)


class ForwardRecorder:
    """`models.network.Forward` over `Value`s: groups, recurrences and states in one list of operations."""

    mask = None  # SHIFT_STATE finds the begin of a segment in the segment table

    def __init__(self, program: Program, weights: Mapping[Matrix, Weight], recurrent: Inputs):
        self.program, self.maths = program, Recorder(weights)
        self.maths.notes.section = program.groups[0].role
        self.inputs = {port.name: self.maths.input(port.width) for port in fused_inputs(program.spec)}
        self._recurrent, self._carry = recurrent, dict[str, Any]()

    def run(self, group: Group, x: dict[str, Any]) -> dict[str, Any]:
        """Record the operations of a group: inputs by name -> outputs by name."""
        self.maths.notes.section = group.role
        return self.program.evaluate(group, self.maths, x)

    def previous(self, part: str, layer: int) -> StateRows:
        return StateRows(part, layer)

    def store(self, part: str, layer: int, rows: Value) -> None:
        self.maths.note(STORE_STATE, None, rows, state=StateRows(part, layer))

    def time_mix(self, layer: int, out: Mapping[str, Any]) -> Value:
        spec = self.program.spec
        x = {port.name: out[port.name] for port in att_outputs(spec, layer)}
        self.maths.notes.section = RECURRENCE
        return self.maths.emit(WKV, spec.A, *self._recurrent(x, self._carry), layer=layer)

    def deep_embedding(self, layer: int) -> Value:
        return self.inputs[f"s.{layer}"]


def record(program: Program, group: Group, weights: Mapping[Matrix, Weight]) -> Recording:
    """The operations of a group."""
    recorder = Recorder(weights)
    recorder.notes.section = group.role
    inputs = {port.name: recorder.input(port.width) for port in group.inputs}
    values = program.evaluate(group, recorder, inputs)
    taken = {value.number for value in inputs.values()}
    outputs: dict[str, Value] = {}
    for port in group.outputs:
        value = values[port.name]
        # Each output needs memory of its own: copy a value that is an input, or another output already.
        outputs[port.name] = value * 1.0 if value.number in taken else value
        taken.add(outputs[port.name].number)
    return _finish(recorder.notes, inputs, outputs)


def record_forward(program: Program, weights: Mapping[Matrix, Weight], recurrent: Inputs) -> Recording:
    """The operations of the fused forward: all groups but the head, with the recurrences between them."""
    recorder = ForwardRecorder(program, weights, recurrent)
    x = run_in_order(forward(program, recorder, recorder.inputs["x"]), recorder.run)
    return _finish(recorder.maths.notes, recorder.inputs, {"x": x})


def _finish(notes: Notes, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> Recording:
    """Fuse and schedule what was recorded. The recording holds no `Value`, which would keep the weights in memory."""
    ends = [{name: value.number for name, value in some.items()} for some in (inputs, outputs)]
    ops = fuse_mixes(notes.ops, len(notes.values), set(ends[1].values()))
    return Recording(schedule(ops, len(notes.values)), notes.values, *ends)


def fuse_mixes(ops: Sequence[Op], values: int, outputs: set[int]) -> list[Op]:
    """Replace a + x * vector, which is frequent in every generation, by one MIX: one pass over memory instead of two.

    A product that has other readers stays.
    """
    readers = [0] * values
    for op in ops:
        for value in op.inputs:
            readers[value] += 1
    fused: list[Op] = []
    for op in ops:
        product = fused[-1] if fused else None
        if (
            op.code == ADD
            and product is not None
            and product.code == MUL_VECTOR
            and product.out == op.inputs[1]
            and readers[op.inputs[1]] == 1
            and product.out not in outputs
        ):
            fused.pop()
            mixed = (op.inputs[0], *product.inputs)
            fused.append(replace(op, code=MIX, inputs=mixed, vectors=product.vectors))
        else:
            fused.append(op)
    return fused


def schedule(ops: Sequence[Op], values: int) -> list[Op]:
    """Sort operations into stages. Between two stages is a barrier, at which threads wait for each other.

    Odd stages hold products and recurrences, whose columns and heads are divided among the threads. Even stages hold
    the operations that compute each row on its own: a thread executes them one after the other on its own rows, without
    waiting. A shift reads the row before, maybe of another thread, so it begins a stage. A state is written in a later
    stage than it is read.
    """
    stage = [0] * values
    read: dict[StateRows, int] = {}
    for op in ops:
        latest = max((stage[value] for value in op.inputs), default=0)
        if op.code in (LINEAR, WKV):
            op.stage = latest + 1 + latest % 2
        elif op.code in (SHIFT, SHIFT_STATE):
            op.stage = latest + 2 - latest % 2
        else:
            op.stage = latest + latest % 2
        if op.code == STORE_STATE:
            assert op.state is not None
            op.stage = max(op.stage, read.get(op.state, 0) + 2)
        elif op.state is not None:
            read[op.state] = max(op.stage, read.get(op.state, 0))
        if op.out is not None:
            stage[op.out] = op.stage
    return sorted(ops, key=lambda op: op.stage)
