"""The operations in which every generation's maths is written, and their execution in NumPy.

A formula in `v4.py` .. `v7.py` takes such an object `f` as its first argument. NumpyMaths computes it (this is
the reference); a tracer records the same calls into an ONNX graph, torch runs them on tensors. Arrays are
rows, (M, width); they support +, - and * with each other, with vectors (width,) and with Python numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

LAYER_NORM_EPS = 1e-5

# Weights that are not fp32 are widened this many elements at a time: a block that stays in the cache.
_WIDEN_BLOCK = 1 << 18

Self = TypeVar("Self", bound="Maths")


class Maths(Protocol):
    """What a formula may use. Names are those of the checkpoint, relative to a layer inside `block(i)`."""

    def block(self: Self, layer: int) -> Self:
        """The same operations with names relative to `blocks.LAYER.`."""

    def vector(self, name: str) -> Any:
        """A vector of the model: a norm, mix or bias, (width,)."""

    def linear(self, x: Any, name: str, index: int | None = None) -> Any:
        """(M, in) -> (M, out): x times a projection, or times number `index` of a stack of them."""

    def layer_norm(self, x: Any, name: str, eps: float = LAYER_NORM_EPS) -> Any:
        """LayerNorm over the width with `name`.weight and `name`.bias."""

    def tanh(self, x: Any) -> Any: ...

    def sigmoid(self, x: Any) -> Any: ...

    def relu(self, x: Any) -> Any: ...

    def shift(self, h: Any, previous: Any, mask: Any) -> Any:
        """Each row's previous token: the row of h above it where `mask` (M, 1) is 1, else its row of `previous`.

        `previous` (M, D) is 0 where the mask is 1, so that the sum of both terms is the same.
        """

    def row_matmul(self, x: Any, s: Any) -> Any:
        """(M, R), (M, R*R) -> (M, R): each row times its own matrix, row-major."""


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(M, K) fp32 @ (K, N) of any float type -> (M, N) fp32, with no more than a block of `weight` widened."""
    if weight.dtype == np.float32:
        return x @ weight
    result = np.empty((len(x), weight.shape[1]), np.float32)
    step = max(1, _WIDEN_BLOCK // weight.shape[0])
    for start in range(0, weight.shape[1], step):
        columns = slice(start, start + step)
        result[:, columns] = x @ weight[:, columns].astype(np.float32)
    return result


def largest(x: np.ndarray) -> float:
    """The largest magnitude, without an array of magnitudes. Of a few rows argmax takes a quarter of max's time."""
    return max(float(x.item(x.argmax())), -float(x.item(x.argmin())))


def sigmoid(x: np.ndarray) -> np.ndarray:
    # Through tanh, which has no exp to overflow.
    return np.float32(0.5) * np.tanh(np.float32(0.5) * x) + np.float32(0.5)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(eps)) * weight + bias


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(M, V) fp32 -> (M, V) fp64: what two models differ by can be less than fp32 resolves."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(M, V) fp32 each -> (M,) fp64: KL(logits || others) of what they predict, in nats. Row by row: in fp64, many rows
    of a large vocabulary leave every cache."""
    kl = np.empty(len(logits))
    for row, (line, other) in enumerate(zip(logits, others, strict=True)):
        p, q = log_softmax(line), log_softmax(other)
        kl[row] = (np.exp(p) * (p - q)).sum()
    return kl


class NumpyMaths:
    """The reference. `weight(name)` gives a tensor in the shape in which the maths uses it."""

    def __init__(self, weight: Callable[[str], np.ndarray], prefix: str = ""):
        self._weight = weight
        self._prefix = prefix

    def block(self, layer: int) -> NumpyMaths:
        return NumpyMaths(self._weight, f"blocks.{layer}.")

    def vector(self, name: str) -> np.ndarray:
        return self._weight(self._prefix + name)

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        weight = self._weight(self._prefix + name)
        return matmul(x, weight if index is None else weight[index])

    def layer_norm(self, x: np.ndarray, name: str, eps: float = LAYER_NORM_EPS) -> np.ndarray:
        return layer_norm(x, self.vector(name + ".weight"), self.vector(name + ".bias"), eps)

    def tanh(self, x: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        return sigmoid(x)

    def relu(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, np.float32(0))

    def shift(self, h: np.ndarray, previous: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if len(h) == 1:
            return previous
        above = np.concatenate([previous[:1], h[:-1]])
        return np.where(mask != 0, above, previous)

    def row_matmul(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        rank = x.shape[1]
        return (x[:, None, :] @ s.reshape(-1, rank, rank))[:, 0]
