"""`rwkv-npu convert`: make a bundle from a checkpoint, and print its path."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rwkv_npu.cli.common import (
    add_adapter_flags,
    add_board_report_flag,
    add_layout_flag,
    log_to_stderr,
    read_board_report,
)
from rwkv_npu.errors import UsageError


def add(commands: Any) -> None:
    p = commands.add_parser("convert", help="make a bundle of a checkpoint", description="Make a bundle.")
    p.add_argument("checkpoint", help=".pth, .safetensors, or a Hugging Face folder")
    p.add_argument("-o", "--out", metavar="DIR", help="the bundle (default: ./STEM.rwkv)")
    p.add_argument(
        "--target",
        default="rk3588",
        help="rk3588 (default; rk3588s too), rk3576, rk3562, rk3566, rk3568, or none",
    )
    p.add_argument(
        "--precision",
        default="fp16",
        help="precision of the NPU's artifacts: fp16 (default), mixed (as much int8 as --max-kl allows), w8a8 or bf16",
    )
    p.add_argument(
        "--precision-map", metavar="FILE", help="JSON file that names the int8 projections of mixed"
    )
    p.add_argument(
        "--max-kl",
        type=float,
        default=0.005,
        metavar="X",
        help="limit of the KL divergence, nats a token (mixed, --cpu auto; default: 0.005)",
    )
    p.add_argument(
        "--remedies",
        default="all",
        help="against the error of int8: all (default), ranges, smoothing or none",
    )
    p.add_argument("--fusion", default="layer", help="layer (default, fewest calls) or projection")
    p.add_argument("--rows", default="auto", help="rows of the artifacts, such as 1,64 (default: auto)")
    cpu = (
        "precision of the CPU's weights: int8, int4, auto (int4 as far as --max-kl allows), fp16 or fp32 "
        "(default: the bundle's, int8 for a new one)"
    )
    p.add_argument("--cpu", help=cpu)
    p.add_argument("-j", "--jobs", type=int, metavar="N", help="builds at a time (default: as memory allows)")
    p.add_argument("--verify", action="store_true", help="compare every graph and artifact with NumPy")
    p.add_argument("--tokenizer", metavar="FILE", help="vocabulary to put into the bundle (or world, pile)")
    p.add_argument(
        "--toolkit",
        metavar="X.Y.Z",
        help="version of the compiler (default: 2.3.2); a board needs a librknnrt of this version or later",
    )
    add_layout_flag(p)
    p.add_argument(
        "--adapter", metavar="FILE", help="adapter to merge: a .pth of RWKV-PEFT, or a folder of PEFT"
    )
    add_adapter_flags(p)
    p.add_argument("--initial-state", metavar="FILE", help="a tuned state from which every text begins")
    texts = "texts for calibration, or ids as .json or .npy (default: a text in the package); none: int4 to nearest"
    p.add_argument("--calibrate", nargs="+", default=[], metavar="TEXT", help=texts)
    p.add_argument("--force", action="store_true", help="replace the bundle at the output")
    dry = "print sizes, memory and estimated speed in each precision; nothing is compiled or written"
    p.add_argument("--dry-run", action="store_true", help=dry)
    p.add_argument("--json", action="store_true", help="with --dry-run: print it as JSON")
    p.add_argument(
        "--explain",
        action="store_true",
        help="with --dry-run: print every term of the estimates and its source",
    )
    add_board_report_flag(p, "with --dry-run: ")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.cli.info import summary
    from rwkv_npu.conversion import converter
    from rwkv_npu.conversion.request import Request, parse_rows, parse_target
    from rwkv_npu.formats.bundle import open_bundle

    for flag in ("json", "explain", "board_report"):
        if getattr(arguments, flag) and not arguments.dry_run:
            raise UsageError(f"--{flag.replace('_', '-')} is for --dry-run")
    terms = read_board_report(arguments)
    request = Request(
        checkpoint=Path(arguments.checkpoint),
        out=_path(arguments.out),
        target=parse_target(arguments.target),
        precision=arguments.precision,
        fusion=arguments.fusion,
        rows=parse_rows(arguments.rows),
        cpu=arguments.cpu,
        force=arguments.force,
        jobs=arguments.jobs,
        verify=arguments.verify,
        tokenizer=arguments.tokenizer,
        toolkit=arguments.toolkit,
        layout=arguments.layout,
        calibrate=tuple(arguments.calibrate),
        precision_map=arguments.precision_map,
        max_kl=arguments.max_kl,
        remedies=arguments.remedies,
        adapter=_path(arguments.adapter),
        adapter_scale=arguments.adapter_scale,
        adapter_init=_path(arguments.adapter_init),
        adapter_blocks=arguments.adapter_blocks,
        initial_state=_path(arguments.initial_state),
    )
    with log_to_stderr():
        if arguments.dry_run:
            from rwkv_npu.cli import dry_run

            return dry_run.run(request, arguments.json, arguments.explain, terms)
        try:
            path = converter.run(request)
        except KeyboardInterrupt:
            print("rwkv-npu: interrupted: the same command continues from here", file=sys.stderr)
            return 130
    print(path)
    print(summary(open_bundle(path)), file=sys.stderr)
    return 0


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
