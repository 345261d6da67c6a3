"""`rwkv-npu state`: list, show, copy and delete states, and convert tuned states between programs."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rwkv_npu.cli.common import add_layout_flag, size
from rwkv_npu.errors import UsageError

OURS = "rwkv-npu"


def add(commands: Any) -> None:
    p = commands.add_parser(
        "state",
        help="list, show, copy, delete and convert states",
        description="Manage the states of chats and of a server's --cache-dir, and convert tuned ones.",
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the states in a folder, the last used first")
    listing.add_argument("folder", nargs="?", default=".", help="default: this folder")
    fork = actions.add_parser("fork", help="copy a state, to continue it in two ways")
    fork.add_argument("file", help="a saved state, or a tuned one (.pth, .st)")
    fork.add_argument("-o", "--out", required=True, metavar="FILE", help="file to write; it must not exist")
    delete = actions.add_parser("delete", help="delete states, and no other files")
    delete.add_argument("files", nargs="+", metavar="FILE", help="saved states")
    show = actions.add_parser("show", help="describe a state")
    show.add_argument("file", help="a saved state, or a tuned one (.pth, .st)")
    add_layout_flag(show)
    convert = actions.add_parser("convert", help="write a tuned state for another program")
    convert.add_argument("file", help="a tuned state (.pth, .st), or a saved one that has read no tokens")
    convert.add_argument(
        "-o", "--out", required=True, metavar="FILE", help="file to write; it must not exist"
    )
    to = "blinkdl (a .pth), web-rwkv (a .st, in fp16), or rwkv-npu (needs --model)"
    convert.add_argument("--to", required=True, choices=("blinkdl", "web-rwkv", OURS), help=to)
    convert.add_argument("-m", "--model", metavar="PATH", help="the model of the state: bundle or checkpoint")
    add_layout_flag(convert)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    run_action = {"list": _list, "show": _show, "fork": _fork, "delete": _delete, "convert": _convert}
    return run_action[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.files import os_reason

    folder = Path(arguments.folder)
    try:
        files = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {os_reason(error)}") from None
    rows, total = [["NAME", "TOKENS", "MODEL", "WEIGHTS", "SIZE", "USED"]], 0
    for path, status in sorted(files, key=lambda file: -file[1].st_mtime):
        notes = _notes(path)
        if notes:
            total += status.st_size
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
            model = f"RWKV-{notes.get('generation', '?'):.4}"
            weights = notes.get("fingerprint", "?")[:12]
            rows.append(
                [path.name, notes.get("tokens_seen", "?")[:18], model, weights, size(status.st_size), used]
            )
    if len(rows) == 1:
        print(f"no states in {folder}", file=sys.stderr)
        return 0
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows) - 1} states, {size(total)}", file=sys.stderr)
    return 0


def _notes(path: Path) -> dict[str, str]:
    """The metadata of a state of rwkv_npu, {} for any other file."""
    from rwkv_npu.formats.state import FORMAT, read_notes

    notes = read_notes(path)
    return notes if notes.get("format") == FORMAT else {}


def _fork(arguments: argparse.Namespace) -> int:
    from rwkv_npu.errors import StateError
    from rwkv_npu.formats.files import os_reason, write_atomically
    from rwkv_npu.formats.layout import BLINKDL
    from rwkv_npu.formats.tuned import read_alone

    path, out = Path(arguments.file), Path(arguments.out)
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists: name another file, or remove it first")
    read_alone(path, BLINKDL)  # raises for a damaged state
    try:
        write_atomically(out, path.read_bytes())
    except OSError as error:
        raise StateError(f"cannot write the state to {out}: {os_reason(error)}") from None
    print(out)
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    from rwkv_npu.errors import StateError
    from rwkv_npu.formats.files import os_reason

    paths = [Path(name) for name in arguments.files]
    for path in paths:
        if not _notes(path):
            raise UsageError(f"{path} is not a state of rwkv-npu: nothing was deleted")
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise StateError(f"cannot delete {path}: {os_reason(error)}") from None
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.layout import BLINKDL
    from rwkv_npu.formats.state import is_tuned
    from rwkv_npu.formats.tuned import read_alone

    path = Path(arguments.file)
    state = read_alone(path, arguments.layout or BLINKDL)
    spec, parts = state.spec, [part for part in state.parts.values() if part.size]
    # RWKV-4's `att.q` is a running maximum of exponents, -1e30 at the start.
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
    count = sum(part.size for part in parts)
    print("\n".join([*lines, f"  holds        {count} numbers, the largest magnitude {largest:.3g}"]))
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
