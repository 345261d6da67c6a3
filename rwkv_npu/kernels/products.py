"""Products of rows with a matrix, compiled: quantised matrices as `rwkv_npu.packing` lays them out, and float ones.

One row is a matrix times a vector: every weight is read once, and memory sets the pace. Several rows go through
panels of 64 columns: the weights of a panel are unpacked once into a scratch that fits the cache, and tiles of
ROWS x 64 sums are kept in registers. Quantised weights meet rows that are quantised as well, a scale for every BLOCK
of a row, so that four products of bytes are one step of one instruction.

Addresses are integers. Rows of x and y lie `stride` floats apart, a multiple of PANEL; there are memory for a whole
number of tiles of rows, and whatever lies beyond the last row and column may be overwritten.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from rwkv_npu.kernels import simd
from rwkv_npu.kernels.simd import (
    ADDRESS,
    Floats,
    Ints,
    absolute,
    add,
    add_ints,
    dot,
    floats,
    fma,
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
    operation,
    repeat_four,
    rounded,
    store_bytes,
    store_floats,
    store_small_ints,
    to_floats,
    total,
)
from rwkv_npu.packing import BLOCK, PANEL

ROWS = 4  # rows of a tile
STRIPS = PANEL // simd.LANES
# Strips of a tile: as many as the registers hold.
SPAN = STRIPS if simd.WIDE else 1

# Rows of a panel that are unpacked at a time: 16 KiB stay in the first cache while all rows of x pass by.
K_STEP_BYTES = 256
K_STEP_FLOATS = 64
SCRATCH_BYTES = PANEL * K_STEP_BYTES

INT4, INT8, FP16, BF16, FP32 = range(5)
ZERO_INT4 = 8
ZERO_INT8 = 0 if simd.SIGNED_DOT else 128


# -- tiles: ROWS x SPAN vectors of sums in registers ---------------------------------------------------------

_TILE = ROWS * SPAN
IntTile = types.UniTuple(Ints, _TILE)
FloatTile = types.UniTuple(Floats, _TILE)


def _tile(b: Any, values: list[Any]) -> Any:
    tile = ir.Constant(ir.ArrayType(values[0].type, _TILE), ir.Undefined)
    for i, value in enumerate(values):
        tile = b.insert_value(tile, value, i)
    return tile


def _at(b: Any, address: Any, stride: Any, index: int) -> Any:
    return b.add(address, b.mul(stride, stride.type(index)))


@operation(IntTile, ADDRESS, ADDRESS, types.int32)
def zeros_of(b: Any, sums: Any, stride: Any, zero: Any) -> Any:
    """Tile to begin with: what the zero of the weights adds to the sum of each row, taken off."""
    values = []
    for r in range(ROWS):
        of_row = simd.read(b, _at(b, sums, stride, r), ir.IntType(32))
        values += [simd.spread(b, b.neg(b.mul(of_row, zero)))] * SPAN
    return _tile(b, values)


@operation(IntTile, IntTile, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
def add_dots(b: Any, tile: Any, weights: Any, weights_stride: Any, x: Any, x_stride: Any) -> Any:
    """Four rows of the matrix and four bytes of each row of x."""
    strips = [simd.read(b, _at(b, weights, weights_stride, s), simd.Bytes.llvm) for s in range(SPAN)]
    values = []
    for r in range(ROWS):
        four = simd.read(b, _at(b, x, x_stride, r), ir.IntType(32))
        of_row = b.bitcast(simd.spread(b, four), simd.Bytes.llvm)
        for s in range(SPAN):
            values.append(simd.emit_dot(b, b.extract_value(tile, r * SPAN + s), strips[s], of_row))
    return _tile(b, values)


@operation(types.void, IntTile, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
def add_scaled(
    b: Any, tile: Any, x_scales: Any, x_stride: Any, scales: Any, scales_stride: Any, y: Any, y_stride: Any
) -> None:
    """y += tile * scale of the block of the row * scales of the block of the columns."""
    columns = [simd.read_bfloats(b, _at(b, scales, scales_stride, s)) for s in range(SPAN)]
    for r in range(ROWS):
        scale = simd.spread(b, simd.read(b, _at(b, x_scales, x_stride, r), ir.FloatType()))
        for s in range(SPAN):
            place = b.add(_at(b, y, y_stride, r), y.type(simd.VECTOR_BYTES * s))
            value = b.fmul(b.sitofp(b.extract_value(tile, r * SPAN + s), Floats.llvm), scale)
            so_far = simd.read(b, place, Floats.llvm)
            simd.write(b, place, simd.call(b, "llvm.fma.v16f32", Floats.llvm, value, columns[s], so_far))


@operation(FloatTile, ADDRESS, ADDRESS)
def load_tile(b: Any, y: Any, y_stride: Any) -> Any:
    return _tile(
        b,
        [
            simd.read(b, b.add(_at(b, y, y_stride, r), y.type(simd.VECTOR_BYTES * s)), Floats.llvm)
            for r in range(ROWS)
            for s in range(SPAN)
        ],
    )


@operation(FloatTile, FloatTile, ADDRESS, ADDRESS, ADDRESS)
def add_products(b: Any, tile: Any, weights: Any, x: Any, x_stride: Any) -> Any:
    """One row of the matrix and one float of each row of x."""
    strips = [
        simd.read(b, b.add(weights, weights.type(simd.VECTOR_BYTES * s)), Floats.llvm) for s in range(SPAN)
    ]
    values = []
    for r in range(ROWS):
        of_row = simd.spread(b, simd.read(b, _at(b, x, x_stride, r), ir.FloatType()))
        for s in range(SPAN):
            so_far = b.extract_value(tile, r * SPAN + s)
            values.append(simd.call(b, "llvm.fma.v16f32", Floats.llvm, of_row, strips[s], so_far))
    return _tile(b, values)


@operation(types.void, FloatTile, ADDRESS, ADDRESS)
def store_tile(b: Any, tile: Any, y: Any, y_stride: Any) -> None:
    for r in range(ROWS):
        for s in range(SPAN):
            place = b.add(_at(b, y, y_stride, r), y.type(simd.VECTOR_BYTES * s))
            simd.write(b, place, b.extract_value(tile, r * SPAN + s))


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
            _store_float(scale, scales + place)
            _store_int(types.int32(total(add(add(a, b), add(c, d)))), sums + place)


@operation(types.void, types.float32, ADDRESS)
def _store_float(b: Any, value: Any, address: Any) -> None:
    simd.write(b, address, value)


@operation(types.void, types.int32, ADDRESS)
def _store_int(b: Any, value: Any, address: Any) -> None:
    simd.write(b, address, value)


@operation(types.float32, ADDRESS)
def load_float(b: Any, address: Any) -> Any:
    return simd.read(b, address, ir.FloatType())


@operation(types.int32, ADDRESS)
def load_int(b: Any, address: Any) -> Any:
    return simd.read(b, address, ir.IntType(32))


# -- one row -----------------------------------------------------------------------------------------------


@njit(nogil=True)
def row_times_int4(q, scales, sums, weights, weight_scales, K, first, last, y):  # type: ignore[no-untyped-def]
    """Strips first .. last of the product of one quantised row."""
    blocks = K // BLOCK
    for strip in range(first, last):
        w, s = weights + strip * K * 8, weight_scales + strip * blocks * 32
        result = floats(types.float32(0))
        for block in range(blocks):
            a = simd.ints(types.int32(-ZERO_INT4) * load_int(sums + block * 4))
            b = simd.ints(types.int32(0))
            for k in range(block * BLOCK, (block + 1) * BLOCK, 16):
                some, more = load_bytes(w + k * 8), load_bytes(w + k * 8 + 64)
                a = dot(a, low_nibbles(some), repeat_four(q + k))
                b = dot(b, high_nibbles(some), repeat_four(q + k + 4))
                a = dot(a, low_nibbles(more), repeat_four(q + k + 8))
                b = dot(b, high_nibbles(more), repeat_four(q + k + 12))
            scale = mul(floats(load_float(scales + block * 4)), load_bfloats(s + block * 32))
            result = fma(to_floats(add_ints(a, b)), scale, result)
        store_floats(result, y + strip * 64)


@njit(nogil=True)
def row_times_int8(q, scales, sums, weights, weight_scales, K, first, last, y):  # type: ignore[no-untyped-def]
    """The same for 8 bits."""
    blocks = K // BLOCK
    for strip in range(first, last):
        w, s = weights + strip * K * 16, weight_scales + strip * blocks * 32
        result = floats(types.float32(0))
        for block in range(blocks):
            a = simd.ints(types.int32(-ZERO_INT8) * load_int(sums + block * 4))
            b = simd.ints(types.int32(0))
            for k in range(block * BLOCK, (block + 1) * BLOCK, 8):
                a = dot(a, operand(load_bytes(w + k * 16)), repeat_four(q + k))
                b = dot(b, operand(load_bytes(w + k * 16 + 64)), repeat_four(q + k + 4))
            scale = mul(floats(load_float(scales + block * 4)), load_bfloats(s + block * 32))
            result = fma(to_floats(add_ints(a, b)), scale, result)
        store_floats(result, y + strip * 64)


def _row_times(load: Any, size: int) -> Any:
    @njit(nogil=True)
    def row_times(x, weights, K, first, last, y):  # type: ignore[no-untyped-def]
        """Strips first .. last of the product of one row of floats; K is a multiple of 4."""
        step = 16 * size
        for strip in range(first, last):
            w = weights + strip * K * step
            a = b = c = d = floats(types.float32(0))
            for k in range(0, K, 4):
                at = w + k * step
                a = fma(floats(load_float(x + k * 4)), load(at), a)
                b = fma(floats(load_float(x + k * 4 + 4)), load(at + step), b)
                c = fma(floats(load_float(x + k * 4 + 8)), load(at + 2 * step), c)
                d = fma(floats(load_float(x + k * 4 + 12)), load(at + 3 * step), d)
            store_floats(add(add(a, b), add(c, d)), y + strip * 64)

    return row_times


row_times_fp16 = _row_times(load_halves, 2)
row_times_bf16 = _row_times(load_bfloats, 2)
row_times_fp32 = _row_times(load_floats, 4)


# -- several rows ------------------------------------------------------------------------------------------


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
