"""Compiled products of rows and a matrix, quantised as `rwkv_npu.quant.cpu` packs it, or of floats.

    gemv    for few rows. The speed of memory is the limit, so every weight is read from it once: all rows are
            multiplied by a strip while its weights are in the cache.
    gemm    for many rows, a panel of 64 columns at a time. The weights of a panel are unpacked into a scratch that fits
            the cache, and then multiplied by all rows, tile by tile.

For a quantised matrix the rows are quantised too, with a scale for every BLOCK of a row. The result of a row then has
the same bits alone and among any other rows, by gemv and by gemm. Products of floats do not promise this.

Addresses are integers. Rows of x and y lie `stride` floats apart, a multiple of PANEL. Their memory holds a whole
number of tiles: what lies beyond the last row and column may be overwritten.
"""

from __future__ import annotations

from typing import Any

from numba import types

from rwkv_npu.kernels import instruction_sets, simd
from rwkv_npu.kernels.compiler import inner
from rwkv_npu.kernels.instructions import TILE_ROWS
from rwkv_npu.kernels.simd import (
    absolute,
    add,
    floats,
    larger,
    largest,
    load_bfloats,
    load_floats,
    load_halves,
    mul,
    rounded,
    store_float,
    store_floats,
    store_small_ints,
)
from rwkv_npu.kernels.tiles import (
    UNPACKED,
    QuantisedTile,
    add_block_to,
    float_tile,
    store_offset,
    unpack_rows,
)
from rwkv_npu.quant.cpu import BLOCK, PANEL

SET = instruction_sets.current()
ROWS = TILE_ROWS
STRIPS = PANEL // simd.LANES
# Strips of a tile of floats: as many as fit the registers.
FLOAT_STRIPS = STRIPS if simd.WIDE else 1

GEMV_ROWS = 16  # the most rows for which gemv is used: for so few, unpacking the weights does not pay
# The weights that gemm unpacks at a time: they stay in the L1 cache while all rows of x are multiplied by them.
UNPACKED_BYTES = 1 << 14
K_STEP_FLOATS = UNPACKED_BYTES // (PANEL * 4)
SCRATCH_BYTES = UNPACKED_BYTES + UNPACKED_BYTES // BLOCK * 4  # with the scales of the blocks

_float_tile = float_tile(ROWS, FLOAT_STRIPS)
load_tile, add_products, store_tile = _float_tile.load, _float_tile.add_products, _float_tile.store

# -- rows, quantised ---------------------------------------------------------------------------------------

_store_offset = store_offset(SET.gemv)


