"""Executes tapes, compiled.

All threads run the same tape: of rows each takes its own, of products its own columns, of recurrences its own heads.
Where the tape says `wait` they meet.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from rwkv_npu.kernels.instructions import (
    ADD,
    ADD_VECTOR,
    BF16,
    FP16,
    INT4,
    INT8,
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
from rwkv_npu.kernels.products import (
    GEMV_ROWS,
    ROWS,
    gemm_bf16,
    gemm_fp16,
    gemm_fp32,
    gemm_int4,
    gemm_int8,
    gemv_bf16,
    gemv_fp16,
    gemv_fp32,
    gemv_int4,
    gemv_int8,
    quantise_rows,
)
from rwkv_npu.kernels.simd import (
    add,
    add_atomically,
    at_least,
    call_code,
    floats,
    fma,
    load_float,
    load_floats,
    load_long,
    mul,
    pause,
    read_atomically,
    sigmoid,
    store_float,
    store_floats,
    store_long,
    sub,
    tanh,
    total,
)
from rwkv_npu.quant.cpu import PANEL

PATIENCE = 4096  # rounds of waiting, some 100 us, before the core is offered to others

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC = 1
_SECOND = 1_000_000_000  # nanoseconds


@njit(nogil=True)
def _now(scratch):  # type: ignore[no-untyped-def]
    """Nanoseconds; 16 bytes of scratch are overwritten."""
    _clock_gettime(types.int32(_MONOTONIC), scratch)  # type: ignore[call-overload]
    return load_long(scratch) * _SECOND + load_long(scratch + 8)


@njit(nogil=True)
def _charge(clock, since, scratch):  # type: ignore[no-untyped-def]
    """Add the time since then to a clock; the time now."""
    now = _now(scratch)
    store_long(load_long(clock) + now - since, clock)
    return now


@njit(nogil=True)
def _meet(counter, goal):  # type: ignore[no-untyped-def]
    """Wait until the threads have come here `goal` times, all together."""
    add_atomically(counter, 1)
    rounds = 0
    while read_atomically(counter) < goal:
        rounds += 1
        if rounds % PATIENCE:
            pause()
        else:  # the others have lost their core to another process: it may be this one
            _sched_yield()


@njit(nogil=True)
def _layer_norm(row, out, width, weight, bias, eps):  # type: ignore[no-untyped-def]
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


@njit(nogil=True)
def _row_matmul(x, s, out, R):  # type: ignore[no-untyped-def]
    """(R,) times an (R, R) matrix, row-major."""
    for n in range(R):
        value = types.float32(0)
        for k in range(R):
            value += load_float(x + k * 4) * load_float(s + (k * R + n) * 4)
        store_float(value, out + n * 4)


@njit(nogil=True)
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    """So many floats and no more: a state has no padding."""
    whole = count // 16 * 16
    for n in range(0, whole, 16):
        store_floats(load_floats(source + n * 4), target + n * 4)
    for n in range(whole, count):
        store_float(load_float(source + n * 4), target + n * 4)


@njit(nogil=True)
def _of_row(t, row):  # type: ignore[no-untyped-def]
    """What an instruction does to one row."""
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


@njit(nogil=True)
def _shift(t, first, last):  # type: ignore[no-untyped-def]
    """Rows of a, each taken from the row above where the mask is not 0, else rows of b."""
    for row in range(first, last):
        at = row * t.stride * 4
        above = row > 0 and load_float(t.vector + row * t.other_stride * 4) != 0
        _copy(t.a + at - t.stride * 4 if above else t.b + at, t.out + at, t.width)


@njit(nogil=True)
def _segment(table, number):  # type: ignore[no-untyped-def]
    """The address of a segment's line in the segment table: its first row, its number of rows, its state."""
    line = table + (1 + number) * SEGMENT_WORDS * 8
    return load_long(line + S_FIRST * 8), load_long(line + S_COUNT * 8), line


@njit(nogil=True)
def _shift_state(t, first, last):  # type: ignore[no-untyped-def]
    """Rows of a, each taken from the row above, and at the first row of a segment from its state."""
    for row in range(max(first, 1), last):
        at = row * t.stride * 4
        _copy(t.a + at - t.stride * 4, t.out + at, t.width)
    for number in range(load_long(t.vector)):
        row, _, line = _segment(t.vector, number)
        if first <= row and row < last:
            _copy(load_long(line + t.k * 8) + t.n, t.out + row * t.stride * 4, t.width)


@njit(nogil=True)
def _store_state(t, first, last):  # type: ignore[no-untyped-def]
    """The last row of each segment, into its state."""
    for number in range(load_long(t.vector)):
        begin, count, line = _segment(t.vector, number)
        row = begin + count - 1
        if first <= row and row < last:
            _copy(t.a + row * t.other_stride * 4, load_long(line + t.k * 8) + t.n, t.width)


