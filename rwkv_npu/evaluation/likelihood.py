"""From logits to likelihoods and divergences: in fp64, since what two models differ by can be less than fp32 resolves.

A vocabulary of 65536 makes half a megabyte of a row in fp64, and 34 of 64 rows: one row at a time stays in the cache.

Letters: M rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from rwkv_npu.errors import BackendError
from rwkv_npu.models import maths


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(M, V) fp32 -> (M, V) fp64. Raises BackendError for logits that are not finite."""
    _check_finite(logits)
    return maths.log_softmax(logits)


def log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(M,) fp64: log p of each row's target under its (M, V) logits. Raises BackendError if these are not finite."""
    return compare(logits, targets)[0]


def compare(
    logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) fp64 each: log p of the targets under (M, V) `logits`, and KL(reference || logits) in nats, 0 without one.

    Raises BackendError for logits that are not finite.
    """
    log_p, kl = np.empty(len(logits)), np.zeros(len(logits))
    a, exp_a, b, exp_b = np.empty((4, logits.shape[1]))
    for row, (line, target) in enumerate(zip(logits, targets, strict=True)):
        log_a = _normalise(line, a, exp_a)
        log_p[row] = a[target] - log_a
        if reference is not None:
            log_b = _normalise(reference[row], b, exp_b)
            # Not as a product: the threads of a BLAS would take longer to wake than this takes.
            kl[row] = (exp_b * (b - a)).sum() / exp_b.sum() - (log_b - log_a)
    return log_p, kl


def _normalise(line: np.ndarray, a: np.ndarray, exp_a: np.ndarray) -> float:
    """Write (V,) logits to `a` in fp64, less the largest, and e^a to `exp_a`; returns log(sum(e^a))."""
    _check_finite(line)
    a[:] = line
    a -= a.max()
    np.exp(a, out=exp_a)
    return float(np.log(exp_a.sum()))


def _check_finite(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise BackendError("the model's logits are not finite: its weights, or its precision, are at fault")
