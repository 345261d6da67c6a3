"""Traces the maths of a group into an ONNX graph, without weights; onnx.py adds them.

The tracer implements `rwkv_npu.models.maths.Maths`. The formulas of `models/` run on it as they run on NumPy, and each
operation adds nodes to the graph. Nodes and initialisers have the names of the checkpoint.

With `rows=None` the graph has a symbolic M, for ONNX Runtime. With fixed rows it is for Rockchip's compiler, and
matrices wider than `split` are cut into parts that the NPU takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from rwkv_npu.models.maths import LAYER_NORM_EPS
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Group, Port, Spec, tensors
from rwkv_npu.quant.npu import NPU_WIDTH, ProjectionParams, QuantParams, cut, int8_parts, reciprocal, spans


@dataclass(frozen=True)
class Constant:
    """An initialiser: a tensor of the model, or number `index` of a stack, cut to `rows` and `columns`."""

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        parts = [self.name] + ([] if self.index is None else [str(self.index)])
        parts += [f"{key}{span[0]}" for key, span in (("k", self.rows), ("n", self.columns)) if span]
        return ".".join(parts)

    @property
    def whole(self) -> Constant:
        """The constant that this one is cut from."""
        return Constant(self.name, self.index)

    def of(self, array: np.ndarray) -> np.ndarray:
        """This constant's part of its tensor."""
        return self.cut(array if self.index is None else array[self.index])

    def cut(self, array: np.ndarray) -> np.ndarray:
        """This constant's rows and columns of the whole matrix or vector."""
        if self.rows:
            array = array[slice(*self.rows)]
        return array[..., slice(*self.columns)] if self.columns else array


class Value:
    """A symbolic array (M, sum of widths): one or more tensors of the graph, side by side.

    names: of the tensors. A None is a part that is zero for every input.
    """

    __array_ufunc__ = None  # otherwise a NumPy scalar on the left would try to broadcast over a Value

    def __init__(self, tracer: Tracer, names: Sequence[str | None], widths: Sequence[int]):
        self.tracer, self.names, self.widths = tracer, tuple(names), tuple(widths)

    def __add__(self, other: Any) -> Value:
        return self.tracer.binary("Add", self, other)

    def __sub__(self, other: Any) -> Value:
        return self.tracer.binary("Sub", self, other)

    def __mul__(self, other: Any) -> Value:
        return self.tracer.binary("Mul", self, other)


