"""What a model would take on a board, term by term: estimates, from figures that the compiler and others give.

The compiler prints cycles for one core and leaves out everything else: the call, the recurrence and the rest of the
CPU's work, the memory's true speed. Each is a term of its own here, with its source beside it, so that nobody has to
believe a sum. Nothing in this module was measured on a board by this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from rwkv_npu.backends.memory import matrix_bytes
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Spec, Tensor, groups, tensors
from rwkv_npu.quant.cpu import PRECISIONS, bits_of, packed_bytes

CLOCK_HZ = 1e9  # the NPU's, at which the compiler's cycles are nanoseconds
TABLE_GB_PER_S = 23.63  # what one core reads in the compiler's table

# Boards took 40 to 270 us for a call that does nothing, in C. The slow end, since our calls come from Python.
CALL_OVERHEAD_US = 270.0
# A PC's core against a Cortex-A76 at 2.3 GHz: about 1.7 times the clock and twice the work a cycle. An assumption.
HOST_FACTOR = 4.0


@dataclass(frozen=True)
class Rate:
    """How the compiler's cycles become time. gb_per_s None is the table's own, for one core only."""

    label: str
    cores: int
    gb_per_s: float | None
    source: str


TABLE = Rate(
    "1 core, compiler's table",
    1,
    None,
    "cycles of Rockchip's compiler at 1 GHz, DDR at 23.6 GB/s: optimistic",
)

# RK3588, FP16 matrix times vector through the C matmul API, as measured on boards by others.
BOARD_RATES = (
    Rate("1 core, boards' GEMV rate", 1, 10.9, "weights at the 10.9 GB/s that boards reached on one core"),
    Rate(
        "3 cores, N split",
        3,
        30.9,
        "weights at the 30.9 GB/s that boards reached on three cores, a third of the products on each; a fused group "
        "cannot be split by N, so the calls are those of projection fusion, three at once counted as one",
    ),
)
RATES = {"rk3588": (TABLE, *BOARD_RATES)}  # of other chips there is only the table

# RK3588, four Cortex-A76: GB/s read, and GFLOP/s of products of many rows. The latter is their peak in fp32 (2 x 4
# lanes, multiply and add, 2.3 GHz, four cores), and it is what llama.cpp was seen to reach in Q8_0 (73 tokens/s read
# with 1 B parameters).
CPU_GB_PER_S, CPU_GFLOPS = 26.7, 147.0
CPU_PRECISIONS = ("fp16", *PRECISIONS)
_CPU_READS = "weights at the 26.7 GB/s that four Cortex-A76 read, products at "
CPU_SOURCES = {
    "fp16": f"{_CPU_READS}their fp32 peak of 147 GFLOP/s: optimistic as well (published: llama.cpp F16 with 2.9 B "
    "parameters at 3.62 tokens/s is 21 GB/s)",
    **dict.fromkeys(
        PRECISIONS,
        f"{_CPU_READS}the 147 GFLOP/s that llama.cpp reached there in Q8_0 (published: 73 tokens/s read with 1 B "
        "parameters); the peak of their int8 instructions is four times that",
    ),
}


@dataclass(frozen=True)
class Estimate:
    """Milliseconds by term for some tokens read at once and one pass of the head; `npu_calls` is how many calls."""

    ms: Mapping[str, float]
    npu_calls: int = 0

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())


@dataclass(frozen=True)
class Assumptions:
    """call_overhead_us: of each call to the NPU. host_factor: how many times slower the board's CPU does the host's
    share than the machine that measured it."""

    call_overhead_us: float = CALL_OVERHEAD_US
    host_factor: float = HOST_FACTOR

    def __post_init__(self) -> None:
        if not 0 <= self.call_overhead_us < float("inf"):
            raise UsageError(
                f"--call-overhead-us is {self.call_overhead_us:g}: it must be a number of at least 0"
            )
        if not 0 < self.host_factor < float("inf"):
            raise UsageError(f"--host-factor is {self.host_factor:g}: it must be a number above 0")


def estimate_ms(artifacts: Sequence[Artifact], tokens: int) -> float | None:
    """The compiler's cycles for `tokens` tokens read at once and one pass of the head, as milliseconds.

    One core, no dispatch, no recurrence: an estimate, and an optimistic one. None where the compiler gives no cycles.
    """
    used = served_by(artifacts, tokens)
    if not all(artifact.cycles for artifact, _ in used):
        return None
    return sum(times * _ms(artifact, TABLE) for artifact, times in used)


def served_by(artifacts: Sequence[Artifact], tokens: int) -> list[tuple[Artifact, int]]:
    """Which artifacts read `tokens` tokens, each with its number of calls; the head reads the last row alone."""
    found = []
    for group in dict.fromkeys(a.group for a in artifacts):
        sizes = {a.rows: a for a in artifacts if a.group == group}
        if group == "head":
            found.append((sizes[min(sizes)], 1))
            continue
        full, rest = divmod(tokens, max(sizes))
        if full:
            found.append((sizes[max(sizes)], full))
        if rest:
            found.append((sizes[min(rows for rows in sizes if rows >= rest)], 1))
    return found


def formula_cycles(k: int, n: int, rows: int, bits: int) -> tuple[float, float, float]:
    """(DDR, NPU, total) cycles of a product with a constant (k, n) matrix of 16 or 8 bits, as the RK3588's compiler
    counts them: found from its tables, whose sums over a graph it meets within a few per cent. Operations that are no
    products have no cycles there, and what is fused into one, such as adding the residual, is left out here.
    """
    size, narrowest, columns = (2, 64, 16) if bits == 16 else (1, 128, 32)
    ddr = (size * rows * (k + n) + matrix_bytes(k, n, bits)) / TABLE_GB_PER_S
    npu = _whole(rows, 16) * max(k, narrowest) * _whole(n, columns) / (8192 / bits)
    return ddr, npu, max(ddr, npu)


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def weights(spec: Spec) -> dict[str, int]:
    """Numbers that every token multiplies with: `head`, and all the other `projections`."""
    return _by_part(spec, lambda tensor: prod(tensor.shape))


def weight_bytes(spec: Spec, precision: str) -> dict[str, int]:
    """What the CPU reads of them for a token, of weights in one of CPU_PRECISIONS or in fp32."""
    if precision in ("fp16", "fp32"):
        size = 2 if precision == "fp16" else 4
        return {part: size * count for part, count in weights(spec).items()}
    return _by_part(spec, lambda tensor: packed_bytes(tensor, bits_of(precision, tensor)))


def _by_part(spec: Spec, size: Callable[[Tensor], int]) -> dict[str, int]:
    sizes = {t.name: size(t) for t in tensors(spec) if t.kind.is_projection and not t.optional}
    head = sizes["head.weight"]
    return {"projections": sum(sizes.values()) - head, "head": head}


def _ms(artifact: Artifact, rate: Rate) -> float:
    """Of one call. The table's total adds up the slower of memory and arithmetic of each operation; at another rate
    only the sums can be compared."""
    cycles = artifact.cycles
    if rate.gb_per_s is None:
        return cycles.get("total", 0) / CLOCK_HZ * 1e3
    memory = cycles.get("ddr", 0) * TABLE_GB_PER_S / rate.gb_per_s
    return max(memory, cycles.get("npu", 0) / rate.cores) / CLOCK_HZ * 1e3


def on_npu(
    spec: Spec,
    artifacts: Sequence[Artifact],
    tokens: int,
    rate: Rate,
    assumptions: Assumptions,
    host_ms: Mapping[str, float],
) -> Estimate:
    """`tokens` tokens at once. `host_ms` is the CPU's share, by name, as measured on another machine."""
    used = served_by(artifacts, tokens)
    calls = sum(times for _, times in used)
    if rate.cores > 1:
        chunks = max(
            sum(times for a, times in used if a.group == group) for group in {a.group for a, _ in used}
        )
        calls = chunks * (len(groups(spec, "projection")) - 1) + 1
    head = sum(times * _ms(a, rate) for a, times in used if a.group == "head")
    terms = {
        "projections": sum(times * _ms(a, rate) for a, times in used if a.group != "head"),
        "head": head,
        "calls": calls * assumptions.call_overhead_us / 1e3,
    }
    return Estimate({**terms, **_scaled(host_ms, assumptions)}, calls)


def on_cpu(
    spec: Spec, precision: str, tokens: int, assumptions: Assumptions, host_ms: Mapping[str, float]
) -> Estimate:
    """The same without the NPU, on an RK3588's four large cores; `precision` is one of `weight_bytes`."""
    count, size = weights(spec), weight_bytes(spec, precision)

    def ms(part: str, rows: int) -> float:
        return max(size[part] / CPU_GB_PER_S, 2 * count[part] * rows / CPU_GFLOPS) / 1e6

    terms = {"projections": ms("projections", tokens), "head": ms("head", 1)}
    return Estimate({**terms, **_scaled(host_ms, assumptions)})


def _scaled(host_ms: Mapping[str, float], assumptions: Assumptions) -> dict[str, float]:
    return {name: value * assumptions.host_factor for name, value in host_ms.items()}
