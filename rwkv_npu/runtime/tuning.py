"""Measures every available backend, and makes the fastest plan for this machine.

A backend reads a prompt and some tokens as it would in use, so that caches, threads and the cost of a call are real,
while the engine counts the time of each role. The rest of a pass is the host's time, which differs between backends
too: their threads that wait for work take cores from it. A backend with a fused forward is measured twice: with it, as
it runs alone, and group by group, as it would run in a mixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
BATCHES = (2, 4, 8, 16, 32, 64)  # sequences at once
WORTH = 0.95  # of the time of what is simpler: a mixture, or another fusion, has to stay below it

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Medians in seconds, by use. A prefill pass has `chunk` tokens, and no head.

    calls: of a pass group by group, by role (all groups of the role together); host: the rest of that pass. fused: of a
    whole pass with the fused forward; empty where the backend has none.
    """

    fusion: str
    backend: str
    chunk: int
    calls: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float]
    fused: Mapping[str, float] = field(default_factory=dict)

    def rows(self, use: str) -> int:
        return self.chunk if use == "prefill" else 1

    def seconds(self, use: str) -> float:
        """Of a pass with this backend alone."""
        return self.fused[use] if self.fused else sum(self.calls[use].values()) + self.host[use]

    def per_token(self, use: str) -> float:
        return self.seconds(use) / self.rows(use)

    def head(self, use: str) -> float:
        return self.calls[use].get("head", 0.0)


def measure(source: BundleSource, backend: str, options: Options, chunk: int | None) -> Measured:
    """Time `backend` on a prompt of `chunk` tokens (None: as many as it takes at once) and on single ones.

    Raises RwkvNpuError where it cannot be opened, or faults.
    """
    fused: dict[str, float] = {}
    engine = open_engine(source, Plan(backend), options)
    try:
        chunk = chunk or engine.chunk
        ids = np.random.default_rng(0).integers(1, source.spec.V, chunk)
        results = _uses(engine, ids)
        if engine.fused:
            fused = {use: sum(calls.values()) + host for use, (calls, host) in results.items()}
            engine.close()
            engine = open_engine(source, Plan(backend), options, fused=False)
            results = _uses(engine, ids)
        if faults := engine.counters.faults.groups:
            raise BackendError(f"{backend} fails at {', '.join(faults)}")
    finally:
        engine.close()
    calls, host = ({use: found[i] for use, found in results.items()} for i in (0, 1))
    return Measured(source.program.fusion, backend, chunk, calls, host, fused)  # type: ignore[arg-type]


def _uses(engine: Engine, ids: np.ndarray) -> dict[str, tuple[dict[str, float], float]]:
    return {use: _passes(engine, ids if use == "prefill" else ids[:1]) for use in USES}


def _passes(engine: Engine, ids: np.ndarray) -> tuple[dict[str, float], float]:
    """Median seconds of reading `ids`: by role, and the host's."""
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
    plan = usual[1] if usual and WORTH * usual[0] <= seconds else plan
    return replace(plan, batch=_measure_batch(BundleSource(bundle, plan.fusion), plan, options)), found


def _measure_batch(source: BundleSource, plan: Plan, options: Options) -> int | None:
    """The fewest sequences (of BATCHES) whose next tokens the backends of prompts read sooner than those of tokens do.
    None where they are the same, or never do."""
    engine = open_engine(source, plan, options)
    try:
        if engine.alike:
            return None
        for count in (count for count in BATCHES if count <= engine.chunk):
            as_tokens, as_prompts = (_batch_seconds(engine, count, batch) for batch in (None, count))
            if as_prompts < WORTH * as_tokens:
                return count
        return None
    finally:
        engine.close()


def _batch_seconds(engine: Engine, count: int, batch: int | None) -> float:
    """Median seconds in which the next tokens of `count` sequences are read."""
    engine.batch = batch
    ids, states = np.ones((count, 1), np.int64), [engine.new_state() for _ in range(count)]
    taken: list[float] = []
    for _ in range(1 + FEWEST):
        begin = time.perf_counter()
        engine.forward_batch(ids, states, inplace=True)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken[1:]))  # the first opens what is not open


def _speed(measured: Measured, use: str) -> str:
    return f"{use} {1e3 * measured.per_token(use):.2f} ms a token"


def best_plan(found: Sequence[Measured]) -> tuple[float, Plan]:
    """Seconds of a typical text, and the plan, from measurements of one fusion."""
    seconds, rules, speeds = 0.0, list[tuple[str, str]](), []
    for use in USES:
        single = min(found, key=lambda measured: measured.per_token(use))
        chosen, own_rules = single.seconds(use), [(use, single.backend)]
        mixtures = [_by_role(found, use), _own_head(found, use)]
        mixed, mixed_rules = min(mixtures, key=lambda mixture: mixture[0])
        if mixed < WORTH * chosen:
            chosen, own_rules = mixed, mixed_rules
        rules += own_rules
        token = chosen / single.rows(use)
        seconds += TYPICAL[use] * token
        speeds.append(f"{use} {1e3 * token:.2f} ms a token")
    names = {name for _, name in rules}
    default = rules[0][1]
    plan = Plan(default, () if len(names) == 1 else tuple(rules), found[0].fusion, ", ".join(speeds))
    return seconds, plan


def _own_head(found: Sequence[Measured], use: str) -> tuple[float, list[tuple[str, str]]]:
    """Seconds and rules of the best mixture that leaves a backend its fused forward: another has the head."""
    body = min(found, key=lambda measured: measured.seconds(use) - measured.head(use))
    head = min(found, key=lambda measured: measured.head(use))
    host = max(head.host[use] - body.host[use], 0.0)  # waiting threads of the head's backend cost it as well
    seconds = body.seconds(use) - body.head(use) + head.head(use) + host
    return seconds, [(use, body.backend), (f"head:{use}", head.backend)]


def _by_role(found: Sequence[Measured], use: str) -> tuple[float, list[tuple[str, str]]]:
    """Seconds and rules of the mixture of the fastest backend for each role, run group by group."""
    best = {role: min(found, key=lambda measured: measured.calls[use][role]) for role in found[0].calls[use]}
    host = max(measured.host[use] for measured in best.values())
    seconds = sum(measured.calls[use][role] for role, measured in best.items()) + host
    return seconds, [(f"{role}:{use}", measured.backend) for role, measured in best.items()]
