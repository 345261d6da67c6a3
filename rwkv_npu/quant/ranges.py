"""Chooses the quantization parameters of projections by sampled rows, and compares them on rows that were held out.

Two calibration methods: `normal` (min-max) covers all that was seen; `mmse` (MSE) clips where that leaves the smallest
squared error. A third, by the entropy of histograms, was best for 2 of 62 projections of two models, and is not used.

Letters: M rows, K width of a projection's input, N of its output.
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
    SILENT,
    Affine,
    Quantised,
    Ranges,
    int8_parts,
    reciprocal,
    round_weight,
    spans,
)

BINS = 1 << 14  # of a histogram: 64 for each step of int8 where nothing is clipped
WORTH = 0.8  # of the squared error: SmoothQuant has to leave less
# Numbers of rows and of products by which parameters are chosen, and as many to compare them; FEWEST rows at least.
NUMBERS, FEWEST = 1 << 22, 128
# Shares of the whole range that are tried: values outside are clipped, and the rest has a smaller scale.
SHARES = np.linspace(1.0, 0.3, 29)
# A Relu follows this matrix: its negative products need no int8 numbers.
RECTIFIED = "ffn.key.weight"
HEAD = "head.weight"
STRETCHES = 8  # in which rows are fitted and held out by turns


@dataclass
class Samples:
    """Inputs of a projection. rows: (n, K) fp32, a uniform sample in the order of the text. low, high: (K,), of all
    rows of the text; made: (P, 2), lowest and highest of what each part of K (npu.int8_parts) made of them."""

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray
    made: np.ndarray

    @property
    def absmax(self) -> np.ndarray:
        """(K,): the largest magnitude of each channel."""
        return np.maximum(-self.low, self.high)

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows to fit with, and as many that are held out. There are at least two.

        They take turns in long stretches, so that they are of different texts: what neighbours have in common would
        hide a channel that one text uses and another does not.
        """
        stretches = np.array_split(self.rows, min(STRETCHES, len(self.rows)))
        return np.concatenate(stretches[::2]), np.concatenate(stretches[1::2])


class Histogram(NamedTuple):
    """Counts of values about each of `centres` (BINS,), which reach from `low` to `high`, and to 0."""

    low: float
    high: float
    centres: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(x: np.ndarray, low: float, high: float) -> Histogram:
        """The histogram of x over a range that may be wider than x."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if high - low <= (HIGHEST - LOWEST) * SILENT:
            low = high = 0.0
        counts, edges = np.histogram(x, BINS, (low, high))
        return Histogram(low, high, ((edges[:-1] + edges[1:]) / 2).astype(np.float32), counts)

    def candidates(self) -> Iterable[Affine]:
        """Parameters for the whole range and for parts of it, unless these are below any scale of int8."""
        whole = normal(self)
        found = (Affine.covering(share * self.low, share * self.high) for share in SHARES)
        return (affine for affine in found if affine.scale <= whole.scale)


def normal(seen: Histogram) -> Affine:
    """Min-max: covers all that was seen."""
    return Affine.covering(seen.low, seen.high)


def mmse(seen: Histogram) -> Affine:
    """MSE: the range whose rounding and clipping leave the smallest squared error."""
    x, counts = seen.centres, seen.counts
    return min(seen.candidates(), key=lambda affine: float(counts @ np.square(affine.round(x) - x)))


ALGORITHMS = {"normal": normal, "mmse": mmse}


class Choice(NamedTuple):
    """Parameters of a projection, their calibration method, and the error (relative, rms) on held-out rows."""

    ranges: Ranges
    algorithm: str
    error: float


def choose(
    label: str,
    weight: np.ndarray,
    samples: Samples,
    smoothings: Sequence[np.ndarray | None] = (None,),
    algorithms: Sequence[str] = tuple(ALGORITHMS),
) -> Choice:
    """The best parameters for a projection (K, N): of the calibration methods and `smoothings`, those with the smallest
    error on held-out rows. SmoothQuant is two more operations for the NPU, and has to be WORTH them."""
    fitted, held = (_some(rows, weight) for rows in samples.halves())
    expected = _behind(label, matmul(held, weight))
    size = max(_squares(expected), 1e-24)
    outputs = _outputs(label, weight, fitted, samples.made, algorithms)
    best, least = None, np.inf
    for smoothing in smoothings:
        factor = np.float32(1) if smoothing is None else reciprocal(smoothing)
        low, high = (samples.low * factor).min(), (samples.high * factor).max()
        inputs = _affines(fitted * factor, low, high, algorithms)
        rounded = round_weight(weight, smoothing)
        for algorithm in algorithms:
            ranges = Ranges(inputs[algorithm], outputs[algorithm], smoothing)
            made = _behind(label, Quantised(ranges, *rounded).linear(held))
            squares = _squares(made - expected)
            # The head's products are the predictions: KL counts there, not squared error.
            cost = float(divergence(expected, made).mean()) if label == HEAD else squares
            cost /= 1.0 if smoothing is None else WORTH
            if best is None or cost < least:
                best, least = Choice(ranges, algorithm, sqrt(squares / size)), cost
    assert best is not None, "there is always a candidate"
    return best


def _some(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """As many of `rows` as NUMBERS allows, evenly spaced."""
    count = min(len(rows), max(FEWEST, NUMBERS // max(weight.shape)))
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _behind(label: str, product: np.ndarray) -> np.ndarray:
    """A product as the next operation gets it: after the Relu, where there is one."""
    return np.maximum(product, np.float32(0)) if label.endswith(RECTIFIED) else product


def _outputs(
    label: str, weight: np.ndarray, rows: np.ndarray, made: np.ndarray, algorithms: Sequence[str]
) -> dict[str, tuple[Affine, ...]]:
    """Parameters of the product of each part of K with `rows`, by calibration method. `made` (P, 2): its lowest and
    highest over all rows of the text."""
    found = []
    for (k0, k1), (low, high) in zip(spans(int8_parts(len(weight))), made, strict=True):
        product = matmul(rows[:, k0:k1], weight[k0:k1])
        if len(made) == 1:  # else the Relu comes behind the sum of several
            product, low = _behind(label, product), _behind(label, low)
        found.append(_affines(product, low, high, algorithms))
    return {name: tuple(part[name] for part in found) for name in algorithms}


def _affines(x: np.ndarray, low: float, high: float, algorithms: Sequence[str]) -> dict[str, Affine]:
    """Parameters of x by calibration method; over all rows of the text x reaches from `low` to `high`."""
    seen = Histogram.of(x, low, high)
    return {name: ALGORITHMS[name](seen) for name in algorithms}


def _squares(x: np.ndarray) -> float:
    """The mean of the squares."""
    return float(np.square(x).mean(dtype=np.float64))
