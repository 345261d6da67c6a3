"""Tiles: some rows of x by some strips of a matrix, whose sums are kept in registers. Operations by size of the tile.

A tile is a value of numba's, rows x span vectors. Strides are bytes from one row, or strip, to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from rwkv_npu.kernels import simd
from rwkv_npu.kernels.simd import ADDRESS, Bytes, Floats, Ints, operation

_I32, _F32 = ir.IntType(32), ir.FloatType()


class IntTile(NamedTuple):
    """Sums of products of bytes."""

    zeros_of: Any
    add_dots: Any
    add_dots_of: Any
    plus: Any


class FloatTile(NamedTuple):
    """Sums of floats."""

    zeros: Any
    load: Any
    store: Any
    add_products: Any
    add_products_of: Any
    add_scaled: Any
    add_scaled_to: Any
    plus: Any


def _at(b: Any, address: Any, stride: Any, index: int) -> Any:
    return b.add(address, b.mul(stride, stride.type(index)))


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return simd.call(b, "llvm.fma.v16f32", Floats.llvm, x, y, z)


class _Size:
    """Emits what operations on a tile of this size have in common."""

    def __init__(self, rows: int, span: int):
        self.rows, self.span, self.count = rows, span, rows * span

    def pack(self, b: Any, values: list[Any]) -> Any:
        tile = ir.Constant(ir.ArrayType(values[0].type, self.count), ir.Undefined)
        for i, value in enumerate(values):
            tile = b.insert_value(tile, value, i)
        return tile

    def added(self, b: Any, tile: Any, other: Any, add: Callable[[Any, Any], Any]) -> Any:
        pairs = ((b.extract_value(tile, i), b.extract_value(other, i)) for i in range(self.count))
        return self.pack(b, [add(*pair) for pair in pairs])

    def places(self, b: Any, y: Any, stride: Any) -> Iterator[Any]:
        """Addresses of the vectors of a tile in memory."""
        for r in range(self.rows):
            row = _at(b, y, stride, r)
            yield from (b.add(row, row.type(simd.VECTOR_BYTES * s)) for s in range(self.span))

    def combine(self, b: Any, tile: Any, strips: list[Any], each: Callable[[int], Any], add: Any) -> Any:
        """Every sum, with what a strip and a row make added: add(sum, strip, each(row))."""
        values = []
        for r in range(self.rows):
            of_row = each(r)
            sums = (b.extract_value(tile, r * self.span + s) for s in range(self.span))
            values += [add(so_far, strip, of_row) for so_far, strip in zip(sums, strips, strict=True)]
        return self.pack(b, values)


def int_tile(rows: int, span: int) -> tuple[Any, IntTile]:
    """The type and its operations."""
    size = _Size(rows, span)
    tile_type = types.UniTuple(Ints, size.count)

    def dots(b: Any, tile: Any, strips: list[Any], x: Any, x_stride: Any) -> Any:
        def four(r: int) -> Any:
            return b.bitcast(simd.spread(b, simd.read(b, _at(b, x, x_stride, r), _I32)), Bytes.llvm)

        return size.combine(b, tile, strips, four, lambda so_far, w, v: simd.emit_dot(b, so_far, w, v))

    @operation(tile_type, ADDRESS, ADDRESS, types.int32)
    def zeros_of(b: Any, sums: Any, stride: Any, zero: Any) -> Any:
        """Tile to begin with: what the zero of the weights adds to the sum of each row, taken off."""
        values = []
        for r in range(rows):
            of_row = simd.read(b, _at(b, sums, stride, r), _I32)
            values += [simd.spread(b, b.neg(b.mul(of_row, zero)))] * span
        return size.pack(b, values)

    @operation(tile_type, tile_type, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def add_dots(b: Any, tile: Any, weights: Any, weights_stride: Any, x: Any, x_stride: Any) -> Any:
        """Four rows of the matrix, a strip after the other, and four bytes of each row of x."""
        strips = [simd.read(b, _at(b, weights, weights_stride, s), Bytes.llvm) for s in range(span)]
        return dots(b, tile, strips, x, x_stride)

    @operation(tile_type, tile_type, Bytes, ADDRESS, ADDRESS)
    def add_dots_of(b: Any, tile: Any, strip: Any, x: Any, x_stride: Any) -> Any:
        """The same of one strip, in a register."""
        return dots(b, tile, [strip], x, x_stride)

    @operation(tile_type, tile_type, tile_type)
    def plus(b: Any, tile: Any, other: Any) -> Any:
        return size.added(b, tile, other, b.add)

    return tile_type, IntTile(zeros_of, add_dots, add_dots_of, plus)


def float_tile(rows: int, span: int) -> FloatTile:
    size = _Size(rows, span)
    tile_type, ints_type = types.UniTuple(Floats, size.count), int_tile(rows, span)[0]

    def products(b: Any, tile: Any, strips: list[Any], x: Any, x_stride: Any) -> Any:
        def one(r: int) -> Any:
            return simd.spread(b, simd.read(b, _at(b, x, x_stride, r), _F32))

        return size.combine(b, tile, strips, one, lambda so_far, w, v: _fma(b, v, w, so_far))

    @operation(tile_type)
    def zeros(b: Any) -> Any:
        return size.pack(b, [simd.constant(Floats, 0.0)] * size.count)

    @operation(tile_type, ADDRESS, ADDRESS)
    def load(b: Any, y: Any, y_stride: Any) -> Any:
        return size.pack(b, [simd.read(b, place, Floats.llvm) for place in size.places(b, y, y_stride)])

    @operation(types.void, tile_type, ADDRESS, ADDRESS)
    def store(b: Any, tile: Any, y: Any, y_stride: Any) -> None:
        for i, place in enumerate(size.places(b, y, y_stride)):
            simd.write(b, place, b.extract_value(tile, i))

    @operation(tile_type, tile_type, ADDRESS, ADDRESS, ADDRESS)
    def add_products(b: Any, tile: Any, weights: Any, x: Any, x_stride: Any) -> Any:
        """One row of the matrix, a strip beside the other, and one float of each row of x."""
        places = [b.add(weights, weights.type(simd.VECTOR_BYTES * s)) for s in range(span)]
        return products(b, tile, [simd.read(b, place, Floats.llvm) for place in places], x, x_stride)

    @operation(tile_type, tile_type, Floats, ADDRESS, ADDRESS)
    def add_products_of(b: Any, tile: Any, strip: Any, x: Any, x_stride: Any) -> Any:
        """The same of one strip, in a register."""
        return products(b, tile, [strip], x, x_stride)

    @operation(types.void, ints_type, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
    def add_scaled(
        b: Any,
        tile: Any,
        x_scales: Any,
        x_stride: Any,
        scales: Any,
        scales_stride: Any,
        y: Any,
        y_stride: Any,
    ) -> None:
        """y += tile * scale of the block of the row * scales of the block of the columns."""
        columns = [simd.read_bfloats(b, _at(b, scales, scales_stride, s)) for s in range(span)]
        for i, place in enumerate(size.places(b, y, y_stride)):
            r, s = divmod(i, span)
            scale = simd.spread(b, simd.read(b, _at(b, x_scales, x_stride, r), _F32))
            value = b.fmul(b.sitofp(b.extract_value(tile, i), Floats.llvm), scale)
            simd.write(b, place, _fma(b, value, columns[s], simd.read(b, place, Floats.llvm)))

    @operation(tile_type, tile_type, ints_type, ADDRESS, ADDRESS, ADDRESS)
    def add_scaled_to(b: Any, sums: Any, tile: Any, x_scales: Any, x_stride: Any, scales: Any) -> Any:
        """The same of one strip, where y is in registers."""
        columns, values = simd.read_bfloats(b, scales), []
        for r in range(rows):
            scale = simd.spread(b, simd.read(b, _at(b, x_scales, x_stride, r), _F32))
            dots = b.sitofp(b.extract_value(tile, r), Floats.llvm)
            values.append(_fma(b, dots, b.fmul(scale, columns), b.extract_value(sums, r)))
        return size.pack(b, values)

    @operation(tile_type, tile_type, tile_type)
    def plus(b: Any, tile: Any, other: Any) -> Any:
        return size.added(b, tile, other, b.fadd)

    return FloatTile(zeros, load, store, add_products, add_products_of, add_scaled, add_scaled_to, plus)
