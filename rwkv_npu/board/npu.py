"""Use of the NPU by one process at a time: a lock, file descriptors, and capture of Rockchip's prints.

Two processes on the NPU at once were seen to crash the kernel. The lock therefore allows one on a machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from rwkv_npu.errors import BackendError

LOCK_NAME = "rwkv_npu.lock"
FILES = 1 << 16  # open files wanted: the driver needs one for each buffer, and the usual limit is 1024


def lock_folder() -> Path:
    """The folder of the lock: one that all users of the machine share and can write to.

    The environment variable RWKV_NPU_LOCKS names another folder, for emulated NPUs, of which there may be several.
    """
    if own := os.environ.get("RWKV_NPU_LOCKS"):
        return Path(own)
    shared = Path("/run/lock")
    with contextlib.suppress(OSError):
        if shared.stat().st_mode & stat.S_IWOTH:
            return shared
    return Path("/tmp")


class Lock:
    """The lock on the machine's NPU. One process holds it, for any number of its backends.

    The file holds the owner's pid. The lock itself is a kernel lock on the file, which ends with its process. The file
    of a killed process therefore blocks nobody.
    """

    def __init__(self, folder: Path | None = None):
        self.path = (folder or lock_folder()) / LOCK_NAME
        self._file = -1
        self._holders = 0
        self._guard = threading.Lock()

    def acquire(self) -> None:
        """Take the lock. Raises BackendError, with the owner's pid, if another process holds it."""
        with self._guard:
            if not self._holders:
                self._take()
            self._holders += 1

    def release(self) -> None:
        with self._guard:
            self._holders -= 1
            if not self._holders:
                os.close(self._file)

    def _take(self) -> None:
        try:
            import fcntl
        except ImportError:
            raise BackendError("Rockchip's NPUs are on Linux only") from None
        try:
            file = self._open()
        except OSError as error:
            raise BackendError(f"cannot open the NPU's lock {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(file, 32, 0).decode(errors="replace").strip()
            os.close(file)
            raise BackendError(
                f"the NPU is in use by process {owner or 'unknown'}, and only one may use it: wait for it, end it, "
                f"or use backend auto ({self.path})"
            ) from None
        # Another user's file may be read-only. The lock holds without a pid in it.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def _open(self) -> int:
        # Any user may write to the folder, so links in it are not followed.
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return os.open(self.path, os.O_RDWR | flags)
        with contextlib.suppress(FileNotFoundError):
            return os.open(self.path, os.O_RDONLY | flags)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(file, 0o666)  # regardless of the umask: any user may be the next owner
        return file


LOCK = Lock()


def raise_file_limit() -> int:
    """Raise this process's limit of open files to FILES, or as far as the system allows. Returns the new limit."""
    import resource  # Linux and macOS have it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Printed:
    """The text that was printed while output was captured."""

    text = ""


@contextlib.contextmanager
def captured() -> Iterator[Printed]:
    """Capture all output of C libraries and Python to stdout and stderr, because stdout is for generated text."""
    printed = Printed()
    _flush()
    with contextlib.ExitStack() as restore, tempfile.TemporaryFile() as file:
        for number in (1, 2):
            with contextlib.suppress(OSError):  # closed by the shell
                saved = os.dup(number)
                restore.callback(os.close, saved)
                restore.callback(os.dup2, saved, number)
                os.dup2(file.fileno(), number)
        try:
            yield printed
        finally:
            _flush()
            file.seek(0)
            printed.text = file.read().decode(errors="replace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # C's own buffers
