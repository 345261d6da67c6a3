"""The operations that the formulas of every generation are written in, and their implementation in NumPy.

A formula in `v4.py` .. `v7.py` takes a `Maths` object `f` as its first argument. NumpyMaths computes the formula and is
the reference. A tracer records the same calls into an ONNX graph; torch runs them on tensors. Arrays are rows,
(M, width). They support +, - and * with each other, with vectors (width,) and with Python numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

LAYER_NORM_EPS = 1e-5

# Weights that are not fp32 are converted in blocks of this many elements, which stay in the cache.
_WIDEN_BLOCK = 1 << 18

Self = TypeVar("Self", bound="Maths")


class Maths(Protocol):
    """The operations that a formula may use. Names are the checkpoint's; `block(i)` makes them relative to a layer."""

    def block(self: Self, layer: int) -> Self:
        """The same operations with names relative to `blocks.LAYER.`."""

    def vector(self, name: str) -> Any:
        """A vector of the model: a norm, mix or bias, (width,)."""

    def linear(self, x: Any, name: str, index: int | None = None) -> Any:
        """(M, in) -> (M, out): x times a projection, or times number `index` of a stack of projections."""

    def layer_norm(self, x: Any, name: str, eps: float = LAYER_NORM_EPS) -> Any:
        """LayerNorm over the width with `name`.weight and `name`.bias."""

    def tanh(self, x: Any) -> Any: ...

    def sigmoid(self, x: Any) -> Any: ...

    def relu(self, x: Any) -> Any: ...

    def shift(self, h: Any, previous: Any, mask: Any) -> Any:
        """The row of the previous token, for each row of h: (M, D).

        Where `mask` (M, 1) is 1, it is the row above in h. Where `mask` is 0, at the first row of a sequence, it is
        that row of `previous` (M, D). `previous` is 0 where the mask is 1, so an implementation may add both terms.
        """

    def row_matmul(self, x: Any, s: Any) -> Any:
        """(M, R), (M, R*R) -> (M, R): each row of x times its own matrix, a row of s in row-major order."""


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(M, K) fp32 @ (K, N) of any float type -> (M, N) fp32. `weight` is converted to fp32 block by block."""
    if weight.dtype == np.float32:
        return x @ weight
    result = np.empty((len(x), weight.shape[1]), np.float32)
    step = max(1, _WIDEN_BLOCK // weight.shape[0])
    for start in range(0, weight.shape[1], step):
        columns = slice(start, start + step)
        result[:, columns] = x @ weight[:, columns].astype(np.float32)
    return result


def largest(x: np.ndarray) -> float:
    """The largest magnitude in x, without an array of magnitudes. On a few rows argmax is four times as fast as max."""
    return max(float(x.item(x.argmax())), -float(x.item(x.argmin())))


def sigmoid(x: np.ndarray) -> np.ndarray:
    # As a tanh, which does not overflow.
    return np.float32(0.5) * np.tanh(np.float32(0.5) * x) + np.float32(0.5)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(eps)) * weight + bias


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(M, V) fp32 -> (M, V) fp64. Two models can differ by less than fp32 resolves."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """KL divergence of two predictions, KL(logits || others), in nats: (M, V) fp32 each -> (M,) fp64.

    Computed row by row, because many fp64 rows of a large vocabulary fit no cache.
    """
    pairs = zip(logits, others, strict=True)
    return np.array([kl_divergence(log_softmax(line), log_softmax(other)) for line, other in pairs])


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) in nats, from log probabilities: (V,) fp64 each."""
    # Not a dot product: waking the threads of a BLAS would take longer than this sum.
    return float((np.exp(log_p) * (log_p - log_q)).sum())


class NumpyMaths:
    """`Maths` in NumPy: the reference. `weight(name)` returns a tensor in `Tensor.used_shape`."""

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


def narrow(source: np.ndarray, target: np.ndarray) -> float:
    """Copy an array of any float type to an fp16 array of the same shape. Values beyond fp16's range become infinity.

    Returns `largest_magnitude(source)`.
    """
    with np.errstate(over="ignore"):
        target[...] = source
    return largest_magnitude(source)


def largest_magnitude(array: np.ndarray) -> float:
    """The largest magnitude in a float array. Not finite if any element is not."""
    if array.dtype == np.float16:  # as integers, because NumPy widens each fp16 for a comparison
        bits = (np.ascontiguousarray(array).view(np.uint16) & np.uint16(0x7FFF)).max()
        return float(bits.view(np.float16))
    return float(np.abs(array).max())
