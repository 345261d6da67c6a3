"""Compare the speed and exactness of RWKV runtimes, on the same random weights.

    python -m bench.peers --folder /tmp/peers [--sizes v7-0.1b,v7-0.4b] [--save bench/results/peers-NAME]

With --save, each size gets its own files, peers-NAME-SIZE.json and .md.

Environments, checkpoints and model files are created in the folder at first use and kept there. Each system has its own
process, which stays open. The systems alternate, so that a change on the machine affects all of them. Before anything
is timed, the logits of each system are compared with those of the `rwkv` package in fp32. A system whose difference is
larger than its precision explains ends the run with status 1.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.peers.results import report
from bench.peers.study import Task, study
from bench.peers.systems import LIMITS, REPOSITORY, SYSTEMS, Failed, Workshop
from bench.saving import save
from rwkv_npu.bench.machine import describe
from tools.make_checkpoint import SIZES


def main() -> int:
    arguments = parse()
    folder = Path(arguments.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m bench.peers " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "machine": describe(),
        "settings": {key: getattr(arguments, key) for key in ("threads", "prompts", "tokens", "rounds")},
    }
    if arguments.limit:
        facts["machine"] |= {"instruction_set": arguments.limit.upper() + ", to which all are limited"}
    workshop = Workshop(folder, arguments.torch, arguments.threads, say, arguments.limit)
    names = [part for part in arguments.systems.split(",") if part]
    try:
        for size in arguments.sizes.split(","):
            task = Task(size, arguments.prompts, arguments.tokens)
            found, versions = study(task, workshop, names, arguments.rounds)
            results = {"size": size, **facts, "versions": versions, **found}
            if arguments.save:
                save(f"{arguments.save}-{size}", results, report(results))
            print(report(results))
    except Failed as error:
        say(f"error: {error}")
        return 1
    return 0


def commit() -> str:
    """The commit of this project that was measured."""
    described = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", required=True, help="folder for environments and models, which stay there"
    )
    parser.add_argument(
        "--sizes", default="v7-0.1b,v7-0.4b", help=f"of {', '.join(s for s in SIZES if s[1] in '47')}"
    )
    parser.add_argument(
        "--systems", default="", help="only systems whose name contains one of these, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=9, help="measurements of every system (default: 9)")
    parser.add_argument(
        "--prompts", type=lengths, default=[128, 512], help="tokens of each prompt (default: 128,512)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded in a turn (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="of every system (default: 2)")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement of the environment with torch")
    parser.add_argument(
        "--limit", choices=LIMITS, default="", help="keep every system to this instruction set"
    )
    parser.add_argument("--save", help="write SAVE-SIZE.json and SAVE-SIZE.md")
    arguments = parser.parse_args()
    for size in arguments.sizes.split(","):
        if size not in SIZES or SIZES[size]["generation"] not in SYSTEMS[0].generations:
            parser.error(f"size {size!r} is not supported by all of these systems")
    if min(arguments.rounds, *arguments.prompts, arguments.tokens, arguments.threads) < 1:
        parser.error("rounds, prompts, tokens and threads must be at least 1")
    return arguments


def lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
