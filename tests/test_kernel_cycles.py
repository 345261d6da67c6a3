"""The machine code of every instruction set, also for other processors than this one."""

from __future__ import annotations

import shutil

import pytest

from bench.kernel_cycles import __main__ as study
from bench.kernel_cycles.kernels import Kernel, assembly, kernels, loops, uses_stack
from rwkv_npu.kernels.instruction_sets import SETS, InstructionSet

# Processors that LLVM knows, by set.
PROCESSORS = {
    "AVX-512 VNNI": ("icelake-server", "-prefer-256-bit"),
    "AVX-VNNI": ("alderlake", ""),
    "AVX2": ("znver3", ""),
    "Arm i8mm": ("neoverse-v1", ""),
    "Arm dotprod": ("cortex-a76", ""),
    "Arm NEON": ("cortex-a72", ""),
    "plain code": ("x86-64", ""),
}


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_every_product_is_made_of_the_instruction_of_its_set(one: InstructionSet) -> None:
    """LLVM silently calls an external function if it does not know the name of an intrinsic."""
    for kernel in kernels(one):
        text = assembly(kernel, *PROCESSORS[one.name])
        instruction = "sdot" if one.instruction == "smmla" and not kernel.gemm else one.instruction
        assert instruction in text and "call" not in text and "\tbl\t" not in text, kernel.name


@pytest.mark.parametrize("one", SETS[:-1], ids=lambda one: one.name)
def test_sums_stay_in_registers(one: InstructionSet) -> None:
    for kernel in kernels(one):
        before, loop, _ = loops(assembly(kernel, *PROCESSORS[one.name]))
        assert not uses_stack(loop or before), kernel.name
        assert len(loop or before) < 300


def test_products_of_int4_and_int8_by_element() -> None:
    dotprod = next(one for one in SETS if one.name == "Arm dotprod")
    for kernel in kernels(dotprod):
        text = assembly(kernel, "cortex-a76")
        assert ".4b[3]" in text and "scvtf" not in text
        assert ("ushr" in text) == (kernel.bits == 4 and not kernel.gemm)


def test_loops() -> None:
    text = "f:\n\tmov a\n.L1:\n\tldr b\n.L2:\n\tsdot c\n\tb.ne\t.L2\n\tfmla d\n\tb.ne\t.L1\n\tret\n"
    assert loops(text) == (["ldr b"], ["sdot c", "b.ne\t.L2"], ["fmla d", "b.ne\t.L1"])
    assert loops(".L1:\n\tldr b\n\tb.ne\t.L1\n")[0] == ["ldr b", "b.ne\t.L1"]
    assert uses_stack(["str q0, [sp, #16]"]) and uses_stack(["vmovdqu %ymm0, 32(%rsp)"])
    assert not uses_stack(["str q0, [x0]"])


@pytest.mark.skipif(shutil.which(study.MCA) is None, reason=f"{study.MCA} is not installed")
def test_the_study_measures_and_prints_a_kernel() -> None:
    processor = next(p for p in study.PROCESSORS if p.name == "Cortex-A76")
    one = next(one for one in SETS if one.name == processor.set)
    row = study.cycles(Kernel(one, 8, True, 4), processor)
    assert 16 < row["products_a_cycle"] <= 32  # two products of 16 bytes a cycle
    results = {"model": study.MCA, "llvm": "22", "commit": "abc", "command": "here", "rows": [row]}
    assert f"| Cortex-A76 | Arm dotprod | int8 gemm, 4 x 16 | {row['cycles']:.1f} | - |" in study.table(
        results
    )
