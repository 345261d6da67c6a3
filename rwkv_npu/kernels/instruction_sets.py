"""Products of bytes, by instruction set: one row of SETS each.

A product adds up blocks of 64 int8 of rows of x times a strip of 16 columns, exactly, in int32. x is never -128.
Weights are bytes: four of a column lie side by side, 16 columns are 64 bytes. `Dots` emits LLVM code for a tile of some
rows times some strips; a set overrides what its instructions do otherwise. A new set is a row and such a class.

A block begins with an `offset`, an int32 of a row that was computed when the row was quantised. It takes off what
unsigned weights add: those of int4 are 0 .. 15 and stand for -8 .. 7.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir

from rwkv_npu.kernels import processor
from rwkv_npu.kernels.simd import Floats, Ints, call, concatenate, constant, read, spread, take
from rwkv_npu.quant.cpu import LANES

_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))

Values = list[Any]


class Dots:
    """Sums of products by plain LLVM code, for any processor.

    width: bytes of a register. zero8: what int8 weights stand for 0 with: 128 as they are stored, 0 once `operand` has
    made them signed.
    """

    width = 64
    zero8 = 0

    @property
    def bytes(self) -> Any:
        return ir.VectorType(_I8, self.width)

    @property
    def ints(self) -> Any:
        return ir.VectorType(_I32, self.width // 4)

    def fours(self, tile: int, bits: int) -> int:
        """Fours of a row that are multiplied before the loop is closed, for a tile of so many rows and strips.

        A long body gives LLVM more to reorder than a large tile leaves registers for.
        """
        return 4

    # -- weights of a strip: a list of registers for every four rows of the matrix -----------------------------

    def unpacked(self, b: Any, address: Any, fours: int, bits: int) -> list[Values]:
        """Weights as they are stored, to operands."""
        if bits == 8:
            return [[self.operand(b, v) for v in four] for four in self.stored(b, address, fours)]
        found = []
        for both in self.stored(b, address, fours // 2):
            found.append([b.and_(v, ir.Constant(v.type, [15] * self.width)) for v in both])
            found.append([b.lshr(v, ir.Constant(v.type, [4] * self.width)) for v in both])
        return found

    def stored(self, b: Any, address: Any, count: int) -> list[Values]:
        """So many times 64 bytes."""
        places = [range(start, start + 64, self.width) for start in range(0, 64 * count, 64)]
        return [[read(b, b.add(address, _I64(at)), self.bytes) for at in four] for four in places]

    def operand(self, b: Any, v: Any) -> Any:
        """int8 weights, stored with a zero of 128."""
        return v if self.zero8 else b.xor(v, ir.Constant(v.type, [128] * self.width))

    def arranged(self, b: Any, fours: list[Values]) -> list[Values]:
        """Operands in the order in which products of many rows read them."""
        return fours

    # -- rows -------------------------------------------------------------------------------------------------

    def offset(self, b: Any, sums: Any) -> Any:
        """The offset of a block. sums: 16 int32 that add up to the sum of the block, x[i] in that of i % 16."""
        return b.mul(_total(b, sums, 1)[0], _I32(-8))

    def repeated(self, b: Any, x: Any, fours: int) -> Values:
        """Bytes of a row: each four of them, in every lane of a register."""
        found = []
        for start in range(0, 4 * fours, 4):
            four = read(b, b.add(x, _I64(start)), _I32)
            found.append(b.bitcast(spread(b, four, self.width // 4), self.bytes))
        return found

    # -- a tile: what is added up lies in registers, row by row, strip by strip -------------------------------

    def begin(self, b: Any, offsets: Values, strips: int, bits: int) -> Values:
        return [self.first(b, offset, bits) for offset in offsets for _ in range(strips * 64 // self.width)]

    def first(self, b: Any, offset: Any, bits: int) -> Any:
        if bits == 8 and not self.zero8:
            return ir.Constant(self.ints, [0] * self.ints.count)
        return spread(b, b.shl(offset, _I32(4)) if bits == 8 else offset, self.ints.count)

    def step(self, b: Any, totals: Values, strips: list[list[Values]], rows: Values, bits: int) -> Values:
        """Add some rows of the matrix. strips: the operands of each; rows: addresses in x."""
        repeated = [self.repeated(b, row, len(strips[0])) for row in rows]
        totals = list(totals)
        for four in range(len(strips[0])):
            weights = [v for strip in strips for v in strip[four]]
            for r, row in enumerate(repeated):
                for i, w in enumerate(weights, r * len(weights)):
                    totals[i] = self.dot(b, totals[i], w, row[four], bits)
        return totals

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        """total + the four products of each lane."""
        widen = b.zext if self.zero8 or bits == 4 else b.sext
        for place in range(4):
            lane = range(place, self.width, 4)
            product = b.mul(widen(take(b, w, lane), self.ints), b.sext(take(b, x, lane), self.ints))
            total = b.add(total, product)
        return total

    def end(self, b: Any, totals: Values, rows: int, bits: int) -> Values:
        """Sums of the block as floats, which are exact: 16 of each row and strip."""
        count = 64 // self.width
        sums = [self.last(b, total, bits) for total in totals]
        return [self.floats(b, concatenate(b, sums[i : i + count])) for i in range(0, len(sums), count)]

    def last(self, b: Any, total: Any, bits: int) -> Any:
        """Reduce the sums in a register to int32."""
        return total

    def floats(self, b: Any, sums: Any) -> Any:
        return b.sitofp(sums, Floats.llvm)


class Vnni512(Dots):
    zero8 = 128

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{8 * self.width}", self.ints, total, w, x)


class Vnni256(Vnni512):
    width = 32

    def fours(self, tile: int, bits: int) -> int:
        return 4 if tile < 4 else 2


class Avx2(Dots):
    """vpmaddubsw adds two products in int16, unsigned times signed, and saturates: at no sum that occurs here."""

    width = 32
    shorts = ir.VectorType(_I16, 16)
    ones = ir.Constant(shorts, [1] * 16)

    def fours(self, tile: int, bits: int) -> int:
        return 4 if tile < 4 else 2 if bits == 4 else 1

    # int4: two products are 2 * 15 * 127 at most. The offset makes 32 of the sum of a block, which is 32 * 8 * 127 at
    # most, and so fits int16: it does not matter that sums wrap on the way.

    def offset(self, b: Any, sums: Any) -> Any:
        """Two int16, for x[i] of i % 4 < 2 and of the others."""
        first, second = (b.trunc(b.mul(half, _I32(-8)), _I16) for half in _total(b, sums, 2))
        return b.or_(b.zext(first, _I32), b.shl(b.zext(second, _I32), _I32(16)))

    def first(self, b: Any, offset: Any, bits: int) -> Any:
        start = super().first(b, offset, bits)
        return b.bitcast(start, self.shorts) if bits == 4 else start

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        if bits == 4:
            return b.add(total, call(b, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, w, x))
        # int8: |w| times x with the sign of w. Two products are 2 * 128 * 127 at most.
        size = call(b, "llvm.abs.v32i8", self.bytes, w, ir.IntType(1)(0))
        x = call(b, "llvm.x86.avx2.psign.b", self.bytes, x, w)
        return b.add(total, self.pairs(b, call(b, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, size, x)))

    def last(self, b: Any, total: Any, bits: int) -> Any:
        return self.pairs(b, total) if bits == 4 else total

    def pairs(self, b: Any, shorts: Any) -> Any:
        return call(b, "llvm.x86.avx2.pmadd.wd", self.ints, shorts, self.ones)


class Neon(Dots):
    """Products in int16 and their sums in pairs, where there is no dot product: two of int8, or 16 of int4, fit."""

    width = 16
    shorts = ir.VectorType(_I16, 8)

    # A register of 16 weights is four columns; its halves are added up apart.

    def begin(self, b: Any, offsets: Values, strips: int, bits: int) -> Values:
        kind = self.shorts if bits == 4 else self.ints
        zeros = ir.Constant(kind, [0] * kind.count)
        return [*(spread(b, offset, 4) for offset in offsets), *[zeros] * (len(offsets) * strips * 8)]

    def step(self, b: Any, totals: Values, strips: list[list[Values]], rows: Values, bits: int) -> Values:
        repeated = [[_halves(b, four)[0] for four in self.repeated(b, row, len(strips[0]))] for row in rows]
        totals, place = list(totals), len(rows)
        for row in repeated:
            for strip in strips:
                for register in range(4):
                    halves = [_halves(b, four[register]) for four in strip]
                    for half in (0, 1):
                        for four in range(0, len(strip), 2):
                            pair = [self.products(b, halves[i][half], row[i]) for i in (four, four + 1)]
                            totals[place] = self.added(b, totals[place], b.add(*pair), bits)
                        place += 1
        return totals

    def products(self, b: Any, w: Any, x: Any) -> Any:
        return call(b, "llvm.aarch64.neon.smull.v8i16", self.shorts, w, x)

    def added(self, b: Any, total: Any, products: Any, bits: int) -> Any:
        if bits == 4:
            return b.add(total, products)
        return b.add(total, call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", self.ints, products))

    def end(self, b: Any, totals: Values, rows: int, bits: int) -> Values:
        offsets, sums = totals[:rows], totals[rows:]
        if bits == 4:
            sums = [call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", self.ints, v) for v in sums]
        pairs = zip(sums[::2], sums[1::2], strict=True)
        columns = [call(b, "llvm.aarch64.neon.addp.v4i32", self.ints, *pair) for pair in pairs]
        of_row = len(columns) // rows
        if bits == 4:
            columns = [b.add(v, offsets[i // of_row]) for i, v in enumerate(columns)]
        return [self.floats(b, concatenate(b, columns[i : i + 4])) for i in range(0, len(columns), 4)]


class Sdot(Dots):
    """Four products of int8 for each int32.

    Sums begin at the integer that float32 has for 1.5 * 2^23. An addition to it is one to the float as well, so that a
    subtraction makes floats of them; a conversion takes four times as long on a Cortex-A76.
    """

    width = 16
    magic = 0x4B400000

    def fours(self, tile: int, bits: int) -> int:
        return 16 if tile == 1 and bits == 4 else 4

    def offset(self, b: Any, sums: Any) -> Any:
        return b.add(super().offset(b, sums), _I32(self.magic))

    def first(self, b: Any, offset: Any, bits: int) -> Any:
        return spread(b, offset, 4) if bits == 4 else ir.Constant(self.ints, [self.magic] * 4)

    def repeated(self, b: Any, x: Any, fours: int) -> Values:
        """Registers of 16 bytes, of which `sdot` takes four by their number."""
        whole = [read(b, b.add(x, _I64(start)), self.ints) for start in range(0, 4 * fours, 16)]
        return [b.bitcast(take(b, whole[four // 4], [four % 4] * 4), self.bytes) for four in range(fours)]

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", self.ints, total, w, x)

    def floats(self, b: Any, sums: Any) -> Any:
        return b.fsub(b.bitcast(sums, Floats.llvm), constant(Floats, 1.5 * 2**23))


class Smmla(Sdot):
    """Two rows times two columns, eight products for each int32. A register of weights holds eight of two columns."""

    longs = ir.VectorType(_I64, 2)

    def fours(self, tile: int, bits: int) -> int:
        return 2

    def arranged(self, b: Any, fours: list[Values]) -> list[Values]:
        """The four and the next four of a column side by side."""
        found = []
        for i in range(0, len(fours), 2):
            registers = []
            for v, w in zip(fours[i], fours[i + 1], strict=True):
                v, w = (b.bitcast(register, self.ints) for register in (v, w))
                registers += [
                    b.bitcast(take(b, v, mask, w), self.bytes) for mask in ([0, 4, 1, 5], [2, 6, 3, 7])
                ]
            found += [registers[:4], registers[4:]]
        return found

    def begin(self, b: Any, offsets: Values, strips: int, bits: int) -> Values:
        totals = []
        for one, other in zip(offsets[::2], offsets[1::2], strict=True):
            v, w = (self.first(b, offset, bits) for offset in (one, other))
            totals += [take(b, v, [0, 1, 4, 5], w)] * (strips * 8)
        return totals

    def step(self, b: Any, totals: Values, strips: list[list[Values]], rows: Values, bits: int) -> Values:
        totals, place = list(totals), 0
        eights = [read(b, row, _I64) for row in rows]
        for pair in zip(eights[::2], eights[1::2], strict=True):
            both = ir.Constant(self.longs, ir.Undefined)
            for i, eight in enumerate(pair):
                both = b.insert_element(both, eight, _I32(i))
            x = b.bitcast(both, self.bytes)
            for strip in strips:
                for weights in (*strip[0], *strip[1]):
                    operands = totals[place], x, weights
                    totals[place] = call(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", self.ints, *operands)
                    place += 1
        return totals

    def end(self, b: Any, totals: Values, rows: int, bits: int) -> Values:
        of_pair = len(totals) // (rows // 2)
        found: list[Values] = []
        for start in range(0, len(totals), of_pair):
            longs = [b.bitcast(v, self.longs) for v in totals[start : start + of_pair]]
            for row in (0, 1):
                found.append(
                    [
                        b.bitcast(take(b, v, [row, 2 + row], w), self.ints)
                        for v, w in zip(longs[::2], longs[1::2], strict=True)
                    ]
                )
        return [
            self.floats(b, concatenate(b, row[i : i + 4])) for row in found for i in range(0, len(row), 4)
        ]


class InstructionSet(NamedTuple):
    """A row of the table.

    features: of LLVM, all of which a processor must have. instruction: that does the products. gemv, gemm: how products
    of few rows, with weights as they are stored, and of many rows are emitted. rows, strips: of the largest tile, that
    of many rows.
    """

    name: str
    architecture: str
    features: frozenset[str]
    instruction: str
    gemv: Dots
    gemm: Dots
    rows: int = 4
    strips: int = 1


# The first that a processor has is taken.
SETS = (
    InstructionSet(
        "AVX-512 VNNI",
        "x86_64",
        frozenset({"avx512f", "avx512vnni"}),
        "vpdpbusd",
        Vnni512(),
        Vnni512(),
        strips=4,
    ),
    InstructionSet("AVX-VNNI", "x86_64", frozenset({"avx2", "avxvnni"}), "vpdpbusd", Vnni256(), Vnni256()),
    InstructionSet("AVX2", "x86_64", frozenset({"avx2"}), "vpmaddubsw", Avx2(), Avx2()),
    InstructionSet("Arm i8mm", "aarch64", frozenset({"i8mm", "dotprod"}), "smmla", Sdot(), Smmla()),
    InstructionSet("Arm dotprod", "aarch64", frozenset({"dotprod"}), "sdot", Sdot(), Sdot()),
    InstructionSet("Arm NEON", "aarch64", frozenset({"neon"}), "smlal", Neon(), Neon(), rows=1),
    InstructionSet("plain code", "", frozenset(), "", Dots(), Dots()),
)


def select(architecture: str, features: frozenset[str]) -> InstructionSet:
    """The set that a processor with these features multiplies with."""
    return next(s for s in SETS if s.architecture in ("", architecture) and s.features <= features)


def current() -> InstructionSet:
    """The set that kernels are compiled for. Raises BackendError where a forced feature is missing here."""
    return select(_architecture(), processor.features())


def best() -> InstructionSet:
    """The best that this processor has, whatever is forced."""
    return select(_architecture(), processor.available())


def describe() -> str:
    """One line for the user: "int8 products: Arm dotprod"."""
    return f"int8 products: {current().name}"


def _architecture() -> str:
    name = llvmlite.binding.get_process_triple().partition("-")[0]
    return {"arm64": "aarch64"}.get(name, name)


def _total(b: Any, v: Any, count: int) -> Values:
    """16 int32, to the sums of those whose places are alike but for their last 2 bits, in `count` parts of 4."""
    while v.type.count > 4:
        v = _add_halves(b, v)
    parts = [take(b, v, range(start, start + 4 // count)) for start in range(0, 4, 4 // count)]
    totals = []
    for part in parts:
        while part.type.count > 1:
            part = _add_halves(b, part)
        totals.append(b.extract_element(part, _I32(0)))
    return totals


def _add_halves(b: Any, v: Any) -> Any:
    return b.add(*_halves(b, v))


def _halves(b: Any, v: Any) -> Values:
    half = v.type.count // 2
    return [take(b, v, range(start, start + half)) for start in (0, half)]


assert Ints.llvm.count == LANES
