"""Constants of the RK3588, and the terms of the estimates with their sources.

This project has measured none of the terms on a board. If a source gives a range, low and high are its ends; assumed
ranges are marked. `Terms.measured` replaces terms by figures measured on a board.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

NAME = "rk3588"

# NPU: three cores at 1 GHz. A cycle of the compiler is 1 ns.
NPU_CORES = 3
NPU_HZ = 1e9
NPU_FLOPS = {16: 1.024e12, 8: 2.048e12}  # operations a second of one core, by bits of an operand
# A core's memory bandwidth in the compiler's cycle table. Boards reach half of it.
NPU_TABLE_GB_PER_S = 23.63

# CPU: the four Cortex-A76; the Cortex-A55 beside them are not used.
CPU_NAME = "RK3588 CPU, 4 x Cortex-A76"
CPU_CORES = 4
CPU_HZ = 2.3e9

DRAMS = ("LPDDR5", "LPDDR4X")  # both at full clock; a board at 528 MHz takes twice as long

BOUNDS = ("low", "central", "high")  # bounds of a time: low is the fastest


@dataclass(frozen=True)
class Term:
    """A figure of the estimates: low <= central <= high, in `unit`. The high end of a rate is the fast one."""

    name: str
    low: float
    central: float
    high: float
    unit: str
    source: str

    @property
    def is_rate(self) -> bool:
        return self.unit in ("GB/s", "bytes/cycle", "multiply-adds/cycle", "x faster", "of the peak")

    def at(self, bound: str) -> float:
        """The value for the low, central or high end of a *time*."""
        if self.is_rate:
            bound = {"low": "high", "high": "low"}.get(bound, bound)
        return float(getattr(self, bound))


_BOARDS = "published board measurements"
_STATIC = "static cycles of this project's kernels on a Cortex-A76 (llvm-mca, bench/kernel_cycles)"
_INTERFACES = "bench/results/npu-interfaces"
_ASSUMED = "; the spread is an assumption"

_TERMS = (
    # Reading weights, one row: GB/s of one NPU core, and of the four large CPU cores.
    Term("npu_read_lpddr5", 10.9, 11.1, 11.1, "GB/s", f"{_BOARDS} (matmul interface, fit over sizes, one core)"),
    Term("npu_read_lpddr4x", 8.6, 8.7, 8.8, "GB/s", f"{_BOARDS} (matmul interface, one core)"),
    Term("npu_three_cores", 2.1, 2.4, 2.8, "x faster", f"{_BOARDS} (three contexts, one core each, against one)"),
    Term("cpu_read_lpddr5", 20.0, 25.0, 25.6, "GB/s", f"{_BOARDS} (bandwidth probes, llama.cpp's decoding)"),
    Term("cpu_read_lpddr4x", 16.0, 21.0, 22.0, "GB/s", f"{_BOARDS} (llama.cpp Q4_0 and Q8_0, STREAM)"),
    # A call of the NPU.
    Term("rknnlite_call", 60, 150, 270, "us", f"{_BOARDS} of the C call (40) and this project's emulated RKNNLite"),
    Term("c_call", 33, 40, 50, "us", f"{_BOARDS} (rknn_matmul_run, rknn_run of a tiny graph)"),
    Term("npu_call", 324, 380, 438, "us", f"c_call, and 97 us of Python on a PC ({_INTERFACES}) times host_python"),
    Term("three_cores_handover", 27, 80, 130, "us", f"{_BOARDS} (threads, synchronisation, conversion a step)"),
    # A graph of 16 rows or more, over the compiler's table.
    Term("graph_over_table", 2.0, 2.4, 2.8, "x", f"{_BOARDS} (a transformer of 16 layers, 50 rows, RKNNLite)"),
    Term("norm_element", 1.95, 2.2, 2.45, "ns", f"{_BOARDS} (per-operator tables of the runtime)"),
    Term("transpose_element", 1.4, 1.6, 1.9, "ns", f"{_BOARDS} (per-operator tables of the runtime)"),
    Term("other_element", 0.38, 0.5, 1.06, "ns", f"{_BOARDS} (Mul, Add, Concat; a sigmoid that is not fused)"),
    Term("small_operator", 1.5, 3, 5, "us", f"{_BOARDS} (operators chained in one submit, one row)"),
    Term("conversion_element", 1, 2, 9, "ns", f"{_BOARDS} (inputs_set and outputs_get of fp32)"),
    Term("port_element", 0.8, 1.17, 1.6, "ns", f"0.40 on a PC ({_INTERFACES}: fill, check) times host_kernels"),
    # Chunks of a prompt beside each other on three cores (npu_three_cores) and the CPU.
    Term("cpu_beside_npu", 1.24, 1.34, 1.43, "x", f"{_BOARDS} (a stage of the CPU while the NPU streams weights)"),
    Term("waves_over_schedule", 1.0, 1.04, 1.08, "x", "bench/results/overlap: measured times over the schedule's"),
    # The matmul interface with many rows: share of a core's peak, by K in fp16.
    Term("matmul_int8", 0.30, 0.34, 0.38, "of the peak", f"{_BOARDS} (4096^3, one core){_ASSUMED}"),
    Term("matmul_fp16_1024", 0.80, 0.88, 0.90, "of the peak", f"{_BOARDS} (K <= 1024){_ASSUMED}"),
    Term("matmul_fp16_2048", 0.50, 0.56, 0.60, "of the peak", f"{_BOARDS} (K = 2048){_ASSUMED}"),
    Term("matmul_fp16_4096", 0.15, 0.17, 0.19, "of the peak", f"{_BOARDS} (K = 4096){_ASSUMED}"),
    Term("matmul_fp16_8192", 0.06, 0.07, 0.08, "of the peak", f"{_BOARDS} (K >= 8192){_ASSUMED}"),
    # The compiled kernels, per large core.
    Term("decode_int8", 7.1, 10.1, 10.1, "bytes/cycle", f"{_STATIC}, dotprod; low: 70 %, an assumption"),
    Term("decode_int4", 4.6, 6.5, 6.5, "bytes/cycle", f"{_STATIC}, dotprod; low: 70 %, an assumption"),
    Term("decode_fp16", 4.0, 8.0, 8.0, "bytes/cycle", "four products a cycle; an assumption, above memory's rate"),
    Term("prefill_int8", 14.4, 20.5, 20.5, "multiply-adds/cycle", f"{_STATIC}, dotprod; low: 70 %, an assumption"),
    Term("prefill_int4", 14.0, 20.0, 20.0, "multiply-adds/cycle", f"{_STATIC}, dotprod; low: 70 %, an assumption"),
    Term("prefill_fp16", 4.8, 5.6, 6.4, "multiply-adds/cycle", "60 to 80 % of the fp32 peak of 8; an assumption"),
    Term("recurrence_v7", 5500, 6500, 9000, "cycles", f"{_STATIC}, a token and head of 64{_ASSUMED}"),
    Term("recurrence_v56", 4300, 5100, 7000, "cycles", f"v7's, by operations an element: 7 against 9{_ASSUMED}"),
    Term("recurrence_v4", 15, 25, 60, "cycles", "a token and channel, three exponentials; an assumption"),
    # Measured on a PC only, and the factors by which a Cortex-A76 is slower, by kind of work.
    Term("sampling_entry", 2.9, 4.3, 10.0, "ns", "the compiled sampler on a PC (bench/sampler): greedy, top-p, flat"),
    Term("python_pass", 0.2, 0.3, 0.4, "ms", "this project on a PC: a forward pass without products and recurrence"),
    Term("host_kernels", 2.0, 2.9, 4.0, "x", "peak of a PC's core against a Cortex-A76, 106 and 36.8 GFLOP/s in fp32"),
    Term("host_python", 3.0, 3.5, 4.0, "x", f"clock and work a cycle of a PC's core against a Cortex-A76{_ASSUMED}"),
)  # fmt: skip


class Terms(Mapping[str, Term]):
    """The terms by name."""

    def __init__(self, terms: Mapping[str, Term]):
        self._terms = dict(terms)

    def __getitem__(self, name: str) -> Term:
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def measured(self, values: Mapping[str, float], source: str) -> Terms:
        """A copy with some terms replaced by measured values, without a range. Raises KeyError for an unknown name."""
        new = {
            name: replace(self._terms[name], low=value, central=value, high=value, source=source)
            for name, value in values.items()
        }
        return Terms({**self._terms, **new})

    def explain(self, names: Mapping[str, object] | None = None) -> list[str]:
        """One line for each term (or those in `names`): name, range, unit, source."""
        return [
            f"{term.name}: {_range(term)} {term.unit}; {term.source}"
            for name, term in self._terms.items()
            if names is None or name in names
        ]


def _range(term: Term) -> str:
    if term.low == term.high:
        return f"{term.central:g}"
    return f"{term.central:g} ({term.low:g} to {term.high:g})"


TERMS = Terms({term.name: term for term in _TERMS})

# Published milliseconds of square fp16 products on boards: matmul interface, one core.
PUBLISHED_MATMUL_MS = {256: 0.27, 512: 0.88, 1024: 4.4, 2048: 30.3, 4096: 788.0, 8192: 14723.0}
