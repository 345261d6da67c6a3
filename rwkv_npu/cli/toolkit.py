"""`rwkv-npu toolkit install | status | remove`: Rockchip's compiler, in an environment of its own."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rwkv_npu.cli.common import size
from rwkv_npu.errors import ToolkitError


def add(commands: Any) -> None:
    p = commands.add_parser(
        "toolkit",
        help="install Rockchip's compiler",
        description="Install, show or remove Rockchip's compiler. It has an environment of its own.",
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    install = actions.add_parser("install", help="install it in the user's cache folder")
    install.add_argument(
        "--version",
        dest="toolkit_version",
        metavar="X.Y.Z",
        help="(default: 2.3.2, which most boards can read)",
    )
    install.add_argument("--python", metavar="PATH", help="a Python 3.10 to 3.12 (default: looked for)")
    actions.add_parser("status", help="show what is installed")
    remove = actions.add_parser("remove", help="remove it")
    remove.add_argument("--version", dest="toolkit_version", metavar="X.Y.Z", help="(default: all)")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return {"install": _install, "status": _status, "remove": _remove}[arguments.action](arguments)


def _install(arguments: argparse.Namespace) -> int:
    from rwkv_npu.toolkit import environment
    from rwkv_npu.toolkit.install import install

    version = arguments.toolkit_version or environment.DEFAULT_VERSION
    made = install(version, arguments.python, progress=lambda line: print(line, file=sys.stderr))
    print(f"rknn-toolkit2 {made.version}: {made.python}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from rwkv_npu.toolkit import environment

    found = environment.status()
    for status in found:
        where = (
            f"{status.python}, {size(status.size_bytes)}" if status.private else f"{status.python}, your own"
        )
        print(f"rknn-toolkit2 {status.version}: {where}{f': {status.problem}' if status.problem else ''}")
    if not found:
        raise ToolkitError("Rockchip's compiler is not installed: run rwkv-npu toolkit install")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from rwkv_npu.toolkit import environment

    removed = environment.remove(arguments.toolkit_version)
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print("there was nothing to remove", file=sys.stderr)
    return 0
