"""Chooses the ranges of quantised projections by rows that were seen, and weighs them on rows that were held out.

Letters: M rows, K width of a projection's input, N of its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from rwkv_npu.calibration import Samples
from rwkv_npu.graphs import NPU_WIDTH
from rwkv_npu.int8 import Affine, Quantised, reciprocal, round_weight
from rwkv_npu.maths import matmul

BINS = 2048  # of the histograms that kl_divergence compares
WORTH = 0.9  # what smoothing leaves of the error, at most
NUMBERS = 1 << 20  # as many are looked at to choose a range, and four times as many to weigh it
# Shares of the whole range that are tried: what lies outside is clipped, and the rest has finer steps.
SHARES = np.linspace(1.0, 0.3, 29)
# A matrix behind which only what is positive counts: the negative half of its range would be for nothing.
RECTIFIED = "ffn.key.weight"


def normal(x: np.ndarray, low: float, high: float) -> Affine:
    """All that was seen."""
    return Affine.covering(low, high)


def mmse(x: np.ndarray, low: float, high: float) -> Affine:
    """The range whose rounding and clipping take the smallest squares from x."""
    return min(_candidates(low, high), key=lambda a: float(np.square(a.round(x) - x).mean()))


def kl_divergence(x: np.ndarray, low: float, high: float) -> Affine:
    """The range that keeps the distribution of x best, by KL of the histograms."""
    if high <= low:
        return Affine.covering(low, high)
    counts, edges = np.histogram(x, BINS, (min(low, 0.0), max(high, 0.0)))
    centres = ((edges[:-1] + edges[1:]) / 2).astype(np.float32)
    return min(_candidates(low, high), key=lambda a: _divergence(counts, centres, a))


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


def _candidates(low: float, high: float) -> Iterable[Affine]:
    return (Affine.covering(share * low, share * high) for share in SHARES)


ALGORITHMS = {"normal": normal, "mmse": mmse, "kl_divergence": kl_divergence}


class Choice(NamedTuple):
    """A projection quantised, how its ranges were found, and the error (relative, rms) on rows that were held out."""

    quantised: Quantised
    algorithm: str
    error: float


def quantise(
    label: str,
    weight: np.ndarray,
    samples: Samples,
    smoothings: Sequence[np.ndarray | None] = (None,),
    algorithms: Sequence[str] = tuple(ALGORITHMS),
) -> Choice:
    """The best that can be made of a projection (K, N): of the algorithms and `smoothings` those that leave the
    smallest error on held-out rows. Smoothing is two more operations for the NPU, and has to be WORTH them."""
    most = max(2, 4 * NUMBERS // max(weight.shape))
    fitted, held = (rows[:most] for rows in samples.halves())
    product, expected = (matmul(rows, weight) for rows in (fitted, held))
    if label.endswith(RECTIFIED):  # the range then starts at 0, and clips what is negative
        product, expected = (np.maximum(p, np.float32(0)) for p in (product, expected))
    products = np.concatenate([product, *_partial(fitted, weight)])
    outputs = _spans(products, products.min(), products.max(), algorithms)
    size = max(_rms(expected), 1e-12)
    choices = []
    for smoothing in smoothings:
        factor = np.float32(1) if smoothing is None else reciprocal(smoothing)
        low, high = (samples.low * factor).min(), (samples.high * factor).max()
        inputs = _spans(fitted * factor, low, high, algorithms)
        rounded = round_weight(weight, smoothing)
        for algorithm in algorithms:
            quantised = Quantised(inputs[algorithm], outputs[algorithm], *rounded, smoothing)
            error = _rms(quantised.linear(held) - expected) / size
            choices.append(Choice(quantised, algorithm, error))
    return min(
        choices, key=lambda choice: choice.error / (1 if choice.quantised.smoothing is None else WORTH)
    )


def _partial(rows: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """The products that a wide projection is added up from where it has several rows: they have the range of their sum,
    and may be larger than it."""
    if len(weight) <= NPU_WIDTH:
        return []
    parts = np.array_split(np.arange(len(weight)), ceil(len(weight) / NPU_WIDTH))
    return [matmul(rows[:, part], weight[part]) for part in parts]


def _spans(x: np.ndarray, low: float, high: float, algorithms: Sequence[str]) -> dict[str, Affine]:
    """What each algorithm makes of x, of which all that was seen is from `low` to `high`."""
    flat = x.reshape(-1)
    sample = flat[:: max(1, len(flat) // NUMBERS)]
    return {name: ALGORITHMS[name](sample, float(low), float(high)) for name in algorithms}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
