"""What others say comes in one line of ours."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from rwkv_npu.cli import main
from rwkv_npu.errors import LONGEST, first_line


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
def test_the_first_line_that_says_something(message: str, line: str) -> None:
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
