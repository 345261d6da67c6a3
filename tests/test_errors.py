"""Errors: one line each, with arguments in Python and flags on the command line."""

from __future__ import annotations

import ast
import errno
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkv_npu.cli import main, parser
from rwkv_npu.cli.common import log_to_stderr
from rwkv_npu.cli.flags import FLAGS, as_flags
from rwkv_npu.errors import LONGEST, UsageError, first_line

PACKAGE = Path(__file__).resolve().parent.parent / "rwkv_npu"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no such node", "no such node"),
        ("\n  [FAIL] : no such node \nat graph.cc:12\n", "[FAIL] : no such node"),
        ("", "ValueError"),
        (" \n\t\n", "ValueError"),
        ("x" * 1000 + "\nmore", "x" * LONGEST),
    ],
)
def test_the_first_line_with_text_is_taken(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


def test_only_errors_of_stdout_are_reported_as_errors_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout's full disk is tested in test_cli_processes."""

    def failing(error: OSError) -> Callable[..., int]:
        def run(arguments: object) -> int:
            raise error

        return run

    monkeypatch.setattr("rwkv_npu.cli.doctor.run", failing(OSError(errno.ECONNREFUSED, "Connection refused")))
    with pytest.raises(ConnectionRefusedError):  # a bug, which keeps its traceback
        main(["doctor"])
    monkeypatch.setattr("rwkv_npu.cli.doctor.run", failing(OSError(errno.ENOSPC, "No space left on device")))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "rwkv-npu: error: No space left on device\n"


# -- arguments in Python, flags on the command line --------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("give tokenizer=FILE, or ids", "give --tokenizer FILE, or ids"),
        ("make it again with force=True", "make it again with --force"),
        ("(a larger max_kl=, or target='none')", "(a larger --max-kl, or --target none)"),
        ("rows='0' makes no sense", "--rows 0 makes no sense"),
        ("layout='a b' is unknown", "--layout 'a b' is unknown"),
        ("temperature=-0.5: it must be a number", "--temp -0.5: it must be a number"),
        ("target='rk3588' precision=\"w8a8\"", "--target rk3588 --precision w8a8"),
        (
            "/models/precision=w8a8/cpu=int8.pth: no such file",
            "/models/precision=w8a8/cpu=int8.pth: no such file",
        ),
        ("logit_bias= and a_state=x stay", "logit_bias= and a_state=x stay"),
    ],
)
def test_arguments_are_shown_as_flags(message: str, shown: str) -> None:
    assert as_flags(message) == shown


@pytest.mark.filterwarnings("default")
def test_errors_and_warnings_show_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        warnings.warn("raw=True keeps them", stacklevel=1)
        logging.getLogger("rwkv_npu").info("unseen without log_to_stderr")
        with log_to_stderr():
            logging.getLogger("rwkv_npu").info("force=True chooses anew")
        raise UsageError("threads=0: it must be at least 1")

    monkeypatch.setattr("rwkv_npu.cli.doctor.run", run)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "rwkv-npu: warning: --raw keeps them",
        "--force chooses anew",
        "rwkv-npu: error: --threads 0: it must be at least 1",
    ]


def test_every_flag_of_the_table_is_a_flag() -> None:
    commands = next(action.choices for action in parser()._actions if action.dest == "command")
    assert commands is not None
    known = {flag for command in commands.values() for flag in command._option_string_actions}
    known |= set(commands["toolkit"]._subparsers._group_actions[0].choices["install"]._option_string_actions)
    assert set(FLAGS.values()) <= known


LIBRARY = "model.py formats text runtime conversion evaluation quant backends kernels graphs toolkit models board serve"
# A command of ours (`extend` in export.py too) or of another program may be quoted whole.
COMMANDS = re.compile(r"rwkv-npu [a-z]|{extend}|pip install|--device /dev|llama-gguf-split")


def test_the_library_names_no_flags() -> None:
    files = [path for unit in LIBRARY.split() for path in [PACKAGE / unit, *(PACKAGE / unit).rglob("*.py")]]
    found = []
    for path in filter(Path.is_file, files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in documents | parts:
                text = ast.unparse(node)
                if re.search(r"[\s(]--[a-z]{2}", text) and not COMMANDS.search(text):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {text[:100]}")
    assert not found, "\n".join(found)
