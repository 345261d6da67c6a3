"""Gives a recording its place in memory, for a number of rows: what results, a `Tape`, is what the machine executes.

Nothing here needs numba.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.kernels.instructions import (
    A_STATES,
    A_VALUES,
    ALIGNMENT,
    ARGUMENTS,
    INSTRUCTION,
    KEEP,
    LINEAR,
    QUANTISE,
    RECUR,
    ROW_MATMUL,
    SHIFT,
    TILE_ROWS,
)
from rwkv_npu.kernels.recorder import Entry, Matrix, Recording, Value
from rwkv_npu.models.spec import Spec, state_shapes
from rwkv_npu.quant.cpu import BLOCK, PANEL, padded

WORD = 8  # bytes: every field of an instruction and every argument of a recurrence


class Bound(NamedTuple):
    """A matrix in memory: K is padded for quantised ones, N for all; addresses of the numbers and of their scales."""

    format: int
    k: int
    n: int
    data: int
    scales: int


class Code(NamedTuple):
    """A compiled recurrence: its address, those of the parameters of each layer, and the state that it updates."""

    address: int
    tables: Sequence[int]
    states: Sequence[str]


# -- memory ------------------------------------------------------------------------------------------------


def aligned_bytes(count: int) -> np.ndarray:
    """Zeroed memory that begins on a whole vector."""
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count]


def tiled(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


@dataclass(frozen=True)
class Layout:
    """How rows lie in memory. unit: a row takes a multiple of so many floats."""

    unit: int

    @staticmethod
    def of(spec: Spec) -> Layout:
        """Whole panels, so that products may write all of their columns; and whole heads, so that a recurrence finds
        one beside the other. (RWKV-4 has no heads.)"""
        return Layout(PANEL if spec.generation == "4" else lcm(PANEL, spec.N))

    def stride(self, width: int) -> int:
        """Floats from one row to the next."""
        return -(-width // self.unit) * self.unit

    def allocate(self, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory for (rows, width) floats as the machine wants it: all of it, and the part that counts."""
        shape = tiled(rows), self.stride(width)
        whole = aligned_bytes(4 * shape[0] * shape[1]).view(np.float32).reshape(shape)
        return whole, whole[:rows, :width]

    def bytes_of(self, value: Value, rows: int) -> int:
        k = padded(value.width, 0)[0]
        row = k + 8 * k // BLOCK if value.quantised else 4 * self.stride(value.width)
        return -(-tiled(rows) * row // ALIGNMENT) * ALIGNMENT

    def place(self, recording: Recording, rows: int) -> tuple[dict[int, int], int]:
        """Offsets in bytes of the values between inputs and outputs, by id, and the bytes that they take together.

        Memory is used again once a level has passed in which a value was read last: within a level threads are apart.
        """
        named = {id(value) for value in (*recording.inputs.values(), *recording.outputs.values())}
        last_use: dict[int, int] = {}
        for entry in recording.entries:
            for value in (entry.out, *entry.inputs):
                last_use[id(value)] = entry.level
        offsets: dict[int, int] = {}
        whole = 0
        live: list[tuple[int, int, int]] = []  # (offset, end, level of the last use)
        for entry in recording.entries:
            if id(entry.out) in named or entry.out.state:
                continue
            live = [piece for piece in live if piece[2] >= entry.level]
            size, offset = self.bytes_of(entry.out, rows), 0
            for begin, end, _ in sorted(live):
                if offset + size <= begin:
                    break
                offset = max(offset, end)
            offsets[id(entry.out)] = offset
            whole = max(whole, offset + size)
            live.append((offset, offset + size, last_use[id(entry.out)]))
        return offsets, whole


# -- tapes -------------------------------------------------------------------------------------------------


@dataclass
class Tape:
    """words: `length` instructions, then the arguments of recurrences. Addresses in the state are still missing:
    `moving` has, by part, the places of those words and the layers that they are of.

    clocks: nanoseconds by section, which every run adds to.
    """

    words: np.ndarray
    length: int
    clocks: np.ndarray
    sections: list[str]
    shapes: dict[str, tuple[int, ...]]
    moving: dict[str, tuple[np.ndarray, np.ndarray]]

    def __post_init__(self) -> None:
        self._attached: dict[str, tuple[int, int]] = {}

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)

    def attach(self, state: Mapping[str, np.ndarray]) -> None:
        """Have the tape update these arrays (L, B, ...) from now on. Raises UsageError for others."""
        for name, (places, layers) in self.moving.items():
            part = state[name]
            if part.shape != self.shapes[name] or part.dtype != np.float32 or not part[0].flags.carray:
                raise UsageError(
                    f"{name} of a state must be float32 {self.shapes[name]}, layer by layer in C order"
                )
            found = int(part.ctypes.data), part.strides[0]
            if self._attached.get(name) != found:
                self.words[places] = found[0] + layers * found[1]
                self._attached[name] = found


