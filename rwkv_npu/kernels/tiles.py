"""Tiles: the sums of some rows of x times some strips of a matrix, held in registers.

The functions here make the operations for one size of tile. In compiled code a tile is a tuple of rows x strips
vectors. A stride is the bytes from one row, or strip, to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from rwkv_npu.kernels import simd
from rwkv_npu.kernels.instruction_sets import Dots
from rwkv_npu.kernels.simd import ADDRESS, Floats, operation
from rwkv_npu.quant.cpu import BLOCK

UNPACKED = 16  # rows of a matrix that are unpacked at a time

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class Tile:
    """Emits LLVM code for tiles of `rows` rows and `strips` strips. A list holds the vectors of a tile, row by row."""

    def __init__(self, rows: int, strips: int):
        self.rows, self.strips, self.count = rows, strips, rows * strips
        self.type = types.UniTuple(Floats, self.count)

    def pack(self, b: Any, values: list[Any]) -> Any:
        tile = ir.Constant(ir.ArrayType(values[0].type, self.count), ir.Undefined)
        for i, value in enumerate(values):
            tile = b.insert_value(tile, value, i)
        return tile

    def unpack(self, b: Any, tile: Any) -> list[Any]:
        return [b.extract_value(tile, i) for i in range(self.count)]

    def places(self, b: Any, y: Any, stride: Any) -> Iterator[Any]:
        """The addresses of a tile's vectors in memory, at y."""
        for r in range(self.rows):
            row = at(b, y, stride, r)
            yield from (b.add(row, row.type(simd.VECTOR_BYTES * s)) for s in range(self.strips))

    def load(self, b: Any, y: Any, stride: Any) -> list[Any]:
        return [simd.read(b, place, Floats.llvm) for place in self.places(b, y, stride)]

    def store(self, b: Any, values: list[Any], y: Any, stride: Any) -> None:
        for value, place in zip(values, self.places(b, y, stride), strict=True):
            simd.write(b, place, value)

    def products(self, b: Any, sums: list[Any], strips: list[Any], x: Any, x_stride: Any) -> list[Any]:
        """sums + one float of each row of x times one vector of each strip."""
        sums = list(sums)
        for r in range(self.rows):
            one = simd.spread(b, simd.read(b, at(b, x, x_stride, r), _F32))
            for s, strip in enumerate(strips, r * self.strips):
                sums[s] = fma(b, one, strip, sums[s])
        return sums


class FloatTile(NamedTuple):
    """Operations on a tile of float sums."""

    zeros: Any
    load: Any
    store: Any
    add_products: Any
    add_products_of: Any
    plus: Any


def float_tile(rows: int, strips: int) -> FloatTile:
    tile = Tile(rows, strips)

    @operation(tile.type)
    def zeros(b: Any) -> Any:
        return tile.pack(b, [simd.constant(Floats, 0.0)] * tile.count)

    @operation(tile.type, ADDRESS, ADDRESS)
    def load(b: Any, y: Any, y_stride: Any) -> Any:
        return tile.pack(b, tile.load(b, y, y_stride))

    @operation(types.void, tile.type, ADDRESS, ADDRESS)
    def store(b: Any, sums: Any, y: Any, y_stride: Any) -> None:
        tile.store(b, tile.unpack(b, sums), y, y_stride)

    @operation(tile.type, tile.type, ADDRESS, ADDRESS, ADDRESS)
    def add_products(b: Any, sums: Any, weights: Any, x: Any, x_stride: Any) -> Any:
        """sums + one float of each row of x times one row of the matrix, of which the strips lie side by side."""
        places = [b.add(weights, weights.type(simd.VECTOR_BYTES * s)) for s in range(strips)]
        vectors = [simd.read(b, place, Floats.llvm) for place in places]
        return tile.pack(b, tile.products(b, tile.unpack(b, sums), vectors, x, x_stride))

    @operation(tile.type, tile.type, Floats, ADDRESS, ADDRESS)
    def add_products_of(b: Any, sums: Any, strip: Any, x: Any, x_stride: Any) -> Any:
        """`add_products` for a tile of one strip, whose vector is in a register."""
        return tile.pack(b, tile.products(b, tile.unpack(b, sums), [strip], x, x_stride))

    @operation(tile.type, tile.type, tile.type)
    def plus(b: Any, sums: Any, others: Any) -> Any:
        pairs = zip(tile.unpack(b, sums), tile.unpack(b, others), strict=True)
        return tile.pack(b, [b.fadd(*pair) for pair in pairs])

    return FloatTile(zeros, load, store, add_products, add_products_of, plus)


