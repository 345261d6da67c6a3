"""Chooses the ranges of quantised projections by rows that were seen, and weighs them on rows that were held out.

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
TOGETHER = 8  # of them are one to kl_divergence: finer ones are too empty to compare
WORTH = 0.8  # what smoothing leaves of the squared error, at most
# Numbers of rows and of products that are looked at to choose ranges, and again to weigh them, but of FEWEST rows.
NUMBERS, FEWEST = 1 << 22, 128
# Shares of the whole range that are tried: what lies outside is clipped, and the rest has finer steps.
SHARES = np.linspace(1.0, 0.3, 29)
# A matrix behind which only what is positive counts: the negative half of its range would be for nothing.
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
    """How many of some numbers lie about each of `centres` (BINS,), which reach from `low` to `high`, and to 0."""

    low: float
    high: float
    centres: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(x: np.ndarray, low: float, high: float) -> Histogram:
        """Of all of x, and of a range that may be wider than x."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if high - low <= (HIGHEST - LOWEST) * SILENT:
            low = high = 0.0
        counts, edges = np.histogram(x, BINS, (low, high))
        return Histogram(low, high, ((edges[:-1] + edges[1:]) / 2).astype(np.float32), counts)

    def candidates(self) -> Iterable[Affine]:
        """The whole range, and parts of it, unless these are silent."""
        whole = normal(self)
        found = (Affine.covering(share * self.low, share * self.high) for share in SHARES)
        return (affine for affine in found if affine.scale <= whole.scale)


def normal(seen: Histogram) -> Affine:
    """All that was seen."""
    return Affine.covering(seen.low, seen.high)


def mmse(seen: Histogram) -> Affine:
    """The range whose rounding and clipping leave the smallest squares of errors."""
    x, counts = seen.centres, seen.counts
    return min(seen.candidates(), key=lambda affine: float(counts @ np.square(affine.round(x) - x)))


def kl_divergence(seen: Histogram) -> Affine:
    """The range that keeps the distribution best, by KL of the histograms."""
    if seen.high <= seen.low:
        return normal(seen)
    counts = seen.counts.reshape(-1, TOGETHER).sum(1)
    centres = seen.centres.reshape(-1, TOGETHER).mean(1)
    return min(seen.candidates(), key=lambda affine: _divergence(counts, centres, affine))


def _divergence(counts: np.ndarray, centres: np.ndarray, affine: Affine) -> float:
    """KL(histogram, what was clipped put into its ends || the histogram in the steps of `affine`)."""
    low, high = affine.span
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    first, last = inside[0], inside[-1] + 1
    p = counts[first:last].astype(np.float64)
    steps = np.rint(centres[first:last] / np.float32(affine.scale)).astype(np.int64)
    steps -= steps[0]
    # Within a step all bins that have anything have the same.
    mass, filled = np.bincount(steps, p), np.bincount(steps, p > 0)
    q = np.where(p > 0, (mass / np.maximum(filled, 1))[steps], 0.0)
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    p, q = p / p.sum(), np.maximum(q / max(q.sum(), 1.0), 1e-12)
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


ALGORITHMS = {"normal": normal, "mmse": mmse, "kl_divergence": kl_divergence}


class Choice(NamedTuple):
    """The ranges of a projection, how they were found, and the error (relative, rms) on rows that were held out."""

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
    """The best ranges for a projection (K, N): of the algorithms and `smoothings` those that cost least on held-out
    rows. Smoothing is two more operations for the NPU, and has to be WORTH them."""
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
            # The head's products are the predictions: what counts there is not how far they are from the others.
            cost = float(divergence(expected, made).mean()) if label == HEAD else squares
            cost /= 1.0 if smoothing is None else WORTH
            if best is None or cost < least:
                best, least = Choice(ranges, algorithm, sqrt(squares / size)), cost
    assert best is not None, "there is always a candidate"
    return best


def _some(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """As many of `rows` as NUMBERS allows, from everywhere."""
    count = min(len(rows), max(FEWEST, NUMBERS // max(weight.shape)))
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _behind(label: str, product: np.ndarray) -> np.ndarray:
    """A product as what follows sees it."""
    return np.maximum(product, np.float32(0)) if label.endswith(RECTIFIED) else product


def _outputs(
    label: str, weight: np.ndarray, rows: np.ndarray, made: np.ndarray, algorithms: Sequence[str]
) -> dict[str, tuple[Affine, ...]]:
    """By algorithm, the numbers of what each part of K makes of `rows`. `made` (P, 2) is its lowest and highest for all
    that was seen."""
    found = []
    for (k0, k1), (low, high) in zip(spans(int8_parts(len(weight))), made, strict=True):
        product = matmul(rows[:, k0:k1], weight[k0:k1])
        if len(made) == 1:  # else the Relu comes behind the sum of several
            product, low = _behind(label, product), _behind(label, low)
        found.append(_affines(product, low, high, algorithms))
    return {name: tuple(part[name] for part in found) for name in algorithms}


def _affines(x: np.ndarray, low: float, high: float, algorithms: Sequence[str]) -> dict[str, Affine]:
    """What each algorithm makes of x, of which all that was seen is from `low` to `high`."""
    seen = Histogram.of(x, low, high)
    return {name: ALGORITHMS[name](seen) for name in algorithms}


def _squares(x: np.ndarray) -> float:
    """Their mean."""
    return float(np.square(x).mean(dtype=np.float64))
