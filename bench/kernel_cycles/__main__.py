"""Estimate the cycles of the kernels' loops on many processors, by LLVM's models.

    python -m bench.kernel_cycles [--save bench/results/kernel-cycles]

Compiles a loop over blocks of 64 weights of a column with numba's settings, and simulates it with `llvm-mca-16`
(Debian: llvm-16). The figures include everything in a block, also its scales, but no cache misses. LLVM has no model of
the Cortex-A76; its relative Neoverse N1 stands for it. bytes: of stored weights, read from memory. products:
multiply-adds.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
from typing import Any, NamedTuple

import llvmlite.binding

from bench.kernel_cycles.kernels import Kernel, assembly, kernels, loops, uses_stack
from bench.peers.__main__ import commit
from bench.saving import save
from rwkv_npu.kernels.instruction_sets import SETS

MCA = "llvm-mca-16"
BLOCKS = 200  # to simulate


class Processor(NamedTuple):
    """A processor. cpu: LLVM's name to compile for. model: llvm-mca's model. set: a name in `instruction_sets`."""

    name: str
    set: str
    cpu: str
    model: str
    features: str = ""


PROCESSORS = (
    Processor("Cortex-A76", "Arm dotprod", "cortex-a76", "neoverse-n1"),
    Processor("Cortex-A76 without dotprod", "Arm NEON", "cortex-a76", "neoverse-n1"),
    Processor("Cortex-A55", "Arm dotprod", "cortex-a55", "cortex-a55"),
    Processor("Zen 3", "AVX2", "znver3", "znver3"),
    Processor("Alder Lake", "AVX-VNNI", "alderlake", "alderlake"),
    Processor("Ice Lake", "AVX-512 VNNI", "icelake-server", "icelake-server", "-prefer-256-bit"),
)


def cycles(kernel: Kernel, processor: Processor) -> dict[str, Any]:
    """Simulated cycles of a block, with bytes and products a cycle."""
    before, loop, after = loops(assembly(kernel, processor.cpu, processor.features))
    arm = kernel.set.architecture == "aarch64"
    block = "\n".join([*before, *loop * kernel.rounds, *after])
    command = [
        MCA,
        f"-march={'aarch64' if arm else 'x86-64'}",
        f"-mcpu={processor.model}",
        f"-iterations={BLOCKS}",
    ]
    done = subprocess.run(command, input=block, capture_output=True, text=True, check=True)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert found, done.stdout
    count = int(found[1]) / BLOCKS
    return {
        "processor": processor.name,
        "set": kernel.set.name,
        "kernel": kernel.name,
        "cycles": count,
        "bytes_a_cycle": kernel.weight_bytes / count,
        "products_a_cycle": kernel.products / count,
        "share_of_loop": kernel.rounds * len(loop) / len(block.splitlines()),
        "stack_in_loop": uses_stack(loop),
    }


def study() -> list[dict[str, Any]]:
    by_name = {one.name: one for one in SETS}
    return [cycles(kernel, p) for p in PROCESSORS for kernel in kernels(by_name[p.set])]


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Cycles of the products of bytes, by model",
        "",
        f"Static: {results['model']}, code by LLVM {results['llvm']}; this project at {results['commit']}; "
        f"`{results['command']}`. No caches: a core of an RK3588 gets 2.7 to 3.4 bytes a cycle when all four read.",
        "",
        "| processor | products | kernel, rows x columns | cycles a block | bytes a cycle | multiply-adds a cycle |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        numbers = [f"{row[key]:.1f}" for key in ("cycles", "bytes_a_cycle", "products_a_cycle")]
        if "gemm" in row["kernel"]:
            numbers[1] = "-"  # read once for all rows
        lines.append(f"| {' | '.join([row['processor'], row['set'], row['kernel'], *numbers])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_cycles", description=__doc__)
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    results = {
        "command": "python -m bench.kernel_cycles " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "model": MCA,
        "llvm": ".".join(map(str, llvmlite.binding.llvm_version_info)),
        "llvmlite": llvmlite.__version__,
        "python": platform.python_version(),
        "rows": study(),
    }
    if arguments.save:
        save(arguments.save, results, table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
