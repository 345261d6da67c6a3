"""Products of rows with a matrix, compiled: quantised matrices as `rwkv_npu.quant.cpu` lays them out, and float ones.

One row is a matrix times a vector: every weight is read once, and memory sets the pace. So it does for a few rows,
which take turns at each strip while its weights are in the cache. Many rows go through panels of 64 columns: the
weights of a panel are unpacked once into a scratch that fits the cache, and tiles of ROWS x 64 sums are kept in
registers. Quantised weights meet rows that are quantised as well, a scale for every BLOCK of a row, so that four
products of bytes are one step of one instruction.

Addresses are integers. Rows of x and y lie `stride` floats apart, a multiple of PANEL; there are memory for a whole
number of tiles of rows, and whatever lies beyond the last row and column may be overwritten.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types

from rwkv_npu.kernels import simd
from rwkv_npu.kernels.instructions import TILE_ROWS
from rwkv_npu.kernels.simd import (
    absolute,
    add,
    floats,
    high_nibbles,
    larger,
    largest,
    load_bfloats,
    load_bytes,
    load_floats,
    load_halves,
    low_nibbles,
    mul,
    operand,
    rounded,
    store_bytes,
    store_float,
    store_floats,
    store_int,
    store_small_ints,
    total,
)
from rwkv_npu.kernels.tiles import float_tile, int_tile
from rwkv_npu.quant.cpu import BLOCK, PANEL, ZERO

ROWS = TILE_ROWS
STRIPS = PANEL // simd.LANES
# Strips of a tile: as many as the registers hold.
SPAN = STRIPS if simd.WIDE else 1

FEW = 16  # rows up to which it is better to read weights as they lie than to unpack them for all rows
# Rows of a panel that are unpacked at a time: 16 KiB stay in the first cache while all rows of x pass by.
K_STEP_BYTES = 256
K_STEP_FLOATS = 64
SCRATCH_BYTES = PANEL * K_STEP_BYTES

# The zero of weights as `dot` takes them.
ZERO_INT4 = ZERO[4]
ZERO_INT8 = 0 if simd.SIGNED_DOT else ZERO[8]


_ints, _floats = int_tile(ROWS, SPAN)[1], float_tile(ROWS, SPAN)  # of panels
zeros_of, add_dots, add_scaled = _ints.zeros_of, _ints.add_dots, _floats.add_scaled
load_tile, add_products, store_tile = _floats.load, _floats.add_products, _floats.store


# -- rows, quantised ---------------------------------------------------------------------------------------


@njit(nogil=True)
def quantise_rows(x, stride, first, last, K, q, scales, sums):  # type: ignore[no-untyped-def]
    """Rows first .. last of x as int8: per block the scale of its largest value, and the sum of its numbers.

    q (rows, K) int8, scales (rows, K / BLOCK) float32, sums (rows, K / BLOCK) int32; K is padded, and x is zero there.
    """
    blocks = K // BLOCK
    for row in range(first, last):
        source, target = x + row * stride * 4, q + row * K
        for block in range(blocks):
            begin = source + block * BLOCK * 4
            a, b = load_floats(begin), load_floats(begin + 64)
            c, d = load_floats(begin + 128), load_floats(begin + 192)
            peak = largest(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(d))))
            scale = peak * types.float32(1 / 127)
            inverse = floats(types.float32(127) / peak if peak > 0 else types.float32(0))
            a, b = rounded(mul(a, inverse)), rounded(mul(b, inverse))
            c, d = rounded(mul(c, inverse)), rounded(mul(d, inverse))
            out = target + block * BLOCK
            store_small_ints(a, out)
            store_small_ints(b, out + 16)
            store_small_ints(c, out + 32)
            store_small_ints(d, out + 48)
            place = (row * blocks + block) * 4
            store_float(scale, scales + place)
            store_int(types.int32(total(add(add(a, b), add(c, d)))), sums + place)


# -- few rows ----------------------------------------------------------------------------------------------
# A product of `R` rows with one strip, in which weights go from memory to the sums without a stop. Two tiles of sums
# take turns, so that an addition need not wait for the one before.


def _few_quantised(R: int, bits: int) -> Any:
    (zeros_of, _, add_dots, plus), sums_of = int_tile(R, 1)[1], float_tile(R, 1)
    zeros, store, add_scaled = sums_of.zeros, sums_of.store, sums_of.add_scaled_to
    zero = ZERO_INT4 if bits == 4 else ZERO_INT8

    @njit(nogil=True)
    def add_int4(a, b, w, q, K):  # type: ignore[no-untyped-def]
        """A block."""
        for k in range(0, BLOCK, 16):
            some, more = load_bytes(w + k * 8), load_bytes(w + k * 8 + 64)
            a = add_dots(a, low_nibbles(some), q + k, K)
            b = add_dots(b, high_nibbles(some), q + k + 4, K)
            a = add_dots(a, low_nibbles(more), q + k + 8, K)
            b = add_dots(b, high_nibbles(more), q + k + 12, K)
        return plus(a, b)

    @njit(nogil=True)
    def add_int8(a, b, w, q, K):  # type: ignore[no-untyped-def]
        for k in range(0, BLOCK, 8):
            a = add_dots(a, operand(load_bytes(w + k * 16)), q + k, K)
            b = add_dots(b, operand(load_bytes(w + k * 16 + 64)), q + k + 4, K)
        return plus(a, b)

    add_block = add_int4 if bits == 4 else add_int8

    @njit(nogil=True)
    def few(q, scales, sums, weights, weight_scales, K, strip, y, stride):  # type: ignore[no-untyped-def]
        blocks = K // BLOCK
        w, s = weights + strip * K * 2 * bits, weight_scales + strip * blocks * 32
        result = zeros()
        for block in range(blocks):
            a = zeros_of(sums + block * 4, blocks * 4, types.int32(zero))
            b = zeros_of(sums + block * 4, blocks * 4, types.int32(0))
            dots = add_block(a, b, w + block * BLOCK * 2 * bits, q + block * BLOCK, K)
            result = add_scaled(result, dots, scales + block * 4, blocks * 4, s + block * 32)
        store(result, y + strip * 64, stride * 4)

    return few


def _few_floats(R: int, load: Any, size: int) -> Any:
    tile = float_tile(R, 1)
    zeros, store, add_products, plus = tile.zeros, tile.store, tile.add_products_of, tile.plus

    @njit(nogil=True)
    def few(x, x_stride, weights, K, strip, y, stride):  # type: ignore[no-untyped-def]
        """Nothing of x is read beyond K."""
        step, fours = 16 * size, K // 4 * 4
        w = weights + strip * K * step
        a, b, c, d = zeros(), zeros(), zeros(), zeros()
        for k in range(0, fours, 4):
            at = w + k * step
            a = add_products(a, load(at), x + k * 4, x_stride * 4)
            b = add_products(b, load(at + step), x + k * 4 + 4, x_stride * 4)
            c = add_products(c, load(at + 2 * step), x + k * 4 + 8, x_stride * 4)
            d = add_products(d, load(at + 3 * step), x + k * 4 + 12, x_stride * 4)
        for k in range(fours, K):
            a = add_products(a, load(w + k * step), x + k * 4, x_stride * 4)
        store(plus(plus(a, b), plus(c, d)), y + strip * 64, stride * 4)

    return few


def _few_rows_quantised(bits: int) -> Any:
    one, two, four = (_few_quantised(R, bits) for R in (1, 2, 4))

    @njit(nogil=True)
    def few_rows(q, scales, sums, rows, weights, weight_scales, K, first, last, y, stride):  # type: ignore[no-untyped-def]
        """Quantised rows times strips first .. last, whose weights are read from memory once."""
        for strip in range(first, last):
            row = 0
            while row < rows:
                x, at = q + row * K, row * (K // BLOCK) * 4
                of_row = y + row * stride * 4
                if rows - row > 2 and simd.WIDE:
                    four(x, scales + at, sums + at, weights, weight_scales, K, strip, of_row, stride)
                    row += 4
                elif rows - row > 1:
                    two(x, scales + at, sums + at, weights, weight_scales, K, strip, of_row, stride)
                    row += 2
                else:
                    one(x, scales + at, sums + at, weights, weight_scales, K, strip, of_row, stride)
                    row += 1

    return few_rows


def _few_rows_floats(load: Any, size: int) -> Any:
    one, two, four = (_few_floats(R, load, size) for R in (1, 2, 4))

    @njit(nogil=True)
    def few_rows(x, x_stride, rows, weights, K, first, last, y, stride):  # type: ignore[no-untyped-def]
        """The same of floats."""
        for strip in range(first, last):
            row = 0
            while row < rows:
                of_x, of_y = x + row * x_stride * 4, y + row * stride * 4
                if rows - row > 2 and simd.WIDE:
                    four(of_x, x_stride, weights, K, strip, of_y, stride)
                    row += 4
                elif rows - row > 1:
                    two(of_x, x_stride, weights, K, strip, of_y, stride)
                    row += 2
                else:
                    one(of_x, x_stride, weights, K, strip, of_y, stride)
                    row += 1

    return few_rows


few_rows_int4, few_rows_int8 = _few_rows_quantised(4), _few_rows_quantised(8)
few_rows_fp16 = _few_rows_floats(load_halves, 2)
few_rows_bf16 = _few_rows_floats(load_bfloats, 2)
few_rows_fp32 = _few_rows_floats(load_floats, 4)


# -- many rows ------------------------------------------------------------------------------------------


@njit(nogil=True)
def _clear(y, stride, first, last):  # type: ignore[no-untyped-def]
    """A panel's columns of rows first .. last."""
    for row in range(first, last):
        for n in range(0, PANEL, 16):
            store_floats(floats(types.float32(0)), y + (row * stride + n) * 4)


