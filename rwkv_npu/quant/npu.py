"""Products in int8 as the NPU computes them: inputs, weights and results all have 8 bits.

    Affine      quantization parameters: int8 numbers q stand for scale * (q - zero), fixed before anything is run
    Ranges      the parameters of a projection's input and products
    Quantised   the same with its weights, which have per-channel scales
    Int8Maths   the reference, with some projections in int8

Everything between the projections stays in floating point; the chip converts in both directions. Rounding is to the
nearest. Sums are exact: int32 on the chip, and here fp32 that holds integers below 2^24, or nearly so. From the same
inputs this computes the same as Rockchip's simulator. In a graph, inputs arrive in fp16, and some round to the next
number; the parts of a wide product are added up in fp16.

Letters: M rows, K width of the input, N of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from math import ceil

import numpy as np

from rwkv_npu.models.maths import NumpyMaths, matmul

PRECISIONS = ("w8a8", "mixed")  # with large projections in int8: all of them, or some

LOWEST, HIGHEST = -128, 127
SILENT = 1e-20  # fp16 has no scale below this, and division by one would leave fp32

# At more than one row Rockchip's compiler leaves the transposes of wider matrices to the board's CPU.
NPU_WIDTH = 8192
# Widest K of a product in int8: the compiler cuts wider ones by itself for the RK3588, into parts with names and
# parameters of its own.
INT8_WIDTH = 3072


def cut(width: int, widest: int) -> list[int]:
    """The widths of the fewest equal parts that are no wider than `widest`, in multiples of 32."""
    step = ceil(width / ceil(width / widest) / 32) * 32
    return [min(step, width - start) for start in range(0, width, step)]


def int8_parts(K: int) -> list[int]:
    """The widths of the parts of K in which a product in int8 is computed, for any number of rows."""
    return [part for wide in cut(K, NPU_WIDTH) for part in cut(wide, INT8_WIDTH)]


def spans(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of parts of `widths`, side by side."""
    return [(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]


@dataclass(frozen=True)
class Affine:
    """Quantization parameters: int8 numbers q stand for scale * (q - zero). One of them stands for 0."""

    scale: float
    zero: int

    @staticmethod
    def covering(low: float, high: float) -> Affine:
        """The smallest scale that reaches from `low` to `high`, and to 0."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32((high - low) / (HIGHEST - LOWEST)))
        scale = scale if scale > SILENT else 1.0
        return Affine(scale, int(np.clip(np.rint(LOWEST - low / scale), LOWEST, HIGHEST)))

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return self.scale * (LOWEST - self.zero), self.scale * (HIGHEST - self.zero)

    def round(self, x: np.ndarray) -> np.ndarray:
        """x rounded to the nearest values that int8 numbers stand for, fp32."""
        steps = np.rint(x / np.float32(self.scale))
        return np.clip(steps, LOWEST - self.zero, HIGHEST - self.zero) * np.float32(self.scale)


@dataclass(frozen=True)
class Ranges:
    """Quantization parameters of a projection (K, N): of its input, and of the product of each part of K
    (`int8_parts`). The sum of these is the projection's product.

    smoothing: (K,) of SmoothQuant, by which the channels of the input are divided before they are rounded, or None.
    """

    input: Affine
    outputs: tuple[Affine, ...]
    smoothing: np.ndarray | None = None

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        """The input after SmoothQuant, before it is rounded, (M, K)."""
        return x if self.smoothing is None else x * reciprocal(self.smoothing)


@dataclass(frozen=True)
class Quantised:
    """A projection (K, N) in int8. weight: int8 numbers less the zero point, (K, N). steps: per-channel scales, of
    column n in part p of K steps[p, n]."""

    ranges: Ranges
    weight: np.ndarray
    steps: np.ndarray

    @staticmethod
    def of(ranges: Ranges, weight: np.ndarray) -> Quantised:
        """`weight` (K, N) in int8, after SmoothQuant."""
        return Quantised(ranges, *round_weight(weight, ranges.smoothing))

    def linear(self, x: np.ndarray) -> np.ndarray:
        """(M, K) -> (M, N) fp32."""
        return self.product(self.ranges.smoothed(x))

    def product(self, x: np.ndarray) -> np.ndarray:
        """As `linear`, of an input after SmoothQuant."""
        x = self.ranges.input.round(x)
        parts = zip(spans(int8_parts(len(self.weight))), self.ranges.outputs, self.steps, strict=True)
        return reduce(
            np.add,
            (out.round(matmul(x[:, k0:k1], self.weight[k0:k1]) * steps) for (k0, k1), out, steps in parts),
        )

    def values(self) -> np.ndarray:
        """The values that the weights stand for, (K, N) fp32, after SmoothQuant."""
        return self.weight * np.repeat(self.steps, int8_parts(len(self.weight)), axis=0)


def reciprocal(smoothing: np.ndarray) -> np.ndarray:
    return np.float32(1) / smoothing


def round_weight(weight: np.ndarray, smoothing: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) -> int8 numbers less their zero points (K, N), and scales of each part of K and column (P, N), fp32.

    The 256 numbers of a column in a part reach from its lowest weight to its highest. The compiler rounds the weights
    once more: that leaves them as they are.
    """
    numbers, steps = np.empty(weight.shape, np.int16), []
    for k0, k1 in spans(int8_parts(len(weight))):
        values = weight[k0:k1].astype(np.float32)
        if smoothing is not None:
            values *= smoothing[k0:k1, None]
        low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
        step = (high - low) / np.float32(HIGHEST - LOWEST)
        step = np.where(step > 0, step, np.float32(1))
        zeros = np.rint(LOWEST - low / step)
        np.rint(np.divide(values, step, out=values), out=values)
        np.clip(np.add(values, zeros, out=values), LOWEST, HIGHEST, out=values)
        numbers[k0:k1] = np.subtract(values, zeros, out=values)
        steps.append(step)
    return numbers, np.stack(steps)


class Int8Maths(NumpyMaths):
    """The reference, with those projections in int8 that `lookup(name)` returns; those of a stack never are."""

    def __init__(
        self,
        weight: Callable[[str], np.ndarray],
        lookup: Callable[[str], Quantised | None],
        prefix: str = "",
    ):
        super().__init__(weight, prefix)
        self._lookup = lookup

    def block(self, layer: int) -> Int8Maths:
        return Int8Maths(self._weight, self._lookup, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        quantised = self._lookup(self._prefix + name) if index is None else None
        return super().linear(x, name, index) if quantised is None else quantised.linear(x)
