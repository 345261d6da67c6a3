"""`rwkv-npu doctor`: print what a board lacks. Exit status 1 on a board whose NPU cannot be used."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rwkv_npu.board import hardware
from rwkv_npu.cli.common import bundle_at

if TYPE_CHECKING:
    from rwkv_npu.cli.diagnosis import Finding

WIDTH = 80  # columns


def add(commands: Any) -> None:
    p = commands.add_parser(
        "doctor",
        help="find what a board lacks, and the command that mends it",
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
    """Format one finding a row, wrapped to 80 columns. A long word, such as a path, stays whole."""
    from rwkv_npu.cli.diagnosis import BAD, NOTE, OK

    marks = {OK: "ok", NOTE: "note", BAD: "BAD"}
    width = max(len(finding.what) for finding in findings)
    indent = " " * (7 + width)

    def wrap(text: str, first: str) -> list[str]:
        return textwrap.wrap(
            text,
            WIDTH,
            initial_indent=first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = []
    for finding in findings:
        lines += wrap(finding.found, f"{marks[finding.level]:<5}{finding.what:<{width}}  ")
        if finding.mend.startswith(("sudo ", "echo ", "strings ", "pip ", "rwkv-npu ")):
            lines.append(f"{indent}-> {finding.mend}")  # a command stays on one line, to be copied
        elif finding.mend:
            lines += wrap(finding.mend, f"{indent}-> ")
    if hardware.soc() is None:
        lines.append("Without an NPU the CPU runs every model, and --backend rknn-sim computes what an")
        lines.append("NPU would.")
    return "\n".join(lines)
