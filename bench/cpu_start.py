"""Measure start time and memory: `python -m bench.cpu_start BUNDLE [--save STEM]`.

Runs every precision of the bundle on backend numba in fresh processes. A first round fills the page cache and compiles
kernels and Python's bytecode; it does not count. Measures the seconds from the start of `rwkv-npu generate -n 1` to its
first output byte and to its end, the stages in between, and the memory of a process that has read a prompt and
generated tokens. Precisions alternate; figures are medians of the rounds.

Imports are inside functions, because they are part of a start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.saving import bundle_study

ROUNDS = 7
PROMPT, TOKENS = 128, 32
STAGES = ("numpy", "rwkv_npu", "numba", "kernels", "opening", "first token")


def environment() -> dict[str, str]:
    """This process's environment, but with Python's bytecode cache enabled, as after an installation."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def start_seconds(bundle: Path, precision: str) -> tuple[float, float]:
    """Seconds from the start of the command to its first output, and to its end."""
    command = [sys.executable, "-m", "rwkv_npu", "generate", "-m", str(bundle), "--precision", precision]
    command += ["--backend", "numba", "-n", "1", "--ids", "-p", "1,2,3"]
    begin = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        written = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(command)} failed")
    return written, time.perf_counter() - begin


def child(path: str, precision: str) -> dict[str, Any]:
    """In this process: measure the stages of a start, then the memory after a prompt and generated tokens."""
    laps = [time.perf_counter()]

    def lap() -> None:
        laps.append(time.perf_counter())

    import numpy as np

    lap()
    import rwkv_npu.model

    lap()
    import numba  # noqa: F401

    lap()
    from rwkv_npu import kernels
    from rwkv_npu.formats import bundle

    spec = bundle.read_manifest(Path(path)).spec
    for module in ("linear", "pool", f"v{spec.generation[0]}"):
        kernels.load(module)
    lap()
    model = rwkv_npu.load(path, backend="numba", precision=precision)
    lap()
    model.forward([1, 2, 3])
    lap()
    _, state = model.forward(np.random.default_rng(0).integers(1, spec.V, PROMPT))
    for token in range(1, TOKENS + 1):
        model.forward([token], state, inplace=True)
    return {
        "stages": dict(zip(STAGES, np.diff(laps).tolist(), strict=True)),
        "state_bytes": sum(part.nbytes for part in state.parts.values()),
        **memory(),
    }


def memory() -> dict[str, int]:
    """Bytes of this process: without mapped files, of mapped files, and peak resident size."""
    rollup, status = (_numbers(f"/proc/self/{file}") for file in ("smaps_rollup", "status"))
    own = rollup["Anonymous"]
    return {"own_bytes": own, "mapped_bytes": rollup["Rss"] - own, "peak_bytes": status["VmHWM"]}


def _numbers(file: str) -> dict[str, int]:
    with open(file, encoding="ascii") as lines:
        parts = [line.split() for line in lines]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in parts if line[-1] == "kB"}


def weight_bytes(bundle: Path, precision: str) -> int:
    """Bytes of the projections in the backend."""
    from rwkv_npu.formats.bundle import read_manifest
    from rwkv_npu.runtime.estimate import weight_bytes as by_part

    return sum(by_part(read_manifest(bundle).spec, precision).values())


def study(bundle: Path) -> dict[str, Any]:
    import numpy as np

    from rwkv_npu.formats.bundle import read_manifest

    precisions = read_manifest(bundle).cpu_precisions
    starts: dict[str, list[tuple[float, float]]] = {name: [] for name in precisions}
    children: dict[str, list[dict[str, Any]]] = {name: [] for name in precisions}
    for number in range(-1, ROUNDS):  # the first fills caches
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
        for name in precisions:
            command = [sys.executable, "-m", "bench.cpu_start", "--child", str(bundle), name]
            found = (
                start_seconds(bundle, name),
                json.loads(subprocess.check_output(command, env=environment())),
            )
            if number >= 0:
                starts[name].append(found[0])
                children[name].append(found[1])
    rows = {}
    for name in precisions:
        first, end = np.median(starts[name], axis=0).tolist()
        memories = {
            key: int(np.median([c[key] for c in children[name]]))
            for key in ("own_bytes", "mapped_bytes", "peak_bytes", "state_bytes")
        }
        stages = {s: float(np.median([c["stages"][s] for c in children[name]])) for s in STAGES}
        weights = weight_bytes(bundle, name)
        rows[name] = {
            "first_token_s": first,
            "first_token_range_s": [min(starts[name])[0], max(starts[name])[0]],
            "end_s": end,
            "stages_s": stages,
            "weights_bytes": weights,
            **memories,
            "own_of_weights_and_state": memories["own_bytes"] / (weights + memories["state_bytes"]),
        }
    return {"model": bundle.name, "rounds": ROUNDS, "rows": rows}


def table(results: dict[str, Any]) -> str:
    machine = results["machine"]
    head = ["weights", "first token s", "lowest - highest", "end s", *STAGES]
    lines = [
        f"# Start and memory: {results['model']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; `{results['command']}`; medians of {results['rounds']} rounds. "
        "Seconds from the start of the command to its first output, and where they go, measured in another process:",
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    for name, row in results["rows"].items():
        low, high = row["first_token_range_s"]
        stages = [f"{row['stages_s'][stage]:.2f}" for stage in STAGES]
        lines.append(
            _row(
                [
                    name,
                    f"{row['first_token_s']:.2f}",
                    f"{low:.2f} - {high:.2f}",
                    f"{row['end_s']:.2f}",
                    *stages,
                ]
            )
        )
    head = ["weights", "their MB", "state MB", "own MB", "own / (weights + state)", "mapped MB", "peak MB"]
    lines += ["", f"Memory after a prompt of {PROMPT} tokens and {TOKENS} more:", "", _row(head)]
    lines.append(_row(["---"] * len(head)))
    for name, row in results["rows"].items():
        mb = {key: f"{value / 1e6:.0f}" for key, value in row.items() if key.endswith("_bytes")}
        lines.append(
            _row(
                [name, mb["weights_bytes"], mb["state_bytes"], mb["own_bytes"]]
                + [f"{row['own_of_weights_and_state']:.2f}", mb["mapped_bytes"], mb["peak_bytes"]]
            )
        )
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return 0
    return bundle_study("bench.cpu_start", __doc__, study, table)


if __name__ == "__main__":
    raise SystemExit(main())
