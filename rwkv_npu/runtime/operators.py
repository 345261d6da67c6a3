"""Counts the operators of a group other than products. The compiler's cycle table has no cycles for them.

The formulas of `models/` run on `Counter` as they run on NumPy, with widths in place of arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Group, Spec, tensors


@dataclass
class Operators:
    """Numbers of operators, and of the elements that they write in one row.

    norm: elements of LayerNorms. other: elements of all other operators. count: operators. ports: elements of inputs
    and outputs.
    """

    norm: int = 0
    other: int = 0
    count: int = 0
    ports: int = 0


@dataclass(frozen=True)
class Width:
    """A symbolic array (M, width)."""

    counter: Counter
    width: int

    def _binary(self, other: Any) -> Width:
        return self.counter.operator(max(self.width, other.width if isinstance(other, Width) else 1))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _binary


@dataclass(frozen=True)
class Counter:
    """`maths.Maths` over `Width`s: counts operators and elements in `found`."""

    shapes: dict[str, tuple[int, ...]]
    rows: int
    found: Operators = field(default_factory=Operators)
    prefix: str = ""

    def block(self, layer: int) -> Counter:
        return Counter(self.shapes, self.rows, self.found, f"blocks.{layer}.")

    def operator(self, width: int) -> Width:
        self.found.count += 1
        self.found.other += width
        return Width(self, width)

    def vector(self, name: str) -> Width:
        return Width(self, self.shapes[self.prefix + name][-1])

    def linear(self, x: Width, name: str, index: int | None = None) -> Width:
        return Width(self, self.shapes[self.prefix + name][-1])

    def layer_norm(self, x: Width, name: str, eps: float = 0.0) -> Width:
        self.found.count += 1
        self.found.norm += x.width
        return x

    def tanh(self, x: Width) -> Width:
        return self.operator(x.width)

    sigmoid = relu = tanh

    def shift(self, h: Width, previous: Width, mask: Width) -> Width:
        if self.rows == 1:
            return previous
        for _ in ("Concat", "Slice", "Mul"):
            self.operator(h.width)
        return self.operator(h.width)  # Add

    def row_matmul(self, x: Width, s: Width) -> Width:
        self.operator(s.width)
        return Width(self, x.width)


def count_operators(spec: Spec, fusion: str, rows: int) -> dict[str, Operators]:
    """Operators of each group by name, in graphs of `rows` rows."""
    program = Program(spec, fusion)
    shapes = {tensor.name: tensor.used_shape for tensor in tensors(spec)}
    counted: dict[tuple[object, ...], Operators] = {}  # layers with the same ports have the same operators
    found = {}
    for group in program.groups:
        key = group.role, group.inputs, group.outputs
        if key not in counted:
            counted[key] = _count(program, group, shapes, rows)
        found[group.name] = counted[key]
    return found


def _count(program: Program, group: Group, shapes: dict[str, tuple[int, ...]], rows: int) -> Operators:
    counter = Counter(shapes, rows)
    program.evaluate(group, counter, {port.name: Width(counter, port.width) for port in group.inputs})
    counter.found.ports += sum(port.width for port in (*group.fixed_inputs(rows), *group.outputs))
    return counter.found
