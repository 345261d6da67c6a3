"""Code that is compiled on the machine it runs on, by numba (extra `fast`): no compiler, no build step.

    recurrence.py      the recurrences of all generations, in v4.py .. v7.py
    recorder.py        groups, and the fused forward, as operations; program.py gives them memory, machine.py
                       executes them, pool.py on several threads
    products.py        matrices times rows, in the tiles of tiles.py and the vectors of simd.py
    instruction_sets.py    products of bytes for each kind of processor; processor.py reads which this one is

numba is imported when one of them is loaded. What it compiles is kept in the cache folder, in a folder named after the
sources, the processor and numba, so that no other machine or version ever reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rwkv_npu.formats.files import cache_dir

# Whether what is compiled next is kept: only in our folder, since the one that numba would choose knows a function by
# the date of its own file, and not what it calls.
KEEP = False
PATIENCE = 1.0  # seconds of compiling after which it is said

_loading = threading.Lock()


def available() -> bool:
    """Whether numba is installed and can be imported. Warns of one that is there and cannot be used."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(f"numba cannot be used, NumPy does its work: {error}", stacklevel=3)
        return False
    return True


def load(module: str, what: str) -> ModuleType:
    """A module of this package, compiled: at once where it was compiled before, else in some seconds.

    what: it computes, for the line that says so.
    """
    name = f"{__name__}.{module}"
    with _loading:
        if name in sys.modules:
            return sys.modules[name]
        folder = cache_dir() / "kernels" / _identity()
        try:
            with _numba_cache(folder), _notice(what):
                return importlib.import_module(name)
        except Exception as error:  # numba's cache raises what the disk, or a damaged file, makes of it
            print(
                f"{what} is compiled for this run only: {folder} cannot be used ({error})",
                file=sys.stderr,
            )
            return importlib.import_module(name)


def _identity() -> str:
    """Names all that a compiled kernel depends on."""
    import numba

    from rwkv_npu.kernels import processor

    digest = hashlib.sha256()
    here = Path(__file__).parent
    used = [*here.glob("*.py"), *(here.parent / "models").glob("*.py"), here.parent / "quant" / "cpu.py"]
    for file in sorted(used):
        digest.update(file.read_bytes())
    digest.update(f"{processor.name()} {sorted(processor.features())} {numba.__version__}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _numba_cache(folder: Path) -> Iterator[None]:
    """Have numba keep in `folder` what is compiled meanwhile. Raises OSError."""
    global KEEP
    config: Any = importlib.import_module("numba.core.config")
    folder.mkdir(parents=True, exist_ok=True)
    before = config.CACHE_DIR
    config.CACHE_DIR, KEEP = str(folder), True
    try:
        yield
    finally:
        config.CACHE_DIR, KEEP = before, False


@contextlib.contextmanager
def _notice(what: str) -> Iterator[None]:
    """Say what takes so long, if it does."""
    line = f"compiling {what} for this processor: some seconds, this once"
    timer = threading.Timer(PATIENCE, print, (line,), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
