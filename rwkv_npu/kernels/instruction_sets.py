"""int8 products, for each instruction set: one row of the table SETS.

Rows of x, int8 and never -128, are multiplied by a matrix whose weights are bytes. The sums are exact, in int32.

    strip    16 columns of the matrix
    block    64 elements of a row of x, and the 64 rows of the matrix that they are multiplied by
    four     4 elements of a block. Those of a column lie side by side: the weights of a four and a strip are 64 bytes
    tile     some rows of x times some strips: their sums lie in registers, which the code calls totals
    offset   where the sum of a block begins: an int32, computed when the row of x was quantised. Weights are stored
             unsigned (of int4, 0 .. 15 stands for -8 .. 7). The offset subtracts what this adds to the sum

`Dots` emits LLVM code for any processor. Its subclasses override what their instructions do better. For a new
instruction set, write such a subclass and a row of the table.
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
    """Emits the code of a block's products, for any processor. `b` is LLVM's builder, `bits` 4 or 8.

    width: bytes of a register. zero8: the byte that stands for an int8 weight of 0 when it is multiplied. Weights are
    stored with 128; a set of 0 has `operand` make them signed.
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
        """The fours in one round of the loop over a block. tile: its rows times its strips.

        A large tile needs a short round: LLVM reorders a long one until the registers do not suffice.
        """
        return 4

    # -- weights of a strip: a list of registers for every four rows of the matrix -----------------------------

    def unpacked(self, b: Any, address: Any, fours: int, bits: int) -> list[Values]:
        """Read packed weights and make them operands."""
        if bits == 8:
            return [[self.operand(b, v) for v in four] for four in self.stored(b, address, fours)]
        found = []
        for both in self.stored(b, address, fours // 2):  # a byte holds a weight of one four, and of the next
            found.append([b.and_(v, ir.Constant(v.type, [15] * self.width)) for v in both])
            found.append([b.lshr(v, ir.Constant(v.type, [4] * self.width)) for v in both])
        return found

    def stored(self, b: Any, address: Any, count: int) -> list[Values]:
        """Read `count` times 64 bytes."""
        places = [range(start, start + 64, self.width) for start in range(0, 64 * count, 64)]
        return [[read(b, b.add(address, _I64(at)), self.bytes) for at in four] for four in places]

    def operand(self, b: Any, v: Any) -> Any:
        """int8 weights as stored, with a zero of 128 -> with a zero of `zero8`."""
        return v if self.zero8 else b.xor(v, ir.Constant(v.type, [128] * self.width))

    def arranged(self, b: Any, fours: list[Values]) -> list[Values]:
        """Reorder operands for products of many rows, before they are stored unpacked."""
        return fours

    # -- rows -------------------------------------------------------------------------------------------------

    def offset(self, b: Any, sums: Any) -> Any:
        """The offset of a block of x. sums: 16 int32, of which number j is the sum of all x[i] with i % 16 == j."""
        return b.mul(_total(b, sums, 1)[0], _I32(-8))

    def repeated(self, b: Any, x: Any, fours: int) -> Values:
        """Read fours of a row of x at address `x`, each into a register that repeats it in every lane."""
        found = []
        for start in range(0, 4 * fours, 4):
            four = read(b, b.add(x, _I64(start)), _I32)
            found.append(b.bitcast(spread(b, four, self.width // 4), self.bytes))
        return found

    # -- totals: registers in the order of rows, and of strips within a row -----------------------------------

    def begin(self, b: Any, offsets: Values, strips: int, bits: int) -> Values:
        """The totals before the first product. offsets: one for each row."""
        return [self.first(b, offset, bits) for offset in offsets for _ in range(strips * 64 // self.width)]

    def first(self, b: Any, offset: Any, bits: int) -> Any:
        """One register of `begin`."""
        if bits == 8 and not self.zero8:
            return ir.Constant(self.ints, [0] * self.ints.count)
        # The offset is -8 times the sum of the block, and a zero of 128 needs -128 times that sum.
        return spread(b, b.shl(offset, _I32(4)) if bits == 8 else offset, self.ints.count)

    def step(self, b: Any, totals: Values, strips: list[list[Values]], rows: Values, bits: int) -> Values:
        """Add the products of some fours. strips: the operands of each strip; rows: addresses in x."""
        repeated = [self.repeated(b, row, len(strips[0])) for row in rows]
        totals = list(totals)
        for four in range(len(strips[0])):
            weights = [v for strip in strips for v in strip[four]]
            for r, row in enumerate(repeated):
                for i, w in enumerate(weights, r * len(weights)):
                    totals[i] = self.dot(b, totals[i], w, row[four], bits)
        return totals

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        """total + the products of a four, in each lane."""
        widen = b.zext if self.zero8 or bits == 4 else b.sext
        for place in range(4):
            lane = range(place, self.width, 4)
            product = b.mul(widen(take(b, w, lane), self.ints), b.sext(take(b, x, lane), self.ints))
            total = b.add(total, product)
        return total

    def end(self, b: Any, totals: Values, rows: int, bits: int) -> Values:
        """The sums of the block as floats, without rounding: a vector of 16 for each row and strip."""
        count = 64 // self.width
        sums = [self.last(b, total, bits) for total in totals]
        return [self.floats(b, concatenate(b, sums[i : i + count])) for i in range(0, len(sums), count)]

    def last(self, b: Any, total: Any, bits: int) -> Any:
        """Reduce the sums in a register to int32."""
        return total

    def floats(self, b: Any, sums: Any) -> Any:
        return b.sitofp(sums, Floats.llvm)


class Vnni512(Dots):
    """Four products, unsigned times signed, are added to each int32."""

    zero8 = 128

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{8 * self.width}", self.ints, total, w, x)


class Vnni256(Vnni512):
    width = 32

    def fours(self, tile: int, bits: int) -> int:
        return 4 if tile < 4 else 2


class Avx2(Dots):
    """vpmaddubsw adds two products, unsigned times signed, in int16. It saturates, but no sum here is that large."""

    width = 32
    shorts = ir.VectorType(_I16, 16)
    ones = ir.Constant(shorts, [1] * 16)

    def fours(self, tile: int, bits: int) -> int:
        return 4 if tile < 4 else 2 if bits == 4 else 1

    # int4: two products are at most 2 * 15 * 127. Each int16 adds up 32 products of a block. With the offset they are
    # products of -8 .. 7, at most 32 * 8 * 127 together: this fits int16, so sums may wrap on the way there.

    def offset(self, b: Any, sums: Any) -> Any:
        """Two int16 offsets: of the x[i] with i % 4 < 2, and of the others."""
        first, second = (b.trunc(b.mul(half, _I32(-8)), _I16) for half in _total(b, sums, 2))
        return b.or_(b.zext(first, _I32), b.shl(b.zext(second, _I32), _I32(16)))

    def first(self, b: Any, offset: Any, bits: int) -> Any:
        start = super().first(b, offset, bits)
        return b.bitcast(start, self.shorts) if bits == 4 else start

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        if bits == 4:
            return b.add(total, call(b, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, w, x))
        # int8: |w| times x with the sign of w. Two products are at most 2 * 128 * 127.
        size = call(b, "llvm.abs.v32i8", self.bytes, w, ir.IntType(1)(0))
        x = call(b, "llvm.x86.avx2.psign.b", self.bytes, x, w)
        return b.add(total, self.pairs(b, call(b, "llvm.x86.avx2.pmadd.ub.sw", self.shorts, size, x)))

    def last(self, b: Any, total: Any, bits: int) -> Any:
        return self.pairs(b, total) if bits == 4 else total

    def pairs(self, b: Any, shorts: Any) -> Any:
        return call(b, "llvm.x86.avx2.pmadd.wd", self.ints, shorts, self.ones)


class Neon(Dots):
    """Arm without a dot product: products in int16, which can hold the sum of two products of int8, or 16 of int4.

    A register of 16 weights is four columns. Each half of it has a total of its own. The totals begin with one register
    for each row, its offset.
    """

    width = 16
    shorts = ir.VectorType(_I16, 8)

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
    """Four products of int8 are added to each int32.

    Sums begin at `magic`, the bits of the float32 1.5 * 2^23. Adding n to these bits adds n to the float. So a
    subtraction of 1.5 * 2^23 converts the sums to floats; the instruction for it takes four times as long on a
    Cortex-A76.
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
        """Read 16 bytes at a time: `sdot` can repeat one four of a register itself."""
        whole = [read(b, b.add(x, _I64(start)), self.ints) for start in range(0, 4 * fours, 16)]
        return [b.bitcast(take(b, whole[four // 4], [four % 4] * 4), self.bytes) for four in range(fours)]

    def dot(self, b: Any, total: Any, w: Any, x: Any, bits: int) -> Any:
        return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", self.ints, total, w, x)

    def floats(self, b: Any, sums: Any) -> Any:
        return b.fsub(b.bitcast(sums, Floats.llvm), constant(Floats, 1.5 * 2**23))


class Smmla(Sdot):
    """Two rows times two columns: eight products are added to each int32. A register holds 8 weights of 2 columns."""

    longs = ir.VectorType(_I64, 2)

    def fours(self, tile: int, bits: int) -> int:
        return 2

    def arranged(self, b: Any, fours: list[Values]) -> list[Values]:
        """Bring two successive fours of a column side by side."""
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

    features: LLVM's names of the features that a processor needs for it. instruction: the one that multiplies.
    gemv, gemm: emit the products of few rows, which read packed weights, and of many rows, which read unpacked ones.
    rows, strips: size of the tiles of gemm.
    """

    name: str
    architecture: str
    features: frozenset[str]
    instruction: str
    gemv: Dots
    gemm: Dots
    rows: int = 4
    strips: int = 1


# The first row whose features a processor has is used.
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
    """The instruction set for a processor with these features."""
    return next(s for s in SETS if s.architecture in ("", architecture) and s.features <= features)


def current() -> InstructionSet:
    """The instruction set that kernels are compiled for. Raises BackendError if a forced feature is missing here."""
    return select(_architecture(), processor.features())


def best() -> InstructionSet:
    """The best instruction set of this processor, even if another is forced."""
    return select(_architecture(), processor.available())


def describe() -> str:
    """One line for the user: "int8 products: Arm dotprod"."""
    return f"int8 products: {current().name}"


def _architecture() -> str:
    name = llvmlite.binding.get_process_triple().partition("-")[0]
    return {"arm64": "aarch64"}.get(name, name)


def _total(b: Any, v: Any, count: int) -> Values:
    """Add up 16 int32 by index modulo 4; from these 4 sums make `count` sums of neighbours, 1 or 2."""
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
