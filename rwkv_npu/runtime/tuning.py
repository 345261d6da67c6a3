"""Measures every available backend, and selects the fastest plan for this machine.

Each backend reads a prompt and single tokens as in normal use, so that caches, threads and the cost of calls are real.
The engine counts the time of each role. The rest of a pass is host time, which also depends on the backend, because its
waiting threads take cores from the host. A backend with a fused forward is measured twice: with the fused forward, and
group by group, as it runs when several backends are mixed.
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
SECONDS, FEWEST, MOST = 2.0, 3, 40  # time limit, fewest and most passes, for each use on each backend
TYPICAL = {"decode": 128, "prefill": 128}  # tokens of each use in the text on which fusions are compared
BATCHES = (2, 4, 8, 16, 32, 64)  # numbers of sequences that are read together
WORTH = 0.95  # a mixture or another fusion must take less than this fraction of the simpler plan's time

Log = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Median seconds of passes by use (decode, prefill). A prefill pass has `chunk` tokens, and no head.

    calls: a pass group by group, by role (the sum over all groups of a role). host: the rest of that pass.
    fused: a whole pass with the fused forward; empty if the backend has none.
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
        """Seconds of a pass with this backend only."""
        return self.fused[use] if self.fused else sum(self.calls[use].values()) + self.host[use]

    def per_token(self, use: str) -> float:
        return self.seconds(use) / self.rows(use)

    def head(self, use: str) -> float:
        return self.calls[use].get("head", 0.0)


def measure(source: BundleSource, backend: str, options: Options, chunk: int | None) -> Measured:
    """Time a backend on a prompt of `chunk` tokens (None: the most that it takes in one call) and on single tokens.

    Raises RwkvNpuError if the backend cannot be opened, or has faults.
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
    calls = {use: by_role for use, (by_role, _) in results.items()}
    host = {use: seconds for use, (_, seconds) in results.items()}
    return Measured(source.program.fusion, backend, chunk, calls, host, fused)


def _uses(engine: Engine, ids: np.ndarray) -> dict[str, tuple[dict[str, float], float]]:
    """`_passes` of each use: prefill reads all `ids`, decode reads one."""
    return {use: _passes(engine, ids if use == "prefill" else ids[:1]) for use in USES}


def _passes(engine: Engine, ids: np.ndarray) -> tuple[dict[str, float], float]:
    """Median seconds to read `ids`: by role, and of the host."""
    roles = {group.role for group in engine.program.groups if len(ids) == 1 or group.role != "head"}
    engine.forward(ids)  # opens the remaining runners, and fills caches
    totals: list[float] = []
    by_role: list[dict[str, float]] = []
    spent, begin = engine.counters.run_s, time.perf_counter()
    while len(totals) < FEWEST or (len(totals) < MOST and time.perf_counter() - begin < SECONDS):
        before, start = dict(spent), time.perf_counter()
        engine.forward(ids)
        totals.append(time.perf_counter() - start)
        by_role.append({role: seconds - before.get(role, 0.0) for role, seconds in spent.items()})
    host = [total - sum(seconds.values()) for total, seconds in zip(totals, by_role, strict=True)]
    medians = {role: float(np.median([seconds[role] for seconds in by_role])) for role in roles}
    return medians, float(np.median(host))


