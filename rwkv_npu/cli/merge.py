"""`rwkv-npu merge`: write a base model and its adapter as one checkpoint, and print its path."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rwkv_npu.cli.common import add_adapter_flags, add_layout_flag


def add(commands: Any) -> None:
    p = commands.add_parser(
        "merge",
        help="merge an adapter into its base model",
        description="Write a base model with an adapter merged in, as a checkpoint for any program.",
    )
    p.add_argument("base", help="checkpoint of the base model")
    p.add_argument("adapter", help="a .pth of RWKV-PEFT, or a folder of PEFT")
    p.add_argument(
        "-o", "--out", required=True, metavar="FILE.safetensors", help="file to write; it must not exist"
    )
    add_adapter_flags(p)
    add_layout_flag(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.adapters import open_adapter
    from rwkv_npu.formats.checkpoint import open_checkpoint, write_checkpoint
    from rwkv_npu.progress import progress

    checkpoint = open_checkpoint(arguments.base, arguments.layout)
    adapter = open_adapter(arguments.adapter, arguments.adapter_init)
    base = checkpoint.fingerprint
    read_as = adapter.apply(checkpoint, arguments.adapter_scale, arguments.adapter_blocks)
    notes = {"adapter": f"{adapter.kind}, {read_as}, {adapter.fingerprint}", "base": base}
    with progress("merge", "tensor", total=len(checkpoint.names)) as bar:
        write_checkpoint(checkpoint, Path(arguments.out), notes, bar.update)
    print(arguments.out)
    return 0
