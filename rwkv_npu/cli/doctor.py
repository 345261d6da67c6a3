"""`rwkv-npu doctor`: what a board has and lacks. Exit status 1 where the NPU cannot be used as things are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rwkv_npu.board import hardware
from rwkv_npu.cli.common import bundle_at

if TYPE_CHECKING:
    from rwkv_npu.cli.diagnosis import Finding


def add(commands: Any) -> None:
    p = commands.add_parser(
        "doctor",
        help="say what a board lacks, and how to mend it",
        description="Look at board, NPU, clocks and software. Nothing is changed.",
    )
    p.add_argument("-m", "--model", metavar="PATH", help="a bundle that has to fit the board")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.cli.diagnosis import BAD, examine

    findings = examine(bundle=bundle_at(arguments.model) if arguments.model else None)
    on_board = hardware.soc() is not None
    print(
        json.dumps([asdict(finding) for finding in findings], indent=1)
        if arguments.json
        else _table(findings)
    )
    return int(on_board and any(finding.level == BAD for finding in findings))


def _table(findings: Sequence[Finding]) -> str:
    from rwkv_npu.cli.diagnosis import BAD, NOTE, OK

    marks = {OK: "ok", NOTE: "note", BAD: "BAD"}
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.level]:<5}{finding.what:<{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':<{5 + width}}  -> {finding.mend}")
    if hardware.soc() is None:
        lines.append(
            "Without an NPU: the CPU runs every model, and --backend rknn-sim computes what an NPU would."
        )
    return "\n".join(lines)
