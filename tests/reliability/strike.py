"""Ends a command at one of its file operations, starts it again, and compares with an undisturbed run.

    python -m tests.reliability.strike COMMAND FOLDER POINTS [all]

COMMAND is one of COMMANDS, FOLDER is empty, POINTS are fractions of the command's file operations, such as 0.25,0.5.
At each point the command is ended by the next of WAYS, or by all. A line of JSON is printed for every strike that went
well; the first that did not is an error. A command runs in a fork of this process, which has imported everything and
has no threads.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from rwkv_npu import cli
from rwkv_npu.conversion import converter  # noqa: F401
from rwkv_npu.evaluation import text  # noqa: F401
from rwkv_npu.formats import adapters, hub  # noqa: F401
from tests.test_hub import NAME, Hub
from tests.tiny import V, write_model

WAYS = ("kill", "term", "full", "twice")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SECONDS = 120  # of one run


class Command:
    """A command line, and what it leaves: files below `folder`, or its output.

    again: False if a second run after a finished one is refused or goes on, so that what is there must be whole.
    """

    def __init__(
        self, folder: Path, words: list[object], left: str, *, again: bool = True, output: bool = False
    ):
        self.folder, self.words, self.left = folder, [str(word) for word in words], folder / left
        self.again, self.output = again, output

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def result(self) -> Any:
        """Everything that the command has left, or None if it has left nothing."""
        if self.output:
            out = self.folder.parent / "stdout"
            return json.loads(out.read_text()) if out.stat().st_size else None
        if self.left.is_dir():
            files = sorted(path for path in self.left.rglob("*") if path.is_file())
            return {str(path.relative_to(self.left)): path.read_bytes() for path in files}
        if not self.left.exists():
            return None
        if self.left.suffix == ".st":  # its header lists the metadata in any order
            with safe_open(self.left, framework="numpy") as file:
                return file.metadata(), {
                    name: file.get_tensor(name).tobytes() for name in sorted(file.keys())
                }
        return self.left.read_bytes()


def make(name: str, base: Path) -> Command:
    """The inputs of a command, and the command on them."""
    model, folder = base / "model" / "model.pth", base / "work"
    write_model(model, "7")
    if name == "convert":
        words = ["convert", model, "--target", "none", "--cpu", "int8", "-o", folder / "out.rwkv"]
        return Command(folder, words, "out.rwkv")
    if name == "merge":
        draw = torch.Generator().manual_seed(0)
        parts = {"lora_A": (4, 64), "lora_B": (64, 4)}
        adapter = {
            f"blocks.{layer}.att.{matrix}.{part}": torch.randn(*shape, generator=draw)
            for layer in range(2)
            for matrix in ("key", "value", "receptance")
            for part, shape in parts.items()
        }
        torch.save(adapter, base / "adapter.pth")
        words = ["merge", model, base / "adapter.pth", "--adapter-scale", 1, "-o", folder / "out.safetensors"]
        return Command(folder, words, "out.safetensors", again=False)
    if name == "state":
        words = ["generate", "-m", model, "--backend", "numpy", "--ids", "-p", "1 2 3", "-n", 3, "--temp", 0]
        return Command(folder, [*words, "--state", folder / "talk.st"], "talk.st", again=False)
    if name == "eval":
        np.save(base / "ids.npy", np.random.default_rng(0).integers(1, V, 2000))
        words = ["eval", "-m", model, "--backend", "numpy", "--text", base / "ids.npy", "--json"]
        return Command(folder, [*words, "--resume", folder / "scores.st"], "scores.st", output=True)
    server = Hub(np.random.default_rng(0).bytes(400_000))
    os.environ |= {"HF_ENDPOINT": server.url, "RWKV_NPU_CACHE": str(folder)}
    return Command(folder, ["pull", NAME], "hub/someone--some-model/sub/model.pth")


COMMANDS = ("convert", "merge", "state", "eval", "pull")


# -- runs ------------------------------------------------------------------------------------------------


def fork(command: Command, before: Callable[[], object] = lambda: None, after: Any = None) -> int:
    """Start the command in a fork, after `before()`. Its output goes to files beside its folder."""
    if child := os.fork():
        return child
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(command.folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.alarm(SECONDS)
        before()
        status = cli.main(command.words)
        sys.stdout.flush()
        if after:
            after()
    except BaseException as error:
        sys.stderr.write(f"\nescaped: {error!r}\n")
        status = 99
    finally:
        sys.stderr.flush()
    os._exit(status)


def ended(child: int) -> int:
    """The exit status of a process; negative is a signal's."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(folder: Path, strike: Callable[[int], object]) -> None:
    """Call strike(number) before every file below `folder` is opened to write, made, renamed or removed."""
    count = 0

    def hook(event: str, words: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        opened = event == "open" and isinstance(words[2], int) and words[2] & WRITING
        if (changes or opened) and isinstance(words[0], str | os.PathLike):
            if os.path.abspath(os.fspath(words[0])).startswith(str(folder)):
                count += 1
                strike(count)

    sys.addaudithook(hook)


def undisturbed(command: Command) -> tuple[Any, int, int]:
    """What a run leaves, the number of its file operations, and the size of its largest file."""
    command.clean()
    counted = command.folder.parent / "count"
    last = [0]
    child = fork(
        command,
        lambda: watch(command.folder, lambda number: last.__setitem__(0, number)),
        lambda: counted.write_text(str(last[0])),
    )
    status = ended(child)
    assert status == 0, (status, (command.folder.parent / "stderr").read_text())
    largest = max(path.stat().st_size for path in command.folder.rglob("*") if path.is_file())
    return command.result(), int(counted.read_text()), largest


def strike(command: Command, way: str, point: float, whole: Any, operations: int, largest: int) -> None:
    """End the command at a point, check what it left, run it again, and compare."""
    command.clean()
    where = max(1, round(point * operations))
    if way == "twice":
        children = [fork(command), fork(command)]
        statuses = {ended(child) for child in children}
        assert 0 in statuses and statuses <= {0, 1}, statuses
    elif way == "full":
        limit = max(1, int(point * largest))
        status = ended(fork(command, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        said = (command.folder.parent / "stderr").read_text()
        assert status == 1 and said.count("error:") == 1 and "Traceback" not in said, (status, said)
    else:
        number = signal.SIGKILL if way == "kill" else signal.SIGTERM
        end = lambda at: at == where and os.kill(os.getpid(), number)  # noqa: E731
        assert ended(fork(command, lambda: watch(command.folder, end))) == -number
    finished = None if command.output else command.result()
    if not command.again and finished is not None:
        assert finished == whole, "what was left is not whole"
        return
    status = ended(fork(command))
    assert status == 0, (way, point, status, (command.folder.parent / "stderr").read_text())
    assert command.result() == whole, f"{way} at {point}: the result is another"


def main(name: str, folder: str, points: str, ways: str = "one") -> None:
    command = make(name, Path(folder))
    whole, operations, largest = undisturbed(command)
    for index, point in enumerate(map(float, points.split(","))):
        for way in WAYS if ways == "all" else WAYS[index % 3 :: 3]:
            begin = time.monotonic()
            strike(command, way, point, whole, operations, largest)
            done = {
                "command": name,
                "way": way,
                "point": point,
                "seconds": round(time.monotonic() - begin, 2),
            }
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
