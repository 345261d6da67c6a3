"""SmoothQuant (arXiv 2211.10438) against outlier channels: candidate factors, of which `ranges.choose` takes the best.

All channels of an input share one scale. Next to a channel fifty times as large, the others use a fiftieth of the int8
numbers. SmoothQuant divides each channel by its own factor and multiplies that row of the weights by it. This moves
part of the error to the weights, which have per-channel scales.

A rotation (Hadamard) would spread outliers over all channels, but it cannot be folded into another operation here: the
token shift, LayerNorm's gain and the gate on y scale each channel by its own factor, and the channel mix squares each
channel. As a separate product it would cost what int8 saves. The only inputs without such an operation are those of
v7's a2 and v2, and these have no outliers.
"""

from __future__ import annotations

import numpy as np

from rwkv_npu.quant.ranges import Samples

ALPHAS = (0.25, 0.5, 0.75)  # share of the outliers to move to the weights
_SMALLEST = 1e-5  # of the largest channel or row: smaller ones count as this, which bounds their factors


def smoothings(weight: np.ndarray, samples: Samples) -> list[np.ndarray | None]:
    """Candidate factors of a projection (K, N): None, and one array (K,) for each of ALPHAS.

    Only the fitted rows are used, so that the held-out rows show the error of a channel that is 0 in the fitted ones.
    """
    fitted, _ = samples.halves()
    absmax = np.abs(fitted).max(0)
    return [None, *(smoothing(absmax, weight, alpha) for alpha in ALPHAS)]


def smoothing(absmax: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """Divisors of the channels, (K,): powers of two, so that dividing and multiplying are exact.

    absmax: (K,), largest magnitude of each channel. The median channel gets the factor 1.
    """
    channels, rows = _bounded(absmax), _bounded(np.abs(weight.astype(np.float32)).max(1))
    exponents = alpha * np.log2(channels) - (1 - alpha) * np.log2(rows)
    return np.exp2(np.rint(exponents - np.median(exponents))).astype(np.float32)


def _bounded(magnitudes: np.ndarray) -> np.ndarray:
    largest = float(magnitudes.max()) or 1.0
    return np.maximum(magnitudes.astype(np.float64), _SMALLEST * largest)
