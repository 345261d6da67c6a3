"""Measure how far NPU and CPU overlap when a prompt is read in chunks: the stand-in with its clock, on this machine.

    python -m bench.overlap [--model v7-0.4b] [--save bench/results/NAME]

On a shared machine, put `chrt -r 1` before the command, so that other processes do not delay the CPU's steps.

A run on the NPU takes its estimated time (`runtime.estimate`), multiplied by a factor. With the first factor the
busiest core works about as long as the CPU, with the second twice as long. The CPU's work is real. Overlap is
max(busiest core, CPU) / wall. The plain order, one call after the other, alternates with the waves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.saving import save
from rwkv_npu.backends.rknn_api import OVERRIDE
from rwkv_npu.bench.machine import describe
from rwkv_npu.conversion.forecast import Graphs
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.network import Program
from rwkv_npu.models.official import OFFICIAL, official_spec
from rwkv_npu.runtime.estimate import formula_cycles
from tools.board import build
from tools.board.clock import table, times
from tools.board.files import write_rknn

ROWS, TOKENS, REPEATS = 64, 512, 15
BITS = {"fp16": 16, "w8a8": 8}
CASES = {"balanced": 1.0, "NPU at twice the CPU": 2.0}  # busiest core / CPU


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="v7-0.4b", choices=OFFICIAL)
    parser.add_argument("--precision", default="fp16", choices=BITS)
    parser.add_argument("--threads", type=int, default=1, help="of the recurrence (default: 1)")
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    library = build.make_standin(lambda line: print(line, file=sys.stderr)) / "x86_64" / "librknnrt.so"
    options = {"model": arguments.model, "rows": ROWS, "tokens": TOKENS, "threads": arguments.threads}
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
        (Path(folder) / "times").write_text(
            write_contexts(Path(folder), arguments.model, arguments.precision)
        )
        options["folder"] = folder
        # At the estimate's own times, to find the CPU's time and the factors.
        first = summary(ask(library, {**options, "repeats": 2}, 1.0))["plain"]
        cases = {}
        for name, ratio in CASES.items():
            factor = ratio * first["cpu_s"] / first["busiest_s"]
            rows = ask(library, {**options, "repeats": REPEATS}, factor)
            cases[name] = {"factor": factor, "orders": summary(rows), "rows": rows}
    command = f"python -m bench.overlap --model {arguments.model} --precision {arguments.precision}"
    del options["folder"]
    policy = "real-time" if os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO) else "shared"
    results = {
        "machine": {**describe(), "scheduling": policy},
        "command": f"{command} --threads {arguments.threads}",
        **options,
        "cases": cases,
    }
    text = report(results)
    print(text)
    if arguments.save:
        save(arguments.save, results, text)
    return 0


def write_contexts(folder: Path, model: str, precision: str) -> str:
    """Write a file for each group, and return the clock's table of their times."""
    spec = official_spec(model)
    program = Program(spec, "layer")
    graphs, artifacts = Graphs(program), []
    for group in program.groups:
        matrices = graphs.matrices(group, ROWS)
        found = [formula_cycles(m.k, m.n, ROWS, BITS[precision]) for m in matrices]
        cycles = {
            key: round(sum(column))
            for key, column in zip(("ddr", "npu", "total"), np.array(found).T, strict=True)
        }
        artifacts.append(Artifact("", group.name, "rk3588", precision, "layer", ROWS, 0, cycles))
        write_rknn(folder / f"{group.name}.rknn", group, ROWS, {"fingerprint": model, "group": group.name})
    return table(times(spec, artifacts))


def ask(library: Path, request: Mapping[str, Any], factor: float) -> list[dict[str, Any]]:
    """Rows that the child measures with the clock at `factor`."""
    clock = {"RKNN_STANDIN_CLOCK": str(factor), "RKNN_STANDIN_TIMES": f"{request['folder']}/times"}
    own = {OVERRIDE: str(library), "RKNN_STANDIN_NULL": "1", "RWKV_NPU_LOCKS": request["folder"]}
    own["OPENBLAS_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "bench.overlap.child", json.dumps(request)]
    environment = {**os.environ, **own, **clock}
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians of the prompts by order."""
    found = {}
    for order in ("plain", "waves"):
        own = [row for row in rows if row["order"] == order]
        overlaps = [max(*row["cores_s"], row["cpu_s"]) / row["wall_s"] for row in own]
        found[order] = {
            "wall_s": statistics.median(row["wall_s"] for row in own),
            "busiest_s": statistics.median(max(row["cores_s"]) for row in own),
            "cpu_s": statistics.median(row["cpu_s"] for row in own),
            "overlap": statistics.median(overlaps),
            "lowest": min(overlaps),
            "highest": max(overlaps),
        }
    return found


def report(results: Mapping[str, Any]) -> str:
    facts = {"command": f"`{results['command']}`", **results["machine"]}
    lines = [*(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [
        f"A prompt of {results['tokens']} tokens of {results['model']} in chunks of {results['rows']}; the recurrence "
        f"in {results['threads']} thread. Medians of {REPEATS} prompts in each order, in turn; lowest and highest in "
        "parentheses. CPU: the time in which its thread had work. Overlap: max(busiest core, CPU) / wall.",
        "",
        "| case | order | clock | busiest core ms | CPU ms | wall ms | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        for order, row in case["orders"].items():
            times_ms = " | ".join(f"{1e3 * row[key]:.0f}" for key in ("busiest_s", "cpu_s", "wall_s"))
            spread = f"{row['overlap']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f})"
            lines.append(f"| {name} | {order} | x{case['factor']:.2f} | {times_ms} | {spread} |")
    lines += ["", "Estimated times of the NPU, and a PC's CPU: only the ratios mean anything."]
    return "\n".join(["# Overlap of NPU and CPU", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
