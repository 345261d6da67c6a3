"""The NPU as something that one process holds: the lock, file descriptors, what Rockchip's libraries print.

Two clients at once were seen to take kernels down with them, so there is one at a time on a machine.
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
FILES = 1 << 16  # descriptors wanted: the driver takes one a buffer, and the usual limit is 1024


def lock_folder() -> Path:
    """A folder that every user of the machine can write to, and the same for all of them.

    RWKV_NPU_LOCKS names another: for NPUs that are none, and may be many.
    """
    if own := os.environ.get("RWKV_NPU_LOCKS"):
        return Path(own)
    shared = Path("/run/lock")
    with contextlib.suppress(OSError):
        if shared.stat().st_mode & stat.S_IWOTH:
            return shared
    return Path("/tmp")


class Lock:
    """The machine's NPU, held by this process for as many backends as it has.

    The file names its owner. The lock itself is the kernel's and goes with the process, however that ends, so
    that a file left behind by a killed one is in nobody's way.
    """

    def __init__(self, folder: Path | None = None):
        self.path = (folder or lock_folder()) / LOCK_NAME
        self._file = -1
        self._holders = 0
        self._guard = threading.Lock()

    def acquire(self) -> None:
        """Raises BackendError with the owner's pid where another process has the NPU."""
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
                f"the NPU is in use by process {owner or 'unknown'}, and takes one at a time: wait for it, end it, "
                f"or use --backend ort ({self.path})"
            ) from None
        with contextlib.suppress(
            OSError
        ):  # read-only, as another user's: the lock holds without a name in it
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def _open(self) -> int:
        # Everybody may write to the folder: no link of theirs is followed.
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return os.open(self.path, os.O_RDWR | flags)
        with contextlib.suppress(FileNotFoundError):
            return os.open(self.path, os.O_RDONLY | flags)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(file, 0o666)  # whatever the umask: any user may be the next owner
        return file


LOCK = Lock()


def raise_file_limit() -> int:
    """Let this process open as many files as the system allows, up to FILES; the limit after it."""
    import resource  # Linux and macOS have it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Printed:
    """Text printed while output was captured."""

    text = ""


@contextlib.contextmanager
def captured() -> Iterator[Printed]:
    """Keep what C libraries and Python print, on stdout and stderr alike, from the user: stdout is for text."""
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
