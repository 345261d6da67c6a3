"""Executes programs, in compiled code.

A stage is the instructions from one with `wait` up to the next such one. pool.py cuts a stage into pieces and hands
them to threads; `run_piece` executes one piece.
"""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from rwkv_npu.kernels.compiler import inner
from rwkv_npu.kernels.instructions import (
    ADD,
    ADD_VECTOR,
    INSTRUCTION,
    LAYER_NORM,
    LINEAR,
    MIX,
    MUL,
    MUL_VECTOR,
    QUANTISE,
    RELU,
    ROW_MATMUL,
    S_COUNT,
    S_FIRST,
    SCALE,
    SEGMENT_WORDS,
    SHIFT,
    SHIFT_STATE,
    SIGMOID,
    STORE_STATE,
    SUB,
    TANH,
    WKV,
)
from rwkv_npu.kernels.products import GEMV_ROWS, quantise_rows
from rwkv_npu.kernels.simd import (
    add,
    at_least,
    floats,
    fma,
    kernel_caller,
    load_float,
    load_floats,
    load_long,
    mul,
    pointer_to,
    sigmoid,
    store_float,
    store_floats,
    sub,
    tanh,
    total,
)

INSTRUCTION_BYTES = INSTRUCTION.itemsize
_instructions = pointer_to(from_dtype(INSTRUCTION))
_call_product, _call_recurrence = kernel_caller(4), kernel_caller(3)


@inner
def instruction(program, i):  # type: ignore[no-untyped-def]
    """Instruction i of the program at an address."""
    return carray(_instructions(program + i * INSTRUCTION_BYTES), (1,))[0]


@inner
def _layer_norm(row, out, width, weight, bias, eps):  # type: ignore[no-untyped-def]
    """Layer norm of one row; weight and bias are padded to whole vectors."""
    whole = width // 16 * 16
    sums = floats(types.float32(0))
    for n in range(0, whole, 16):
        sums = add(sums, load_floats(row + n * 4))
    mean = total(sums)
    for n in range(whole, width):
        mean += load_float(row + n * 4)
    mean = types.float32(mean / width)
    centre, squares = floats(mean), floats(types.float32(0))
    for n in range(0, whole, 16):
        x = sub(load_floats(row + n * 4), centre)
        squares = fma(x, x, squares)
    variance = total(squares)
    for n in range(whole, width):
        x = types.float32(load_float(row + n * 4) - mean)
        variance += x * x
    factor = types.float32(1 / np.sqrt(variance / width + eps))
    for n in range(0, width, 16):
        x = mul(sub(load_floats(row + n * 4), centre), floats(factor))
        store_floats(fma(x, load_floats(weight + n * 4), load_floats(bias + n * 4)), out + n * 4)


@inner
def _row_matmul(x, s, out, R):  # type: ignore[no-untyped-def]
    """x (R,) times s (R, R), row-major."""
    for n in range(R):
        value = types.float32(0)
        for k in range(R):
            value += load_float(x + k * 4) * load_float(s + (k * R + n) * 4)
        store_float(value, out + n * 4)


@inner
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    """Copy `count` floats exactly: a state has no padding."""
    whole = count // 16 * 16
    for n in range(0, whole, 16):
        store_floats(load_floats(source + n * 4), target + n * 4)
    for n in range(whole, count):
        store_float(load_float(source + n * 4), target + n * 4)


@inner
def _run_row(t, row):  # type: ignore[no-untyped-def]
    """Execute an instruction on one row, whole vectors at a time: what follows `width` is padding."""
    op, width = t.op, t.width
    at = row * t.stride * 4
    a, b, out = t.a + at, t.b + at, t.out + at
    if op == LAYER_NORM:
        _layer_norm(a, out, width, t.vector, t.bias, t.number)
    elif op == ROW_MATMUL:
        _row_matmul(a, t.b + row * t.other_stride * 4, out, width)
    elif op == MIX:
        for n in range(0, width, 16):
            value = fma(load_floats(b + n * 4), load_floats(t.vector + n * 4), load_floats(a + n * 4))
            store_floats(value, out + n * 4)
    elif op == ADD:
        for n in range(0, width, 16):
            store_floats(add(load_floats(a + n * 4), load_floats(b + n * 4)), out + n * 4)
    elif op == SUB:
        for n in range(0, width, 16):
            store_floats(sub(load_floats(a + n * 4), load_floats(b + n * 4)), out + n * 4)
    elif op == MUL:
        for n in range(0, width, 16):
            store_floats(mul(load_floats(a + n * 4), load_floats(b + n * 4)), out + n * 4)
    elif op == ADD_VECTOR:
        for n in range(0, width, 16):
            store_floats(add(load_floats(a + n * 4), load_floats(t.vector + n * 4)), out + n * 4)
    elif op == MUL_VECTOR:
        for n in range(0, width, 16):
            store_floats(mul(load_floats(a + n * 4), load_floats(t.vector + n * 4)), out + n * 4)
    elif op == SCALE:
        for n in range(0, width, 16):
            store_floats(mul(load_floats(a + n * 4), floats(types.float32(t.number))), out + n * 4)
    elif op == RELU:
        for n in range(0, width, 16):
            store_floats(at_least(load_floats(a + n * 4), floats(types.float32(0))), out + n * 4)
    elif op == SIGMOID:
        for n in range(0, width, 16):
            store_floats(sigmoid(load_floats(a + n * 4)), out + n * 4)
    elif op == TANH:
        for n in range(0, width, 16):
            store_floats(tanh(load_floats(a + n * 4)), out + n * 4)


