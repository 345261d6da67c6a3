"""Timing one call: warmed up, repeated until the spread is known, each call on its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STOP_S = 20.0  # a series ends at the first run that is longer
WARM_S, WARM_CALLS = 0.05, 2
LONG_S, FEWEST = 20.0, 3  # a row of slow calls ends after so long with so few
MOST_CALLS = 20_000

Stage = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """When to stop: after at least `repeats` calls (fewer if they take LONG_S), once the median is known to `precision`
    or after `seconds`."""

    repeats: int = 7
    precision: float = 0.005
    seconds: float = 1.5


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls: percentiles, the uncertainty of the median, the median of one stage."""

    median: float
    p10: float | None
    p90: float | None
    error: float | None
    repeats: int
    submit: float | None


def time_calls(stages: Sequence[Stage], submit: int | None, effort: Effort) -> Timing:
    """Time the calls that consist of `stages` one after the other; `submit` is the index of the stage that hands
    the work over, timed apart. A first call above STOP_S is the only one, and has no spread."""
    begin = time.perf_counter()
    for count in range(1, MOST_CALLS):
        first = time.perf_counter()
        for stage in stages:
            stage()
        now = time.perf_counter()
        if now - first > STOP_S:
            return Timing(now - first, None, None, None, 1, None)
        if (count >= WARM_CALLS and now - begin > WARM_S) or now - first > 1.0:
            break
    collecting = gc.isenabled()
    gc.disable()
    try:
        marks = _calls(stages, effort)
    finally:
        if collecting:
            gc.enable()
    totals = marks[:, -1] - marks[:, 0]
    p10, median, p90 = np.quantile(totals, (0.1, 0.5, 0.9))
    return Timing(
        median=float(median),
        p10=float(p10),
        p90=float(p90),
        error=median_error(totals),
        repeats=len(totals),
        submit=None if submit is None else float(np.median(marks[:, submit + 1] - marks[:, submit])),
    )


def _calls(stages: Sequence[Stage], effort: Effort) -> np.ndarray:
    """Moments between stages, (calls, stages + 1)."""
    marks: list[list[float]] = []
    totals: list[float] = []
    begin, check = time.perf_counter(), effort.repeats
    while True:
        moments = [time.perf_counter()]
        for stage in stages:
            stage()
            moments.append(time.perf_counter())
        marks.append(moments)
        totals.append(moments[-1] - moments[0])
        spent = moments[-1] - begin
        if len(marks) < effort.repeats:
            if spent > LONG_S and len(marks) >= FEWEST:
                break
            continue
        if spent > effort.seconds or len(marks) >= MOST_CALLS:
            break
        if len(marks) >= check:  # not after each call: quantiles cost more than a small product
            check = int(1.3 * len(marks)) + 1
            if spent > effort.seconds / 5 and median_error(totals) < effort.precision * np.median(totals):
                break
    return np.array(marks)


def median_error(values: Sequence[float] | np.ndarray) -> float:
    """Half the 68 % interval of the median: the order statistics one binomial deviation off the middle.

    It assumes nothing about the distribution, which for times is never normal.
    """
    off = min(0.5, 0.5 / np.sqrt(len(values)))
    low, high = np.quantile(np.asarray(values), (0.5 - off, 0.5 + off))
    return float(high - low) / 2
