"""Steps in a curve of time against N: places where a smooth growth jumps, as when a tiling changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rwkv_npu.bench.record import Row, by_series

SMALLEST = 0.05  # relative; smaller jumps are not worth a line
FEWEST = 8  # points
SIDE = 3  # points on each side that must agree that it is a step


@dataclass(frozen=True)
class Step:
    """Between `before` and `after` the time is `factor` times what the growth on both sides lets expect. A `spike` is
    one size off its neighbours, and `before` is then that size."""

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
    """Works on y = ln(t / N^3), the inverse of the speed: flat where the speed is."""
    y = np.log(t / n.astype(float) ** 3)
    spikes = _spikes(n, y, errors)
    keep = np.array([size not in spikes for size in n])
    steps = [Step(series, "spike", size, size, factor) for size, factor in spikes.items()]
    return sorted(steps + _jumps(series, n[keep], y[keep], errors[keep]), key=lambda step: step.before)


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


def describe(step: Step) -> str:
    """One line."""
    if step.kind == "spike":
        return (
            f"{step.series}: N = {step.before} takes {step.factor:.2f} times what its neighbours let expect"
        )
    sizes = f"from N = {step.before} to {step.after}"
    return f"{step.series}: {sizes} the time grows {step.factor:.2f} times as much as N^3"
