"""`rwkv-npu pull`: download a file of the Hugging Face Hub, and print its path."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    p = commands.add_parser(
        "pull",
        help="download a model from the Hugging Face Hub",
        description="Download a file of the Hugging Face Hub to the cache, check its hash, and print its path. "
        "Any command that takes a model takes hf:OWNER/NAME/FILE as well.",
    )
    p.add_argument("hub_file", metavar="FILE", help="OWNER/NAME/FILE, or OWNER/NAME@REVISION/FILE")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.hub import parse, pull

    try:
        print(pull(parse(arguments.hub_file)))
    except KeyboardInterrupt:
        print("rwkv-npu: interrupted: the same command continues from here", file=sys.stderr)
        return 130
    return 0
