"""This version beside another one: `python -m bench.versions BUNDLE OTHER_PYTHON [--save STEM]`.

OTHER_PYTHON is the interpreter of an environment with another version of rwkv_npu, such as a clone's .venv/bin/python.
Both read a prompt of 128 tokens and write 24, five times in a process, in turns of processes; medians, tokens a second.
The bundle must be one that both open.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

TURNS = 3
WORKER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, rwkv_npu
found = {}
for precision in sys.argv[2].split(","):
    model = rwkv_npu.load(sys.argv[1], backend="numba", precision=precision, threads=2)
    ids = np.random.default_rng(0).integers(1, model.spec.V, 128).tolist()
    model.forward(ids)
    _, state = model.forward([1])
    prefill, decode = [], []
    for _ in range(5):
        begin = time.perf_counter()
        model.forward(ids)
        prefill.append(128 / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for token in range(24):
            _, state = model.forward([token + 1], state, inplace=True)
        decode.append(24 / (time.perf_counter() - begin))
    found[precision] = {"prefill": float(np.median(prefill)), "decode": float(np.median(decode))}
    model.close()
print(json.dumps(found))
"""


def main() -> int:
    from bench.saving import save
    from rwkv_npu.bench.machine import describe
    from rwkv_npu.formats.bundle import read_manifest
    from rwkv_npu.kernels import instruction_sets

    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("other", help="interpreter with the other version")
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    precisions = [name for name in read_manifest(arguments.bundle).cpu_precisions if name in ("int4", "int8")]
    runs: dict[str, list[Any]] = {"this": [], "other": []}
    for _ in range(TURNS):
        for name, python in (("other", arguments.other), ("this", sys.executable)):
            command = [python, "-c", WORKER, str(arguments.bundle.resolve()), ",".join(precisions)]
            folder = Path(python).parent.parent.parent  # the clone, for an environment that lies in it
            runs[name].append(json.loads(subprocess.check_output(command, text=True, cwd=folder)))
    lines = [
        f"`python -m bench.versions {arguments.bundle.name} OTHER/.venv/bin/python`, {instruction_sets.describe()}"
    ]
    lines += ["", "| | before, tokens/s | now | ratio of each turn |", "|---|---|---|---|"]
    for precision in precisions:
        for what in ("prefill", "decode"):
            old, new = ([run[precision][what] for run in runs[name]] for name in ("other", "this"))
            ratios = ", ".join(f"{n / o:.2f}" for n, o in zip(new, old, strict=True))
            lines.append(f"| {precision}, {what} | {median(old):.0f} | {median(new):.0f} | {ratios} |")
    if arguments.save:
        save(arguments.save, {"machine": describe(), "runs": runs}, "\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
