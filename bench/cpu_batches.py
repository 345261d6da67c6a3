"""Measure several sequences at once: `python -m bench.cpu_batches BUNDLE [--save STEM]`.

Tokens a second of `Model.forward_batch` for 1, 2, 4 and 8 sequences, in every precision of the bundle. Precisions
alternate, so that a change on the machine affects all of them. Figures are medians of the rounds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from bench.saving import bundle_study
from rwkv_npu.formats.bundle import read_manifest

SIZES = (1, 2, 4, 8)
TOKENS = 24  # steps of every sequence in a round
ROUNDS = 7


def batch_seconds(model: rwkv_npu.Model, size: int) -> float:
    """Seconds of one step with `size` sequences."""
    random = np.random.default_rng(0)
    states = [model.forward([1 + i])[1] for i in range(size)]
    tokens = random.integers(1, model.spec.V, (TOKENS + 2, size, 1))
    for step in tokens[:2]:
        _, states = model.forward_batch(step, states, inplace=True)
    begin = time.perf_counter()
    for step in tokens[2:]:
        _, states = model.forward_batch(step, states, inplace=True)
    return (time.perf_counter() - begin) / TOKENS


def study(bundle: Path) -> dict[str, Any]:
    precisions = read_manifest(bundle).cpu_precisions
    models = {name: rwkv_npu.load(bundle, backend="numba", precision=name) for name in precisions}
    turns: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in precisions}
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
        for name, model in models.items():
            for size in SIZES:
                turns[name][size].append(batch_seconds(model, size))
    rows = {
        name: {
            "tokens_per_s": {size: size / float(np.median(turns[name][size])) for size in SIZES},
            "gain": {
                size: float(np.median(size * np.array(turns[name][1]) / np.array(turns[name][size])))
                for size in SIZES
            },
        }
        for name in precisions
    }
    return {"model": bundle.name, "rounds": ROUNDS, "rows": rows}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"# Several sequences at once: {results['model']}",
        "",
        f"{results['machine']['cpu']}, {results['machine']['cores']} cores; `{results['command']}`; medians of "
        f"{results['rounds']} rounds.",
        "",
        "| weights | " + " | ".join(f"{size} t/s" for size in SIZES) + " | 2 | 4 | 8 against 1 |",
        "|---" * (len(SIZES) + 4) + "|",
    ]
    for name, row in results["rows"].items():
        speeds = " | ".join(f"{row['tokens_per_s'][size]:.1f}" for size in SIZES)
        gains = " | ".join(f"{row['gain'][size]:.2f}" for size in SIZES[1:])
        lines.append(f"| {name} | {speeds} | {gains} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(bundle_study("bench.cpu_batches", __doc__, study, table))
