"""Files that appear whole or not at all, and the folder for those that can be made again."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rwkv_npu.errors import UsageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, sync, and rename: whoever reads it sees the old content or the new. Raises OSError."""
    aside = path.with_name(path.name + ".writing")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def resume_file(path: str | None) -> Path | None:
    """What `--resume` names. Raises UsageError, before anything is computed, where nothing could be kept."""
    if path is None:
        return None
    file = Path(path)
    try:
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UsageError(f"--resume {file}: cannot write there: {error.strerror}") from error
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the existing folder or file `path` against other processes that do the same. Raises BlockingIOError if one
    does.

    The lock goes with the process that holds it, however that ends; and with `path`, should that be replaced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def waited_for(path: Path, say: Callable[[str], object], other: str) -> Iterator[None]:
    """Hold the file `path`, made where it is missing, once nobody else does; `say` is told what is waited for."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for {other}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_dir() -> Path:
    """The folder for what can be made again: $RWKV_NPU_CACHE, or rwkv_npu in the user's cache folder."""
    if own := os.environ.get("RWKV_NPU_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "rwkv_npu"
