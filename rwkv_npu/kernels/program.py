"""Turns a recording into a `MachineProgram`: lays out its values in memory and writes instructions with addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.kernels.instructions import (
    ALIGNMENT,
    ARGUMENTS,
    INSTRUCTION,
    LINEAR,
    QUANTISE,
    ROW_MATMUL,
    S_COUNT,
    S_FIRST,
    S_RECURRENT,
    S_ROWS,
    S_SEGMENTS,
    S_STATE,
    SEGMENT_WORDS,
    SHIFT,
    STORE_STATE,
    TILE_ROWS,
    WKV,
)
from rwkv_npu.kernels.recorder import Matrix, Op, Recording, Shape
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import Spec, state_shapes
from rwkv_npu.quant.cpu import BLOCK, PANEL, padded

WORD = 8  # bytes: every field of an instruction and every argument of a recurrence


class Bound(NamedTuple):
    """A matrix (k, n) in memory. data, scales: addresses. n is padded to panels, and k to blocks if it is quantised."""

    format: int
    k: int
    n: int
    data: int
    scales: int


class Code(NamedTuple):
    """A compiled recurrence: its address, and the address of each layer's parameters."""

    address: int
    tables: Sequence[int]


# -- memory ------------------------------------------------------------------------------------------------


def aligned_bytes(count: int) -> np.ndarray:
    """Zeroed memory whose address is a multiple of ALIGNMENT."""
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count]


def tiled(rows: int) -> int:
    """Rows padded to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


@dataclass(frozen=True)
class Layout:
    """The layout of rows in memory. The stride of a row is a multiple of `unit` floats."""

    unit: int

    @staticmethod
    def of(spec: Spec) -> Layout:
        """The layout for a model. A row is a whole number of panels, which products write, and of heads."""
        return Layout(PANEL if spec.generation == "4" else lcm(PANEL, spec.N))

    def stride(self, width: int) -> int:
        """Floats from one row to the next."""
        return -(-width // self.unit) * self.unit

    def allocate(self, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Padded memory for (rows, width) floats, and the view of it without the padding."""
        shape = tiled(rows), self.stride(width)
        whole = aligned_bytes(4 * shape[0] * shape[1]).view(np.float32).reshape(shape)
        return whole, whole[:rows, :width]

    def bytes_of(self, shape: Shape, rows: int) -> int:
        """Bytes of a value. A quantised one has int8, then scales and sums of 4 bytes for every block."""
        k = padded(shape.width, 0)[0]
        row = k + 8 * k // BLOCK if shape.quantised else 4 * self.stride(shape.width)
        return -(-tiled(rows) * row // ALIGNMENT) * ALIGNMENT

    def place(self, recording: Recording, rows: int) -> tuple[list[int | None], int]:
        """The offset in bytes of each value, and the bytes of all. Inputs and outputs lie elsewhere: None.

        Memory is reused in a later stage than the last that reads its value: threads within a stage are not in step.
        """
        last_use = [0] * len(recording.values)
        for op in recording.ops:
            for value in op.inputs if op.out is None else (op.out, *op.inputs):
                last_use[value] = op.stage
        elsewhere = {*recording.inputs.values(), *recording.outputs.values()}
        offsets: list[int | None] = [None] * len(recording.values)
        total = 0
        live: list[tuple[int, int, int]] = []  # (offset, end, stage of the last use)
        for op in recording.ops:
            if op.out is None or op.out in elsewhere:
                continue
            live = [piece for piece in live if piece[2] >= op.stage]
            size, offset = self.bytes_of(recording.values[op.out], rows), 0
            for begin, end, _ in sorted(live):
                if offset + size <= begin:
                    break
                offset = max(offset, end)
            offsets[op.out] = offset
            total = max(total, offset + size)
            live.append((offset, offset + size, last_use[op.out]))
        return offsets, total


# -- segments ----------------------------------------------------------------------------------------------


def segment_table(capacity: int) -> np.ndarray:
    """An empty table (1 + capacity, SEGMENT_WORDS) for `capacity` segments."""
    return aligned_bytes((1 + capacity) * SEGMENT_WORDS * WORD).view(np.int64).reshape(-1, SEGMENT_WORDS)


def fill_segments(table: np.ndarray, rows: Rows, spec: Spec) -> None:
    """Write the segments of `rows` into the table. Raises UsageError for states that cannot be updated in place."""
    addresses = rows.addresses(spec)
    lines = table[1 : 1 + len(addresses)]
    lines[:, S_STATE : S_STATE + addresses.shape[1]] = addresses
    lines[:, S_FIRST], lines[:, S_COUNT] = rows.firsts, rows.counts
    table[0, S_SEGMENTS], table[0, S_ROWS] = len(addresses), len(rows)


def part_bytes(spec: Spec, part: str) -> int:
    """Bytes of one layer in a part of a state."""
    return 4 * int(np.prod(state_shapes(spec)[part]))


def recurrence_arguments(
    spec: Spec, layer: int, *, segments: np.ndarray, stride: int, table: int, y: int, inputs: Sequence[int]
) -> list[int]:
    """The arguments of a recurrence, (ARGUMENTS,), in the order of the names A_... in `instructions`.

    table, y, inputs: addresses of the layer's parameters, of the result and of the projections' outputs.
    """
    part = list(state_shapes(spec))[S_RECURRENT - S_STATE]  # the parts that it updates are equally large
    offset = layer * part_bytes(spec, part)
    found = [segments.ctypes.data, offset, spec.H, spec.N, stride, table, y, *inputs]
    return found + [0] * (ARGUMENTS - len(found))


# -- programs ----------------------------------------------------------------------------------------------


@dataclass
class MachineProgram:
    """A program for `machine.py`. words: `length` instructions, then the arguments of recurrences, all int64.

    clocks: nanoseconds of each section; every run adds to them. segments: the table that the instructions read.
    """

    words: np.ndarray
    length: int
    clocks: np.ndarray
    sections: list[str]
    segments: np.ndarray

    def __post_init__(self) -> None:
        size = self.length * INSTRUCTION.itemsize // WORD
        self._rows = self.words[:size].view(INSTRUCTION)["rows"]

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)

    def set_rows(self, rows: int) -> None:
        """Set the number of rows to compute, at most `Binder.rows`."""
        if self._rows[0] != rows:
            self._rows[:] = rows


