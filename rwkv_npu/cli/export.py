"""`rwkv-npu export`: write the part of a bundle that one board needs, or a GGUF file, and print its path."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rwkv_npu.cli.common import add_layout_flag, log_to_stderr
from rwkv_npu.errors import UsageError


def add(commands: Any) -> None:
    p = commands.add_parser(
        "export",
        help="make a smaller bundle for one board, or a GGUF file",
        description="Make a bundle of what one board needs, and compare its results with those of the whole bundle. "
        "Or write a checkpoint as GGUF, for llama.cpp.",
    )
    p.add_argument("model", help="bundle, or with --gguf a checkpoint")
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument("--for", dest="target", metavar="CHIP", help="rk3588 and others, or none for CPUs only")
    to.add_argument(
        "--gguf", metavar="FILE", help="write RWKV-6 or RWKV-7 in F16 to this file; it must not exist"
    )
    p.add_argument("-o", "--out", metavar="DIR", help="with --for: the bundle to write")
    p.add_argument("--precision", help="precision of the artifacts (default: the bundle's default)")
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    cpu = "precision of the CPU's weights: int8, int4, auto, fp16 or fp32 (default: the bundle's default)"
    p.add_argument("--cpu", help=cpu)
    p.add_argument("--force", action="store_true", help="replace the bundle at the output")
    p.add_argument("--tokenizer", metavar="FILE", help="with --gguf: vocabulary file (or world)")
    add_layout_flag(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.gguf:
        return _export_gguf(arguments)
    if not arguments.out:
        raise UsageError("--for needs -o DIR, the bundle to write")
    return _export_bundle(arguments)


def _export_gguf(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.bundle import is_bundle
    from rwkv_npu.formats.checkpoint import open_checkpoint
    from rwkv_npu.formats.gguf_writer import write_gguf
    from rwkv_npu.progress import progress
    from rwkv_npu.text.tokenizer import WorldTokenizer, find_tokenizer

    if is_bundle(Path(arguments.model)):
        raise UsageError(
            f"{arguments.model} is a bundle: --gguf needs the checkpoint that the bundle was made from"
        )
    checkpoint = open_checkpoint(arguments.model, arguments.layout)
    V = checkpoint.spec.V
    tokenizer = find_tokenizer(vocab_size=V, beside=checkpoint.path, override=arguments.tokenizer)
    tokens = None
    if isinstance(tokenizer, WorldTokenizer):
        tokens = [tokenizer.token_bytes(token) for token in range(V)]
    else:
        print(
            "no World vocabulary is known for this model: the GGUF works on token ids only", file=sys.stderr
        )
    with progress("export", "tensor", total=len(checkpoint.names)) as bar:
        write_gguf(checkpoint, Path(arguments.gguf), tokens, bar.update)
    print(arguments.gguf)
    return 0


def _export_bundle(arguments: argparse.Namespace) -> int:
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
            print("rwkv-npu: interrupted: the same command continues from here", file=sys.stderr)
            return 130
    print(path)
    print(summary(open_bundle(path), f"scp -r {shlex.quote(str(path))} board:"), file=sys.stderr)
    return 0
