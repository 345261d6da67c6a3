"""The reference backend: NumPy computes the formulas of the model on the stored weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import Group


class NumpyRunner:
    def __init__(self, source: Source, maths: NumpyMaths, group: Group, rows: int):
        self._source, self._maths, self._group = source, maths, group
        self.inputs = allocate_inputs(group, rows)

    def run(self) -> Mapping[str, np.ndarray]:
        return self._source.evaluate(self._group, self._maths, dict(self.inputs))


class NumpyBackend:
    name = "numpy"

    def __init__(self, source: Source, *, threads: int | None = None):
        self._source = source
        self._maths = source.maths()  # shared by all runners, because it caches quantised matrices

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int) -> NumpyRunner:
        return NumpyRunner(self._source, self._maths, group, rows)

    def close(self) -> None:
        self._maths = self._source.maths()