@inner
def _shift(t, first, last):  # type: ignore[no-untyped-def]
    """SHIFT: row r is row r - 1 of a where the mask is not 0, else row r of b."""
    for row in range(first, last):
        at = row * t.stride * 4
        above = row > 0 and load_float(t.vector + row * t.other_stride * 4) != 0
        _copy(t.a + at - t.stride * 4 if above else t.b + at, t.out + at, t.width)


@inner
def _segment(table, number):  # type: ignore[no-untyped-def]
    """(first row, number of rows, address of the line) of a segment in the segment table."""
    line = table + (1 + number) * SEGMENT_WORDS * 8
    return load_long(line + S_FIRST * 8), load_long(line + S_COUNT * 8), line


@inner
def _shift_state(t, first, last):  # type: ignore[no-untyped-def]
    """SHIFT_STATE: row r is row r - 1 of a; the first row of a segment is its state."""
    for row in range(max(first, 1), last):
        at = row * t.stride * 4
        _copy(t.a + at - t.stride * 4, t.out + at, t.width)
    for number in range(load_long(t.vector)):
        row, _, line = _segment(t.vector, number)
        if first <= row and row < last:
            _copy(load_long(line + t.k * 8) + t.n, t.out + row * t.stride * 4, t.width)


@inner
def _store_state(t, first, last):  # type: ignore[no-untyped-def]
    """STORE_STATE: write the last row of each segment to its state."""
    for number in range(load_long(t.vector)):
        begin, count, line = _segment(t.vector, number)
        row = begin + count - 1
        if first <= row and row < last:
            _copy(t.a + row * t.other_stride * 4, load_long(line + t.k * 8) + t.n, t.width)


@inner
def _unit(table, heads, work):  # type: ignore[no-untyped-def]
    """The first unit that is left when `work` row-heads are done, counted segment by segment.

    Unit u is head u % heads of segment u // heads, and it has one row-head for every row of its segment.
    """
    segments = load_long(table)
    for number in range(segments):
        row, count, _ = _segment(table, number)
        ahead = work - row * heads
        if ahead < count * heads:
            return number * heads + (0 if ahead <= 0 else -(-ahead // count))
    return segments * heads


@inner
def _quantise(t, first, last):  # type: ignore[no-untyped-def]
    """QUANTISE. The padding is zeroed first, since it would add to scales and sums."""
    for row in range(first, last):
        for n in range(t.width, t.k):
            store_float(types.float32(0), t.a + (row * t.stride + n) * 4)
    quantise_rows(t.a, t.stride, first, last, t.k, t.out, t.b, t.sums)


@inner
def run_piece(program, begin, end, piece, pieces, scratch):  # type: ignore[no-untyped-def]
    """Execute piece number `piece` of `pieces` of a stage, the instructions begin .. end of a program.

    A piece is a share of the columns of a product, of the heads of a recurrence, and of the rows of all else.
    """
    for i in range(begin, end):
        t = instruction(program, i)
        if t.op == LINEAR:
            _call_product(
                t.gemv if t.rows <= GEMV_ROWS else t.gemm,
                program + i * INSTRUCTION_BYTES,
                piece,
                pieces,
                scratch,
            )
        elif t.op == WKV:
            table, work = load_long(t.vector), t.rows * t.n
            first, last = (
                _unit(table, t.n, work * piece // pieces),
                _unit(table, t.n, work * (piece + 1) // pieces),
            )
            _call_recurrence(t.weights, t.vector, first, last)
        else:
            first, last = t.rows * piece // pieces, t.rows * (piece + 1) // pieces
            if t.op == QUANTISE:
                _quantise(t, first, last)
            elif t.op == SHIFT:
                _shift(t, first, last)
            elif t.op == SHIFT_STATE:
                _shift_state(t, first, last)
            elif t.op == STORE_STATE:
                _store_state(t, first, last)
            else:
                for row in range(first, last):
                    _run_row(t, row)
