"""`rwkv-npu completion`: print a script for a shell that completes commands, flags and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from rwkv_npu.errors import UsageError

FILES = ("PATH", "FILE", "DIR", "checkpoint", "path")  # metavars and names of arguments that are files


def add(commands: Any) -> None:
    p = commands.add_parser(
        "completion",
        help="print a completion script for your shell",
        description='Print a completion script. For bash: eval "$(rwkv-npu completion bash)"',
    )
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs shtab: pip install shtab") from None
    from rwkv_npu.cli import parser

    top = parser()
    for action in _actions(top):
        if (action.metavar or action.dest) in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, arguments.shell))
    return 0


def _actions(p: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in p._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
