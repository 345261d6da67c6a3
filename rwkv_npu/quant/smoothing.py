"""SmoothQuant (arXiv 2211.10438) against outlier channels: candidates, of which `ranges.choose` takes the best.

One scale serves all channels of an input: a channel fifty times as large as the others leaves them a fiftieth of the
int8 numbers. SmoothQuant divides each channel by a factor of its own and multiplies that row of the weights by it. That
moves part of the error to the weights, which have per-channel scales.

A rotation (Hadamard) would spread outliers over all channels, but it cannot be folded into anything here: the token
shift mixes each channel by a factor of its own, so do LayerNorm's gain and the gate on y, and the channel mix squares
each channel. As a product of its own it would cost what int8 saves. Only a1 -> a2 and v1 -> v2 of v7 have nothing in
between, and no outliers either.
"""

from __future__ import annotations

import numpy as np

from rwkv_npu.quant.ranges import Samples

ALPHAS = (0.25, 0.5, 0.75)  # share of the outliers that moves to the weights
_SMALLEST = 1e-5  # of the largest channel or row: a channel near 0 is not scaled up without end


def smoothings(weight: np.ndarray, samples: Samples) -> list[np.ndarray | None]:
    """Candidates for a projection (K, N): none at all, and one (K,) for each of ALPHAS.

    By the fitted rows alone: the held-out rows then show the error of a channel that is 0 in one text only.
    """
    fitted, _ = samples.halves()
    absmax = np.abs(fitted).max(0)
    return [None, *(smoothing(absmax, weight, alpha) for alpha in ALPHAS)]


def smoothing(absmax: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """(K,): the divisor of each channel, a power of two, so that dividing and multiplying change no bit.

    absmax: (K,), the largest magnitude of each channel. The median channel is left as it is.
    """
    channels, rows = _bounded(absmax), _bounded(np.abs(weight.astype(np.float32)).max(1))
    exponents = alpha * np.log2(channels) - (1 - alpha) * np.log2(rows)
    return np.exp2(np.rint(exponents - np.median(exponents))).astype(np.float32)


def _bounded(magnitudes: np.ndarray) -> np.ndarray:
    largest = float(magnitudes.max()) or 1.0
    return np.maximum(magnitudes.astype(np.float64), _SMALLEST * largest)
