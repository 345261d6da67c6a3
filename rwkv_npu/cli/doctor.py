"""`rwkv-npu doctor`: what a board has and lacks. Exit status 1 where the NPU cannot be used as things are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rwkv_npu.board import hardware
from rwkv_npu.cli.common import bundle_at
from rwkv_npu.cli.diagnosis import BAD, NOTE, OK, Finding, examine

MARKS = {OK: "ok", NOTE: "note", BAD: "BAD"}


def run(arguments: argparse.Namespace) -> int:
    findings = examine(bundle=bundle_at(arguments.model) if arguments.model else None)
    on_board = hardware.soc() is not None
    print(
        json.dumps([asdict(finding) for finding in findings], indent=1)
        if arguments.json
        else _table(findings)
    )
    return int(on_board and any(finding.level == BAD for finding in findings))


def _table(findings: Sequence[Finding]) -> str:
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.level]:<5}{finding.what:<{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':<{5 + width}}  -> {finding.mend}")
    if hardware.soc() is None:
        lines.append(
            "Without an NPU: the CPU runs every model, and --backend rknn-sim computes what an NPU would."
        )
    return "\n".join(lines)
