"""`rwkv-npu export`: writes the part of a bundle that one board needs, and prints its path."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from rwkv_npu.cli.common import log_to_stderr


def add(commands: Any) -> None:
    p = commands.add_parser(
        "export",
        help="make a smaller bundle for one board",
        description="Make a bundle of what one board needs, and compare its results with those of the whole bundle.",
    )
    p.add_argument("model", help="bundle")
    p.add_argument(
        "--for", dest="target", required=True, metavar="CHIP", help="rk3588 and others, or none for CPUs only"
    )
    p.add_argument("-o", "--out", required=True, metavar="DIR", help="the bundle to write")
    p.add_argument("--precision", help="of the artifacts (default: the bundle's default)")
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    cpu = "of the CPU's weights: int8, int4, fp16 or fp32 (default: the bundle's default)"
    p.add_argument("--cpu", help=cpu)
    p.add_argument("--force", action="store_true", help="replace the bundle at the output")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.cli.common import bundle_at
    from rwkv_npu.cli.info import summary
    from rwkv_npu.conversion.export import export
    from rwkv_npu.conversion.request import parse_target
    from rwkv_npu.formats.bundle import open_bundle

    whole = bundle_at(arguments.model)
    with log_to_stderr():
        try:
            path = export(
                whole.path,
                arguments.out,
                target=parse_target(arguments.target),
                precision=arguments.precision,
                fusion=arguments.fusion,
                cpu=arguments.cpu,
                force=arguments.force,
            )
        except KeyboardInterrupt:
            print("rwkv-npu: interrupted: the same command goes on from here", file=sys.stderr)
            return 130
    print(path)
    print(summary(open_bundle(path), f"scp -r {shlex.quote(str(path))} board:"), file=sys.stderr)
    return 0
