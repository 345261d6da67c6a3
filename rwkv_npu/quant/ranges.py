"""Choose quantization parameters of projections from sampled rows, and compare them on held-out rows.

Two calibration methods: `normal` (min-max) covers all values, `mmse` (MSE) clips if that gives a smaller squared error.
A third method, by the entropy of histograms, was best for 2 of 62 projections of two models and is not used.

Letters: M rows, K width of a projection's input, N of its output, P parts of K, n sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

from rwkv_npu.models.maths import divergence, matmul
from rwkv_npu.quant.npu import (
    HIGHEST,
    LOWEST,
    MIN_SCALE,
    ProjectionParams,
    Quantised,
    QuantParams,
    int8_parts,
    reciprocal,
    round_weight,
    spans,
)

BINS = 1 << 14  # of a histogram: 64 for each int8 number if nothing is clipped
SMOOTHING_FACTOR = 0.8  # SmoothQuant is used if its squared error is below this fraction of that without it
# Bounds of the fitted rows and of the held-out rows: the most elements of their inputs or outputs, and the fewest rows.
MAX_ELEMENTS, MIN_ROWS = 1 << 22, 128
# Fractions of the full range that MSE tries. Values outside are clipped; the others get a smaller scale.
FRACTIONS = np.linspace(1.0, 0.3, 29)
# A Relu follows this matrix: its negative products need no int8 numbers.
RECTIFIED = "ffn.key.weight"
HEAD = "head.weight"
STRETCHES = 8  # of the rows, alternately fitted and held out


@dataclass
class Samples:
    """Sampled inputs of a projection.

    rows: (n, K) fp32, a uniform sample in the order of the text. low, high: (K,) over all rows of the text. products:
    (P, 2), lowest and highest product of each part of K (npu.int8_parts) over all rows of the text.
    """

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray
    products: np.ndarray

    @property
    def absmax(self) -> np.ndarray:
        """(K,): the largest magnitude of each channel."""
        return np.maximum(-self.low, self.high)

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Split the rows (at least two) into those to fit and those to hold out.

        The two alternate in long stretches, so that they come from different texts. Neighbouring rows have much in
        common, which would hide a channel that only one text uses.
        """
        stretches = np.array_split(self.rows, min(STRETCHES, len(self.rows)))
        return np.concatenate(stretches[::2]), np.concatenate(stretches[1::2])


class Histogram(NamedTuple):
    """Counts of values in bins with these `centres` (BINS,), from `low` to `high`. The range always includes 0."""

    low: float
    high: float
    centres: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(x: np.ndarray, low: float, high: float) -> Histogram:
        """The histogram of x over the range from `low` to `high`, which may be wider than x."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if high - low <= (HIGHEST - LOWEST) * MIN_SCALE:
            low = high = 0.0
        counts, edges = np.histogram(x, BINS, (low, high))
        return Histogram(low, high, ((edges[:-1] + edges[1:]) / 2).astype(np.float32), counts)

    def candidates(self) -> Iterable[QuantParams]:
        """Parameters for the whole range and for fractions of it."""
        whole = min_max(self)
        for fraction in FRACTIONS:
            params = QuantParams.covering(fraction * self.low, fraction * self.high)
            if params.scale <= whole.scale:  # false below MIN_SCALE, where `covering` returns scale 1
                yield params


def min_max(histogram: Histogram) -> QuantParams:
    """Calibration method min-max: cover all values."""
    return QuantParams.covering(histogram.low, histogram.high)


def mse(histogram: Histogram) -> QuantParams:
    """Calibration method MSE: minimise the squared error of rounding and clipping."""
    x, counts = histogram.centres, histogram.counts
    return min(histogram.candidates(), key=lambda params: float(counts @ np.square(params.round(x) - x)))


ALGORITHMS = {"normal": min_max, "mmse": mse}


class Choice(NamedTuple):
    """Chosen parameters of a projection, their calibration method, and the relative rms error on held-out rows."""

    params: ProjectionParams
    algorithm: str
    error: float


def choose(
    label: str,
    weight: np.ndarray,
    samples: Samples,
    smoothings: Sequence[np.ndarray | None] = (None,),
    algorithms: Sequence[str] = tuple(ALGORITHMS),
) -> Choice:
    """Choose the parameters of a projection (K, N): the calibration method and SmoothQuant factors with the smallest
    error on held-out rows.

    SmoothQuant costs the NPU two more operations, so its error counts 1 / SMOOTHING_FACTOR times.
    """
    fitted, held_out = (_subsample(rows, weight) for rows in samples.halves())
    expected = _after_relu(label, matmul(held_out, weight))
    size = max(_mean_square(expected), 1e-24)
    outputs = _output_params(label, weight, fitted, samples.products, algorithms)
    best, least = None, np.inf
    for smoothing in smoothings:
        factor = np.float32(1) if smoothing is None else reciprocal(smoothing)
        low, high = (samples.low * factor).min(), (samples.high * factor).max()
        inputs = _params_by_method(fitted * factor, low, high, algorithms)
        rounded = round_weight(weight, smoothing)
        for algorithm in algorithms:
            params = ProjectionParams(inputs[algorithm], outputs[algorithm], smoothing)
            actual = _after_relu(label, Quantised(params, *rounded).linear(held_out))
            error = _mean_square(actual - expected)
            # The head's products are the predictions: their KL counts, not their squared error.
            cost = float(divergence(expected, actual).mean()) if label == HEAD else error
            cost /= 1.0 if smoothing is None else SMOOTHING_FACTOR
            if best is None or cost < least:
                best, least = Choice(params, algorithm, sqrt(error / size)), cost
    assert best is not None, "there is always a candidate"
    return best


def _subsample(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Evenly spaced rows, as many as MAX_ELEMENTS allows."""
    count = min(len(rows), max(MIN_ROWS, MAX_ELEMENTS // max(weight.shape)))
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _after_relu(label: str, product: np.ndarray) -> np.ndarray:
    """A product as the next operation reads it: after the Relu, if one follows this matrix."""
    return np.maximum(product, np.float32(0)) if label.endswith(RECTIFIED) else product


def _output_params(
    label: str, weight: np.ndarray, rows: np.ndarray, products: np.ndarray, algorithms: Sequence[str]
) -> dict[str, tuple[QuantParams, ...]]:
    """Parameters of the product of each part of K, by calibration method. `products`: as in Samples."""
    parts = []
    for (k0, k1), (low, high) in zip(spans(int8_parts(len(weight))), products, strict=True):
        product = matmul(rows[:, k0:k1], weight[k0:k1])
        if len(products) == 1:  # the Relu follows the sum of several parts
            product, low = _after_relu(label, product), _after_relu(label, low)
        parts.append(_params_by_method(product, low, high, algorithms))
    return {name: tuple(part[name] for part in parts) for name in algorithms}


def _params_by_method(
    x: np.ndarray, low: float, high: float, algorithms: Sequence[str]
) -> dict[str, QuantParams]:
    """Parameters of x by calibration method. low, high: of x over all rows of the text."""
    histogram = Histogram.of(x, low, high)
    return {name: ALGORITHMS[name](histogram) for name in algorithms}


def _mean_square(x: np.ndarray) -> float:
    return float(np.square(x).mean(dtype=np.float64))
