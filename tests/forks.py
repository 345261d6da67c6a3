"""Runs on the emulated board: forks a process for every command that it is asked for.

Most of a command's time there is Python's start and its imports, under emulation; a fork has them behind it, and what
the emulator has translated by then as well. Whatever matters to a command is its own: environment, files, limits, the
libraries of Rockchip's and of the stand-in, which nobody has loaded before, and its end. (Nor has anybody loaded ONNX
Runtime, which does not survive a fork there.)

A line of stdin is a request, JSON: `words` (rwkv-npu ..., or python -c CODE ...), `environment`, the files `out` and
`err`, and `seconds`, after which it is killed. A line of stdout answers with the exit status; negative is a signal's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import tqdm  # noqa: F401

from rwkv_npu import cli  # noqa: F401
from rwkv_npu.backends import rknn, rknn_matmul  # noqa: F401
from rwkv_npu.cli import (  # noqa: F401
    diagnosis,  # noqa: F401
    doctor,
    generate,
    info,
    tune,
)
from rwkv_npu.runtime import tuning  # noqa: F401


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if child := os.fork():
            print(ended(child, request["seconds"]), file=answers)
        else:
            answers.close()
            return become(request)


def ended(child: int, seconds: float) -> int:
    """The exit status of a process. It is killed if it takes longer than that."""
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def become(request: dict[str, Any]) -> None:
    """Run the command in this process."""
    files = (os.devnull, os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_CREAT) for name in ("out", "err"))
    for number, (path, flags) in enumerate(files):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["environment"])
    program, *arguments = request["words"]
    if program == "rwkv-npu":
        sys.argv = [program, *arguments]
        cli.entry()
    _, code, *rest = arguments
    sys.argv = ["-c", *rest]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
