"""Commands that are ended in the middle, and long runs: short samples of `make campaign`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.strike import COMMANDS

pytestmark = pytest.mark.reliability
SAMPLES = (
    *(("tokens", 500, "numba"), ("cycles", 40, "numba"), ("threads", 20, "numba"), ("models", 20, "numba")),
    *(("forked", 3, "numba"), ("forked", 2, "torch"), ("forked", 2, "ort"), ("spawned", 1, "numpy")),
)


def child(module: str, *words: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", f"tests.reliability.{module}", *map(str, words)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_was_ended_can_be_run_again(command: str, tmp_path: Path) -> None:
    """By SIGKILL at one point, by SIGTERM at another, by a full disk at a third; and two at once."""
    rows = child("strike", command, tmp_path, "0.25,0.5,0.75")
    assert sorted(row["way"] for row in rows) == ["full", "kill", "term", "twice"]


@pytest.mark.parametrize(("run", "size", "backend"), SAMPLES)
def test_long_runs(run: str, size: int, backend: str, tmp_path: Path) -> None:
    (row,) = child("long", run, tmp_path, size, backend)
    assert row["run"] == run
    assert row.get("answer") == ({"torch": "refused"}.get(backend, "right") if run == "forked" else None)
