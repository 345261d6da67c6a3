"""The recurrences in machine code, where numba is installed; everywhere else NumPy runs `models`.

One file a generation: `models.vN.time_mix` as one pass over every head, held to it by tests/test_kernels.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rwkv_npu import board
from rwkv_npu.kernels import load
from rwkv_npu.models import MODULES
from rwkv_npu.models.common import Arrays
from rwkv_npu.spec import Spec

# Multiplications of a state's elements that are worth a thread of their own: some 100 us, when waking it takes 20.
SHARE = 1 << 20


class Compiled:
    """The recurrence of a model: `prepare` and `time_mix` as the modules in `models` have them.

    The y that `time_mix` returns is valid until its next call.
    """

    name = "numba"

    def __init__(self, spec: Spec, threads: int | None = None):
        """`threads`: the most to be used at once; None: one a large core."""
        self._kernel = load(f"v{spec.generation[0]}", f"the recurrence of RWKV-{spec.generation}")
        self._reference = MODULES[spec.generation]
        self._tasks = spec.H
        self._share = max(1, SHARE // (spec.N * (1 if spec.generation == "4" else spec.N)))
        self._threads = threads or len(board.big_cores())
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


def compiled(spec: Spec, threads: int | None = None) -> Compiled | None:
    """The compiled recurrence of a model; None where numba is not installed, and NumPy runs it.

    Warns of a numba that is there and cannot be used.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(f"numba cannot be used, NumPy runs the recurrence: {error}", stacklevel=3)
        return None
    return Compiled(spec, threads)
