"""Chunks: in a prompt, the recurrence of one head computes a few tokens at once, as products of matrices.

Computed token by token, a recurrence reads and writes the state, N x N, for every token. Computed in chunks, it is
products of (2C, N) and (N, N), which read the state twice a chunk and run on tiles of registers. Short chunks are the
fastest, since the work between the tokens of a chunk grows with the square of its length.

The memory of a chunk is one fp32 array (ROWS, N), divided as the names below say. Letters: C the most tokens of a
chunk, N head size.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from rwkv_npu.kernels import simd
from rwkv_npu.kernels.compiler import inner
from rwkv_npu.kernels.simd import (
    ADDRESS,
    Floats,
    floats,
    fma,
    load_float,
    load_floats,
    mul,
    operation,
    store_floats,
)
from rwkv_npu.kernels.tiles import float_tile
from rwkv_npu.quant.cpu import LANES

N = 64
C = LANES // 2  # two keys of each token fill a vector
SHORTEST = (
    2 * C
)  # the least rows of a segment for which chunks are used: the state must be transposed for them

# The first row of each array. Of 2C rows, the first C are what v7 removes from the state; v5 and v6 do not use them.
# The others are what a token reads (queries) and adds (keys, values).
STATE = 0  # (N, N): transposed, [k, v]
QUERIES = STATE + N  # (2C, N)
KEYS = QUERIES + 2 * C  # (2C, N)
VALUES = KEYS + 2 * C  # (2C, N)
OUT = VALUES + 2 * C  # (2C, N): queries times the state, later y
KEYS_T = OUT + 2 * C  # (N, 2C)
SCORES = KEYS_T + 2 * C  # (2C, 2C): queries times keys
DECAY = SCORES + 4 * C * C // N  # (N,): the product of the decays since the begin of the chunk
ROWS = DECAY + 1

ROW = 4 * N  # bytes
_TILE = 4  # rows
_SPAN = 2 if simd.WIDE else 1  # strips of a tile: as many as fit the registers
_COLUMNS = _SPAN * LANES
_wide, _narrow = float_tile(_TILE, _SPAN), float_tile(_TILE, 1)
_zeros, _load, _store, _add = _wide.zeros, _wide.load, _wide.store, _wide.add_products
_zeros_narrow, _store_narrow, _add_narrow = _narrow.zeros, _narrow.store, _narrow.add_products
_tile_type = types.UniTuple(Floats, _TILE * _SPAN)


@operation(_tile_type, _tile_type, ADDRESS)
def _times(b: Any, tile: Any, factors: Any) -> Any:
    """Multiply each row of a tile by its factor: factors (_TILE,)."""
    for i in range(_TILE * _SPAN):
        at = b.add(factors, factors.type(4 * (i // _SPAN)))
        factor = simd.spread(b, simd.read(b, at, ir.FloatType()))
        tile = b.insert_value(tile, b.fmul(b.extract_value(tile, i), factor), i)
    return tile


@operation(types.void, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
def _transpose_block(b: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> None:
    """Transpose 16 x 16 floats: exchange the off-diagonal quarters of blocks of 16, then of 8, 4 and 2."""

    def place(at: Any, stride: Any, i: int) -> Any:
        return b.add(at, b.mul(stride, stride.type(i)))

    rows = [simd.read(b, place(source, source_stride, i), Floats.llvm) for i in range(LANES)]
    half = LANES // 2
    while half:
        low = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
        high = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes) for lanes in (low, high)]
        for i in range(LANES):
            if not i & half:
                pair = rows[i], rows[i + half]
                rows[i], rows[i + half] = (b.shuffle_vector(*pair, mask) for mask in masks)
        half //= 2
    for i, row in enumerate(rows):
        simd.write(b, place(target, target_stride, i), row)


@inner
def transpose_state(source, target):  # type: ignore[no-untyped-def]
    """target (N, N) = source^T."""
    for row in range(0, N, LANES):
        for column in range(0, N, LANES):
            _transpose_block(source + row * ROW + 4 * column, ROW, target + column * ROW + 4 * row, ROW)


@inner
def start(at):  # type: ignore[no-untyped-def]
    """Begin a chunk at address `at`: nothing has decayed yet."""
    for column in range(0, ROW, 4 * LANES):
        store_floats(floats(1.0), at + DECAY * ROW + column)


@inner
def _clear(at, tokens):  # type: ignore[no-untyped-def]
    """Zero the rows of keys and values that a chunk of `tokens` tokens does not use."""
    for t in range(tokens, C):
        for column in range(0, ROW, 4 * LANES):
            for rows in (KEYS, KEYS + C, VALUES, VALUES + C):
                store_floats(floats(0.0), at + (rows + t) * ROW + column)


@inner
def _read_state(at, begin):  # type: ignore[no-untyped-def]
    """OUT = QUERIES STATE. begin, here and below: the first of the 2C rows that is used, 0 or C."""
    for row in range(begin, 2 * C, _TILE):
        for column in range(0, N, _COLUMNS):
            tile = _zeros()
            for k in range(N):
                weights = at + (STATE + k) * ROW + 4 * column
                tile = _add(tile, weights, at + (QUERIES + row) * ROW + 4 * k, ROW)
            _store(tile, at + (OUT + row) * ROW + 4 * column, ROW)


@inner
def _score(at, begin):  # type: ignore[no-untyped-def]
    """SCORES = QUERIES KEYS^T."""
    for column in range(0, N, LANES):
        target = at + KEYS_T * ROW + 4 * LANES * column
        _transpose_block(at + KEYS * ROW + 4 * column, ROW, target, 4 * LANES)
    for row in range(begin, 2 * C, _TILE):
        tile = _zeros_narrow()
        for k in range(N):
            weights = at + KEYS_T * ROW + 4 * LANES * k
            tile = _add_narrow(tile, weights, at + (QUERIES + row) * ROW + 4 * k, ROW)
        _store_narrow(tile, at + SCORES * ROW + 4 * LANES * row, 4 * LANES)


@inner
def _mix(at, query, removed, added, target):  # type: ignore[no-untyped-def]
    """Row `target` = row `query` of OUT + its scores times the first `removed` and the first `added` values."""
    scores = at + SCORES * ROW + 4 * LANES * query
    for column in range(0, ROW, 4 * LANES):
        total = load_floats(at + (OUT + query) * ROW + column)
        for s in range(C, C + added):
            value = load_floats(at + (VALUES + s) * ROW + column)
            total = fma(floats(load_float(scores + 4 * s)), value, total)
        for s in range(removed):
            value = load_floats(at + (VALUES + s) * ROW + column)
            total = fma(floats(load_float(scores + 4 * s)), value, total)
        store_floats(total, at + target * ROW + column)


@inner
def _update_state(at, begin):  # type: ignore[no-untyped-def]
    """STATE = diag(DECAY) STATE + KEYS^T VALUES."""
    for row in range(0, N, _TILE):
        for column in range(0, N, _COLUMNS):
            place = at + (STATE + row) * ROW + 4 * column
            tile = _times(_load(place, ROW), at + DECAY * ROW + 4 * row)
            for t in range(begin, 2 * C):
                weights = at + (VALUES + t) * ROW + 4 * column
                tile = _add(tile, weights, at + (KEYS + t) * ROW + 4 * row, 4)
            _store(tile, place, ROW)


@inner
def _decay_keys(at, begin):  # type: ignore[no-untyped-def]
    """Make KEYS relative to the end of the chunk; they were relative to its begin."""
    for column in range(0, ROW, 4 * LANES):
        decay = load_floats(at + DECAY * ROW + column)
        for t in range(begin, 2 * C):
            place = at + (KEYS + t) * ROW + column
            store_floats(mul(load_floats(place), decay), place)


@inner
def advance_v7(at, tokens):  # type: ignore[no-untyped-def]
    """Compute y of the chunk's tokens, from row OUT + C on, and the STATE after them.

    The first loop finds the values that each token removes, by forward substitution.
    """
    _clear(at, tokens)
    _read_state(at, 0)
    _score(at, 0)
    for t in range(tokens):
        _mix(at, t, t, t, VALUES + t)
    for t in range(tokens):
        _mix(at, C + t, t + 1, t + 1, OUT + C + t)
    _decay_keys(at, 0)
    _update_state(at, 0)


@inner
def advance_v5(at, tokens, alone):  # type: ignore[no-untyped-def]
    """`advance_v7` for v5 and v6, which remove nothing. The caller adds what a token reads of its own value to y.

    alone: the chunk is one token, which decays so much that its key cannot be divided by the decay.
    """
    _clear(at, tokens)
    _read_state(at, C)
    if not alone:
        _score(at, C)
        for t in range(tokens):
            _mix(at, C + t, 0, t, OUT + C + t)
        _decay_keys(at, C)
    _update_state(at, C)
