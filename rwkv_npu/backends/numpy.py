"""The reference backend: the formulas of the model, executed by NumPy on the stored weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.models.spec import Group


class NumpyRunner:
    def __init__(self, source: Source, group: Group, rows: int, batch: int):
        self._source, self._group = source, group
        self._maths = source.maths()
        self.inputs = allocate_inputs(group, rows, batch)

    def run(self) -> Mapping[str, np.ndarray]:
        return self._source.evaluate(self._group, self._maths, dict(self.inputs))


class NumpyBackend:
    name = "numpy"

    def __init__(self, source: Source, *, threads: int | None = None):
        self._source = source

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int, batch: int = 1) -> NumpyRunner:
        return NumpyRunner(self._source, group, rows, batch)

    def close(self) -> None:
        pass