@njit(nogil=True)
def _unpack_int4(strip, count, target):  # type: ignore[no-untyped-def]
    for k in range(0, count, 8):
        both = load_bytes(strip + k * 8)
        store_bytes(low_nibbles(both), target + k * 16)
        store_bytes(high_nibbles(both), target + k * 16 + 64)


@njit(nogil=True)
def _unpack_int8(strip, count, target):  # type: ignore[no-untyped-def]
    for k in range(0, count, 4):
        store_bytes(operand(load_bytes(strip + k * 16)), target + k * 16)


@njit(nogil=True)
def rows_times_quantised(  # type: ignore[no-untyped-def]
    bits, q, scales, sums, first, last, weights, weight_scales, K, panel, scratch, y, stride
):
    """Rows first .. last (whole tiles) of quantised rows times one panel of the matrix."""
    blocks = K // BLOCK
    zero = types.int32(ZERO_INT4 if bits == 4 else ZERO_INT8)
    strips, of_panel = weights + panel * STRIPS * K * 2 * bits, weight_scales + panel * STRIPS * blocks * 32
    out = y + panel * PANEL * 4
    _clear(out, stride, first, last)
    for k0 in range(0, K, K_STEP_BYTES):
        count = min(K_STEP_BYTES, K - k0)
        for s in range(STRIPS):
            strip, target = strips + (s * K + k0) * 2 * bits, scratch + s * count * 16
            if bits == 4:
                _unpack_int4(strip, count, target)
            else:
                _unpack_int8(strip, count, target)
        for row in range(first, last, ROWS):
            of_row = (row * blocks + k0 // BLOCK) * 4
            for s in range(0, STRIPS, SPAN):
                w, ws = scratch + s * count * 16, of_panel + (s * blocks + k0 // BLOCK) * 32
                for block in range(count // BLOCK):
                    tile = zeros_of(sums + of_row + block * 4, blocks * 4, zero)
                    for k in range(block * BLOCK, (block + 1) * BLOCK, 4):
                        tile = add_dots(tile, w + k * 16, count * 16, q + row * K + k0 + k, K)
                    place, columns = of_row + block * 4, ws + block * 32
                    to = out + row * stride * 4 + s * 64
                    add_scaled(tile, scales + place, blocks * 4, columns, blocks * 32, to, stride * 4)


def _rows_times(load: Any, size: int) -> Any:
    @njit(nogil=True)
    def rows_times(x, x_stride, first, last, weights, K, panel, scratch, y, stride):  # type: ignore[no-untyped-def]
        """Rows first .. last (whole tiles) of x times one panel of a float matrix."""
        strips, out = weights + panel * STRIPS * K * 16 * size, y + panel * PANEL * 4
        _clear(out, stride, first, last)
        for k0 in range(0, K, K_STEP_FLOATS):
            count = min(K_STEP_FLOATS, K - k0)
            for s in range(STRIPS):
                for k in range(count):
                    store_floats(
                        load(strips + (s * K + k0 + k) * 16 * size), scratch + (k * PANEL + s * 16) * 4
                    )
            for row in range(first, last, ROWS):
                of_row = x + (row * x_stride + k0) * 4
                for s in range(0, STRIPS, SPAN):
                    to = out + row * stride * 4 + s * 64
                    tile = load_tile(to, stride * 4)
                    for k in range(count):
                        tile = add_products(
                            tile, scratch + k * PANEL * 4 + s * 64, of_row + k * 4, x_stride * 4
                        )
                    store_tile(tile, to, stride * 4)

    return rows_times


rows_times_fp16 = _rows_times(load_halves, 2)
rows_times_bf16 = _rows_times(load_bfloats, 2)
rows_times_fp32 = _rows_times(load_floats, 4)