@dataclass
class Trace:
    """A graph without the values of its constants.

    int8: by label of a weight in int8, the quantization parameters of its input and of its product.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    projections: dict[str, Constant] = field(default_factory=dict)
    int8: dict[str, tuple[QuantParams, QuantParams]] = field(default_factory=dict)
    vectors: dict[str, Constant] = field(default_factory=dict)
    literals: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Tracer:
    """`maths.Maths` over `Value`s.

    shape_of: `used_shape` of a tensor by name. rows: M, None if it is symbolic. split: widest matrix that is not cut,
    None for no limit. int8: parameters of the projections in int8, by label.
    is_zero: True for all-zero constants, which Rockchip's compiler cannot build. The tracer leaves out their products,
    which are exactly zero, and the operations on those.
    rows_of: name and width of an input with one row a token. The tracer makes zeros from it where a graph needs some.
    """

    shape_of: Callable[[str], tuple[int, ...]]
    rows: int | None
    split: int | None
    int8: Mapping[str, ProjectionParams]
    is_zero: Callable[[Constant], bool]
    rows_of: tuple[str, int]
    trace: Trace = field(default_factory=Trace)
    prefix: str = ""

    def block(self, layer: int) -> Tracer:
        return replace(self, prefix=f"blocks.{layer}.")

    def vector(self, name: str) -> Constant:
        return Constant(self.prefix + name)

    def linear(self, x: Value, name: str, index: int | None = None) -> Value:
        full = self.prefix + name
        K, N = self.shape_of(full)[-2:]
        widths, params = self._part_widths(N), self.int8.get(Constant(full, index).label)
        inputs = self._cut(x, int8_parts(K) if params else self._part_widths(K))
        if params and params.smoothing is not None:
            inputs = self._smoothed(inputs, params)
        outputs: list[str | None] = []
        for columns in _spans(widths):
            products = []
            for part, (x_k, rows) in enumerate(zip(inputs.names, _spans(inputs.widths), strict=True)):
                constant = Constant(full, index, rows, columns)
                if x_k is None or self.is_zero(constant):
                    continue
                products.append(self._product(x_k, constant))
                if params:
                    self.trace.int8[constant.label] = params.input, params.outputs[part]
            outputs.append(self._sum(products) if products else None)
        return Value(self, outputs, widths)

    def layer_norm(self, x: Value, name: str, eps: float = LAYER_NORM_EPS) -> Value:
        label = self.prefix + name
        inputs = [
            self.whole(x),
            *(self._use_vector(Constant(f"{label}.{part}")) for part in ("weight", "bias")),
        ]
        # The compiler fails without these two attributes, although they have their default values.
        return self._like(x, self.node("LayerNormalization", inputs, label, axis=-1, epsilon=eps))

    def tanh(self, x: Value) -> Value:
        return self._unary("Tanh", x, zero_at_zero=True)

    def sigmoid(self, x: Value) -> Value:
        return self._unary("Sigmoid", x, zero_at_zero=False)

    def relu(self, x: Value) -> Value:
        return self._unary("Relu", x, zero_at_zero=True)

    def shift(self, h: Value, previous: Value, mask: Value) -> Value:
        if self.rows == 1:
            return previous
        nothing = self._literal(np.zeros((1, sum(h.widths)), np.float32))
        joined = self.node("Concat", [nothing, self.whole(h)], axis=0)
        if self.rows is None:
            end = self.node("Shape", [self.whole(h)], start=0, end=1)
        else:
            end = self._literal(np.array([self.rows], np.int64))
        zero = self._literal(np.array([0], np.int64))
        above = self.node("Slice", [joined, zero, end, zero])
        masked = self.node("Mul", [above, self.whole(mask)])
        return self._like(h, self.node("Add", [masked, self.whole(previous)]))

    def row_matmul(self, x: Value, s: Value) -> Value:
        # Only products of 2-D tensors stay on the NPU. So repeat x along the rows of each matrix, multiply elementwise,
        # and add up the columns by a product with a matrix of ones.
        R = sum(x.widths)
        if x.names == (None,):
            return x
        repeat = np.repeat(np.eye(R, dtype=np.float32), R, axis=1)
        collect = np.tile(np.eye(R, dtype=np.float32), (R, 1))
        spread = self.node("MatMul", [self.whole(x), self._literal(repeat)])
        product = self.node("Mul", [spread, self.whole(s)])
        return self._like(x, self.node("MatMul", [product, self._literal(collect)]))

    def binary(self, op: str, a: Value, b: Any) -> Value:
        """An elementwise operation, part by part. b: a Value, a Constant vector or a number."""
        others: list[str | None]  # None where b is zero
        if isinstance(b, Value):
            finest = max(a.widths, b.widths, key=len)
            a, b = self._cut(a, finest), self._cut(b, finest)
            others = list(b.names)
        elif isinstance(b, Constant):
            parts = [replace(b, columns=columns) for columns in _spans(a.widths)]
            others = [None if self.is_zero(part) else self._use_vector(part) for part in parts]
        else:
            others = [self._literal(np.array([b], np.float32))] * len(a.names)
        names: list[str | None] = []
        for name, other, width in zip(a.names, others, a.widths, strict=True):
            if op == "Mul" and (name is None or other is None):
                names.append(None)
            elif other is None:  # x + 0, x - 0
                names.append(name)
            elif name is None and op == "Add" and isinstance(b, Value):
                names.append(other)
            else:
                names.append(self.node(op, [self._zeros(width) if name is None else name, other]))
        return Value(self, names, a.widths)

    def _zeros(self, width: int) -> str:
        """A tensor of zeros (M, width): an input minus itself, which the compiler can build."""
        return self.zeros_from(*self.rows_of, width)

    def zeros_from(self, rows: str, wide: int, width: int) -> str:
        """A tensor of zeros (M, width) made from the tensor `rows` (M, wide)."""
        pieces = [rows if count == wide else self._columns(rows, 0, count) for count in _pieces(width, wide)]
        zeros = [self.node("Sub", [piece, piece]) for piece in pieces]
        return zeros[0] if len(zeros) == 1 else self.node("Concat", zeros, axis=1)

    def node(self, op: str, inputs: list[str], label: str = "", **attributes: Any) -> str:
        """Add a node with one output. Returns the output's name."""
        name = label or f"{self.prefix}{op.lower()}.{len(self.trace.nodes)}"
        self.trace.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def whole(self, x: Value) -> str:
        """The name of x as one tensor."""
        parts = zip(x.names, x.widths, strict=True)
        names = [self._zeros(width) if name is None else name for name, width in parts]
        return names[0] if len(names) == 1 else self.node("Concat", names, axis=1)

    def _smoothed(self, x: Value, params: ProjectionParams) -> Value:
        """x times its SmoothQuant factors, clipped to the range of int8.

        Without the Clip the compiler would fold the factors into the weights and undo the smoothing. It does not fold
        across a Clip. Rounding to int8 clips anyway, so the Clip changes no result.
        """
        assert params.smoothing is not None
        factors = reciprocal(params.smoothing)
        literals = [self._literal(factors[slice(*span)] if span else factors) for span in _spans(x.widths)]
        bounds = [self._literal(np.array(bound, np.float32)) for bound in params.input.span]
        pairs = list(zip(x.names, literals, strict=True))
        smoothed = [name and self.node("Mul", [name, literal]) for name, literal in pairs]
        return Value(self, [name and self.node("Clip", [name, *bounds]) for name in smoothed], x.widths)

    def _like(self, x: Value, name: str) -> Value:
        """The tensor `name`, which is as wide as x."""
        return Value(self, [name], [sum(x.widths)])

    def _unary(self, op: str, x: Value, *, zero_at_zero: bool) -> Value:
        """An elementwise operation, part by part. zero_at_zero: its result is 0 for 0."""
        names: list[str | None] = []
        for name, width in zip(x.names, x.widths, strict=True):
            if name is None and not zero_at_zero:
                name = self._zeros(width)
            names.append(name and self.node(op, [name]))
        return Value(self, names, x.widths)

    def _sum(self, names: list[str]) -> str:
        return reduce(lambda total, name: self.node("Add", [total, name]), names)

    def _product(self, x: str, constant: Constant) -> str:
        """Add the product of x and a projection, or a part of one."""
        self.trace.projections[constant.label] = constant
        label = constant.label.replace(".weight", "")
        # Node and weight need different names. Low-rank matrices have no suffix `.weight` to drop.
        return self.node(
            "MatMul", [x, constant.label], label if label != constant.label else f"{label}.product"
        )

    def _use_vector(self, constant: Constant) -> str:
        """Add a vector to the graph's constants. Returns its name."""
        self.trace.vectors[constant.label] = constant
        return constant.label

    def _literal(self, array: np.ndarray) -> str:
        """Add an array that is no tensor of the model to the graph's constants. Returns its name."""
        content = hashlib.blake2b(array.tobytes(), digest_size=4).hexdigest()
        name = f"literal.{array.dtype}.{'x'.join(map(str, array.shape))}.{content}"
        literals = self.trace.literals
        while literals.get(name, array).tobytes() != array.tobytes():  # a collision of digests
            name += "+"
        literals[name] = array
        return name

    def _part_widths(self, width: int) -> list[int]:
        """Widths of the parts of a tensor with `width` columns, each of which the NPU takes."""
        return cut(width, self.split or width)

    def _cut(self, x: Value, widths: Sequence[int]) -> Value:
        """x cut into parts of `widths`. Each new part must lie inside one of the old parts."""
        names: list[str | None] = []
        for begin, end in spans(widths):
            ((name, start, stop),) = [
                (name, start, stop)
                for name, (start, stop) in zip(x.names, spans(x.widths), strict=True)
                if start <= begin and end <= stop
            ]
            whole = (begin, end) == (start, stop)
            names.append(name if whole or name is None else self._columns(name, begin - start, end - start))
        return Value(self, names, widths)

    def _columns(self, x: str, start: int, stop: int) -> str:
        """Columns start .. stop of the tensor x."""
        bounds = [self._literal(np.array([number], np.int64)) for number in (start, stop, 1)]
        return self.node("Slice", [x, *bounds])