@dataclass
class Binder:
    """Writes operations as a program for up to `rows` rows.

    addresses: of each value, by its number. vectors: addresses by name. products: a matrix format -> the addresses of
    its kernels, gemv and gemm. segments: the segment table. code: the recurrence, if there is one.
    """

    spec: Spec
    layout: Layout
    rows: int
    addresses: Sequence[int]
    vectors: Mapping[str, int]
    matrices: Mapping[Matrix, Bound]
    products: Callable[[int], tuple[int, int]]
    segments: np.ndarray
    code: Code | None = None

    def bind(self, recording: Recording) -> MachineProgram:
        ops, self._values = recording.ops, recording.values
        sections = list(dict.fromkeys(op.section for op in ops))
        clocks = np.zeros(len(sections), np.int64)
        recurrences = sum(op.code == WKV for op in ops)
        size = end = len(ops) * INSTRUCTION.itemsize // WORD
        words = aligned_bytes((size + ARGUMENTS * recurrences) * WORD).view(np.int64)
        names = INSTRUCTION.names or ()
        lines, stage = [], 0
        for op in ops:
            fields = self._instruction(op)
            fields["wait"], stage = op.stage != stage, op.stage
            fields["clock"] = clocks.ctypes.data + sections.index(op.section) * WORD
            if op.code == WKV:
                words[end : end + ARGUMENTS] = self._arguments(op)
                fields["vector"] = words.ctypes.data + end * WORD
                end += ARGUMENTS
            lines.append(tuple(fields.get(name, 0) for name in names))
        words[:size].view(INSTRUCTION)[:] = np.array(lines, INSTRUCTION)
        return MachineProgram(words, len(ops), clocks, sections, self.segments)

    def _instruction(self, op: Op) -> dict[str, Any]:
        """The fields that are not 0, as the table in `instructions.py` says."""
        code = op.code
        fields: dict[str, Any] = {"op": code, "rows": self.rows, "number": op.number}
        fields |= {name: self.addresses[v] for name, v in zip("ab", op.inputs, strict=False)}
        fields |= {name: self.vectors[v] for name, v in zip(("vector", "bias"), op.vectors, strict=False)}
        if op.out is not None:
            width = self._values[op.out].width
            fields |= {"out": self.addresses[op.out], "width": width, "stride": self.layout.stride(width)}
        if code == WKV:
            assert self.code is not None
            return {**fields, "a": 0, "b": 0, "weights": self.code.address, "n": self.spec.H}
        if code == ROW_MATMUL:
            fields["other_stride"] = self._stride(op.inputs[1])
        elif code == LINEAR:
            fields["other_stride"] = self._stride(op.inputs[0])
        elif code == SHIFT:
            fields["vector"] = self.addresses[op.inputs[2]]
            fields["other_stride"] = self._stride(op.inputs[2])
        elif code == STORE_STATE:
            fields["width"] = self._values[op.inputs[0]].width
            fields["other_stride"] = self._stride(op.inputs[0])
        if op.state is not None:
            fields["vector"] = self.segments.ctypes.data
            fields["k"] = S_STATE + list(state_shapes(self.spec)).index(op.state.part)
            fields["n"] = op.state.layer * part_bytes(self.spec, op.state.part)
        if code == QUANTISE:
            assert op.out is not None
            fields["k"] = padded(self._values[op.out].width, 0)[0]
            fields["b"], fields["sums"] = self._scales_and_sums(op.out)
        if code == LINEAR:
            assert op.matrix is not None
            fields |= self.matrices[op.matrix]._asdict()
            fields["weights"] = fields.pop("data")
            fields["gemv"], fields["gemm"] = self.products(fields["format"])
            if self._values[op.inputs[0]].quantised:
                fields["b"], fields["sums"] = self._scales_and_sums(op.inputs[0])
        return fields

    def _arguments(self, op: Op) -> list[int]:
        assert self.code is not None and op.out is not None
        return recurrence_arguments(
            self.spec,
            op.layer,
            segments=self.segments,
            stride=self._stride(op.out),
            table=self.code.tables[op.layer],
            y=self.addresses[op.out],
            inputs=[self.addresses[value] for value in op.inputs],
        )

    def _stride(self, value: int) -> int:
        return self.layout.stride(self._values[value].width)

    def _scales_and_sums(self, value: int) -> tuple[int, int]:
        """The addresses of the scales and sums of a quantised value: they follow its bytes."""
        size = tiled(self.rows) * padded(self._values[value].width, 0)[0]
        scales = self.addresses[value] + size
        return scales, scales + size // BLOCK * 4
