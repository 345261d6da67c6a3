"""The product to be timed: its operands, and the check of its result against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SEED = 0
CHECKED = 1.5e11  # operations in float64 that a check may take; above, it looks at evenly spread rows


@dataclass(frozen=True)
class Problem:
    """A (m, k) and B (k, n), fp32, fixed by the seed and the shape; elements of A @ B have variance 1."""

    m: int
    k: int
    n: int
    a: np.ndarray
    b: np.ndarray

    def error(self, result: np.ndarray) -> float:
        """Largest difference from the product in float64, over that product's largest element."""
        if result.shape != (self.m, self.n):
            raise ValueError(f"the result has shape {result.shape}, not {(self.m, self.n)}")
        b = self.b.astype(np.float64)
        rows = self._checked_rows()
        worst = largest = 0.0
        for start in range(0, len(rows), 256):  # a block at a time: the whole would double the memory
            some = rows[start : start + 256]
            exact = self.a[some].astype(np.float64) @ b
            difference = np.abs(result[some].astype(np.float64) - exact).max()
            if not np.isfinite(difference):
                return float("inf")
            worst, largest = max(worst, float(difference)), max(largest, float(np.abs(exact).max()))
        return worst / largest

    def _checked_rows(self) -> np.ndarray:
        count = max(16, int(CHECKED / (2 * self.k * self.n)))
        return np.arange(self.m) if count >= self.m else np.linspace(0, self.m - 1, count).astype(int)


def make_problem(m: int, k: int, n: int) -> Problem:
    rng = np.random.default_rng([SEED, m, k, n])
    a = rng.standard_normal((m, k), np.float32)
    b = rng.standard_normal((k, n), np.float32)
    b *= np.float32(k**-0.5)
    return Problem(m, k, n, a, b)


def memory_needed(m: int, k: int, n: int) -> int:
    """Bytes that a backend and the check hold at most, about: operands and result in fp32 three times over, B in
    float64."""
    return 3 * 4 * (m * k + k * n + m * n) + 8 * k * n
