"""`rwkv-npu tune`: measure every backend, and keep the fastest plan for this machine in the bundle."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import NPU_CORES, NPU_CORES_HELP, bundle_at, use_big_cores
from rwkv_npu.errors import UsageError

if TYPE_CHECKING:
    from rwkv_npu.runtime.tuning import Measured


def add(commands: Any) -> None:
    p = commands.add_parser(
        "tune",
        help="find the fastest backends for this machine",
        description="Measure a bundle on every backend that works here, and keep the fastest plan in the bundle.",
    )
    p.add_argument("-m", "--model", metavar="PATH", required=True, help="the bundle")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of the CPU's backends")
    p.add_argument("--npu-cores", default="auto", metavar="CORES", choices=NPU_CORES, help=NPU_CORES_HELP)
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.bundle import artifacts_digest
    from rwkv_npu.runtime.loading import Options, machine_key
    from rwkv_npu.runtime.placement import USES, save_tuned
    from rwkv_npu.runtime.tuning import tune

    bundle = bundle_at(arguments.model)
    if not os.access(bundle.path, os.W_OK):  # checked before minutes of measuring
        raise UsageError(
            f"{bundle.path} cannot be written to, and the plan is kept in it: tune a copy of your own"
        )
    use_big_cores(arguments.threads)
    options = Options(arguments.threads, arguments.npu_cores)
    plan, found = tune(bundle, options, log=lambda line: print(line, file=sys.stderr))
    measured = {f"{m.fusion} {m.backend}": {use: _milliseconds(m, use) for use in USES} for m in found}
    machine = machine_key()
    kept = save_tuned(bundle.path, machine, artifacts_digest(bundle.manifest), plan, measured)
    facts = {
        "machine": machine,
        "plan": plan.text(),
        "fusion": plan.fusion,
        "batch": plan.batch,
        "measured": measured,
        "file": str(kept),
    }
    print(json.dumps(facts, indent=1) if arguments.json else _table(facts))
    return 0


def _milliseconds(measured: Measured, use: str) -> dict[str, Any]:
    """Milliseconds of a forward over `rows` tokens, for the calls of each role of group and for the host."""
    taken = {**measured.calls[use], "host": measured.host[use]}
    return {
        "rows": measured.rows(use),
        **{role: round(1e3 * seconds, 3) for role, seconds in taken.items()},
        "token": round(1e3 * measured.per_token(use), 3),
    }


def _table(facts: dict[str, Any]) -> str:
    """Format a line for every backend, use and fusion. Columns are roles of groups."""
    lines: list[str] = []
    fusions = dict.fromkeys(name.split(" ")[0] for name in facts["measured"])
    for fusion in fusions:
        rows = [
            {"fusion": fusion, "backend": backend, **taken}
            for (of, backend), uses in ((name.split(" "), uses) for name, uses in facts["measured"].items())
            if of == fusion
            for taken in uses.values()
        ]
        columns = list(rows[0]) if rows else []  # the row of decoding has every role
        lines += [_line(row, columns) for row in ({name: name for name in columns}, *rows) if row]
    lines.append("Milliseconds of a forward, by its number of rows; the last column is for one token.")
    lines += [f"plan         {facts['plan']}, {facts['fusion']} fusion", f"machine      {facts['machine']}"]
    if facts["batch"]:
        lines.append(f"batch        {facts['batch']} or more sequences at once are read as prompts are")
    return "\n".join([*lines, f"kept in      {facts['file']}"])


def _line(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    cells = [row.get(name, "") for name in columns]
    words = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    return "".join([f"{words[0]:<12}{words[1]:<13}", *(f"{word:>9}" for word in words[2:])])