@dataclass
class Binder:
    """What instructions need to become a tape of M = `rows` rows of `batch` sequences.

    addresses: of every value but those of the state, by id. vectors: addresses by name.
    """

    spec: Spec
    layout: Layout
    rows: int
    batch: int
    addresses: Mapping[int, int]
    vectors: Mapping[str, int]
    matrices: Mapping[Matrix, Bound]
    code: Code | None = None

    def bind(self, recording: Recording) -> Tape:
        entries = recording.entries
        sections = list(dict.fromkeys(entry.section for entry in entries))
        clocks = np.zeros(len(sections), np.int64)
        recurrences = sum(entry.op == RECUR for entry in entries)
        size = end = len(entries) * INSTRUCTION.itemsize // WORD
        words = aligned_bytes((size + ARGUMENTS * recurrences) * WORD).view(np.int64)
        moving: dict[str, list[tuple[int, int]]] = {}
        names = INSTRUCTION.names or ()
        lines, level = [], 0
        for number, entry in enumerate(entries):
            fields = self._instruction(entry)
            fields["wait"], level = entry.level != level, entry.level
            fields["clock"] = clocks.ctypes.data + sections.index(entry.section) * WORD
            if entry.op == RECUR:
                assert self.code is not None
                words[end : end + ARGUMENTS] = self._arguments(entry)
                fields["vector"] = words.ctypes.data + end * WORD
                for place, name in enumerate(self.code.states, end + A_STATES):
                    moving.setdefault(name, []).append((place, entry.layer))
                end += ARGUMENTS
            for name, value in (("out", entry.out), *zip("ab", entry.inputs, strict=False)):
                if value.state:
                    place = number * len(names) + names.index(name)
                    moving.setdefault(value.state[0], []).append((place, value.state[1]))
            lines.append(tuple(fields.get(name, 0) for name in names))
        words[:size].view(INSTRUCTION)[:] = np.array(lines, INSTRUCTION)
        shapes = {name: (self.spec.L, self.batch, *shape) for name, shape in state_shapes(self.spec).items()}
        places = {name: (np.array(found)[:, 0], np.array(found)[:, 1]) for name, found in moving.items()}
        return Tape(words, len(entries), clocks, sections, shapes, places)

    def _instruction(self, entry: Entry) -> dict[str, Any]:
        """Fields other than 0; those of the state are 0 too."""
        op = entry.op
        fields: dict[str, Any] = {"op": op, "rows": self.rows, "out": self._address(entry.out)}
        fields |= {"width": entry.out.width, "stride": self._stride(entry.out)}
        fields["number"] = float(self.batch if op in (SHIFT, KEEP) else entry.number)
        if op == RECUR:
            assert self.code is not None
            return fields | {"weights": self.code.address, "n": self.batch * self.spec.H}
        fields |= {name: self._address(value) for name, value in zip("ab", entry.inputs, strict=False)}
        fields |= {name: self.vectors[v] for name, v in zip(("vector", "bias"), entry.vectors, strict=False)}
        if op in (SHIFT, ROW_MATMUL):
            fields["other_stride"] = self._stride(entry.inputs[1])
        elif op in (KEEP, LINEAR):
            fields["other_stride"] = self._stride(entry.inputs[0])
        if op == QUANTISE:
            fields["k"] = padded(entry.out.width, 0)[0]
            fields["b"], fields["sums"] = self._parts(entry.out)
        if op == LINEAR:
            assert entry.matrix is not None
            fields |= self.matrices[entry.matrix]._asdict()
            fields["weights"] = fields.pop("data")
            if entry.inputs[0].quantised:
                fields["b"], fields["sums"] = self._parts(entry.inputs[0])
        return fields

    def _arguments(self, entry: Entry) -> list[int]:
        assert self.code is not None
        spec, y = self.spec, entry.out
        sizes = [self.rows // self.batch, self.batch, spec.H, spec.N, self._stride(y)]
        found = [*sizes, self.code.tables[entry.layer], self._address(y)]
        found += [0] * (A_VALUES - len(found)) + [self._address(value) for value in entry.inputs]
        return found + [0] * (ARGUMENTS - len(found))

    def _address(self, value: Value) -> int:
        return 0 if value.state else self.addresses[id(value)]

    def _stride(self, value: Value) -> int:
        return value.width if value.state else self.layout.stride(value.width)

    def _parts(self, value: Value) -> tuple[int, int]:
        """Where the scales and the sums of a quantised value lie: after its bytes."""
        size = tiled(self.rows) * padded(value.width, 0)[0]
        scales = self._address(value) + size
        return scales, scales + size // BLOCK * 4
