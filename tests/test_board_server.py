"""`python -m tools.board serve`: how it starts after another, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import one_line


@pytest.fixture
def path() -> Iterator[Path]:
    """A place for a socket, whose name must be short."""
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
        yield Path(folder) / "socket"


def serve(path: Path, bundle: Path) -> subprocess.Popen[str]:
    """A server that listens, started as a shell starts a command with &: Ctrl-C is ignored."""
    command = [sys.executable, "-m", "tools.board", "serve", str(path), str(bundle)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stderr is not None
    assert f"or kill {process.pid}\n" in process.stderr.readline()
    return process


def test_a_server_follows_one_that_was_killed_and_ends_as_told(path: Path, whole: Path) -> None:
    killed = serve(path, whole)
    killed.kill()
    killed.communicate()
    assert path.is_socket()
    second = serve(path, whole)
    command = [sys.executable, "-m", "tools.board", "serve", str(path), str(whole)]
    third = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        third.returncode == 1 and one_line(third.stderr) and "another process listens there" in third.stderr
    )
    second.terminate()
    assert second.communicate(timeout=30)[1] == "" and second.returncode == 0
    assert not path.exists()


def test_a_file_in_its_place_stays(path: Path, whole: Path) -> None:
    path.write_text("a file")
    command = [sys.executable, "-m", "tools.board", "serve", str(path), str(whole)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and one_line(ended.stderr)
    assert path.read_text() == "a file"
