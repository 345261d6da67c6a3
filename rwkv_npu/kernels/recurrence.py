"""The recurrences in machine code, where numba is installed; everywhere else NumPy runs `models`.

One file a generation: `models.vN.time_mix` as one pass over every head, held to it by tests/test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

from rwkv_npu.board import hardware
from rwkv_npu.kernels import available, load
from rwkv_npu.kernels.instructions import A_STATES, A_VALUES, ARGUMENTS
from rwkv_npu.models import MODULES
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.spec import Spec

# Multiplications of a state's elements that are worth a thread of their own: some 100 us, when waking it takes 20.
SHARE = 1 << 20


def kernel(spec: Spec) -> ModuleType:
    """The compiled recurrence of a generation."""
    return load(f"v{spec.generation[0]}", f"the recurrence of RWKV-{spec.generation}")


def parameters(vector: Callable[[str], np.ndarray], spec: Spec) -> np.ndarray:
    """Those of a layer as rows of one table, each (A,). vector: tensors by their name in the layer."""
    parts = kernel(spec).parameters(MODULES[spec.generation].prepare(vector, spec))
    return np.stack([part.reshape(-1) for part in parts]).astype(np.float32)


class Compiled:
    """The recurrence of a model: `prepare` and `time_mix` as the modules in `models` have them.

    The y that `time_mix` returns is valid until its next call.
    """

    name = "numba"

    def __init__(self, spec: Spec, threads: int | None = None):
        """`threads`: the most to be used at once; None: one a large core."""
        self._spec, self._kernel = spec, kernel(spec)
        self._share = max(1, SHARE // (spec.N * (1 if spec.generation == "4" else spec.N)))
        self._threads = threads or len(hardware.big_cores())
        self._pool: ThreadPoolExecutor | None = None
        self._y = np.empty((0, 0, 0), np.float32)

    def prepare(self, vector: Callable[[str], np.ndarray], spec: Spec) -> np.ndarray:
        return parameters(vector, spec)

    def time_mix(self, p: np.ndarray, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
        values = [_plain(array) for array in self._kernel.inputs(x, carry)]
        states = [state[name] for name in self._kernel.STATES]
        if not all(part.flags.carray and part.dtype == np.float32 for part in (p, *states)):
            raise ValueError(
                "parameters and states must be float32 in C order: they are updated where they lie"
            )
        if self._y.shape != values[0].shape:
            self._y = np.empty_like(values[0])
        T, B, A = self._y.shape
        arguments = np.zeros(ARGUMENTS, np.int64)
        arguments[:A_STATES] = T, B, self._spec.H, self._spec.N, A, p.ctypes.data, self._y.ctypes.data
        arguments[A_STATES : A_STATES + len(states)] = [part.ctypes.data for part in states]
        arguments[A_VALUES : A_VALUES + len(values)] = [array.ctypes.data for array in values]
        self._share_out(arguments.ctypes.data, T, B * self._spec.H)
        return self._y

    def _share_out(self, arguments: int, tokens: int, heads: int) -> None:
        """Run the kernel over the heads of all sequences, in as many threads as they are worth."""
        run = self._kernel.run.ctypes
        parts = min(self._threads, heads, tokens * heads // self._share)
        if parts < 2:
            run(arguments, 0, heads)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, "rwkv_npu-kernel")
        bounds = [heads * part // parts for part in range(parts + 1)]
        others = [self._pool.submit(run, arguments, *bounds[part : part + 2]) for part in range(1, parts)]
        run(arguments, 0, bounds[1])
        for other in others:
            other.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _plain(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where a backend hands out one that kernels are not compiled for."""
    plain = array.flags.carray and array.dtype == np.float32
    return array if plain else np.array(array, np.float32, order="C")


def compiled(spec: Spec, threads: int | None = None) -> Compiled | None:
    """The compiled recurrence of a model; None where numba is not installed, and NumPy runs it.

    Warns of a numba that is there and cannot be used.
    """
    return Compiled(spec, threads) if available() else None
