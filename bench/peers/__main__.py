"""Speed and exactness of RWKV runtimes side by side, on the same random weights.

    python -m bench.peers --folder /tmp/peers [--sizes v7-0.1b,v7-0.4b] [--save bench/results/peers-NAME]

Environments, checkpoints and model files are made in the folder at first use and kept there. Every system runs in
a process of its own that stays open; they take turns, so that what changes on the machine changes for all. Before
anything is timed, the logits of each are held to those of the `rwkv` package in fp32: a system that is further
off than its precision explains ends the run with status 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.children import Child
from bench.peers.results import difference, report, rotation, summarise
from bench.peers.systems import (
    REFERENCE,
    SYSTEMS,
    Failed,
    System,
    Workshop,
    available_bytes,
    chosen,
    fitting,
    size_on_disk,
)
from rwkv_npu.bench.machine import describe
from tools.make_checkpoint import SIZES, make_spec

CHECKED = 16  # tokens after the prompt whose logits are compared
PAUSE = 0.3  # seconds between turns, in which the threads of the last one stop spinning


def main() -> int:
    arguments = parse()
    folder = Path(arguments.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m bench.peers " + shlex.join(sys.argv[1:]),
        "machine": describe(),
        "settings": {key: getattr(arguments, key) for key in ("threads", "prompt", "tokens", "rounds")},
        "versions": {},
        "sizes": {},
    }
    workshop = Workshop(folder, arguments.torch, arguments.threads, say)
    try:
        for size in arguments.sizes.split(","):
            with ExitStack() as open_children:
                results["sizes"][size] = study(size, workshop, arguments, results["versions"], open_children)
    except Failed as error:
        say(f"error: {error}")
        return 1
    print(report(results))
    if arguments.save:
        target = Path(arguments.save)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".md").write_text(report(results) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", required=True, help="where environments and models go, and stay")
    parser.add_argument(
        "--sizes", default="v7-0.1b,v7-0.4b", help=f"of {', '.join(s for s in SIZES if s[1] in '47')}"
    )
    parser.add_argument(
        "--systems", default="", help="only those whose name contains one of these, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of every system (default: 7)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: 128)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a turn (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="of every system (default: 2)")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement of the environment with torch")
    parser.add_argument("--save", help="write PATH.json and PATH.md")
    arguments = parser.parse_args()
    for size in arguments.sizes.split(","):
        if size not in SIZES or SIZES[size]["generation"] not in SYSTEMS[0].generations:
            parser.error(f"size {size!r} is none that these systems have in common")
    if min(arguments.rounds, arguments.prompt, arguments.tokens, arguments.threads) < 1:
        parser.error("rounds, prompt, tokens and threads must be at least 1")
    return arguments


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def study(
    size: str, workshop: Workshop, arguments: argparse.Namespace, versions: dict[str, str], stack: ExitStack
) -> dict[str, Any]:
    """One size: open what fits, compare logits, take turns. Raises Failed where logits are wrong."""
    spec = make_spec(**SIZES[size])
    wanted = chosen([part for part in arguments.systems.split(",") if part], spec.generation)
    found: dict[str, Any] = {"parameters": spec.parameters, "systems": {}, "left_out": {}}
    draw = np.random.default_rng(1).integers
    prompt, tokens = (draw(1, spec.V, count).tolist() for count in (arguments.prompt, arguments.tokens))
    checked = {"prompt": prompt, "tokens": tokens[:CHECKED]}
    reference = reference_logits(size, spec.generation, workshop, checked)

    children: dict[str, Child] = {}
    kept = fitting(wanted, spec.parameters, available_bytes())
    for system in wanted:
        if system not in kept:
            found["left_out"][system.name] = f"memory: {available_bytes() / 1e9:.1f} GB were free for all"
            continue
        try:
            child, row = open_child(system, size, spec.generation, workshop, stack)
            row["logits"] = difference(logits_of(child, system, workshop, checked), reference)
        except Failed as error:
            say(f"{system.name}: {error}")
            found["left_out"][system.name] = str(error)
            continue
        versions.update(row.pop("versions"))
        children[system.name], found["systems"][system.name] = child, row
        say(
            f"{size} {system.name}: ready in {row['ready_s']:.1f} s, logits off by {row['logits']['largest']:.2g}"
        )
    refuse_wrong(found["systems"])
    take_turns(children, found["systems"], {"prompt": prompt, "tokens": tokens}, arguments.rounds)
    for name, child in children.items():
        found["systems"][name] |= child.ask("memory")
    summarise(found, {"prefill": len(prompt), "decode": len(tokens)})
    return found


def open_child(
    system: System, size: str, generation: str, workshop: Workshop, stack: ExitStack
) -> tuple[Child, dict[str, Any]]:
    model = workshop.model(system, size)
    log = workshop.folder / "logs" / f"{size}.{system.name.replace(' ', '-')}.log"
    child = stack.enter_context(
        Child(workshop.python(system.environment), system.runtime, workshop.threads, log)
    )
    command = {"weights": system.weights, "generation": generation, "threads": workshop.threads}
    row = child.ask("open", model=str(model), **command)
    return child, {**row, "file_bytes": size_on_disk(model)}


def logits_of(child: Child, system: System, workshop: Workshop, ids: dict[str, list[int]]) -> np.ndarray:
    """(1 + tokens, V): after the prompt, and after each token that is given to it."""
    out = workshop.folder / f"logits-{system.name.replace(' ', '-')}.npy"
    child.ask("logits", out=str(out), **ids)
    logits: np.ndarray = np.load(out)
    out.unlink()
    return logits


def reference_logits(size: str, generation: str, workshop: Workshop, ids: dict[str, list[int]]) -> np.ndarray:
    """Made once a size, in a process that is gone before the others need the memory."""
    system = next(system for system in SYSTEMS if system.name == REFERENCE)
    with ExitStack() as stack:
        child, _ = open_child(system, size, generation, workshop, stack)
        return logits_of(child, system, workshop, ids)


def refuse_wrong(rows: dict[str, Any]) -> None:
    """Raises Failed if a system is further from the reference than its precision explains."""
    bounds = {system.name: system.tolerance for system in SYSTEMS}
    for name, row in rows.items():
        if not row["logits"]["largest"] <= bounds[name]:
            raise Failed(
                f"{name} computes something else: its logits are off by {row['logits']['largest']:.3g} standard "
                f"deviations, {bounds[name]:g} are explained by its precision"
            )


def take_turns(
    children: dict[str, Child], rows: dict[str, Any], ids: dict[str, list[int]], rounds: int
) -> None:
    """Every system once a round, after a round that does not count."""
    names = list(children)
    for row in rows.values():
        row["turns"] = []
    for turn in range(rounds + 1):
        for name in rotation(names, turn):
            time.sleep(PAUSE)
            taken = children[name].ask("turn", **ids)
            if turn:
                rows[name]["turns"].append(taken)
        say(f"round {turn} of {rounds} done" if turn else "warmed up")


if __name__ == "__main__":
    raise SystemExit(main())
