"""Measure the compiled recurrences of prompts: `python -m bench.recurrence [--beside FOLDER] [--save STEM]`.

Microseconds for each token and head (N = 64) on one core, with 128 tokens (one call of the engine) and 16 heads. Also
the arithmetic of the step form over that time, and the bytes of inputs, outputs and states. FOLDER holds the sources of
another version (`git archive REVISION | tar -x -C FOLDER`); processes of both versions alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

GENERATIONS = ("5.2", "6", "7")
T, H, N, LAYERS, ROUNDS, RUNS = 128, 16, 64, 4, 20, 3
# Multiplications and additions of the step form for each element of a state.
FLOP = {"5.2": 5, "6": 5, "7": 9}
SECTION = "--measure"  # runs one measurement in its own process, with the sources of either version


def measure(generation: str) -> list[float]:
    """Microseconds for each token and head, by round. Each layer has its own inputs, as in a model."""
    from rwkv_npu.kernels.recurrence import Compiled
    from rwkv_npu.models.rows import Rows
    from rwkv_npu.models.spec import att_outputs, state_shapes
    from tools.make_checkpoint import make_spec

    rng, spec = np.random.default_rng(0), make_spec(generation, D=H * N, L=2, V=8, N=N)

    def vector(name: str) -> np.ndarray:
        by_head = name in ("att.r_k", "att.time_faaaa") or (name, generation) == ("att.time_decay", "5.2")
        shape = (H, N) if by_head else (H * N,)
        low, high = (-6, 0) if name == "att.time_decay" else (-1, 1)
        return rng.uniform(low, high, shape).astype(np.float32)

    compiled = Compiled(spec, threads=1)
    table = compiled.prepare(vector, spec)
    shapes = state_shapes(spec)
    state = {name: np.zeros((2, *shape), np.float32) for name, shape in shapes.items()}
    rows = Rows([range(T)], [state])
    layers = [
        {port.name: rng.uniform(0, 1, (T, port.width)).astype(np.float32) for port in att_outputs(spec, 0)}
        for _ in range(LAYERS)
    ]
    found = []
    for _ in range(ROUNDS + 2):
        begin = time.perf_counter()
        for x in layers:
            compiled.time_mix(table, x, rows, 1, {})
        found.append((time.perf_counter() - begin) / (LAYERS * T * H) * 1e6)
    return found[2:]


def row_of(generation: str, folders: dict[str, Path]) -> dict[str, Any]:
    times: dict[str, list[float]] = {way: [] for way in folders}
    for _ in range(RUNS):
        for way, folder in folders.items():
            command = [sys.executable, __file__, SECTION, generation]
            run = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(folder)},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            times[way] += json.loads(run.stdout)
    inputs = {"5.2": 4, "6": 5, "7": 8}[generation]
    row: dict[str, Any] = {"generation": generation}
    # Of a token and head: inputs and y. The state is read and written once a call.
    row["bytes"] = 4 * N * (inputs + 1) + 8 * N * N // T
    for way, found in times.items():
        low, median = min(found), float(np.median(found))
        row[way] = {"min us": low, "median us": median, "GFLOP/s": FLOP[generation] * N * N / low / 1e3}
    return row


def table(results: dict[str, Any]) -> str:
    machine, ways = results["machine"], [way for way in ("here", "beside") if way in results["rows"][0]]
    lines = [
        "# The recurrences of prompts",
        "",
        f"{machine['cpu']}, one core, Python {machine['python']}; `{results['command']}`; microseconds of a token and "
        f"head (N = {N}), minimum / median of {RUNS} processes of {ROUNDS} rounds, which take turns; "
        f"{T} tokens, {H} heads, {LAYERS} layers. GFLOP/s: the arithmetic of the step form over the minimum."
        + (f" Beside: {results['beside']}." if results["beside"] else ""),
        "",
        "| RWKV | bytes | " + " | ".join(f"{way}, us | GFLOP/s" for way in ways) + " |",
        "|---|---|" + "---|---|" * len(ways),
    ]
    for row in results["rows"]:
        cells = [
            f"{row[w]['min us']:.2f} / {row[w]['median us']:.2f} | {row[w]['GFLOP/s']:.0f}" for w in ways
        ]
        lines.append(f"| {row['generation']} | {row['bytes']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == [SECTION]:
        print(json.dumps(measure(sys.argv[2])))
        return 0
    from bench.saving import save
    from rwkv_npu.bench.machine import describe

    parser = argparse.ArgumentParser(prog="python -m bench.recurrence", description=__doc__)
    parser.add_argument("--beside", metavar="FOLDER", type=Path, help="the sources of another version")
    parser.add_argument("--name", default="", help="what to call it")
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    folders = {"here": Path(__file__).resolve().parent.parent}
    if arguments.beside:
        folders["beside"] = arguments.beside.resolve()
    results = {
        "machine": describe(),
        "command": "python -m bench.recurrence" + (" --beside FOLDER" if arguments.beside else ""),
        "beside": arguments.name or (arguments.beside and arguments.beside.name),
        "rows": [row_of(generation, folders) for generation in GENERATIONS],
    }
    if arguments.save:
        save(Path(arguments.save), results, table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
