"""The command line: the parser, the list of commands, and how errors are shown.

stdout is for results, stderr for everything else. An error that the user can cause is one line on stderr, with exit
status 2 for the command line itself and 1 for the rest. `--help` imports no numpy: see COMMANDS.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from rwkv_npu import __version__
from rwkv_npu.cli import (
    batch,
    bench,
    chat,
    completion,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    info,
    kernels,
    merge,
    models,
    pull,
    serve,
    state,
    toolkit,
    tune,
)
from rwkv_npu.cli.flags import as_flags
from rwkv_npu.errors import RwkvNpuError

# The commands in the order of --help. In each, `add` declares the flags. `run` executes the command, and imports what
# it needs only then.
COMMANDS = (
    models,
    pull,
    convert,
    export,
    merge,
    generate,
    chat,
    serve,
    batch,
    evaluate,
    info,
    state,
    tune,
    doctor,
    bench,
    kernels,
    toolkit,
    completion,
)

STDOUT = "<stdout>"
# Arguments that may be empty, and that are not resolved if they begin with `hf:`.
TEXTS = ("prompt", "system", "stop", "hub_file")
LINUX_ONLY = {"fcntl", "resource", "termios"}  # modules of Python that other systems may lack
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk


class _Parser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # `main` must notice a closed pipe, before Python exits
        super().exit(status, message)


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="rwkv-npu", description="RWKV language models on the Rockchip NPU.")
    top.add_argument("--version", action="version", version=f"rwkv-npu {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        top = parser()
        arguments = top.parse_args(argv)
        for name, value in vars(arguments).items():
            words = value if isinstance(value, list) else [value]
            if name in TEXTS:
                continue
            if "" in words:  # a shell passes "" for "$MODEL" if the variable is not set
                top.error(f"{name.replace('_', '-')} is empty: give a value, or leave it out")
            if any(isinstance(word, str) and word.startswith("hf:") for word in words):
                from rwkv_npu.formats.hub import resolve

                paths = [resolve(word) if isinstance(word, str) else word for word in words]
                setattr(arguments, name, paths if isinstance(value, list) else paths[0])
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except RwkvNpuError as error:
        print(f"rwkv-npu: error: {as_flags(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the program that reads our output has ended
        _give_up_stdout()
        return 0
    except OSError as error:
        if error.filename == STDOUT:
            _give_up_stdout()
            print(f"rwkv-npu: error: cannot write the output: {error.strerror}", file=sys.stderr)
        elif error.filename is None and error.errno in FULL:
            print(f"rwkv-npu: error: {error.strerror}", file=sys.stderr)
        else:
            raise
        return 1
    except ModuleNotFoundError as error:
        if error.name not in LINUX_ONLY:
            raise
        print(f"rwkv-npu: error: this command needs Linux: there is no {error.name} here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rwkv-npu: interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        print("rwkv-npu: error: not enough memory for this model on this machine", file=sys.stderr)
        return 1


def _give_up_stdout() -> None:
    """Redirect stdout to /dev/null. Otherwise Python would report the same error again when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"rwkv-npu: warning: {as_flags(str(message))}", file=sys.stderr)


def entry() -> NoReturn:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell: <&- >&-
            setattr(sys, name, open(os.devnull, mode))
    # SIGTERM raises SystemExit, so that calls to the NPU finish and its contexts are released. A process that is killed
    # may leave the driver stuck.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    _keep_stdout()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    sys.exit(main())


def _keep_stdout() -> None:
    """Redirect prints of C libraries, such as Rockchip's, from stdout to stderr. stdout is for results only."""
    with contextlib.suppress(OSError, ValueError):  # closed by the shell
        ours = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), 1)
        file = io.BufferedWriter(_Stdout(ours, "w"))
        sys.stdout = io.TextIOWrapper(file, encoding=sys.stdout.encoding, line_buffering=os.isatty(ours))


class _Stdout(io.FileIO):
    """stdout. Its errors have the file name STDOUT, by which `_run` tells them from errors of other files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


if __name__ == "__main__":
    entry()
