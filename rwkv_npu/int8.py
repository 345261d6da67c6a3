"""Products in int8 as the NPU computes them: inputs, weights and results all of 8 bits.

    Affine      int8 numbers q that stand for scale * (q - zero), fixed before anything is run
    Quantised   one projection: the ranges of what goes in and comes out, and its weights in steps of their column
    Int8Maths   the reference, with some projections quantised

Between the projections everything stays in floating point; the chip converts in both directions. Rounding is to the
nearest, sums are exact (int32 there, and integers below 2^24, or as good as, in fp32 here): from the same inputs this
computes what Rockchip's simulator does. In a graph they arrive in fp16, of which some round to the next step.

Letters: M rows, K width of the input, N of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rwkv_npu.maths import NumpyMaths, matmul

PRECISIONS = ("w8a8", "mixed")  # in which large projections are in int8: all of them, or those that may be

LOWEST, HIGHEST = -128, 127
SILENT = 1e-20  # a step below which fp16 has nothing, and division would leave fp32


@dataclass(frozen=True)
class Affine:
    """int8 numbers q for the values scale * (q - zero), of which 0 is one."""

    scale: float
    zero: int

    @staticmethod
    def covering(low: float, high: float) -> Affine:
        """The finest steps that reach from `low` to `high`, and to 0."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32((high - low) / (HIGHEST - LOWEST)))
        scale = scale if scale > SILENT else 1.0
        return Affine(scale, int(np.clip(np.rint(LOWEST - low / scale), LOWEST, HIGHEST)))

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return self.scale * (LOWEST - self.zero), self.scale * (HIGHEST - self.zero)

    def round(self, x: np.ndarray) -> np.ndarray:
        """The nearest values that there are numbers for, fp32."""
        steps = np.rint(x / np.float32(self.scale))
        return np.clip(steps, LOWEST - self.zero, HIGHEST - self.zero) * np.float32(self.scale)


@dataclass(frozen=True)
class Quantised:
    """A projection (K, N). weight: in steps from 0, of which those of column n are steps[n]; int8 numbers less the one
    that stands for 0.

    smoothing: (K,), what the channels of the input are divided by before they are rounded, or None.
    """

    input: Affine
    output: Affine
    weight: np.ndarray
    steps: np.ndarray
    smoothing: np.ndarray | None = None

    def linear(self, x: np.ndarray) -> np.ndarray:
        """(M, K) -> (M, N) fp32."""
        return self.product(self.smoothed(x))

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        """The input as it is rounded, (M, K)."""
        return x if self.smoothing is None else x * reciprocal(self.smoothing)

    def product(self, x: np.ndarray) -> np.ndarray:
        """Of a smoothed input, (M, K) -> (M, N) fp32."""
        return self.output.round(matmul(self.input.round(x), self.weight) * self.steps)

    def values(self) -> np.ndarray:
        """What the weights stand for, (K, N) fp32, smoothing included."""
        return self.weight * self.steps


def reciprocal(smoothing: np.ndarray) -> np.ndarray:
    return np.float32(1) / smoothing


def round_weight(weight: np.ndarray, smoothing: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) -> how many steps each weight is from 0, (K, N), and the step of each column (N,), fp32.

    A column's 256 numbers reach from its lowest weight to its highest. Rounded again they are the same, which is what
    the compiler does with the weights that it is given.
    """
    values = weight.astype(np.float32)
    if smoothing is not None:
        values = values * smoothing[:, None]
    low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
    steps = (high - low) / np.float32(HIGHEST - LOWEST)
    steps = np.where(steps > 0, steps, np.float32(1))
    zeros = np.rint(LOWEST - low / steps)
    numbers = np.clip(np.rint(values / steps) + zeros, LOWEST, HIGHEST)
    return (numbers - zeros).astype(np.int16), steps


class Int8Maths(NumpyMaths):
    """The reference, but for the projections that `lookup(name)` has quantised; those of a stack are never."""

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
