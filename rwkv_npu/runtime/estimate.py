"""Estimates of a model's times on an RK3588: sums of the terms of `rk3588.py`.

`convert --dry-run`, `info` and `bench inference` use these functions, so their figures agree. Each part of a sum has a
name and each term a source. Each total has a range: all terms at their fast ends, and all at their slow ends. This
project has measured none of the terms on a board.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from rwkv_npu.backends.memory import matrix_bytes
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Group, Kind, Spec, Tensor, groups, state_shapes, tensors
from rwkv_npu.quant.cpu import bits_of, packed_bytes
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.operators import Operators, count_operators
from rwkv_npu.runtime.rk3588 import BOUNDS, TERMS, Terms
from rwkv_npu.runtime.schedule import Step, schedule_ms

CPU_PRECISIONS = ("fp16", "int8", "int4")
MATMUL_PRECISIONS = {"fp16": 16, "w8a8": 8}  # precisions of the NPU's matmul interface, and bits of a weight

# Parts of a time. The engine measures the first six; estimates have the others too.
PARTS = ("projections", "head", "recurrence", "sampling", "dispatch", "rest", "calls", "operators", "io")

Milliseconds = Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """Milliseconds by part, to read some tokens in one pass, run the head once and sample one token.

    ms: all terms at their central values. low: all at their fast ends. high: all at their slow ends.
    """

    ms: Milliseconds
    low: Milliseconds
    high: Milliseconds
    npu_calls: int = 0

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())

    @property
    def low_ms(self) -> float:
        return sum(self.low.values())

    @property
    def high_ms(self) -> float:
        return sum(self.high.values())

    def speeds(self, tokens: int, *, sampled: bool = False) -> tuple[float, float, float]:
        """(slow, central, fast) tokens a second. Several tokens end before sampling, unless they are `sampled`."""
        left_out = "sampling" if tokens > 1 and not sampled else ""
        times = (sum(ms.values()) - ms.get(left_out, 0.0) for ms in (self.high, self.ms, self.low))
        slow, central, fast = (1e3 * tokens / time for time in times)
        return slow, central, fast


# -- artifacts, bytes and cycles -------------------------------------------------------------------------


def served_by(artifacts: Sequence[Artifact], tokens: int) -> list[tuple[Artifact, int]]:
    """The artifacts that read `tokens` tokens, with their numbers of calls. The head reads the last row only."""
    calls = []
    for group in dict.fromkeys(a.group for a in artifacts):
        sizes = {a.rows: a for a in artifacts if a.group == group}
        if group == "head":
            calls.append((sizes[min(sizes)], 1))
            continue
        full, rest = divmod(tokens, max(sizes))
        if full:
            calls.append((sizes[max(sizes)], full))
        if rest:
            calls.append((sizes[min(rows for rows in sizes if rows >= rest)], 1))
    return calls


def formula_cycles(k: int, n: int, rows: int, bits: int) -> tuple[float, float, float]:
    """(DDR, NPU, total) cycles of a product with a constant (k, n) matrix of 16 or 8 bits, by the RK3588's compiler.

    The formula was fitted to the compiler's tables; sums over a graph agree within a few per cent. The tables have no
    cycles for other operators. Operators fused into a product, such as adding the residual, are not counted here.
    """
    size, narrowest, columns = (2, 64, 16) if bits == 16 else (1, 128, 32)
    ddr = (size * rows * (k + n) + matrix_bytes(k, n, bits)) / rk3588.NPU_TABLE_GB_PER_S
    npu = _round_up(rows, 16) * max(k, narrowest) * _round_up(n, columns) / (8192 / bits)
    return ddr, npu, max(ddr, npu)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def weights(spec: Spec) -> dict[str, int]:
    """Number of weights that a token is multiplied with, by part: `head`, and all other `projections`."""
    return _by_part(spec, lambda tensor: prod(tensor.shape))


def weight_bytes(spec: Spec, precision: str) -> dict[str, int]:
    """Bytes of weights that the CPU reads for a token, by part: packed as in a bundle, or in fp16 or fp32."""
    if precision in ("fp16", "fp32"):
        size = 2 if precision == "fp16" else 4
        return {part: size * count for part, count in weights(spec).items()}
    return _by_part(spec, lambda tensor: packed_bytes(tensor, bits_of(precision, tensor)))


def state_bytes(spec: Spec) -> int:
    """Bytes of the recurrent state that a token reads and writes."""
    return 2 * 4 * spec.L * sum(prod(shape) for shape in state_shapes(spec).values())


def _by_part(spec: Spec, size: Callable[[Tensor], int]) -> dict[str, int]:
    sizes = {t.name: size(t) for t in tensors(spec) if t.kind.is_projection and not t.optional}
    head = sizes["head.weight"]
    return {"projections": sum(sizes.values()) - head, "head": head}


# -- products --------------------------------------------------------------------------------------------


def graph_ms(cycles: Mapping[str, int], rows: int, dram: str, terms: Terms, bound: str) -> float:
    """Milliseconds of the products of a compiled graph on one core: the larger of reading weights and arithmetic."""
    read = terms[f"npu_read_{dram.lower()}"].at(bound)
    memory = cycles.get("ddr", 0) * rk3588.NPU_TABLE_GB_PER_S / read
    factor = terms["graph_over_table"].at(bound) if rows >= 16 else 1.0
    return max(memory, factor * cycles.get("npu", 0)) / rk3588.NPU_HZ * 1e3


def port_ms(elements: int, rows: int, terms: Terms, bound: str) -> tuple[float, float]:
    """Milliseconds of inputs and outputs: (transposes in the graph, filling and checking fp16 arrays on the CPU).

    elements: of all inputs and outputs, in one row.
    """
    transposed = rows * elements * terms["transpose_element"].at(bound) if rows > 1 else 0.0
    filled = rows * elements * terms["port_element"].at(bound)
    return transposed / 1e6, filled / 1e6


def operators_ms(found: Operators, rows: int, terms: Terms, bound: str) -> float:
    """Milliseconds of the operators that the compiler's table has no cycles for."""
    if rows == 1:
        return found.count * terms["small_operator"].at(bound) / 1e3
    norm, other = terms["norm_element"].at(bound), terms["other_element"].at(bound)
    return rows * (found.norm * norm + found.other * other) / 1e6


