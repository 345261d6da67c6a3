"""Compile the kernels' loop over blocks for any processor, as assembly. Nothing but the int8 product code is emitted.

The function keeps the sums of a tile in registers and adds one block after the other, like `rwkv_npu.kernels.products`.
"""

from __future__ import annotations

from typing import NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

from rwkv_npu.kernels import simd
from rwkv_npu.kernels.instruction_sets import Dots, InstructionSet
from rwkv_npu.kernels.simd import Floats
from rwkv_npu.kernels.tiles import Block, QuantisedTile
from rwkv_npu.quant.cpu import BLOCK

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
_I64 = ir.IntType(64)


class Kernel(NamedTuple):
    """A loop to compile. rows, strips: size of its tile. gemm: weights are unpacked beforehand."""

    set: InstructionSet
    bits: int
    gemm: bool
    rows: int
    strips: int = 1

    @property
    def name(self) -> str:
        return f"int{self.bits} {'gemm' if self.gemm else 'gemv'}, {self.rows} x {16 * self.strips}"

    @property
    def dots(self) -> Dots:
        return self.set.gemm if self.gemm else self.set.gemv

    @property
    def rounds(self) -> int:
        """Iterations of the loop inside a block."""
        return BLOCK // (4 * self.dots.fours(self.rows * self.strips, self.bits))

    @property
    def weight_bytes(self) -> int:
        """Bytes of a stored block, including its scales."""
        return self.strips * 16 * (BLOCK * self.bits // 8 + 2)

    @property
    def products(self) -> int:
        """Multiply-adds of a block."""
        return self.rows * self.strips * 16 * BLOCK


def kernels(one: InstructionSet) -> list[Kernel]:
    """The kernels for decoding and for prompts."""
    gemv = [Kernel(one, bits, False, rows) for bits in (8, 4) for rows in sorted({1, one.rows})]
    return gemv + [Kernel(one, bits, True, one.rows, one.strips) for bits in (8, 4)]


def assembly(kernel: Kernel, cpu: str, features: str = "") -> str:
    """Assembly of a function that runs the loop on `cpu` (LLVM's name), optimised with numba's settings."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = TRIPLES.get(kernel.set.architecture, TRIPLES["x86_64"])
    target = llvm.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="default")
    module = llvm.parse_assembly(str(_module(kernel, triple, str(machine.target_data))))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return str(machine.emit_assembly(module))


def _module(kernel: Kernel, triple: str, layout: str) -> ir.Module:
    tile = QuantisedTile(kernel.dots, kernel.rows, kernel.strips, kernel.bits, unpacked=kernel.gemm)
    module = ir.Module("kernel")
    module.triple, module.data_layout = triple, layout
    # y, its stride, blocks, and the fields of Block
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [_I64] * (3 + len(Block._fields))), "kernel"
    )
    y, y_stride, blocks, *rest = function.args
    start = Block(*rest)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    scale_bytes = 64 if kernel.gemm else 32
    weight_bytes = BLOCK * 16 if kernel.gemm else BLOCK * 2 * kernel.bits
    if not kernel.gemm:  # one strip after the other, its blocks side by side
        start = start._replace(weights_stride=_I64(0), scales_stride=_I64(0))
    zeros = [simd.constant(Floats, 0.0)] * tile.count

    def add(number, sums):  # type: ignore[no-untyped-def]
        here = start._replace(
            weights=b.add(start.weights, b.mul(number, _I64(weight_bytes))),
            scales=b.add(start.scales, b.mul(number, _I64(scale_bytes))),
            q=b.add(start.q, b.mul(number, _I64(BLOCK))),
            q_scales=b.add(start.q_scales, b.mul(number, _I64(4))),
            offsets=b.add(start.offsets, b.mul(number, _I64(4))),
        )
        return tile.add_block(b, sums, here)

    tile.store(b, simd.loop(b, blocks, zeros, add), y, y_stride)
    b.ret_void()
    return module


def loops(text: str) -> tuple[list[str], list[str], list[str]]:
    """Instructions of the loop over blocks, in three parts: before its inner loop, the inner loop, and after it.

    Without an inner loop, all of them are in the first part.
    """
    places, lines = {}, []
    for line in map(str.strip, text.splitlines()):
        if line.startswith(".L") and line.endswith(":"):
            places[line[:-1]] = len(lines)
        elif line and not line.startswith((".", "#", "//")) and not line.endswith(":"):
            lines.append(line)
    spans = [(places[line.split()[-1]], end) for end, line in enumerate(lines) if line.split()[-1] in places]
    spans = [(start, end) for start, end in spans if start <= end]
    (outer, end), (start, stop) = max(spans, key=_length), min(spans, key=_length)
    if len(spans) == 1:
        return lines[outer : end + 1], [], []
    return lines[outer:start], lines[start : stop + 1], lines[stop + 1 : end + 1]


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def uses_stack(lines: list[str]) -> bool:
    return any("(%rsp" in line or "[sp" in line for line in lines)
