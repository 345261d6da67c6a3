"""The cache of compiled kernels: one file of machine code each.

The name of their folder contains a hash of everything that the code depends on. $RWKV_NPU_CACHE may list several
folders, as PATH does. All are read, and the first writable one is written. So a container image can ship kernels in a
folder that is read-only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rwkv_npu.errors import BackendError
from rwkv_npu.formats.files import cache_dirs, write_atomically
from rwkv_npu.kernels import processor

_temporary: list[str] = []  # a folder that is deleted when this process ends; empty while none is needed
_DIGEST_BYTES = hashlib.sha256().digest_size


@functools.cache
def key() -> str:
    """The name of the folder: the processor, and a hash of all else that matters (sources, features, compilers)."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    used = [*package.glob("kernels/*.py"), *package.glob("models/*.py"), package / "quant" / "cpu.py"]
    for file in sorted(used):
        digest.update(file.read_bytes())
    versions = [importlib.metadata.version(compiler) for compiler in ("numba", "llvmlite")]
    system = platform.machine(), platform.system(), platform.python_version_tuple()[:2]
    name = processor.name()
    digest.update(repr((name, sorted(processor.features()), system, versions)).encode())
    return f"{name}-{digest.hexdigest()[:16]}"


def roots() -> list[str]:
    """The folders that may hold a cache; the last is a temporary one where no other is writable."""
    return [str(folder) for folder in cache_dirs()] + _temporary


def folders() -> list[Path]:
    """The folders to search for the kernels of this processor, in order."""
    return [Path(root) / "kernels" / key() for root in roots()]


def read(name: str) -> bytes | None:
    """The machine code of a kernel; None if no folder has an undamaged copy."""
    for folder in folders():
        with contextlib.suppress(OSError):
            data = (folder / name).read_bytes()
            digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                return code
    return None


def write(folder: Path, name: str, code: bytes) -> None:
    """Store the machine code of a kernel. Raises OSError."""
    write_atomically(folder / name, hashlib.sha256(code).digest() + code)


def writable_folder() -> Path:
    """Return the first writable one of `folders()`, creating it if it is missing.

    If there is none, create a temporary folder and print a warning. Raises BackendError if that is not possible either.
    """
    problem: OSError | None = None
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problem = problem or error
        else:
            return folder
    advice = "set RWKV_NPU_CACHE to a folder that can be written, or add one that `rwkv-npu kernels build` has filled"
    try:
        _temporary.append(tempfile.mkdtemp(prefix="rwkv_npu-"))
    except OSError:
        raise BackendError(
            f"numba has no folder for compiled kernels, not even a temporary one: {problem}; {advice}, or use ort"
        ) from problem
    print(
        f"compiled kernels cannot be kept, every start compiles them anew: {problem}\n{advice}",
        file=sys.stderr,
    )
    atexit.register(shutil.rmtree, _temporary[0], ignore_errors=True)
    folder = folders()[-1]
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def lock(folder: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Lock a kernel while it is compiled. Yields False if another process has the lock and `wait` is not set."""
    import fcntl  # not on Windows

    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
