"""`rwkv-npu toolkit install | status | remove`: Rockchip's compiler."""

from __future__ import annotations

import argparse
import sys

from rwkv_npu.cli.common import size
from rwkv_npu.errors import ToolkitError
from rwkv_npu.toolkit import environment
from rwkv_npu.toolkit.install import install


def run(arguments: argparse.Namespace) -> int:
    return {"install": _install, "status": _status, "remove": _remove}[arguments.action](arguments)


def _install(arguments: argparse.Namespace) -> int:
    version = arguments.toolkit_version or environment.DEFAULT_VERSION
    made = install(version, arguments.python, progress=lambda line: print(line, file=sys.stderr))
    print(f"rknn-toolkit2 {made.version}: {made.python}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
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
    removed = environment.remove(arguments.toolkit_version)
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print("there was nothing to remove", file=sys.stderr)
    return 0
