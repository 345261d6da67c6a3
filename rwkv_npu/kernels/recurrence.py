"""The compiled recurrences. Where numba is not installed, NumPy executes those of `models`.

Each generation has a file: `vN.run` is `models.vN.time_mix` as one pass over every head. tests/test_kernels.py compares
the two.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

from rwkv_npu.board import hardware
from rwkv_npu.kernels import available, load
from rwkv_npu.kernels.program import fill_segments, recurrence_arguments, segment_table
from rwkv_npu.models import MODULES
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import Spec

# The least work of a thread, in multiplications of an element of the state: some 100 us. Waking a thread takes 20 us.
SHARE = 1 << 20


def kernel(spec: Spec) -> ModuleType:
    """The module with the compiled recurrence of a model's generation."""
    return load(f"v{spec.generation[0]}")


def parameters(vector: Callable[[str], np.ndarray], spec: Spec) -> np.ndarray:
    """The recurrence's parameters in one layer: a table (count, A). vector: tensors by their name in the layer."""
    parts = kernel(spec).parameters(MODULES[spec.generation].prepare(vector, spec))
    return np.stack([part.reshape(-1) for part in parts]).astype(np.float32)


class Compiled:
    """`models.network.Recurrence`, compiled. The y that `time_mix` returns is valid until its next call."""

    name = "numba"

    def __init__(self, spec: Spec, threads: int | None = None):
        """threads: the most to use; None means one for each large core."""
        self._spec, self._kernel = spec, kernel(spec)
        self._share = max(1, SHARE // (spec.N * (1 if spec.generation == "4" else spec.N)))
        self._threads = threads or len(hardware.big_cores())
        self._pool: ThreadPoolExecutor | None = None
        self._y = np.empty((0, 0), np.float32)
        self._copies: dict[str, np.ndarray] = {}
        self._widen = load("halves").widen
        self._table = segment_table(0)

    def prepare(self, vector: Callable[[str], np.ndarray], spec: Spec) -> np.ndarray:
        return parameters(vector, spec)

    def time_mix(self, p: np.ndarray, x: Arrays, rows: Rows, layer: int, carry: Arrays) -> np.ndarray:
        x = {name: self._plain(name, array, keep=layer == 0) for name, array in x.items()}
        values = self._kernel.inputs(x, carry)
        if self._y.shape != values[0].shape:
            self._y = np.empty_like(values[0])
        if len(self._table) <= len(rows.counts):
            self._table = segment_table(len(rows.counts))
        fill_segments(self._table, rows, self._spec)
        arguments = np.array(
            recurrence_arguments(
                self._spec,
                layer,
                segments=self._table,
                stride=self._y.shape[1],
                table=p.ctypes.data,
                y=self._y.ctypes.data,
                inputs=[array.ctypes.data for array in values],
            ),
            np.int64,
        )
        self._run(arguments.ctypes.data, len(rows), len(rows.counts) * self._spec.H)
        return self._y

    def _plain(self, name: str, array: np.ndarray, *, keep: bool) -> np.ndarray:
        """The array, or a contiguous fp32 copy of it: kernels read nothing else. An NPU's outputs are fp16.

        keep: make a new copy, because v7's later layers read the values of layer 0.
        """
        if array.flags.carray and array.dtype == np.float32:
            return array
        copy = None if keep else self._copies.get(name)
        if copy is None or copy.shape != array.shape:
            copy = np.empty(array.shape, np.float32)
        if not keep:
            self._copies[name] = copy
        self._widen(array, copy)
        return copy

    def _run(self, arguments: int, rows: int, units: int) -> None:
        """Run the kernel over all units, the heads of all segments, on as many threads as there is work for."""
        run = self._kernel.run.ctypes
        parts = min(self._threads, units, rows * self._spec.H // self._share)
        if parts < 2:
            run(arguments, 0, units)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, "rwkv_npu-kernel")
        bounds = [units * part // parts for part in range(parts + 1)]
        others = [self._pool.submit(run, arguments, *bounds[part : part + 2]) for part in range(1, parts)]
        run(arguments, 0, bounds[1])
        for other in others:
            other.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def compiled(spec: Spec, threads: int | None = None) -> Compiled | None:
    """The compiled recurrence of a model; None without numba. Warns if numba is installed and its import fails."""
    return Compiled(spec, threads) if available() else None
