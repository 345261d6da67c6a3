"""Models small enough to be made anew by every test module, and the command line run on them.

V rows of the head are more than the vocabulary has ids: the last ones have no text and must never be sampled.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_npu.cli import main
from rwkv_npu.model import Model
from rwkv_npu.models.spec import Spec
from tools.make_checkpoint import make_checkpoint

Run = Callable[..., tuple[int, str, str]]  # (exit status, stdout, stderr) of a command

PROMPT = "the turning über"
WORDS = ["the ", "and", "ing ", "re", "turn", "über", "  ", "€uro"]
VOCABULARY = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
WITHOUT_TEXT = 8
V = 1 + len(VOCABULARY) + WITHOUT_TEXT
HEAD_SIZE = 16
RANKS = {"4": {}, "5.0": {}, "5.1": {}, "5.2": {}, "6": {"mix": 8, "decay": 8}}
RANKS |= {"7": {"w": 8, "a": 8, "v": 8, "g": 8}, "7a": {"w": 8, "a": 8, "v": 8, "g": 8, "s": 8}}


def write_vocabulary(path: Path) -> Path:
    lines = [f"{number} {data!r} {len(data)}" for number, data in enumerate(VOCABULARY, 1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_model(path: Path, generation: str = "7", *, vocabulary: bool = True, **options: Any) -> Spec:
    """A checkpoint, in a folder of its own with its vocabulary beside it unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if vocabulary:
        write_vocabulary(path.parent / "vocab.txt")
    sizes = {"D": 64, "L": 2, "V": V, "N": HEAD_SIZE, "dtype": "fp32", "ranks": RANKS[generation], **options}
    return make_checkpoint(path, generation=generation, **sizes)


def continuation(model: Model, prompt: str = PROMPT, **options: Any) -> str:
    """The model's continuation of a prompt: by default 12 tokens, greedily."""
    options = {"temperature": 0, "max_tokens": 12} | options
    return "".join(step.text for step in model.generate(prompt, **options))


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command run in this process."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class Stdin(io.TextIOWrapper):
    """A stdin that holds `data` and is a pipe, or a terminal."""

    def __init__(self, data: bytes = b"", *, terminal: bool = False):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rwkv_npu", *map(str, arguments)]


def run_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, with an empty stdin unless told otherwise."""
    options = {"capture_output": True, "timeout": 60} | options
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command(*arguments), **options)


def peak_memory(*arguments: object, **environment: str) -> tuple[int, int]:
    """(exit status, largest resident memory in bytes) of a command in a process of its own."""
    with open(os.devnull, "r+b") as null:
        process = subprocess.Popen(
            command(*arguments), stdin=null, stdout=null, stderr=null, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def said(err: str) -> str:
    """stderr without the line that the first test to use a kernel prints while it is compiled."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("compiling "))


def one_line(text: str) -> bool:
    text = said(text)
    return text.endswith("\n") and text.count("\n") == 1 and "Traceback" not in text and len(text) < 400


def error_line(result: tuple[int, str, str], status: int = 1) -> str:
    """The one line of a command that failed, and printed nothing else."""
    assert result[0] == status, result
    assert result[1] == ""
    assert one_line(result[2]), result[2]
    assert said(result[2]).startswith("rwkv-npu")
    return said(result[2])
