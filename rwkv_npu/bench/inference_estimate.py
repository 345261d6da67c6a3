"""Rows that nobody measured: a bundle's artifacts on their chip, and the RK3588's CPU beside them.

The arithmetic and its sources are in rwkv_npu/estimate.py; the CPU's share of the work comes from a measured row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from rwkv_npu.bench.inference_record import PREFILLS, Row
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Spec, groups, state_shapes
from rwkv_npu.runtime import estimate

HOST_TERMS = ("recurrence", "sampling", "dispatch", "rest")  # what the CPU does beside the groups
BOARD = "rk3588"  # the chip whose CPU and bandwidths are known

Blank = Callable[..., Row]


def estimates(
    spec: Spec,
    artifacts: Sequence[Artifact],
    measured: Sequence[Row],
    assumptions: estimate.Assumptions,
    blank: Blank,
) -> list[Row]:
    """The rows; none without artifacts. `blank(backend=..., ...)` makes a row of the model."""
    estimator = Estimator(spec, _host(measured), assumptions, blank)
    kinds = dict.fromkeys((a.target, a.precision, a.fusion) for a in artifacts)
    on_board = any(target == BOARD for target, _, _ in kinds)
    rows = [estimator.cpu(precision) for precision in estimate.CPU_PRECISIONS if on_board]
    for kind in kinds:
        chosen = [a for a in artifacts if (a.target, a.precision, a.fusion) == kind]
        if all(a.cycles for a in chosen):  # else the compiler printed none
            dispatching = replace(estimator, host=_host(measured, len(groups(spec, kind[2]))))
            rows += [dispatching.npu(chosen, rate) for rate in estimate.RATES.get(kind[0], (estimate.TABLE,))]
    return rows


def _host(measured: Sequence[Row], calls: int | None = None) -> Row | None:
    """The row whose recurrence, sampling and dispatch stand for the board's: one that makes as many calls a token, if
    that matters and there is one; then the default backend's."""
    able = [row for row in measured if row.decode_ms and row.prefill_128_ms]
    order = {"numba": 0, "ort": 1}

    def preference(row: Row) -> tuple[bool, int, float]:
        others = calls is not None and row.calls_per_token != calls
        return others, order.get(row.backend, 2), -(row.decode_tps or 0)

    return min(able, key=preference, default=None)


@dataclass(frozen=True)
class Estimator:
    """Makes the estimates of one model. host: a measured row, or None for estimates without the CPU's share."""

    spec: Spec
    host: Row | None
    assumptions: estimate.Assumptions
    blank: Blank

    def npu(self, artifacts: Sequence[Artifact], rate: estimate.Rate) -> Row:
        first = artifacts[0]
        row = self.blank("rknn", weights=first.precision, fusion=first.fusion, estimated=True)
        row.device = f"{first.target.upper()} NPU, {rate.label}"
        row.basis = rate.source
        row.terms = {
            "cores": rate.cores,
            "gb_per_s": rate.gb_per_s or estimate.TABLE_GB_PER_S,
            "call_overhead_us": self.assumptions.call_overhead_us,
        }
        a_token = sum(artifact.weight_bytes for artifact, _ in estimate.served_by(artifacts, 1))
        row.bytes_per_token = a_token + self._state_bytes()
        self._fill(
            row, lambda n, host: estimate.on_npu(self.spec, artifacts, n, rate, self.assumptions, host)
        )
        return row

    def cpu(self, precision: str) -> Row:
        row = self.blank("cpu", weights=precision, estimated=True, device="RK3588 CPU, 4 x Cortex-A76")
        row.basis = estimate.CPU_SOURCES[precision]
        row.terms = {"gb_per_s": estimate.CPU_GB_PER_S, "gflops": estimate.CPU_GFLOPS}
        row.bytes_per_token = sum(estimate.weight_bytes(self.spec, precision).values()) + self._state_bytes()
        self._fill(row, lambda n, host: estimate.on_cpu(self.spec, precision, n, self.assumptions, host))
        return row

    def _fill(self, row: Row, compute: Callable[[int, Mapping[str, float]], estimate.Estimate]) -> None:
        """Times and speeds; `compute(tokens, the host's share in ms)`."""
        row.stored = row.weights
        row.terms["host_factor"] = self.assumptions.host_factor
        if self.host is None:
            row.basis += "; without the CPU's share, since nothing was measured"
        else:
            name = self.host.name
            row.basis += (
                f"; recurrence, sampling, dispatch and rest as {name} took here, times the host factor"
            )
        for name, tokens in (("decode", 1), *((f"prefill_{count}", count) for count in PREFILLS)):
            measured: Mapping[str, float] = getattr(self.host, f"{name}_ms") if self.host else {}
            if self.host and not measured:
                continue
            share = {term: measured[term] for term in HOST_TERMS if term in measured}
            found = compute(tokens, share)
            row.terms |= {f"{name}_calls": found.npu_calls, f"{name}_host_ms_here": sum(share.values())}
            reading_ms = found.total_ms - (found.ms.get("sampling", 0.0) if tokens > 1 else 0.0)
            row.update({f"{name}_ms": dict(found.ms), f"{name}_tps": tokens / reading_ms * 1e3})
            if tokens == PREFILLS[0]:
                row.first_token_s = found.total_ms / 1e3
        row.calls_per_token = float(row.terms.get("decode_calls") or 0) or None

    def _state_bytes(self) -> int:
        """Read and written by a token."""
        return 2 * 4 * self.spec.L * sum(prod(shape) for shape in state_shapes(self.spec).values())
