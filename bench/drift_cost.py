"""What watching for drift costs (backends/drift.py): `python -m bench.drift_cost [--save STEM]`.

The host's share of a token, or of a chunk of a prompt, at the sizes of official models in layer fusion, over an NPU
that returns at once: dispatch, recurrence and all else that the CPU does, of which watching is a part where artifacts
are in int8. With and without it take turns, and with them a second one without, to tell what a difference means.
Watching is timed by itself as well: the calls of 13 tokens, of which one in 13 is looked at, with an eye on them and
without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.saving import save
from rwkv_npu.backends.base import Backend, Runner, allocate_inputs
from rwkv_npu.backends.drift import EVERY, Peaks, Watched
from rwkv_npu.bench.machine import describe
from rwkv_npu.bench.shapes import official_spec
from rwkv_npu.kernels.recurrence import compiled
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Group, Spec, tensors
from rwkv_npu.runtime.engine import Engine

MODELS = {"v7-0.4b": "0.45B", "v7-1.5b": "1.5B"}
ROWS = (1, 64)
ROUNDS = 90  # each of the three ways comes first as often
CALLS = 5  # of the engine in a turn
WATCHED = ("y", "att_last", "ffn_last")  # inputs that int8 is made of, beside all of the head's


class Idle:
    """An NPU that returns what it returned before. Opened twice, a group has the same arrays: where they lie matters
    more than what is measured."""

    name = "idle"

    def __init__(self, rows: int):
        self._rows = rows
        self._opened: dict[str, IdleRunner] = {}

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return (1,) if group.role == "head" else (self._rows,)

    def open(self, group: Group, rows: int, batch: int = 1) -> Runner:
        if group.name not in self._opened:
            self._opened[group.name] = IdleRunner(group, rows)
        return self._opened[group.name]

    def close(self) -> None:
        pass


class IdleRunner:
    def __init__(self, group: Group, rows: int):
        random = np.random.default_rng(group.layer + 1)
        self.inputs = allocate_inputs(group, rows, 1)
        self._outputs = {p.name: random.standard_normal((rows, p.width), np.float32) for p in group.outputs}

    def run(self) -> Mapping[str, np.ndarray]:
        return self._outputs


def ranges_of(groups: list[Group]) -> Peaks:
    """Never left: what follows from that happens once."""
    found = {g.name: {p.name: 1e9 for p in g.inputs if p.name in WATCHED or g.role == "head"} for g in groups}
    return {name: inputs for name, inputs in found.items() if inputs}


def host_tensors(spec: Spec) -> Callable[[str], np.ndarray]:
    """What the CPU reads of a random model: all but the projections, of which none is asked for."""
    random = np.random.default_rng(0)
    found = {"emb.weight": np.zeros((spec.V, spec.D), np.float16)}
    for tensor in tensors(spec):
        if not tensor.kind.is_projection and tensor.name not in found:
            found[tensor.name] = random.uniform(0.1, 0.9, tensor.used_shape).astype(np.float32)
    return found.__getitem__


def engine_over(backend: Backend, program: Program, host: Callable[[str], np.ndarray]) -> Engine:
    return Engine(
        program,
        host,
        serve=lambda group, decode: backend,
        fingerprint="",
        initial={},
        recurrence=compiled(program.spec, 1),
    )


def host_seconds(engine: Engine, M: int, state: Any) -> float:
    """Of a call for M tokens."""
    ids = np.arange(1, M + 1)
    begin = time.perf_counter()
    for _ in range(CALLS):
        engine.forward(ids, state, inplace=True)
    return (time.perf_counter() - begin) / CALLS


def call_seconds(runners: list[Runner]) -> float:
    """Of the calls for a token, or a chunk, alone."""
    begin = time.perf_counter()
    for _ in range(EVERY):
        for runner in runners:
            runner.run()
    return (time.perf_counter() - begin) / EVERY


def measure(spec: Spec, host: Callable[[str], np.ndarray], M: int) -> dict[str, float]:
    """Medians over the rounds, in seconds; `error`: half of the width of the middle half of what watching takes."""
    program = Program(spec, "layer")
    idle = Idle(M)
    watched = Watched(idle, ranges_of(program.groups))
    backends: dict[str, Backend] = {"plain": idle, "again": idle, "watched": watched}
    engines = {name: engine_over(backend, program, host) for name, backend in backends.items()}
    state = engines["plain"].new_state()
    runners = {
        name: [backend.open(group, 1 if group.role == "head" else M) for group in program.groups]
        for name, backend in backends.items()
    }
    for name in backends:  # warm
        host_seconds(engines[name], M, state), call_seconds(runners[name])
    turns: dict[str, list[float]] = {f"{kind} {name}": [] for kind in ("host", "calls") for name in backends}
    for number in range(ROUNDS):
        first = number % len(backends)
        for name in [*backends][first:] + [*backends][:first]:
            turns[f"host {name}"].append(host_seconds(engines[name], M, state))
            turns[f"calls {name}"].append(call_seconds(runners[name]))
    for engine in engines.values():
        engine.close()
    found = {name: np.array(seconds) for name, seconds in turns.items()}
    alone = found["calls watched"] - found["calls plain"]
    low, high = np.quantile(alone, (0.25, 0.75))
    return {
        **{name: float(np.median(seconds)) for name, seconds in found.items()},
        "watching": float(np.median(alone)),
        "error": float(high - low) / 2,
        **{
            f"{name} in turns": float(np.median(found[f"host {name}"] / found["host plain"])) - 1
            for name in ("watched", "again")
        },
    }


def study() -> dict[str, Any]:
    rows = []
    for name in MODELS:
        spec = official_spec(name)
        host = host_tensors(spec)
        for M in ROWS:
            print(f"{name}, {M} rows", file=sys.stderr)
            row = {"model": name, "D": spec.D, "L": spec.L, "M": M}
            rows.append({**row, **measure(spec, host, M)})
    return {"rounds": ROUNDS, "every": EVERY, "rows": rows}


def table(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# What watching for drift costs the host",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; `{results['command']}`; medians of "
        f"{results['rounds']} rounds, in which with and without take turns. One call in {results['every']} is looked "
        "at. Random weights; an NPU that returns at once.",
        "",
        "| RWKV-7 | D, L | tokens a call | host's share, ms | watching, ms | of that share "
        "| in turns | without, again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        share = row["watching"] / row["host plain"]
        lines.append(
            f"| {MODELS[row['model']]} | {row['D']}, {row['L']} | {row['M']} | {row['host plain'] * 1e3:.3f} | "
            f"{row['watching'] * 1e3:.4f} (+- {row['error'] * 1e3:.4f}) | {share:.2%} | "
            f"{row['watched in turns']:+.1%} | {row['again in turns']:+.1%} |"
        )
    lines += [
        "",
        "Host's share: all that the CPU does for a call of the engine, the recurrence compiled, one thread; what the "
        "NPU, RKNNLite and the guard before it take comes on top, and makes the part that watching has smaller. "
        "Watching is timed by itself, where its code and data are at hand; in turns, what an engine with it takes "
        "longer than one without, which is the safer figure, but for what machine and chance add: as much as the last "
        "column, where both are without.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drift_cost", description=__doc__)
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    results = {"machine": describe(), "command": "python -m bench.drift_cost", **study()}
    if arguments.save:
        save(Path(arguments.save), results, table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
