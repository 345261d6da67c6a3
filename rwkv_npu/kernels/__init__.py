"""The recurrences in machine code, where numba is installed (extra `fast`); everywhere else NumPy runs `models`.

One file a generation: `models.vN.time_mix` as one pass over every head, held to it by tests/test_kernels.py. numba is
imported when a kernel is loaded. What it compiles is kept in the cache folder, in a folder named after the sources, the
processor and numba, so that no other machine or version ever reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.files import cache_dir
from rwkv_npu.models import MODULES
from rwkv_npu.models.common import Arrays
from rwkv_npu.spec import Spec

CHOICES = ("auto", "numpy", "numba")

# Multiplications of a state's elements that are worth a thread of their own: some 100 us, when waking it takes 20.
SHARE = 1 << 20

KEEP = True  # whether what is compiled next goes to the cache folder
PATIENCE = 1.0  # seconds of compiling after which it is said

_loading = threading.Lock()


class Compiled:
    """The recurrence of a model: `prepare` and `time_mix` as the modules in `models` have them.

    The y that `time_mix` returns is valid until its next call.
    """

    name = "numba"

    def __init__(self, spec: Spec, threads: int | None = None):
        """`threads`: the most to be used at once; None: as many as there are processors to run on."""
        self._kernel = load(spec.generation)
        self._reference = MODULES[spec.generation]
        self._tasks = spec.H
        self._share = max(1, SHARE // (spec.N * (1 if spec.generation == "4" else spec.N)))
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool: ThreadPoolExecutor | None = None
        self._y = np.empty((0, 0, 0), np.float32)

    def prepare(self, vector: Callable[[str], np.ndarray], spec: Spec) -> np.ndarray:
        """The parameters of a layer as rows of one table, each (A,)."""
        parts = self._kernel.parameters(self._reference.prepare(vector, spec))
        return np.stack([part.reshape(-1) for part in parts]).astype(np.float32)

    def time_mix(self, p: np.ndarray, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
        kernel = self._kernel
        inputs = tuple([_plain(array) for array in kernel.inputs(x, carry)])
        if self._y.shape != inputs[0].shape:
            self._y = np.empty_like(inputs[0])
        self._share_out(inputs, p, *[state[name] for name in kernel.STATES], self._y)
        return self._y

    def _share_out(self, *arguments: Any) -> None:
        """Run the kernel over the heads of all sequences, in as many threads as they are worth."""
        (T, B, _), run = self._y.shape, self._kernel.run
        tasks = B * self._tasks
        parts = min(self._threads, tasks, T * tasks // self._share)
        if parts < 2:
            run(*arguments, 0, tasks)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, "rwkv_npu-kernel")
        bounds = [tasks * part // parts for part in range(parts + 1)]
        others = [self._pool.submit(run, *arguments, *bounds[part : part + 2]) for part in range(1, parts)]
        run(*arguments, 0, bounds[1])
        for other in others:
            other.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _plain(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where a backend hands out one that kernels are not compiled for."""
    return array if array.flags.carray else np.array(array, np.float32, order="C")


def compiled(spec: Spec, choice: str = "auto", threads: int | None = None) -> Compiled | None:
    """The compiled recurrence of a model, None where NumPy is to run it.

    choice: `numpy`, `numba`, or `auto` for the latter where it is installed. Raises BackendError for a numba that
    is asked for and cannot be used; `auto` warns of one that is there and cannot.
    """
    if choice not in CHOICES:
        raise UsageError(f"recurrence {choice!r} is unknown: use one of {', '.join(CHOICES)}")
    if choice == "numpy":
        return None
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if choice == "numba":
            raise BackendError(
                f"numba cannot be imported: pip install 'rwkv_npu[fast]' ({error})"
            ) from error
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(f"numba cannot be used, NumPy runs the recurrence: {error}", stacklevel=3)
        return None
    return Compiled(spec, threads)


def load(generation: str) -> ModuleType:
    """The module of a generation, compiled: at once where it was compiled before, else in some seconds."""
    name = f"{__name__}.v{generation[0]}"
    with _loading:
        if name in sys.modules:
            return sys.modules[name]
        folder = cache_dir() / "kernels" / _identity()
        try:
            with _numba_cache(folder), _notice(generation):
                return importlib.import_module(name)
        except Exception as error:  # numba's cache raises what the disk, or a damaged file, makes of it
            print(
                f"the recurrence is compiled for this run only: {folder} cannot be used ({error})",
                file=sys.stderr,
            )
            with _uncached():
                return importlib.import_module(name)


def _identity() -> str:
    """Names all that a compiled kernel depends on."""
    import llvmlite.binding
    import numba

    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(__file__).parent.parent / "models"):
        for file in sorted(package.glob("*.py")):
            digest.update(file.read_bytes())
    features = llvmlite.binding.get_host_cpu_features().flatten()
    digest.update(f"{llvmlite.binding.get_host_cpu_name()} {features} {numba.__version__}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _numba_cache(folder: Path) -> Iterator[None]:
    """Have numba keep in `folder` what is compiled meanwhile. Raises OSError."""
    from numba.core import config

    folder.mkdir(parents=True, exist_ok=True)
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    global KEEP
    KEEP = False
    try:
        yield
    finally:
        KEEP = True


@contextlib.contextmanager
def _notice(generation: str) -> Iterator[None]:
    """Say what takes so long, if it does."""
    line = f"compiling the recurrence of RWKV-{generation} for this processor: some seconds, this once"
    timer = threading.Timer(PATIENCE, print, (line,), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