@inner
def quantise_rows(x, stride, first, last, K, q, scales, offsets):  # type: ignore[no-untyped-def]
    """Quantise rows first .. last of x to int8, -127 .. 127; of each block store a scale and an offset.

    q (rows, K) int8, scales (rows, K / BLOCK) float32, offsets (rows, K / BLOCK) int32: see `instruction_sets`. K is
    padded to whole blocks, and x is zero in the padding.
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
            _store_offset(add(add(a, b), add(c, d)), offsets + place)


# -- gemv ----------------------------------------------------------------------------------------------------


def _gemv_strip_quantised(R: int, bits: int) -> Any:
    zeros, store = float_tile(R, 1).zeros, float_tile(R, 1).store
    add_block = add_block_to(QuantisedTile(SET.gemv, R, 1, bits, unpacked=False))

    @inner
    def gemv(q, scales, offsets, weights, weight_scales, K, strip, y, stride):  # type: ignore[no-untyped-def]
        """R quantised rows times a strip, whose weights go from memory to registers and are used at once."""
        blocks = K // BLOCK
        w, s = weights + strip * K * 2 * bits, weight_scales + strip * blocks * 32
        sums = zeros()
        for block in range(blocks):
            at, i = w + block * BLOCK * 2 * bits, block * 4
            sums = add_block(
                sums, at, 0, s + block * 32, 0, q + block * BLOCK, K, scales + i, offsets + i, blocks * 4
            )
        store(sums, y + strip * 64, stride * 4)

    return gemv


def _gemv_quantised(bits: int) -> Any:
    one, two, four = (_gemv_strip_quantised(R, bits) for R in (1, 2, 4))
    most = SET.rows

    @inner
    def gemv(q, scales, offsets, rows, weights, weight_scales, K, first, last, y, stride):  # type: ignore[no-untyped-def]
        """Quantised rows times strips first .. last, each of which is read from memory once."""
        for strip in range(first, last):
            row = 0
            while row < rows:
                x, at, out = q + row * K, row * (K // BLOCK) * 4, y + row * stride * 4
                if rows - row > 2 and most >= 4:
                    four(x, scales + at, offsets + at, weights, weight_scales, K, strip, out, stride)
                    row += 4
                elif rows - row > 1 and most >= 2:
                    two(x, scales + at, offsets + at, weights, weight_scales, K, strip, out, stride)
                    row += 2
                else:
                    one(x, scales + at, offsets + at, weights, weight_scales, K, strip, out, stride)
                    row += 1

    return gemv


def _gemv_strip_floats(R: int, load: Any, size: int) -> Any:
    tile = float_tile(R, 1)
    zeros, store, add_products, plus = tile.zeros, tile.store, tile.add_products_of, tile.plus

    @inner
    def gemv(x, x_stride, weights, K, strip, y, stride):  # type: ignore[no-untyped-def]
        """R rows of floats times a strip, in four sums, so that an addition need not wait for the one before it.

        x is not read beyond K.
        """
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

    return gemv


def _gemv_floats(load: Any, size: int) -> Any:
    one, two, four = (_gemv_strip_floats(R, load, size) for R in (1, 2, 4))

    @inner
    def gemv(x, x_stride, rows, weights, K, first, last, y, stride):  # type: ignore[no-untyped-def]
        """Rows of floats times strips first .. last, each of which is read from memory once."""
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

    return gemv


gemv_int4, gemv_int8 = _gemv_quantised(4), _gemv_quantised(8)
gemv_fp16 = _gemv_floats(load_halves, 2)
gemv_bf16 = _gemv_floats(load_bfloats, 2)
gemv_fp32 = _gemv_floats(load_floats, 4)


# -- gemm ----------------------------------------------------------------------------------------------------


@inner
def _clear(y, stride, first, last):  # type: ignore[no-untyped-def]
    """Zero the columns of a panel in rows first .. last."""
    for row in range(first, last):
        for n in range(0, PANEL, 16):
            store_floats(floats(types.float32(0)), y + (row * stride + n) * 4)


def _gemm_quantised(bits: int) -> Any:
    rows_of_tile, strips_of_tile = SET.rows, SET.strips
    k_step = UNPACKED_BYTES // (simd.LANES * strips_of_tile)
    scale_bytes = k_step // BLOCK * 64  # of a strip
    unpack, sums_of = unpack_rows(SET.gemm, bits), float_tile(rows_of_tile, strips_of_tile)
    zeros, load, store = sums_of.zeros, sums_of.load, sums_of.store
    add_block = add_block_to(QuantisedTile(SET.gemm, rows_of_tile, strips_of_tile, bits, unpacked=True))

    @inner
    def unpack_strips(weights, weight_scales, K, strip, k0, count, scratch):  # type: ignore[no-untyped-def]
        """Unpack rows k0 .. k0 + count of a tile's strips, and their scales, into scratch."""
        blocks = K // BLOCK
        for s in range(strips_of_tile):
            source, target = weights + ((strip + s) * K + k0) * 2 * bits, scratch + s * count * 16
            for k in range(0, count, UNPACKED):
                unpack(source + k * 2 * bits, target + k * 16)
            source = weight_scales + ((strip + s) * blocks + k0 // BLOCK) * 32
            target = scratch + UNPACKED_BYTES + s * scale_bytes
            for block in range(count // BLOCK):
                store_floats(load_bfloats(source + block * 32), target + block * 64)

    @inner
    def gemm(q, scales, offsets, first, last, weights, weight_scales, K, panel, scratch, y, stride):  # type: ignore[no-untyped-def]
        """Quantised rows first .. last (whole tiles) times one panel of the matrix."""
        blocks = K // BLOCK
        for strip in range(panel * STRIPS, (panel + 1) * STRIPS, strips_of_tile):
            for k0 in range(0, K, k_step):
                count = min(k_step, K - k0)
                unpack_strips(weights, weight_scales, K, strip, k0, count, scratch)
                for row in range(first, last, rows_of_tile):
                    of_q, of_row = q + row * K + k0, (row * blocks + k0 // BLOCK) * 4
                    out = y + row * stride * 4 + strip * 64
                    sums = load(out, stride * 4) if k0 > 0 else zeros()
                    for block in range(count // BLOCK):
                        sums = add_block(
                            sums,
                            scratch + block * BLOCK * 16,
                            count * 16,
                            scratch + UNPACKED_BYTES + block * 64,
                            scale_bytes,
                            of_q + block * BLOCK,
                            K,
                            scales + of_row + block * 4,
                            offsets + of_row + block * 4,
                            blocks * 4,
                        )
                    store(sums, out, stride * 4)

    return gemm


gemm_int4, gemm_int8 = _gemm_quantised(4), _gemm_quantised(8)


def _gemm_floats(load: Any, size: int) -> Any:
    @inner
    def gemm(x, x_stride, first, last, weights, K, panel, scratch, y, stride):  # type: ignore[no-untyped-def]
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
                for s in range(0, STRIPS, FLOAT_STRIPS):
                    to = out + row * stride * 4 + s * 64
                    tile = load_tile(to, stride * 4)
                    for k in range(count):
                        tile = add_products(
                            tile, scratch + k * PANEL * 4 + s * 64, of_row + k * 4, x_stride * 4
                        )
                    store_tile(tile, to, stride * 4)

    return gemm


gemm_fp16 = _gemm_floats(load_halves, 2)
gemm_bf16 = _gemm_floats(load_bfloats, 2)
gemm_fp32 = _gemm_floats(load_floats, 4)
