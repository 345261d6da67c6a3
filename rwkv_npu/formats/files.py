"""Atomic writes, safe removal inside a folder, file locks, and the cache folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rwkv_npu.errors import UsageError

UNFINISHED = ".writing"  # suffix of a file that is being written
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_INNER_FOLDER = _FOLDER | getattr(os, "O_NOFOLLOW", 0)


# -- writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it is renamed to `path`; after an exception it is removed.

    Each writer has its own temporary path, so that two processes can write the same file at once.
    """
    aside = path.with_name(f"{path.name[:40]}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, sync, and rename: a reader sees the old content or the new. Raises OSError."""
    with replacing(path) as aside, aside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def resume_file(path: str | None) -> Path | None:
    """The file to resume from. Raises UsageError, before anything is computed, if it cannot be written."""
    if path is None:
        return None
    file = Path(path)
    try:
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()
    except (OSError, ValueError) as error:
        raise UsageError(f"resume={file}: cannot write there: {os_reason(error)}") from error
    return file


# -- tests of paths --------------------------------------------------------------------------------------


def is_file(path: Path) -> bool:
    """True for a file. False for anything else, including names that are too long or not allowed."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """True for a folder. False for anything else, as in `is_file`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def os_reason(error: Exception) -> str:
    """Reason of a failed file operation, without the file's name."""
    return getattr(error, "strerror", None) or str(error)


def irregular_entries(folder: Path) -> Iterator[str]:
    """Yield the relative name of everything in `folder` that is neither a plain file nor a folder.

    Links are not followed. Raises OSError.
    """

    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, files in os.walk(folder, onerror=refuse):
        for name in sorted(folders + files):
            path = Path(directory, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                yield path.relative_to(folder).as_posix()


# -- removing --------------------------------------------------------------------------------------------


def remove_within(root: Path, name: str) -> None:
    """Remove the file `name`, a relative path with slashes, below the folder `root`; it may be missing.

    Each folder is opened by descriptor, without following links, so nothing outside `root` can be removed.
    Raises OSError if a folder is a link, ValueError for a name that leaves `root`.
    """
    *folders, leaf = _inside(name)
    descriptor = os.open(root, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _INNER_FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        os.unlink(leaf, dir_fd=descriptor)
    except FileNotFoundError:
        pass
    finally:
        os.close(descriptor)


def remove_unlisted(root: Path, folders: Iterable[str], listed: Collection[str]) -> None:
    """Remove files of `folders` that are not in `listed`, and files in `root` whose writing was interrupted.

    folders: names in `root`; they stay, with their subfolders. listed: paths relative to `root`. Nothing outside `root`
    can be removed, as in `remove_within`. Raises OSError.
    """
    at_root = os.open(root, _FOLDER)
    try:
        for name in os.listdir(at_root):
            if name.endswith(UNFINISHED):
                os.unlink(name, dir_fd=at_root)
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                # fwalk does not enter a link, not even as its first folder.
                for directory, _, files, descriptor in os.fwalk(folder, dir_fd=at_root):
                    for file in files:
                        if PurePosixPath(directory, file).as_posix() not in listed:
                            os.unlink(file, dir_fd=descriptor)
    finally:
        os.close(at_root)


def stays_inside(name: str) -> bool:
    """True if a path with slashes is relative and stays below its folder."""
    path = PurePosixPath(name)
    parts = path.parts
    return bool(parts) and not path.is_absolute() and ".." not in parts and "\0" not in name


def _inside(name: str) -> tuple[str, ...]:
    if not stays_inside(name):
        raise ValueError(f"{name!r:.80} is not a name inside a folder")
    return PurePosixPath(name).parts


# -- locks -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock an existing folder or file against other processes. Raises BlockingIOError if another process has the lock.

    It ends with the process at the latest. A file that replaces `path` is not locked.
    """
    fcntl = _fcntl()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def waited_for(path: Path, say: Callable[[str], object], other: str) -> Iterator[None]:
    """Lock the file `path`, which is created if it is missing. Waits for another process that has the lock.

    say: called with a message before the wait. other: names the other process in the message.
    """
    fcntl = _fcntl()
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for {other}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fcntl() -> Any:
    try:
        import fcntl
    except ImportError:  # Windows
        raise UsageError("this needs file locks as Linux has them: use Linux, or WSL") from None
    return fcntl


# -- cache -----------------------------------------------------------------------------------------------


def cache_dirs() -> list[Path]:
    """The folders for files that can be made again: those in $RWKV_NPU_CACHE, or rwkv_npu in the user's cache folder.

    The variable lists folders like PATH. A user without a home folder gets a private folder among the system's
    temporary files. Raises UsageError if somebody else owns that folder.
    """
    try:
        if own := [part for part in os.environ.get("RWKV_NPU_CACHE", "").split(os.pathsep) if part]:
            return [Path(part).expanduser().absolute() for part in own]
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return [Path(base).expanduser().absolute() / "rwkv_npu"]
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return [_private_folder(Path(tempfile.gettempdir()) / f"rwkv_npu-{os.getuid()}")]


def cache_dir() -> Path:
    """The first of `cache_dirs` that can be written; the very first if none can. Raises UsageError."""
    folders = cache_dirs()
    return next((folder for folder in folders if _is_writable(folder)), folders[0])


def _is_writable(folder: Path) -> bool:
    """True if the folder can be written, or created if it is missing."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _private_folder(path: Path) -> Path:
    """Make the folder `path` for this user alone. It will hold compiled code, so nobody else may write to it."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UsageError(
            f"there is no home folder, and {path} is not private: set RWKV_NPU_CACHE to a folder"
        )
    return path
