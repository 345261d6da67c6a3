"""int8 products as the NPU computes them: inputs, weights and outputs have 8 bits.

    QuantParams        an int8 number q represents scale * (q - zero); fixed before inference
    ProjectionParams   quantization parameters of a projection's input and of its products
    Quantised          the same with its int8 weights, which have per-channel scales
    Int8Maths          the reference forward, with some projections in int8

Everything between the projections stays in floating point; the chip converts in both directions. Rounding is to
nearest. Sums are int32 on the chip; here they are fp32, which is exact for integers below 2^24.

Given the same inputs, this module and Rockchip's simulator have the same results. Inside a graph they differ a little:
inputs arrive in fp16, so some are rounded to a neighbouring int8 number, and the parts of a wide product are added in
fp16.

Letters: M rows, K width of the input, N of the output, P parts of K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from math import ceil
from typing import Protocol

import numpy as np

from rwkv_npu.models.maths import NumpyMaths, matmul

PRECISIONS = ("w8a8", "mixed")  # all large projections in int8, or some of them

LOWEST, HIGHEST = -128, 127
MIN_SCALE = 1e-20  # fp16 has no scale this small, and dividing by it would overflow fp32

# With more than one row, Rockchip's compiler leaves the transposes of wider matrices to the board's CPU.
NPU_WIDTH = 8192
# Largest K of an int8 product. For the RK3588 the compiler splits wider products itself, into parts with their own
# names and quantization parameters.
INT8_WIDTH = 3072


def cut(width: int, widest: int) -> list[int]:
    """Split `width` into the fewest equal parts of at most `widest`, in multiples of 32. Returns their widths."""
    step = ceil(width / ceil(width / widest) / 32) * 32
    return [min(step, width - start) for start in range(0, width, step)]


def int8_parts(K: int) -> list[int]:
    """Widths of the parts of K in which an int8 product is computed. They do not depend on the number of rows."""
    return [part for wide in cut(K, NPU_WIDTH) for part in cut(wide, INT8_WIDTH)]


def spans(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of consecutive parts with these widths."""
    return [(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]


@dataclass(frozen=True)
class QuantParams:
    """Quantization parameters of a tensor: an int8 number q represents scale * (q - zero). 0 is represented exactly."""

    scale: float
    zero: int

    @staticmethod
    def covering(low: float, high: float) -> QuantParams:
        """The parameters with the smallest scale that cover `low`, `high` and 0."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32((high - low) / (HIGHEST - LOWEST)))
        scale = scale if scale > MIN_SCALE else 1.0
        return QuantParams(scale, int(np.clip(np.rint(LOWEST - low / scale), LOWEST, HIGHEST)))

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest representable value."""
        return self.scale * (LOWEST - self.zero), self.scale * (HIGHEST - self.zero)

    def round(self, x: np.ndarray) -> np.ndarray:
        """Round x to the nearest representable values, fp32."""
        levels = np.rint(x / np.float32(self.scale))
        return np.clip(levels, LOWEST - self.zero, HIGHEST - self.zero) * np.float32(self.scale)


@dataclass(frozen=True)
class ProjectionParams:
    """Quantization parameters of a projection (K, N): of its input, and of the product of each part of K.

    The projection's output is the sum of these products (`int8_parts`).
    smoothing: (K,) divisors that SmoothQuant applies to the input's channels before rounding, or None.
    """

    input: QuantParams
    outputs: tuple[QuantParams, ...]
    smoothing: np.ndarray | None = None

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        """The input (M, K) after SmoothQuant, before rounding."""
        return x if self.smoothing is None else x * reciprocal(self.smoothing)


@dataclass(frozen=True)
class Quantised:
    """A projection (K, N) in int8.

    weight: (K, N), int8 numbers minus their zero points. scales: (P, N), a scale for each part of K and column.
    """

    params: ProjectionParams
    weight: np.ndarray
    scales: np.ndarray

    @staticmethod
    def of(params: ProjectionParams, weight: np.ndarray) -> Quantised:
        """Quantise `weight` (K, N), after SmoothQuant."""
        return Quantised(params, *round_weight(weight, params.smoothing))

    def linear(self, x: np.ndarray) -> np.ndarray:
        """x (M, K) -> (M, N) fp32."""
        return self.product(self.params.smoothed(x))

    def product(self, x: np.ndarray) -> np.ndarray:
        """Like `linear`, for an input that SmoothQuant has scaled already."""
        x = self.params.input.round(x)
        parts = zip(spans(int8_parts(len(self.weight))), self.params.outputs, self.scales, strict=True)
        return reduce(
            np.add,
            (out.round(matmul(x[:, k0:k1], self.weight[k0:k1]) * scale) for (k0, k1), out, scale in parts),
        )

    def values(self) -> np.ndarray:
        """The dequantised weights (K, N) fp32, after SmoothQuant."""
        return self.weight * np.repeat(self.scales, int8_parts(len(self.weight)), axis=0)


def reciprocal(smoothing: np.ndarray) -> np.ndarray:
    return np.float32(1) / smoothing


def round_weight(weight: np.ndarray, smoothing: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Quantise weights (K, N). Returns int8 numbers minus their zero points (K, N), and scales (P, N) fp32.

    In each part of K, the 256 numbers of a column reach from its lowest to its highest weight. The compiler rounds the
    result once more, which changes nothing.
    """
    numbers, scales = np.empty(weight.shape, np.int16), []
    for k0, k1 in spans(int8_parts(len(weight))):
        values = weight[k0:k1].astype(np.float32)
        if smoothing is not None:
            values *= smoothing[k0:k1, None]
        low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
        scale = (high - low) / np.float32(HIGHEST - LOWEST)
        scale = np.where(scale > 0, scale, np.float32(1))
        zeros = np.rint(LOWEST - low / scale)
        np.rint(np.divide(values, scale, out=values), out=values)
        np.clip(np.add(values, zeros, out=values), LOWEST, HIGHEST, out=values)
        numbers[k0:k1] = np.subtract(values, zeros, out=values)
        scales.append(scale)
    return numbers, np.stack(scales)


class Product(Protocol):
    """A quantised projection: x (M, K) -> (M, N)."""

    def linear(self, x: np.ndarray) -> np.ndarray: ...


class Int8Maths(NumpyMaths):
    """The reference forward with some projections quantised: those for which `lookup(name)` returns a Product.

    Matrices of a stack are never quantised.
    """

    def __init__(
        self,
        weight: Callable[[str], np.ndarray],
        lookup: Callable[[str], Product | None],
        prefix: str = "",
    ):
        super().__init__(weight, prefix)
        self._lookup = lookup

    def block(self, layer: int) -> Int8Maths:
        return Int8Maths(self._weight, self._lookup, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        quantised = self._lookup(self._prefix + name) if index is None else None
        return super().linear(x, name, index) if quantised is None else quantised.linear(x)