def tune(bundle: Bundle, options: Options, log: Log) -> tuple[Plan, list[Measured]]:
    """Measure all backends with both fusions. Returns the fastest plan and the measurements.

    log: called with a line for each backend: its speeds, or why it cannot be measured.
    """
    measurements: list[Measured] = []
    for fusion in FUSIONS:
        source, chunk = BundleSource(bundle, fusion), None
        for backend in (*NPU_BACKENDS, *CPU_BACKENDS):
            absent = why_absent(backend, source) if backend in NPU_BACKENDS else None
            try:
                if absent:
                    raise BackendError(absent)
                measurements.append(measure(source, backend, options, chunk))
            except RwkvNpuError as error:
                log(f"{fusion} fusion, {backend}: not measured: {error}")
                continue
            # All backends are compared on the NPU's chunk, because a mixture with the NPU reads prompts in its chunks.
            chunk = chunk or (measurements[-1].chunk if backend in NPU_BACKENDS else PREFILL_ROWS)
            log(f"{fusion} fusion, {backend}: " + ", ".join(_speed(measurements[-1], use) for use in USES))
    if not measurements:
        raise BackendError("no backend can run this model here: rwkv-npu doctor may show why")
    plans = {
        fusion: best_plan([m for m in measurements if m.fusion == fusion])
        for fusion in {m.fusion for m in measurements}
    }
    seconds, plan = min(plans.values(), key=lambda pair: pair[0])
    default = plans.get(bundle.manifest.fusion)
    plan = default[1] if default and WORTH * default[0] <= seconds else plan
    return replace(plan, batch=_measure_batch(BundleSource(bundle, plan.fusion), plan, options)), measurements


def _measure_batch(source: BundleSource, plan: Plan, options: Options) -> int | None:
    """The smallest number of sequences (of BATCHES) whose next tokens the prefill backends read faster than the decode
    backends. None if they are the same backends, or if prefill is never faster."""
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
    """Median seconds to read the next tokens of `count` sequences."""
    engine.batch = batch
    ids, states = np.ones((count, 1), np.int64), [engine.new_state() for _ in range(count)]
    taken: list[float] = []
    for _ in range(1 + FEWEST):
        begin = time.perf_counter()
        engine.forward_batch(ids, states, inplace=True)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken[1:]))  # the first pass opens runners


def _speed(measured: Measured, use: str) -> str:
    return f"{use} {1e3 * measured.per_token(use):.2f} ms a token"


def best_plan(measurements: Sequence[Measured]) -> tuple[float, Plan]:
    """Seconds of a typical text with the fastest plan, and that plan. The measurements have one fusion."""
    seconds, rules, speeds = 0.0, list[tuple[str, str]](), []
    for use in USES:
        single = min(measurements, key=lambda measured: measured.per_token(use))
        best, best_rules = single.seconds(use), [(use, single.backend)]
        mixtures = [_by_role(measurements, use), _own_head(measurements, use)]
        mixed, mixed_rules = min(mixtures, key=lambda mixture: mixture[0])
        if mixed < WORTH * best:
            best, best_rules = mixed, mixed_rules
        rules += best_rules
        token = best / single.rows(use)
        seconds += TYPICAL[use] * token
        speeds.append(f"{use} {1e3 * token:.2f} ms a token")
    names = {name for _, name in rules}
    default = rules[0][1]
    plan = Plan(default, () if len(names) == 1 else tuple(rules), measurements[0].fusion, ", ".join(speeds))
    return seconds, plan


def _own_head(measurements: Sequence[Measured], use: str) -> tuple[float, list[tuple[str, str]]]:
    """Seconds and rules of the best mixture of two backends: one for the head, one for all other groups.

    The second may use its fused forward.
    """
    body = min(measurements, key=lambda measured: measured.seconds(use) - measured.head(use))
    head = min(measurements, key=lambda measured: measured.head(use))
    # The waiting threads of the head's backend slow the host too.
    host = max(head.host[use] - body.host[use], 0.0)
    seconds = body.seconds(use) - body.head(use) + head.head(use) + host
    return seconds, [(use, body.backend), (f"head:{use}", head.backend)]


def _by_role(measurements: Sequence[Measured], use: str) -> tuple[float, list[tuple[str, str]]]:
    """Seconds and rules of the mixture that runs each role on its fastest backend, group by group."""
    roles = measurements[0].calls[use]
    best = {role: min(measurements, key=lambda measured: measured.calls[use][role]) for role in roles}
    host = max(measured.host[use] for measured in best.values())
    seconds = sum(measured.calls[use][role] for role, measured in best.items()) + host
    return seconds, [(f"{role}:{use}", measured.backend) for role, measured in best.items()]
