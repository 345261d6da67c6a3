"""A backend in fp16 arithmetic, which imitates the NPU as far as its arithmetic is known.

The result of every operation is rounded to fp16. Sums in products and norms are fp32. Products that are int8 in the
artifacts of the source's precision are computed in int8, and their results are rounded to fp16 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import cache

import numpy as np

from rwkv_npu.backends.base import allocate_inputs
from rwkv_npu.models import maths
from rwkv_npu.models.maths import LAYER_NORM_EPS
from rwkv_npu.models.spec import Group
from rwkv_npu.runtime.weights import ModelSource


class HalfMaths:
    """`maths.Maths` over fp16 arrays. Weights are rounded to fp16 and stored in fp32, for products in fp32."""

    def __init__(self, source: ModelSource):
        self._source, self._prefix = source, ""
        self._weights: dict[str, np.ndarray] = {}
        self._quantised = cache(source.quantised)

    def block(self, layer: int) -> HalfMaths:
        within = copy(self)
        within._prefix = f"blocks.{layer}."
        return within

    def vector(self, name: str) -> np.ndarray:
        return self._weight(name).astype(np.float16)

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        wide = x.astype(np.float32)
        if index is None and (quantised := self._quantised(self._prefix + name)):
            return _half(quantised.product(_half(quantised.params.smoothed(wide)).astype(np.float32)))
        weight = self._weight(name)
        return _half(wide @ (weight if index is None else weight[index]))

    def layer_norm(self, x: np.ndarray, name: str, eps: float = LAYER_NORM_EPS) -> np.ndarray:
        weight, bias = self._weight(name + ".weight"), self._weight(name + ".bias")
        return _half(maths.layer_norm(x.astype(np.float32), weight, bias, eps))

    def tanh(self, x: np.ndarray) -> np.ndarray:
        return _half(np.tanh(x.astype(np.float32)))

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        return _half(maths.sigmoid(x.astype(np.float32)))

    def relu(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, np.float16(0))

    def shift(self, h: np.ndarray, previous: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if len(h) == 1:
            return previous
        return np.where(mask != 0, np.concatenate([previous[:1], h[:-1]]), previous)

    def row_matmul(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        rank = x.shape[1]
        matrices = s.astype(np.float32).reshape(-1, rank, rank)
        return _half((x.astype(np.float32)[:, None, :] @ matrices)[:, 0])

    def _weight(self, name: str) -> np.ndarray:
        full = self._prefix + name
        if full not in self._weights:
            self._weights[full] = _half(self._source.tensor(full)).astype(np.float32)
        return self._weights[full]


class HalfRunner:
    def __init__(self, source: ModelSource, maths: HalfMaths, group: Group, rows: int):
        self._source, self._maths, self._group = source, maths, group
        self.inputs = allocate_inputs(group, rows)

    def run(self) -> Mapping[str, np.ndarray]:
        inputs = {name: _half(array) for name, array in self.inputs.items()}
        outputs = self._source.evaluate(self._group, self._maths, inputs)
        return {name: array.astype(np.float32) for name, array in outputs.items()}


class HalfBackend:
    name = "half"

    def __init__(self, source: ModelSource):
        self._source, self._maths = source, HalfMaths(source)

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int) -> HalfRunner:
        return HalfRunner(self._source, self._maths, group, rows)

    def close(self) -> None:
        self._maths = HalfMaths(self._source)


def _half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # past 65504 there is infinity, as on the NPU
        return x.astype(np.float16)
