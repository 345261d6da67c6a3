"""What others say comes in one line of ours."""

from __future__ import annotations

import pytest

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
