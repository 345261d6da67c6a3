"""The parent's side of a compiler process (child.py): start, request, stop, and error messages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from rwkv_npu.errors import ToolkitError
from rwkv_npu.toolkit import child
from rwkv_npu.toolkit.environment import Environment
from rwkv_npu.toolkit.log import last_error


class Worker:
    """One child process and its scratch folder, created in `folder` (None: the system's temporary folder).

    Use it as a context manager, or call `close`. Another thread may call `kill`; a running request then raises
    ToolkitError.
    """

    def __init__(self, environment: Environment, folder: Path | None = None) -> None:
        self._killed = False
        self._lock = threading.Lock()
        try:
            self.scratch = Path(tempfile.mkdtemp(prefix=child.PREFIX, dir=folder)).absolute()
        except OSError as error:
            raise ToolkitError(
                f"cannot write in {folder or tempfile.gettempdir()}: {error.strerror}"
            ) from error
        command = environment.command(Path(child.__file__), str(self.scratch))
        settings = {"TMPDIR": str(self.scratch), "PYTHONWARNINGS": "ignore"}
        try:
            # A session of its own: Ctrl-C reaches the parent only, which decides what to stop.
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise ToolkitError(f"cannot run {environment.python}: {error.strerror}") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def request(
        self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Send one request and wait for its reply: (header, arrays).

        Raises ToolkitError if the request failed or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            try:
                child.send(self._process.stdin, dict(header), dict(arrays or {}))
                reply = child.receive(self._process.stdout)
            except (OSError, EOFError, ValueError):  # ValueError: another thread closed the stream
                reply = None
        if reply is None:
            raise ToolkitError(self._why_it_ended())
        if problem := reply[0].get("error"):
            raise ToolkitError(last_error(self.log(), problem))
        return reply

    def log(self) -> str:
        """The compiler's output so far."""
        try:
            return (self.scratch / "log").read_text(errors="replace")
        except OSError:
            return ""

    def kill(self) -> None:
        """End the process at once. `close` must still be called."""
        self._killed = True
        self._process.kill()

    def close(self) -> None:
        """End the process and delete its files. A second call does nothing."""
        process = self._process
        _close(process.stdin)  # the child ends when its stdin closes
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:  # inside a long call of the C library
            process.kill()
            process.wait()
        _close(process.stdout)  # last: another thread may be reading it
        _close(process.stderr)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _why_it_ended(self) -> str:
        if self._killed:
            return "Rockchip's compiler was stopped"
        try:
            _, printed = self._process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, ValueError, OSError):
            self._process.kill()
            printed = b""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "Rockchip's compiler was killed, most likely for lack of memory: compile fewer graphs at a time"
        how = f"ended by signal {-code}" if code < 0 else f"exited with status {code}"
        text = self.log() + printed.decode(errors="replace")
        return last_error(text, f"Rockchip's compiler {how}")


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        try:
            stream.close()
        except OSError:  # unsent bytes for a process that has ended
            pass
