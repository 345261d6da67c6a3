"""The products of `bench matmul`: their sizes, operands and check, and the timing of calls.

Letters: M rows of a call, K inputs, N outputs.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import is_bundle, read_manifest
from rwkv_npu.models.official import OFFICIAL, official_spec
from rwkv_npu.models.spec import tensors

# -- sizes -----------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]

DEFAULT_SIZES = "128:4096:128"
MODEL_ROWS = (1, 16, 64, 128)
LARGEST = 1 << 20


def parse_sizes(text: str, flag: str = "--sizes") -> list[Shape]:
    """Parse numbers and ranges `FIRST:LAST:STEP`, joined by commas, as square shapes. Raises UsageError."""
    sizes: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+)(?::(\d+))?)?\s*", part)
        if not match:
            raise UsageError(f"{flag} {text}: {part.strip()!r} is neither a number nor FIRST:LAST:STEP")
        first, last, step = (int(group) if group else None for group in match.groups())
        assert first is not None
        if step == 0 or (last is not None and last < first):
            raise UsageError(f"{flag} {text}: {part.strip()} is an empty range")
        sizes += range(first, (last or first) + 1, step or 1) if (last or first) <= LARGEST else [LARGEST + 1]
    return _checked(flag, text, [(size, size, size) for size in sizes])


def parse_shapes(text: str) -> list[Shape]:
    """Parse shapes `MxKxN`, joined by commas. Raises UsageError."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", part)
        if not match:
            raise UsageError(f"--shapes {text}: {part.strip()!r} is not MxKxN, such as 1x2048x8192")
        shapes.append((int(match[1]), int(match[2]), int(match[3])))
    return _checked("--shapes", text, shapes)


def _checked(flag: str, text: str, shapes: list[Shape]) -> list[Shape]:
    for shape in shapes:
        if not all(1 <= size <= LARGEST for size in shape):
            raise UsageError(f"{flag} {text}: sizes must be from 1 to {LARGEST}")
    if len(shapes) > 10_000:
        raise UsageError(f"{flag} {text}: {len(shapes)} sizes are too many, 10000 are allowed")
    return ordered(shapes)


def ordered(shapes: list[Shape]) -> list[Shape]:
    """Sort shapes by work, without duplicates."""
    return sorted(set(shapes), key=lambda shape: (shape[0] * shape[1] * shape[2], shape))


def model_shapes(name: str) -> list[Shape]:
    """The projections of an official size or of a bundle, at several row counts. Raises UsageError, BundleError.

    The head has one row: a prompt needs only the logits of its last token.
    """
    if name in OFFICIAL:
        spec = official_spec(name)
    elif is_bundle(Path(name)):
        spec = read_manifest(Path(name)).spec
    else:
        raise UsageError(f"--model {name}: not a bundle, and not one of {', '.join(OFFICIAL)}")
    shapes: set[Shape] = set()
    for tensor in tensors(spec):
        if tensor.kind.is_projection and not tensor.optional:
            K, N = tensor.used_shape[-2:]
            rows = (1,) if tensor.name == "head.weight" else MODEL_ROWS
            shapes |= {(M, K, N) for M in rows}
    return ordered(list(shapes))


# -- operands --------------------------------------------------------------------------------------------

SEED = 0
CHECKED = 1.5e11  # float64 operations of a check; a larger product is checked at evenly spaced rows


@dataclass(frozen=True)
class Problem:
    """Operands A (m, k) and B (k, n), fp32, determined by seed and shape. Elements of A @ B have variance 1."""

    m: int
    k: int
    n: int
    a: np.ndarray
    b: np.ndarray

    def error(self, result: np.ndarray) -> float:
        """Largest difference from the float64 product, divided by that product's largest element."""
        if result.shape != (self.m, self.n):
            raise ValueError(f"the result has shape {result.shape}, not {(self.m, self.n)}")
        b = self.b.astype(np.float64)
        count = min(self.m, max(16, int(CHECKED / (2 * self.k * self.n))))
        rows = np.linspace(0, self.m - 1, count).astype(int)
        worst = largest = 0.0
        for start in range(0, len(rows), 256):  # in blocks, because all rows at once would double the memory
            block = rows[start : start + 256]
            exact = self.a[block].astype(np.float64) @ b
            difference = np.abs(result[block].astype(np.float64) - exact).max()
            if not np.isfinite(difference):
                return float("inf")
            worst, largest = max(worst, float(difference)), max(largest, float(np.abs(exact).max()))
        return worst / largest

    def moved(self, a: float, b: float, c: float) -> float:
        """Bytes of A, B and C together. a, b, c: bytes of an element."""
        return a * self.m * self.k + b * self.k * self.n + c * self.m * self.n


def make_problem(m: int, k: int, n: int) -> Problem:
    rng = np.random.default_rng([SEED, m, k, n])
    a = rng.standard_normal((m, k), np.float32)
    b = rng.standard_normal((k, n), np.float32)
    b *= np.float32(k**-0.5)
    return Problem(m, k, n, a, b)


def memory_needed(m: int, k: int, n: int) -> int:
    """Approximate peak memory of a backend and the check, in bytes: A, B and C in fp32 three times, B in float64."""
    return 3 * 4 * (m * k + k * n + m * n) + 8 * k * n


# -- timing ----------------------------------------------------------------------------------------------

STOP_S = 20.0  # a series ends at the first run that takes longer
WARM_S, WARM_CALLS = 0.05, 2
LONG_S, FEWEST = 20.0, 3  # slow calls end after this many seconds, and at least this many calls
MOST_CALLS = 20_000

Stage = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """When a timing ends: as soon as its median is known to a relative `precision`, or after `seconds`.

    At least `repeats` calls are made, unless they take LONG_S.
    """

    repeats: int = 7
    precision: float = 0.005
    seconds: float = 1.5


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls: percentiles, error of the median, and the median of one stage."""

    median: float
    p10: float | None
    p90: float | None
    error: float | None
    repeats: int
    submit: float | None


def time_calls(stages: Sequence[Stage], submit: int | None, effort: Effort) -> Timing:
    """Time calls that run `stages` in order. `submit` is the index of a stage that is also timed on its own.

    If the first call takes longer than STOP_S, it stays the only one, without a spread.
    """
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
    """Time stamps around the stages, (calls, stages + 1)."""
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
        if len(marks) >= check:  # not after each call, because quantiles cost more than a small product
            check = int(1.3 * len(marks)) + 1
            if spent > effort.seconds / 5 and median_error(totals) < effort.precision * np.median(totals):
                break
    return np.array(marks)


def median_error(values: Sequence[float] | np.ndarray) -> float:
    """Half the 68 % interval of the median. Its ends are one binomial deviation of the rank from the middle.

    It assumes no distribution of the times, which are never normally distributed.
    """
    offset = min(0.5, 0.5 / np.sqrt(len(values)))
    low, high = np.quantile(np.asarray(values), (0.5 - offset, 0.5 + offset))
    return float(high - low) / 2
