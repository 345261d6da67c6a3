"""A server in a process of its own, on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny import command


def debian_program(name: str, package: str = "") -> str:
    """Path of a program of Debian's, installed where that is allowed; otherwise the test is skipped."""
    path = "/usr/sbin:/usr/bin:" + os.environ.get("PATH", "")
    if not shutil.which(name, path=path) and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", package or name], capture_output=True)
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class LiveServer:
    def __init__(self, process: subprocess.Popen[str], url: str):
        self.process, self.url = process, url

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def live_server(*arguments: object, log: Path) -> Iterator[LiveServer]:
    """Start `rwkv-npu serve` with these flags. Its stderr goes to `log`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command("serve", "--port", 0, *arguments), stdout=subprocess.PIPE, stderr=file, text=True
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), log.read_text()
            yield LiveServer(process, url)
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
