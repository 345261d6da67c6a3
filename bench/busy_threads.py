"""Measure threads beside a busy process: `python -m bench.busy_threads MODEL [--save STEM]`.

Tokens a second of backend numba with one thread and with one thread a core, with and without a process that keeps the
last core busy. The four cases alternate in short intervals, so that a change on the machine affects all of them.
Figures are medians of the intervals, and of the ratios within a round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from bench.saving import bundle_study

ROUNDS = 15
SPELL_S = 0.2  # seconds of each case in a round
BUSY = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"


def tokens_per_s(model: rwkv_npu.Model, state: rwkv_npu.State) -> float:
    """Tokens a second in one interval."""
    begin = time.perf_counter()
    count = 0
    while time.perf_counter() - begin < SPELL_S:
        model.forward([1 + count % 100], state, inplace=True)
        count += 1
    return count / (time.perf_counter() - begin)


def study(bundle: Path) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    threads = (1, len(cores))
    models = {n: rwkv_npu.load(bundle, backend="numba", threads=n) for n in threads}
    states = {n: model.forward([1, 2, 3])[1] for n, model in models.items()}
    spells: dict[str, list[float]] = {f"{n} {kind}": [] for kind in ("idle", "busy") for n in threads}
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
        for n, model in models.items():
            spells[f"{n} idle"].append(tokens_per_s(model, states[n]))
        command = [sys.executable, "-c", BUSY % cores[-1]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as busy:
            assert busy.stdout is not None
            busy.stdout.readline()  # it runs
            for n, model in models.items():
                spells[f"{n} busy"].append(tokens_per_s(model, states[n]))
            busy.kill()
    rows = {}
    for kind in ("idle", "busy"):
        one, all_ = (np.array(spells[f"{n} {kind}"]) for n in threads)
        ratios = all_ / one
        rows[kind] = {
            "one_thread": float(np.median(one)),
            "all_threads": float(np.median(all_)),
            "ratio": float(np.median(ratios)),
            "lowest_ratio": float(ratios.min()),
        }
    return {"model": bundle.name, "rounds": ROUNDS, "threads": threads[1], "rows": rows}


def table(results: dict[str, Any]) -> str:
    machine, n = results["machine"], results["threads"]
    lines = [
        f"# Threads beside a busy process: {results['model']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; `{results['command']}`; {results['rounds']} rounds of "
        f"{SPELL_S} s a case, at a load average of {machine['load_average']:.0f}. Tokens a second, medians:",
        "",
        f"| machine | 1 thread | {n} threads | ratio | lowest ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, row in results["rows"].items():
        name = "as it is" if kind == "idle" else "and a process that keeps a core busy"
        numbers = f"{row['one_thread']:.0f} | {row['all_threads']:.0f}"
        lines.append(f"| {name} | {numbers} | {row['ratio']:.2f} | {row['lowest_ratio']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(bundle_study("bench.busy_threads", __doc__, study, table))
