"""Progress of what is long: nothing where it is short, lines where there is no terminal."""

from __future__ import annotations

import re
import sys
import time

import pytest

from rwkv_npu import progress as module
from rwkv_npu.progress import progress
from tests.tiny import Stdin


def test_what_is_short_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("count", "number", over=range(50))) == list(range(50))
    with progress("count", "number", total=3) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_progress_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_S", 0.05)
    for _ in progress("count", "number", over=range(5)):
        time.sleep(0.06)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 2 <= len(lines) <= 5
    counts = [int(re.fullmatch(r"count: (\d) of 5, 00:00", line)[1]) for line in lines]  # type: ignore[index]
    assert counts == sorted(set(counts))


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Stdin(terminal=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("count", "number", total=3) as bar:
        bar.update(3)
        bar.refresh()
    terminal.seek(0)
    assert "\rcount: 100%" in terminal.buffer.getvalue().decode()  # type: ignore[attr-defined]
