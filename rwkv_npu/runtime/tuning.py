"""Measures the groups on every backend that is there, and makes the fastest plan of it for this machine.

A backend reads a prompt and some tokens as it would in use, so that caches, threads and the cost of a call are those
of the real thing, while the engine counts the time of each role. What is left of a pass is the host's share, which
differs between backends too: threads of theirs that wait for work take cores from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rwkv_npu.backends import NPU_BACKENDS
from rwkv_npu.errors import BackendError, RwkvNpuError
from rwkv_npu.formats.bundle import Bundle
from rwkv_npu.models.spec import FUSIONS
from rwkv_npu.runtime.engine import PREFILL_ROWS, Engine
from rwkv_npu.runtime.loading import Options, open_engine, why_absent
from rwkv_npu.runtime.placement import USES, Plan
from rwkv_npu.runtime.weights import BundleSource

CPU_BACKENDS = ("numba", "ort", "numpy")
SECONDS, FEWEST, MOST = 2.0, 3, 40  # for each use on each backend: at most so long, and so many passes
TYPICAL = {"decode": 128, "prefill": 128}  # tokens of each use by which fusions are compared
WORTH = 0.95  # of the time of what is simpler: a mixture, or another fusion, has to stay below it

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Medians in seconds: of a call, by use and role (all groups of the role together), and of the host's share. A
    prefill pass has `chunk` tokens."""

    fusion: str
    backend: str
    chunk: int
    calls: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float]

    def rows(self, use: str) -> int:
        return self.chunk if use == "prefill" else 1

    def per_token(self, use: str) -> float:
        return (sum(self.calls[use].values()) + self.host[use]) / self.rows(use)


def measure(source: BundleSource, backend: str, options: Options, chunk: int | None) -> Measured:
    """Time `backend` on a prompt of `chunk` tokens (None: as many as it takes at once) and on single ones.

    Raises RwkvNpuError where it cannot be opened, or faults.
    """
    engine = open_engine(source, Plan(backend), options)
    try:
        chunk = chunk or engine.chunk
        ids = np.random.default_rng(0).integers(1, source.spec.V, chunk)
        results = {use: _passes(engine, ids if use == "prefill" else ids[:1]) for use in USES}
        if faults := engine.counters.faults.groups:
            raise BackendError(f"{backend} fails at {', '.join(faults)}")
    finally:
        engine.close()
    calls = {use: found[0] for use, found in results.items()}
    return Measured(
        source.program.fusion, backend, chunk, calls, {use: found[1] for use, found in results.items()}
    )


def _passes(engine: Engine, ids: np.ndarray) -> tuple[dict[str, float], float]:
    """Seconds by role, and the host's, of reading `ids`: medians."""
    roles = {group.role for group in engine.program.groups if len(ids) == 1 or group.role != "head"}
    engine.forward(ids)  # opens what is not open, and fills caches
    totals: list[float] = []
    taken: list[dict[str, float]] = []
    spent, begin = engine.counters.run_s, time.perf_counter()
    while len(totals) < FEWEST or (len(totals) < MOST and time.perf_counter() - begin < SECONDS):
        before, start = dict(spent), time.perf_counter()
        engine.forward(ids)
        totals.append(time.perf_counter() - start)
        taken.append({role: seconds - before.get(role, 0.0) for role, seconds in spent.items()})
    host = [total - sum(found.values()) for total, found in zip(totals, taken, strict=True)]
    medians = {role: float(np.median([found[role] for found in taken])) for role in roles}
    return medians, float(np.median(host))


def tune(bundle: Bundle, options: Options, say: Say) -> tuple[Plan, list[Measured]]:
    """The fastest plan for this machine, and what it follows from. `say` gets a line for what cannot be measured."""
    found: list[Measured] = []
    for fusion in FUSIONS:
        source, chunk = BundleSource(bundle, fusion), None
        for backend in (*NPU_BACKENDS, *CPU_BACKENDS):
            absent = why_absent(backend, source) if backend in NPU_BACKENDS else None
            try:
                if absent:
                    raise BackendError(absent)
                found.append(measure(source, backend, options, chunk))
            except RwkvNpuError as error:
                say(f"{fusion} fusion, {backend}: not measured: {error}")
                continue
            # Backends are compared on as many rows as the NPU takes: a mixture reads prompts in its chunks.
            chunk = chunk or (found[-1].chunk if backend in NPU_BACKENDS else PREFILL_ROWS)
            say(f"{fusion} fusion, {backend}: " + ", ".join(_speed(found[-1], use) for use in USES))
    if not found:
        raise BackendError("no backend can run this model here: rwkv-npu doctor may say why")
    plans = {
        fusion: best_plan([m for m in found if m.fusion == fusion]) for fusion in {m.fusion for m in found}
    }
    seconds, plan = min(plans.values(), key=lambda pair: pair[0])
    usual = plans.get(bundle.manifest.fusion)
    return (usual[1] if usual and WORTH * usual[0] <= seconds else plan), found


def _speed(measured: Measured, use: str) -> str:
    return f"{use} {1e3 * measured.per_token(use):.2f} ms a token"


def best_plan(found: Sequence[Measured]) -> tuple[float, Plan]:
    """Seconds of a typical text, and the plan, from measurements of one fusion."""
    seconds, rules, speeds = 0.0, list[tuple[str, str]](), []
    for use in USES:
        single = min(found, key=lambda measured: measured.per_token(use))
        best = {
            role: min(found, key=lambda measured: measured.calls[use][role]) for role in single.calls[use]
        }
        host = max(m.host[use] for m in best.values())
        mixed = (sum(m.calls[use][role] for role, m in best.items()) + host) / single.rows(use)
        if mixed < WORTH * single.per_token(use):
            rules += [(f"{role}:{use}", measured.backend) for role, measured in best.items()]
            token = mixed
        else:
            rules.append((use, single.backend))
            token = single.per_token(use)
        seconds += TYPICAL[use] * token
        speeds.append(f"{use} {1e3 * token:.2f} ms a token")
    names = {name for _, name in rules}
    default = rules[0][1]
    plan = Plan(default, () if len(names) == 1 else tuple(rules), found[0].fusion, ", ".join(speeds))
    return seconds, plan