def npu_ms(artifact: Artifact, found: Operators, dram: str, terms: Terms, bound: str) -> tuple[float, float]:
    """Milliseconds of one call of an artifact on one core: (products, other operators and transposes).

    found: the operators of its group.
    """
    transposes, _ = port_ms(found.ports, artifact.rows, terms, bound)
    products = graph_ms(artifact.cycles, artifact.rows, dram, terms, bound)
    return products, operators_ms(found, artifact.rows, terms, bound) + transposes


def matmul_share(k: int, bits: int, terms: Terms, bound: str) -> float:
    """The part of a core's peak that products of many rows reach through the matmul interface."""
    if bits == 8:
        return terms["matmul_int8"].at(bound)
    size = next((size for size in (1024, 2048, 4096) if k <= size), 8192)
    return terms[f"matmul_fp16_{size}"].at(bound)


def cpu_product_ms(
    bytes_: float, work: float, precision: str, rows: int, dram: str, terms: Terms, bound: str
) -> float:
    """Milliseconds of a product on the four large cores: the larger of memory time and the kernel's static cycles.

    bytes_: weights that are read. work: multiply-adds of all rows.
    """
    read = terms[f"cpu_read_{dram.lower()}"].at(bound) * 1e9
    cycles = rk3588.CPU_CORES * rk3588.CPU_HZ
    name = {"fp32": "fp16", "auto": "int8"}.get(precision, precision)
    if rows == 1:
        kernel = bytes_ / (terms[f"decode_{name}"].at(bound) * cycles)
    else:
        kernel = work / (terms[f"prefill_{name}"].at(bound) * cycles)
    return max(bytes_ / read, kernel) * 1e3


# -- the board's CPU beside the products -----------------------------------------------------------------


def _host_ms(
    spec: Spec, tokens: int, dram: str, terms: Terms, bound: str, given: Milliseconds | None
) -> Milliseconds:
    """Milliseconds by part: recurrence, sampling of one token, and the Python code around a pass. given: measured."""
    if given is not None:
        return given
    return {
        "recurrence": _recurrence_ms(spec, tokens, dram, terms, bound),
        "sampling": spec.V * terms["sampling_entry"].at(bound) * terms["host_kernels"].at(bound) / 1e6,
        "rest": terms["python_pass"].at(bound) * terms["host_python"].at(bound),
    }


def _recurrence_ms(spec: Spec, tokens: int, dram: str, terms: Terms, bound: str) -> float:
    """The larger of arithmetic on the four large cores, and reading and writing the state once."""
    if spec.generation == "4":
        cycles = spec.L * spec.A * terms["recurrence_v4"].at(bound)
    else:
        name = "recurrence_v7" if spec.generation in ("7", "7a") else "recurrence_v56"
        cycles = spec.L * spec.H * (spec.N / 64) ** 2 * terms[name].at(bound)
    arithmetic = tokens * cycles / (rk3588.CPU_CORES * rk3588.CPU_HZ)
    memory = state_bytes(spec) / (terms[f"cpu_read_{dram.lower()}"].at(bound) * 1e9)
    return max(arithmetic, memory) * 1e3


