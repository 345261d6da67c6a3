"""What is done about channels that stand out: candidates, of which `ranges.choose` takes what held-out rows favour.

One range serves all channels of an input, so that a channel fifty times as large as the others leaves them a fiftieth
of the steps. Smoothing (SmoothQuant, arXiv 2211.10438) divides each channel by a number of its own and multiplies that
row of the weights by it, which moves some of the trouble to the weights; columns of weights have steps of their own.

A rotation (Hadamard) would spread what stands out over all channels, and has no place to be folded into here: the
token shift mixes each channel by a factor of its own, LayerNorm's gain and the gate on y do the same, and the square of
the channel mix is taken channel by channel. As a product of its own it would cost what int8 saves. Only a1 -> a2 and
v1 -> v2 of v7 have nothing in between, and nothing that stands out either.
"""

from __future__ import annotations

import numpy as np

from rwkv_npu.quant.ranges import Samples

ALPHAS = (0.25, 0.5, 0.75)  # how much of what stands out goes to the weights
_SMALLEST = 1e-5  # of the largest channel or row: one that is silent is not blown up without end


def smoothings(weight: np.ndarray, samples: Samples) -> list[np.ndarray | None]:
    """Candidates for a projection (K, N): none at all, and one (K,) for each of ALPHAS.

    By the fitted rows alone, so that those held out show what becomes of a channel that is silent in one text only.
    """
    fitted, _ = samples.halves()
    absmax = np.abs(fitted).max(0)
    return [None, *(smoothing(absmax, weight, alpha) for alpha in ALPHAS)]


def smoothing(absmax: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """(K,): what each channel is divided by, powers of two, so that to divide and multiply changes no bit.

    absmax: (K,), the largest magnitude of each channel. The typical channel is left as it is.
    """
    channels, rows = _bounded(absmax), _bounded(np.abs(weight.astype(np.float32)).max(1))
    exponents = alpha * np.log2(channels) - (1 - alpha) * np.log2(rows)
    return np.exp2(np.rint(exponents - np.median(exponents))).astype(np.float32)


def _bounded(magnitudes: np.ndarray) -> np.ndarray:
    largest = float(magnitudes.max()) or 1.0
    return np.maximum(magnitudes.astype(np.float64), _SMALLEST * largest)
