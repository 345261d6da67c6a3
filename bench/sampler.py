"""Measure the sampler at V = 65,536: `python -m bench.sampler [--beside FILE] [--save STEM]`.

Microseconds for one token on one core: compiled, in plain NumPy, and with the sampler of another version, FILE
(`git show REVISION:rwkv_npu/text/sampling.py > FILE`). The variants alternate. Also eight sequences in one call.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from bench.saving import save
from rwkv_npu.bench.machine import describe
from rwkv_npu.text import sampling

V, PAST, SEQUENCES, ROUNDS = 65536, 200, 8, 40

# A trained model has some hundreds of likely tokens. "flat" is the worst case: thousands are likely.
LOGITS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "trained": lambda rng: np.where(rng.random(V) < 3e-3, 2, -6) + rng.normal(0, 2, V),
    "flat": lambda rng: rng.normal(0, 1, V),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-p 0.85": {},
    "top-p 0.85, penalties": {"presence_penalty": 0.3, "frequency_penalty": 0.3},
    "top-k 40": {"top_p": 1.0, "top_k": 40},
}


def sampler_of(module: ModuleType, options: dict[str, Any], seed: int) -> Any:
    """A sampler with the World vocabulary's bans and some past tokens."""
    banned = np.arange(V) >= V - 6
    sampler = module.Sampler(module.SamplingOptions(**options), seed=seed, banned=banned)
    for token in np.random.default_rng(seed).integers(0, V, PAST):
        sampler.accept(int(token))
    return sampler


def measure(beside: ModuleType | None) -> list[dict[str, Any]]:
    rows = []
    for kind, draw in LOGITS.items():
        logits = np.stack([draw(np.random.default_rng(i)).astype(np.float32) for i in range(SEQUENCES)])
        for name, options in OPTIONS.items():
            one, several = (
                sampler_of(sampling, options, 0),
                [sampler_of(sampling, options, i) for i in range(8)],
            )
            ways: dict[str, Callable[[], Any]] = {"compiled": lambda: one.sample(logits[0])}  # noqa: B023
            ways["eight, compiled"] = lambda: sampling.sample(logits, several)  # noqa: B023
            ways["plain"] = plainly(sampler_of(sampling, options, 0), logits[0])
            if beside:
                other = sampler_of(beside, options, 0)
                ways["beside"] = lambda: other.sample(logits[0])  # noqa: B023
            times: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(ROUNDS + 3):
                for way, run in ways.items():
                    begin = time.perf_counter()
                    run()
                    if number >= 3:
                        times[way].append((time.perf_counter() - begin) * 1e6)
            found = {way: {"min": min(t), "median": float(np.median(t))} for way, t in times.items()}
            rows.append({"logits": kind, "options": name, **found})
    return rows


def plainly(sampler: Any, logits: np.ndarray) -> Callable[[], Any]:
    def run() -> None:
        with mock.patch.object(sampling, "_compiled", lambda: None):
            sampler.sample(logits)

    return run


def table(results: dict[str, Any]) -> str:
    machine, ways = (
        results["machine"],
        [way for way in results["rows"][0] if way not in ("logits", "options")],
    )
    lines = [
        "# The sampler",
        "",
        f"{machine['cpu']}, one core, Python {machine['python']}; `{results['command']}`; V = {V:,}; microseconds, "
        f"minimum / median of {ROUNDS} rounds. The variants alternate."
        + (f" Beside: {results['beside']}." if results["beside"] else ""),
        "",
        "| logits | options | " + " | ".join(ways) + " |",
        "|---|---|" + "---|" * len(ways),
    ]
    for row in results["rows"]:
        cells = [f"{row[way]['min']:,.0f} / {row[way]['median']:,.0f}" for way in ways]
        lines.append(f"| {row['logits']} | {row['options']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("beside", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["beside"] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sampler", description=__doc__)
    parser.add_argument("--beside", metavar="FILE", type=Path, help="sampling.py of another version")
    parser.add_argument("--name", default="", help="what to call it")
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    beside = module_of(arguments.beside) if arguments.beside else None
    results = {
        "machine": describe(),
        "command": "python -m bench.sampler" + (" --beside FILE" if beside else ""),
        "beside": arguments.name or (arguments.beside and arguments.beside.name),
        "rows": measure(beside),
    }
    if arguments.save:
        save(Path(arguments.save), results, table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