@njit(nogil=True)
def _unit(table, heads, work):  # type: ignore[no-untyped-def]
    """The number of the first unit, a head of a segment, that begins where so much work is done; work counts rows times
    heads, and unit u is head u % heads of segment u // heads."""
    segments = load_long(table)
    for number in range(segments):
        row, count, _ = _segment(table, number)
        ahead = work - row * heads
        if ahead < count * heads:
            return number * heads + (0 if ahead <= 0 else -(-ahead // count))
    return segments * heads


@njit(nogil=True)
def _quantise(t, first, last):  # type: ignore[no-untyped-def]
    """Rows as int8; what lies beyond their width is cleared first, since it would count."""
    for row in range(first, last):
        for n in range(t.width, t.k):
            store_float(types.float32(0), t.a + (row * t.stride + n) * 4)
    quantise_rows(t.a, t.stride, first, last, t.k, t.out, t.b, t.sums)


@njit(nogil=True)
def _gemv(t, thread, threads):  # type: ignore[no-untyped-def]
    """A few rows times this thread's columns of a matrix."""
    strips, rows, stride = t.n // 16, t.rows, t.stride
    first, last = strips * thread // threads, strips * (thread + 1) // threads
    if t.format == INT4:
        gemv_int4(t.a, t.b, t.sums, rows, t.weights, t.scales, t.k, first, last, t.out, stride)
    elif t.format == INT8:
        gemv_int8(t.a, t.b, t.sums, rows, t.weights, t.scales, t.k, first, last, t.out, stride)
    elif t.format == FP16:
        gemv_fp16(t.a, t.other_stride, rows, t.weights, t.k, first, last, t.out, stride)
    elif t.format == BF16:
        gemv_bf16(t.a, t.other_stride, rows, t.weights, t.k, first, last, t.out, stride)
    else:
        gemv_fp32(t.a, t.other_stride, rows, t.weights, t.k, first, last, t.out, stride)


@njit(nogil=True)
def _gemm(t, thread, threads, scratch):  # type: ignore[no-untyped-def]
    """All rows times this thread's panels; where there are fewer panels than threads, they share the rows too."""
    panels, tiles = -(-t.n // PANEL), -(-t.rows // ROWS)
    pieces = 1 if panels >= threads else min(tiles, -(-threads // panels))
    jobs = panels * pieces
    for job in range(jobs * thread // threads, jobs * (thread + 1) // threads):
        panel, piece = job // pieces, job % pieces
        first, last = tiles * piece // pieces * ROWS, tiles * (piece + 1) // pieces * ROWS
        if t.format == INT4:
            gemm_int4(
                t.a, t.b, t.sums, first, last, t.weights, t.scales, t.k, panel, scratch, t.out, t.stride
            )
        elif t.format == INT8:
            gemm_int8(
                t.a, t.b, t.sums, first, last, t.weights, t.scales, t.k, panel, scratch, t.out, t.stride
            )
        elif t.format == FP16:
            gemm_fp16(t.a, t.other_stride, first, last, t.weights, t.k, panel, scratch, t.out, t.stride)
        elif t.format == BF16:
            gemm_bf16(t.a, t.other_stride, first, last, t.weights, t.k, panel, scratch, t.out, t.stride)
        else:
            gemm_fp32(t.a, t.other_stride, first, last, t.weights, t.k, panel, scratch, t.out, t.stride)


@njit(nogil=True)
def execute(tape, thread, threads, counter, met, scratch):  # type: ignore[no-untyped-def]
    """This thread's share of a tape. counter: the address of what the threads meet at, which stands at `met`.

    Returns where it stands afterwards: all threads are done then.
    """
    since, clock = _now(scratch), tape[0].clock
    for i in range(len(tape)):
        t = tape[i]
        if t.wait:
            met += threads
            _meet(counter, met)
            if thread == 0:
                since, clock = _charge(clock, since, scratch), t.clock
        if t.op == LINEAR:
            if t.rows <= GEMV_ROWS:
                _gemv(t, thread, threads)
            else:
                _gemm(t, thread, threads, scratch)
        elif t.op == WKV:
            table, work = load_long(t.vector), t.rows * t.n
            begin = _unit(table, t.n, work * thread // threads)
            call_code(t.weights, t.vector, begin, _unit(table, t.n, work * (thread + 1) // threads))
        else:
            first, last = t.rows * thread // threads, t.rows * (thread + 1) // threads
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
                    _of_row(t, row)
    met += threads
    _meet(counter, met)
    if thread == 0:
        _charge(clock, since, scratch)
    return met
