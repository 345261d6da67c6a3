"""python -m tools.board build | run -- CMD ... | serve SOCKET BUNDLE ... | clean"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence

from rwkv_npu.errors import RwkvNpuError
from tools.board import build


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(command: Sequence[str]) -> int:
    """Replace this process by a command of the board: `python`, `rwkv-npu`."""
    board = build.make(say)
    program = board / "bin" / command[0]
    if not program.exists():
        there = ", ".join(sorted(path.name for path in (board / "bin").iterdir()))
        raise build.BoardError(f"the board has no {command[0]}: it has {there}")
    os.execv(program, [str(program), *command[1:]])


def serve(path: str, bundles: Sequence[str]) -> int:
    # A command that a shell starts with & ignores Ctrl-C, so kill must end it too. The signals are blocked before NumPy
    # starts its threads, which inherit this.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    from tools.board.compute import Bundles, Server

    with Server(path, Bundles(bundles)):
        say(f"computing {', '.join(bundles)} at {path}, in fp16: end with Ctrl-C, or kill {os.getpid()}")
        signal.sigwait(ends)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.board", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the board, or what is missing of it; prints its folder")
    running = commands.add_parser("run", help="run a command in it: run -- rwkv-npu generate ...")
    running.add_argument("words", nargs=argparse.REMAINDER)
    serving = commands.add_parser("serve", help="compute for the stand-in (RKNN_STANDIN_SOCKET)")
    serving.add_argument("socket")
    serving.add_argument("bundles", nargs="+")
    commands.add_parser("clean", help="remove all boards from the cache folder")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            print(build.make(say))
        elif arguments.command == "clean":
            shutil.rmtree(build.folder(), ignore_errors=True)
        elif arguments.command == "serve":
            return serve(arguments.socket, arguments.bundles)
        else:
            words = [word for i, word in enumerate(arguments.words) if (i, word) != (0, "--")]
            if not words:
                parser.error("run needs a command")
            return run(words)
    except RwkvNpuError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