# -- whole passes ----------------------------------------------------------------------------------------


def on_npu(
    spec: Spec,
    artifacts: Sequence[Artifact],
    tokens: int,
    dram: str,
    terms: Terms = TERMS,
    host: Milliseconds | None = None,
    sequences: int = 1,
) -> Estimate:
    """Estimate for compiled graphs of one fusion, through librknnrt's own interface.

    The rows of one chunk run call by call, on one core at a time. Several chunks overlap, on three cores and beside the
    CPU; the time of each part is then its share of the whole.
    host: measured CPU time, instead of an estimate. sequences: that the tokens belong to; each has logits.
    """
    used = served_by(artifacts, tokens)
    counts = {
        key: count_operators(spec, *key) for key in dict.fromkeys((a.fusion, a.rows) for a in artifacts)
    }
    calls = sum(sequences if artifact.group == "head" else times for artifact, times in used)

    def ms(bound: str) -> dict[str, float]:
        layers = dict.fromkeys(("projections", "operators", "io", "calls"), 0.0)
        after = dict.fromkeys(("head", "operators", "io", "calls"), 0.0)  # the layers
        c_call, call = (terms[name].at(bound) / 1e3 for name in ("c_call", "npu_call"))
        steps: dict[str, list[tuple[float, float]]] = {}  # (CPU, NPU) of each chunk, by group
        for artifact, times in used:
            group = counts[artifact.fusion, artifact.rows][artifact.group]
            products, operators = npu_ms(artifact, group, dram, terms, bound)
            io = port_ms(group.ports, artifact.rows, terms, bound)[1]
            if artifact.group == "head":
                parts, part, times = after, "head", sequences
            else:
                parts, part = layers, "projections"
                step = call - c_call + io, c_call + products + operators
                steps.setdefault(artifact.group, []).extend([step] * times)
            for name, time in ((part, products), ("operators", operators), ("io", io), ("calls", call)):
                parts[name] += times * time
        beside = dict(_host_ms(spec, tokens, dram, terms, bound, host))
        beside["sampling"] = sequences * beside.get("sampling", 0.0)
        layers["recurrence"] = beside.pop("recurrence", 0.0)
        if steps and len(next(iter(steps.values()))) > 1:
            wall = _overlapped_ms(spec, artifacts[0].fusion, steps, layers["recurrence"], terms, bound)
            share = wall / sum(layers.values())
            layers = {name: share * time for name, time in layers.items()}
        return {
            name: sum(parts.get(name, 0.0) for parts in (layers, after, beside))
            for name in (*layers, *after, *beside)
        }

    return _estimate(ms, calls)


def _overlapped_ms(
    spec: Spec,
    fusion: str,
    steps: Mapping[str, Sequence[tuple[float, float]]],
    recurrence: float,
    terms: Terms,
    bound: str,
) -> float:
    """Milliseconds of chunks that overlap. steps: (CPU, NPU) milliseconds of each chunk, by group of the layers.

    Contention for memory slows all: cores at work are less than so many times as fast, and the CPU is slower beside
    them.
    """
    count = len(next(iter(steps.values())))
    cores = min(count, rk3588.NPU_CORES)
    faster = 1 + (terms["npu_three_cores"].at(bound) - 1) * (cores - 1) / (rk3588.NPU_CORES - 1)
    slower = terms["cpu_beside_npu"].at(bound)
    share = recurrence / (count * len(steps))  # of a step
    used = [group for group in groups(spec, fusion) if group.name in steps]

    def step(group: Group, chunk: int) -> Step:
        cpu, npu = steps[group.name][chunk]
        return slower * (cpu + share), npu * cores / faster, group.layer % rk3588.NPU_CORES

    chunks = [[step(group, chunk) for group in used] for chunk in range(count)]
    return terms["waves_over_schedule"].at(bound) * schedule_ms(chunks)