def _pieces(width: int, wide: int) -> list[int]:
    """Split `width` into parts of `wide` and a rest."""
    return [wide] * (width // wide) + ([width % wide] if width % wide else [])


def _spans(widths: Sequence[int]) -> Sequence[tuple[int, int] | None]:
    """(begin, end) of each part; None for a single part."""
    return spans(widths) if len(widths) > 1 else [None]


def trace_group(
    program: Program,
    group: Group,
    *,
    rows: int | None = None,
    split: int | None = None,
    int8: Mapping[str, ProjectionParams] = MappingProxyType({}),
    is_zero: Callable[[Constant], bool] | None = None,
) -> Trace:
    """Trace a group.

    rows: fixes M; None leaves it symbolic. split: the widest matrix that is not cut.
    int8: by label of a projection in int8, its quantization parameters. It is cut into int8's narrower parts, and its
        input is smoothed.
    is_zero: True for constants to leave out, because they are all zero.
    """
    rows_of = max(((port.name, port.width) for port in group.inputs), key=lambda port: port[1])
    tracer = Tracer(
        shape_of=_shapes(program.spec).__getitem__,
        rows=rows,
        split=split,
        int8=int8,
        is_zero=is_zero or (lambda constant: False),
        rows_of=rows_of,
    )
    inputs = {port.name: Value(tracer, [port.name], [port.width]) for port in group.inputs}
    values = program.evaluate(group, tracer, inputs)
    results = {port.name: tracer.whole(values[port.name]) for port in group.outputs}
    trace = tracer.trace
    renamed = {old: new for new, old in results.items() if old not in inputs}
    for node in trace.nodes:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for new, old in results.items():
        if renamed.get(old) != new:  # an output that is an input, or a value with two names
            trace.nodes.append(helper.make_node("Identity", [renamed.get(old, old)], [new], name=new))
    ports = group.inputs if rows is None else group.fixed_inputs(rows)
    if is_zero is not None:
        _remove_unused(trace, results.keys())
        _use_inputs(tracer, ports, group.outputs[0])
    trace.inputs = [_value_info(port, rows) for port in ports]
    trace.outputs = [_value_info(port, rows) for port in group.outputs]
    return trace


@lru_cache(maxsize=4)
def _shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """`used_shape` of a model's tensors by name."""
    return {tensor.name: tensor.used_shape for tensor in tensors(spec)}


def _remove_unused(trace: Trace, outputs: Collection[str]) -> None:
    """Remove the nodes that no output depends on: the inputs of products that were left out."""
    used, kept = set(outputs), []
    for node in reversed(trace.nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    trace.nodes[:] = kept[::-1]
    tables: list[dict[str, Any]] = [trace.projections, trace.int8, trace.vectors, trace.literals]
    for constants in tables:
        for name in set(constants) - used:
            del constants[name]


def _use_inputs(tracer: Tracer, inputs: Sequence[Port], output: Port) -> None:
    """For each input that no node reads, add zeros made from it to the output.

    The compiler would drop such an input from the artifact, and callers fill all inputs.
    """
    nodes = tracer.trace.nodes
    used = {name for node in nodes for name in node.input}
    for port in inputs:
        if port.name in used:
            continue
        inner = f"{output.name}.without.{port.name}"
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [inner if name == output.name else name for name in names]
        # The mask has width 1: one column of zeros is added to all columns.
        zeros = tracer.zeros_from(port.name, port.width, output.width if port.width > 1 else 1)
        nodes.append(helper.make_node("Add", [inner, zeros], [output.name], name=output.name))


def _value_info(port: Port, rows: int | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        port.name, TensorProto.FLOAT, ["M" if rows is None else rows, port.width]
    )


def compiler_trace(
    program: Program,
    group: Group,
    rows: int,
    int8: Mapping[str, ProjectionParams] = MappingProxyType({}),
    is_zero: Callable[[Constant], bool] | None = None,
) -> Trace:
    """Trace a group for Rockchip's compiler: fixed rows, wide matrices cut."""
    split = NPU_WIDTH if rows > 1 else None
    return trace_group(program, group, rows=rows, split=split, int8=int8, is_zero=is_zero)


class Matrix(NamedTuple):
    """A projection of a graph, or a part of one: the name of its tensor, and its shape (k, n)."""

    name: str
    k: int
    n: int


def matrices(trace: Trace, spec: Spec) -> list[Matrix]:
    """The projections of a graph with their shapes."""
    shapes = _shapes(spec)

    def length(part: tuple[int, int] | None, whole: int) -> int:
        return part[1] - part[0] if part else whole

    return [
        Matrix(c.name, length(c.rows, shapes[c.name][-2]), length(c.columns, shapes[c.name][-1]))
        for c in trace.projections.values()
    ]
