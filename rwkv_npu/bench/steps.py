"""Steps in a curve of time against N: places where a smooth growth jumps, as when a tiling changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np

from rwkv_npu.bench.record import Row, by_series

SMALLEST = 0.07  # relative; smaller jumps are not worth a line
FEWEST = 8  # points
SIDE = 3  # points on each side that must agree that it is a step


@dataclass(frozen=True)
class Step:
    """From `before` to `after` the time grows `factor` times as much as a smooth curve. A `spike` is one size off its
    neighbours, and `before` is then that size."""

    series: str
    kind: str
    before: int
    after: int
    factor: float


def find_steps(rows: Iterable[Row]) -> list[Step]:
    """The steps and spikes of every series over square sizes."""
    found = []
    for series, points in by_series(rows, square=True).items():
        if len(points) >= FEWEST:
            n = np.array([row.n for row in points])
            t = np.array([row.time_s for row in points], float)
            errors = np.array([(row.time_error_s or 0.0) for row in points]) / t
            found += _of(series, n, t, errors)
    return found


def _of(series: str, n: np.ndarray, t: np.ndarray, errors: np.ndarray) -> list[Step]:
    """Works on y, the logarithm of the time over that of a smooth curve."""
    y = np.log(t / smooth(n, t))
    spikes = _spikes(n, y, errors)
    keep = np.array([size not in spikes for size in n])
    steps = [Step(series, "spike", size, size, factor) for size, factor in spikes.items()]
    return sorted(steps + _jumps(series, n[keep], y[keep], errors[keep]), key=lambda step: step.before)


def smooth(n: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The curve c0 + c1 N + c2 N^2 + c3 N^3 (a call, vectors, moving matrices, arithmetic) with the least relative
    deviation, no coefficient negative: the best of all choices of terms that give none."""
    terms = np.stack([(n / n.max()) ** power for power in range(4)])
    best, least = t, np.inf
    for count in range(1, 5):
        for chosen in combinations(range(4), count):
            columns = terms[list(chosen)]
            factors = np.linalg.lstsq((columns / t).T, np.ones_like(t), rcond=None)[0]
            curve = factors @ columns
            deviation = float(np.sum((curve / t - 1) ** 2))
            if factors.min() >= 0 and deviation < least:
                best, least = curve, deviation
    return best


def _threshold(values: np.ndarray) -> float:
    """Four robust deviations (scaled median of absolute differences), SMALLEST at least."""
    return max(SMALLEST, 4 * 1.4826 * float(np.median(np.abs(values - np.median(values)))))


def _spikes(n: np.ndarray, y: np.ndarray, errors: np.ndarray) -> dict[int, float]:
    """Sizes off the line through their neighbours, in the same direction from both."""
    left, right = y[1:-1] - y[:-2], y[1:-1] - y[2:]
    off = np.where(left * right > 0, np.sign(left) * np.minimum(np.abs(left), np.abs(right)), 0.0)
    limit = np.maximum(_threshold(off), 4 * np.hypot(errors[1:-1], np.maximum(errors[:-2], errors[2:])))
    return {int(n[i + 1]): float(np.exp(off[i])) for i in np.flatnonzero(np.abs(off) > limit)}


def _jumps(series: str, n: np.ndarray, y: np.ndarray, errors: np.ndarray) -> list[Step]:
    """Differences between the medians of SIDE points on each side, where the jump itself makes up most of them."""
    found = []
    single = np.diff(y)
    limit = _threshold(single)
    for i in np.flatnonzero(np.abs(single) > np.maximum(limit, 4 * np.hypot(errors[1:], errors[:-1]))):
        before, after = y[max(0, i + 1 - SIDE) : i + 1], y[i + 1 : i + 1 + SIDE]
        across = float(np.median(after) - np.median(before))
        if abs(across) > limit / 2 and across * single[i] > 0:
            found.append(Step(series, "step", int(n[i]), int(n[i + 1]), float(np.exp(single[i]))))
    return found


def tilings(rows: Iterable[Row]) -> list[str]:
    """A line for each series of the NPU: into how many operations the compiler cuts which sizes."""
    lines = []
    for series, points in by_series(rows, square=True).items():
        parts = []
        for count, some in groupby(
            (row for row in points if row.npu_ops is not None), key=lambda row: row.npu_ops
        ):
            sizes = [row.n for row in some]
            parts.append(f"{count} at N = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else ""))
        if len(parts) > 1:
            lines.append(f"{series}, operations that the compiler makes of a product: {', '.join(parts)}")
    return lines


def describe(step: Step) -> str:
    """One line."""
    if step.kind == "spike":
        return (
            f"{step.series}: N = {step.before} takes {step.factor:.2f} times what its neighbours let expect"
        )
    sizes = f"from N = {step.before} to {step.after}"
    return f"{step.series}: {sizes} the time grows {step.factor:.2f} times as much as a smooth curve"
