"""Round a matrix to int4 so that its products change least, by the second moments of its inputs.

Rounding every weight to the nearest number treats all inputs alike. Here the error of a rounded row is compensated by
the rows that are not rounded yet, as in GPTQ (Frantar et al. 2022, arXiv 2210.17323), which minimises

    tr(E^T H E),    E = W - Q (K, N),    H = X^T X / rows (K, K)

where X holds the inputs of a calibration text. Afterwards scales and numbers are improved in turn: each scale to the
least error, then each number, with everything else fixed. Columns do not depend on each other.

Letters: K width of the input, N of the output, B rows of a block, n columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_npu.quant.cpu import (
    BLOCK,
    PANEL,
    SCALE,
    Packed,
    best_scales,
    inverse_of,
    pack_numbers,
    padded,
    rounded,
)

BITS = 4
DAMPING = 0.05  # of H's mean diagonal, added to the diagonal: another text has other inputs
SWEEPS = 2  # over scales and numbers, after GPTQ: the second gains 2 % of the error, a third less than 1 %
WIDEST = 1024  # rows of a part of K; each part has its own H. Bounds the memory and time of the factorisation
_COLUMNS = 1 << 21  # elements to round at a time
_STEP = 16  # rows to round before their error is added to the rest of the block


def parts(K: int, widest: int = WIDEST) -> list[tuple[int, int]]:
    """(begin, end) of the parts of K that have second moments: equal, in whole blocks."""
    count = -(-K // widest)
    step = -(-K // (count * BLOCK)) * BLOCK
    return [(start, min(start + step, K)) for start in range(0, K, step)]


def pack_compensated(weight: np.ndarray, moments: Sequence[np.ndarray]) -> Packed:
    """Quantise a matrix (K, N) of any float type to 4 bits. moments: H of each of the `parts` of K, in order."""
    K, N = weight.shape
    numbers = np.zeros((padded(K, N)[0], N), np.int8)
    scales = np.zeros((len(numbers) // BLOCK, N), SCALE)
    start = 0
    for moment in moments:
        end = start + len(moment)
        H, U = _factors(moment)
        step = max(PANEL, _COLUMNS // len(H) // PANEL * PANEL)
        blocks = slice(start // BLOCK, start // BLOCK + len(H) // BLOCK)
        for n in range(0, N, step):
            columns = np.zeros((len(H), min(step, N - n)), np.float32)
            columns[: end - start] = weight[start:end, n : n + step]
            q, s = _round(columns, H, U)
            numbers[blocks.start * BLOCK : blocks.stop * BLOCK, n : n + step] = q
            scales[blocks, n : n + step] = s
        start = end
    assert start == K, "the parts cover K"
    return pack_numbers(numbers, scales, BITS, (K, N))


def _factors(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H with damping, padded to whole blocks, and the upper U of H^-1 = U^T U, both fp32."""
    K = padded(len(moment), 1)[0]
    H = np.zeros((K, K))
    H[: len(moment), : len(moment)] = moment
    diagonal = np.diagonal(H).copy()
    mean = diagonal.sum() / len(moment)
    # Weights of an input that is always zero are rounded to the nearest number.
    H[np.diag_indices(K)] += DAMPING * mean + (diagonal == 0) * (mean or 1.0)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    return H.astype(np.float32), np.ascontiguousarray(U, np.float32)


def _round(W: np.ndarray, H: np.ndarray, U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (K, n) and scales (K // BLOCK, n) of SCALE for columns W (K, n)."""
    q, scales = _compensate(W, H, U)
    error = W - q * np.repeat(scales, BLOCK, axis=0)
    for _ in range(SWEEPS):
        for start in range(0, len(W), BLOCK):
            rows = slice(start, start + BLOCK)
            _improve(q[rows], scales[start // BLOCK], error, H[rows], rows)
    return q, scales.astype(SCALE)


def _compensate(W: np.ndarray, H: np.ndarray, U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ: round row by row, and add the error of each to the later rows. Returns numbers and scales, fp32."""
    W, q = W.copy(), np.empty_like(W)
    scales = np.empty((len(W) // BLOCK, W.shape[1]), np.float32)
    importance = np.diagonal(H)
    for start in range(0, len(W), BLOCK):
        end = start + BLOCK
        block = best_scales(W[None, start:end], BITS, importance[start:end, None])[0]
        scales[start // BLOCK] = block
        inverse = inverse_of(block)
        lost = np.empty((BLOCK, W.shape[1]), np.float32)
        for first in range(start, end, _STEP):
            last = first + _STEP
            for row in range(first, last):
                q[row] = rounded(W[row] * inverse, BITS)
                lost[row - start] = (W[row] - q[row] * block) / U[row, row]
                W[row + 1 : last] -= U[row, row + 1 : last, None] * lost[row - start]
            W[last:end] -= U[first:last, last:end].T @ lost[first - start : last - start]
        W[end:] -= U[start:end, end:].T @ lost
    return q, scales


def _improve(q: np.ndarray, scales: np.ndarray, error: np.ndarray, H: np.ndarray, rows: slice) -> None:
    """Set the scales, then the numbers of one block to the least error. Changes `q`, `scales` and `error`.

    q (B, n) and scales (n,) of the block. error (K, n): W - Q of all rows. H (B, K): the block's rows.
    """
    own = np.ascontiguousarray(H[:, rows])
    # 1. Scales: the minimum of a parabola, rounded as they are stored.
    gradient = H @ error
    steepness = np.einsum("bn,bn->n", q, own @ q)
    step = np.einsum("bn,bn->n", q, gradient) / np.where(steepness > 0, steepness, 1)
    change = (scales + step).astype(SCALE).astype(np.float32) - scales
    scales += change
    error[rows] -= q * change
    gradient -= own @ (q * change)
    # 2. Numbers, one row after the other. `gradient` is H @ error, kept up to date.
    inverse = inverse_of(scales)
    for first in range(0, BLOCK, _STEP):
        last = first + _STEP
        changes = np.empty((_STEP, q.shape[1]), np.float32)
        for row in range(first, last):
            new = rounded(q[row] + gradient[row] * (inverse / own[row, row]), BITS)
            changes[row - first] = (new - q[row]) * scales
            q[row] = new
            gradient[row + 1 : last] -= own[row, row + 1 : last, None] * changes[row - first]
        gradient[last:] -= own[last:, first:last] @ changes
        error[rows.start + first : rows.start + last] -= changes
