"""`rwkv-npu convert`: prints the path of the bundle."""

from __future__ import annotations

import argparse
import sys

from rwkv_npu.cli import dry_run
from rwkv_npu.conversion.converter import convert
from rwkv_npu.errors import UsageError


def run(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return dry_run.run(arguments)
    if arguments.json:
        raise UsageError("--json is for --dry-run")
    try:
        path = convert(
            arguments.checkpoint,
            arguments.out,
            target=arguments.target,
            precision=arguments.precision,
            fusion=arguments.fusion,
            rows=arguments.rows,
            cpu=arguments.cpu,
            force=arguments.force,
            jobs=arguments.jobs,
            verify=arguments.verify,
            tokenizer=arguments.tokenizer,
            toolkit=arguments.toolkit,
            calibrate=arguments.calibrate,
            precision_map=arguments.precision_map,
            max_kl=arguments.max_kl,
            remedies=arguments.remedies,
            say=lambda line: print(line, file=sys.stderr),
        )
    except KeyboardInterrupt:
        print("rwkv-npu: interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(path)
    return 0
