"""`rwkv-npu state`: shows states, and converts tuned ones between the files of several programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rwkv_npu.cli.common import add_layout_flag
from rwkv_npu.errors import UsageError

OURS = "rwkv-npu"


def add(commands: Any) -> None:
    p = commands.add_parser(
        "state", help="show and convert states", description="Show states, and convert tuned ones."
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="say what a state is")
    show.add_argument("file", help="a state of ours, or a tuned one (.pth, .st)")
    add_layout_flag(show)
    convert = actions.add_parser("convert", help="write a tuned state for another program")
    convert.add_argument("file", help="a state of ours that has read nothing, or a tuned one (.pth, .st)")
    convert.add_argument("-o", "--out", required=True, metavar="FILE", help="a file that does not exist")
    to = "blinkdl (a .pth), web-rwkv (a .st, in fp16), or rwkv-npu, with the model"
    convert.add_argument("--to", required=True, choices=("blinkdl", "web-rwkv", OURS), help=to)
    convert.add_argument("-m", "--model", metavar="PATH", help="the model of the state: bundle or checkpoint")
    add_layout_flag(convert)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return _show(arguments) if arguments.action == "show" else _convert(arguments)


def _show(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.layout import BLINKDL
    from rwkv_npu.formats.state import is_tuned
    from rwkv_npu.formats.tuned import read_alone

    path = Path(arguments.file)
    state = read_alone(path, arguments.layout or BLINKDL)
    spec, numbers = state.spec, [part for part in state.parts.values() if part.size]
    largest = max(
        float(abs(part).max()) for name, part in state.parts.items() if name != "att.q" and part.size
    )
    if is_tuned(path):
        lines = [
            f"{path} (tuned state)",
            f"  for          RWKV-5, 6 or 7 with {spec.L} layers and {spec.H} heads of {spec.N} channels",
        ]
    else:
        lines = [
            f"{path} (state of rwkv-npu)",
            f"  for          RWKV-{spec.generation}, D {spec.D}, L {spec.L}, V {spec.V}, {state.fingerprint}",
            f"  has read     {state.tokens_seen} tokens",
        ]
    count = sum(part.size for part in numbers)
    print("\n".join([*lines, f"  holds        {count} numbers, the largest of size {largest:.3g}"]))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.bundle import is_bundle, open_bundle
    from rwkv_npu.formats.checkpoint import open_checkpoint
    from rwkv_npu.formats.state import load_state, new_state
    from rwkv_npu.formats.tuned import read_alone, save_tuned, time_states

    path, out = Path(arguments.file), Path(arguments.out)
    if arguments.model is None and arguments.to == OURS:
        raise UsageError("a state of rwkv-npu belongs to a model: name it with -m")
    if arguments.model is None:
        save_tuned(out, time_states(read_alone(path, arguments.layout), path), arguments.to)
        print(out)
        return 0
    model = Path(arguments.model)
    known = open_bundle(model).manifest if is_bundle(model) else open_checkpoint(model)
    tuned = time_states(load_state(path, known.spec, known.fingerprint, arguments.layout), path)
    if arguments.to != OURS:
        save_tuned(out, tuned, arguments.to)
    elif out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists: name another file, or remove it first")
    else:
        new_state(known.spec, known.fingerprint, dict(enumerate(tuned))).save(out)
    print(out)
    return 0