# -- quantised ---------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Where a block of the matrix and of x lies: addresses, each with its stride from one strip, or row, to the next.

    scales: 16 of a strip, bfloat16 beside packed weights and float32 beside unpacked ones.
    """

    weights: Any
    weights_stride: Any
    scales: Any
    scales_stride: Any
    q: Any
    q_stride: Any
    q_scales: Any  # one float32 of a row
    offsets: Any  # one int32 of a row
    q_parameters_stride: Any  # of q_scales and of offsets


_BLOCK = (ADDRESS,) * len(Block._fields)


class QuantisedTile(Tile):
    """A tile of quantised products. unpacked: weights are operands, as `unpack_rows` stores them."""

    def __init__(self, dots: Dots, rows: int, strips: int, bits: int, unpacked: bool):
        super().__init__(rows, strips)
        self.dots, self.bits, self.unpacked = dots, bits, unpacked

    def add_block(self, b: Any, sums: list[Any], block: Block) -> list[Any]:
        """sums + the products of a block.

        A row's sums have the same bits in tiles of every size and with every instruction set: sums of integers are
        exact, and blocks are added one after the other.
        """
        products, found = self._products(b, block), []
        columns = [self._scales(b, at(b, block.scales, block.scales_stride, s)) for s in range(self.strips)]
        for r in range(self.rows):
            place = at(b, block.q_scales, block.q_parameters_stride, r)
            scale = simd.spread(b, simd.read(b, place, _F32))
            for s, column in enumerate(columns):
                i = r * self.strips + s
                found.append(fma(b, products[i], b.fmul(scale, column), sums[i]))
        return found

    def _products(self, b: Any, block: Block) -> list[Any]:
        fours = self.dots.fours(self.count, self.bits)
        stored = fours * (64 if self.unpacked else 8 * self.bits)  # bytes of a strip

        def step(number: Any, totals: list[Any]) -> list[Any]:
            weights = b.add(block.weights, b.mul(number, _I64(stored)))
            q = b.add(block.q, b.mul(number, _I64(4 * fours)))
            places = [at(b, weights, block.weights_stride, s) for s in range(self.strips)]
            if self.unpacked:
                strips = [self.dots.stored(b, place, fours) for place in places]
            else:
                strips = [self.dots.unpacked(b, place, fours, self.bits) for place in places]
            rows = [at(b, q, block.q_stride, r) for r in range(self.rows)]
            return self.dots.step(b, totals, strips, rows, self.bits)

        places = [at(b, block.offsets, block.q_parameters_stride, r) for r in range(self.rows)]
        offsets = [simd.read(b, place, _I32) for place in places]
        totals = self.dots.begin(b, offsets, self.strips, self.bits)
        rounds = BLOCK // (4 * fours)
        if rounds == 1:
            totals = step(_I64(0), totals)
        else:  # LLVM must not unroll this loop: some of the totals would move to the stack
            totals = simd.loop(b, simd.hidden(b, _I64(rounds)), totals, step)
        return self.dots.end(b, totals, self.rows, self.bits)

    def _scales(self, b: Any, place: Any) -> Any:
        return simd.read(b, place, Floats.llvm) if self.unpacked else simd.read_bfloats(b, place)


def add_block_to(tile: QuantisedTile) -> Any:
    @operation(tile.type, tile.type, *_BLOCK)
    def add_block(b: Any, sums: Any, *block: Any) -> Any:
        return tile.pack(b, tile.add_block(b, tile.unpack(b, sums), Block(*block)))

    return add_block


def unpack_rows(dots: Dots, bits: int) -> Any:
    @operation(types.void, ADDRESS, ADDRESS)
    def unpack(b: Any, weights: Any, target: Any) -> None:
        """Unpack UNPACKED rows of a strip, for products of many rows."""
        fours = dots.arranged(b, dots.unpacked(b, weights, UNPACKED // 4, bits))
        for i, register in enumerate(register for four in fours for register in four):
            simd.write(b, b.add(target, _I64(i * dots.width)), register)

    return unpack


def store_offset(dots: Dots) -> Any:
    @operation(types.void, Floats, ADDRESS)
    def store(b: Any, sums: Any, address: Any) -> None:
        """Store the offset of a block of x. sums: those of `Dots.offset`, whole numbers as floats."""
        simd.write(b, address, dots.offset(b, simd.whole(b, sums)))

    return store


def at(b: Any, address: Any, stride: Any, index: int) -> Any:
    return b.add(address, b.mul(stride, stride.type(index)))


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return simd.call(b, "llvm.fmuladd.v16f32", Floats.llvm, x, y, z)