def on_three_cores(
    spec: Spec,
    precision: str,
    tokens: int,
    dram: str,
    terms: Terms = TERMS,
    host: Milliseconds | None = None,
) -> Estimate:
    """Estimate for the `rknn-matmul` backend: large products split over three cores, prompts in chunks of 64 rows."""
    bits = MATMUL_PRECISIONS[precision]
    used = [t for t in tensors(spec) if t.kind.is_projection and not t.optional]
    large = [t for t in used if t.kind is Kind.LINEAR and t.name != "head.weight"]
    small = sum(prod(t.used_shape) for t in used if t.kind is not Kind.LINEAR)
    # Products of one input (r, k and v) run in one step: 3 steps a layer.
    steps = len(groups(spec, "projection")) - 1
    chunks = -(-tokens // 64)
    rows = min(tokens, 64)

    def product(k: int, n: int, rows: int, bound: str) -> tuple[float, float]:
        """Milliseconds of (a product, the conversion of its operands)."""
        cores = terms["npu_three_cores"].at(bound)
        memory = matrix_bytes(k, n, bits) / (terms[f"npu_read_{dram.lower()}"].at(bound) * 1e9)
        peak = rk3588.NPU_FLOPS[bits] * matmul_share(k, bits, terms, bound)
        time = max(memory, 2 * _round_up(rows, 16) * k * n / peak if rows > 1 else 0.0) / cores
        return time * 1e3, rows * (k + n) * terms["conversion_element"].at(bound) / 1e6

    def ms(bound: str) -> dict[str, float]:
        layers = [product(t.used_shape[-2], t.used_shape[-1], rows, bound) for t in large]
        head, head_io = product(spec.D, spec.V, 1, bound)
        low_rank = cpu_product_ms(2 * small, rows * small, "fp16", rows, dram, terms, bound)
        step = (terms["c_call"].at(bound) + terms["three_cores_handover"].at(bound)) / 1e3
        return {
            "projections": chunks * (sum(time for time, _ in layers) + low_rank),
            "head": head,
            "calls": (chunks * steps + 1) * step,
            "io": chunks * sum(io for _, io in layers) + head_io,
            **_host_ms(spec, tokens, dram, terms, bound, host),
        }

    return _estimate(ms, chunks * steps + 1)


def on_cpu(
    spec: Spec,
    precision: str,
    tokens: int,
    dram: str,
    terms: Terms = TERMS,
    host: Milliseconds | None = None,
) -> Estimate:
    """Estimate for the `numba` backend on the four large cores. precision: as in `weight_bytes`."""
    count, size = weights(spec), weight_bytes(spec, precision)

    def ms(bound: str) -> dict[str, float]:
        def part(name: str, rows: int) -> float:
            return cpu_product_ms(size[name], rows * count[name], precision, rows, dram, terms, bound)

        products = {"projections": part("projections", tokens), "head": part("head", 1)}
        return {**products, **_host_ms(spec, tokens, dram, terms, bound, host)}

    return _estimate(ms)


def _estimate(ms: Callable[[str], Mapping[str, float]], calls: int = 0) -> Estimate:
    low, central, high = (ms(bound) for bound in BOUNDS)
    return Estimate(central, low, high, calls)


# -- for people ------------------------------------------------------------------------------------------


def for_bundle(
    spec: Spec, artifacts: Sequence[Artifact], tokens: int, dram: str = rk3588.DRAMS[0], terms: Terms = TERMS
) -> Estimate | None:
    """Estimate for a bundle's artifacts; None if the terms of their chip or the compiler's cycles are unknown."""
    if not artifacts or any(a.target != rk3588.NAME or not a.cycles for a in artifacts):
        return None
    return on_npu(spec, artifacts, tokens, dram, terms)


def sequences_for_npu(
    spec: Spec, artifacts: Sequence[Artifact], cpu: str, dram: str = rk3588.DRAMS[0], terms: Terms = TERMS
) -> int | None:
    """The fewest sequences whose next tokens the NPU reads faster than the CPU in precision `cpu`.

    artifacts: of one fusion and precision. Head, sampling and recurrence are not compared: the CPU runs them either
    way. None if the CPU is faster for every number of sequences that the artifacts have rows for, or nothing is known.
    """
    layers = [artifact for artifact in artifacts if artifact.group != "head"]
    if not layers or any(a.target != rk3588.NAME or not a.cycles for a in layers):
        return None
    for count in range(2, max(artifact.rows for artifact in layers) + 1):
        npu = on_npu(spec, layers, count, dram, terms, host={})
        if npu.total_ms < on_cpu(spec, cpu, count, dram, terms, host={}).ms["projections"]:
            return count
    return None


def explain(terms: Terms = TERMS) -> list[str]:
    """Lines for people: how the terms are added up, and each term with range and source."""
    return [
        "Central values, and in parentheses all terms at their fast ends and all at their slow ends.",
        "Products on the NPU: the slower of the compiler's DDR cycles at the rate that boards read weights with, and "
        "of its NPU cycles (from 16 rows on, times graph_over_table).",
        "Chunks of a prompt overlap as in a simulation of their schedule on three cores and the CPU, with contention "
        "for memory (npu_three_cores, cpu_beside_npu), times waves_over_schedule.",
        "Products on the CPU: the slower of bytes over memory's rate, and of the kernel's static cycles.",
        *terms.explain(),
    ]
