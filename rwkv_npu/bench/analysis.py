"""Analyses of times against N: crossovers between series, steps in a curve, and fits by Minuit.

Two models are fitted: the 2023 article's exponential, and a power law.

    exponential  t = exp(c + s N)
    power        t = a (N / 1024)^b + t0        a: the time at N = 1024 without t0; t0 is not negative

The points are weighted in two ways.

    repeats   A point has two errors, added in quadrature: that of its median, from its repeats, and FLOOR times the
              time, for the scatter between separate runs. A point without repeats has the second only.
    equal     Every point counts the same, in seconds, as in the article (ROOT's default for a graph without errors).
              chi2 is then a sum of squared seconds and not a test. Only the large N matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby, permutations
from math import exp, log
from typing import Any

import numpy as np

from rwkv_npu.bench import INSTALL
from rwkv_npu.bench.document import ProductRow, by_series
from rwkv_npu.errors import UsageError

# -- crossovers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossover:
    """`winner` is faster from N = `size` up to the largest common size.

    `size` is interpolated between two sizes on log-log axes. `time_s` is the time of both series there.
    """

    winner: str
    loser: str
    size: float
    time_s: float
    estimated: bool


def crossovers(rows: Iterable[ProductRow], *, one_machine: bool = False) -> list[Crossover]:
    """The last change of the lead between every pair of series, over square sizes.

    Series of an RK3588 (estimated or published) are compared with each other, and so are series measured here.
    one_machine: all rows come from one board.
    """
    lines = by_series(rows, square=True)
    crossings = []
    for winner, loser in permutations(lines, 2):
        if not one_machine and lines[winner][0].is_measured_here != lines[loser][0].is_measured_here:
            continue
        fast, slow = ({row.n: row for row in lines[name]} for name in (winner, loser))
        sizes = sorted(fast.keys() & slow.keys())
        # Positive where `winner` is faster.
        leads = [log(_time(slow[size]) / _time(fast[size])) for size in sizes]
        before = max((i for i, lead in enumerate(leads) if lead <= 0), default=-1)
        if not 0 <= before < len(sizes) - 1:
            continue
        low, high = sizes[before], sizes[before + 1]
        share = -leads[before] / (leads[before + 1] - leads[before])
        size = exp(log(low) + share * log(high / low))
        time = exp(log(_time(fast[low])) + share * log(_time(fast[high]) / _time(fast[low])))
        estimated = fast[low].estimated or slow[low].estimated
        crossings.append(Crossover(winner, loser, size, time, estimated))
    return sorted(crossings, key=lambda crossing: (crossing.winner, crossing.size))


def _time(row: ProductRow) -> float:
    assert row.time_s is not None
    return row.time_s


def describe_crossovers(crossings: Iterable[Crossover], lines: Sequence[str]) -> list[str]:
    """One line for each crossover."""
    text = []
    for c in crossings:
        mark = ", estimated" if c.estimated else ""
        text.append(
            f"{c.winner} is faster than {c.loser} from N = {c.size:.0f} on ({c.time_s * 1e3:.3g} ms{mark})"
        )
    return text or [f"no crossovers among {', '.join(lines)}"]


# -- steps -----------------------------------------------------------------------------------------------

SMALLEST = 0.07  # relative size of a jump; smaller ones are not reported
STEP_POINTS = 8  # points that a series needs
SIDE = 3  # points on each side that must confirm a step


@dataclass(frozen=True)
class Step:
    """Between N = `before` and `after` the time grows `factor` times as much as a smooth curve.

    A `spike` is a single size off its neighbours; `before` and `after` are then that size.
    """

    series: str
    kind: str
    before: int
    after: int
    factor: float


def find_steps(rows: Iterable[ProductRow]) -> list[Step]:
    """The steps and spikes of every series over square sizes."""
    steps: list[Step] = []
    for series, points in by_series(rows, square=True).items():
        if len(points) >= STEP_POINTS:
            n = np.array([row.n for row in points])
            t = np.array([row.time_s for row in points], float)
            errors = np.array([(row.time_error_s or 0.0) for row in points]) / t
            steps += _steps_of(series, n, t, errors)
    return steps


def _steps_of(series: str, n: np.ndarray, t: np.ndarray, errors: np.ndarray) -> list[Step]:
    """Find steps and spikes in y, the logarithm of the time over a smooth curve."""
    y = np.log(t / smooth(n, t))
    spikes = _spikes(n, y, errors)
    keep = np.array([size not in spikes for size in n])
    steps = [Step(series, "spike", size, size, factor) for size, factor in spikes.items()]
    return sorted(steps + _jumps(series, n[keep], y[keep], errors[keep]), key=lambda step: step.before)


def smooth(n: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Fit c0 + c1 N + c2 N^2 + c3 N^3 (a call, vectors, moving matrices, arithmetic) without negative coefficients.

    Tries every subset of the terms. Returns the curve with the smallest relative deviation.
    """
    terms = np.stack([(n / n.max()) ** power for power in range(4)])
    best, least = t, np.inf
    for count in range(1, 5):
        for subset in combinations(range(4), count):
            columns = terms[list(subset)]
            factors = np.linalg.lstsq((columns / t).T, np.ones_like(t), rcond=None)[0]
            curve = factors @ columns
            deviation = float(np.sum((curve / t - 1) ** 2))
            if factors.min() >= 0 and deviation < least:
                best, least = curve, deviation
    return best


def _threshold(values: np.ndarray) -> float:
    """Four robust deviations (scaled median of absolute differences), but at least SMALLEST."""
    return max(SMALLEST, 4 * 1.4826 * float(np.median(np.abs(values - np.median(values)))))


def _spikes(n: np.ndarray, y: np.ndarray, errors: np.ndarray) -> dict[int, float]:
    """Sizes off both of their neighbours in the same direction. Returns a factor by size."""
    left, right = y[1:-1] - y[:-2], y[1:-1] - y[2:]
    offset = np.where(left * right > 0, np.sign(left) * np.minimum(np.abs(left), np.abs(right)), 0.0)
    limit = np.maximum(_threshold(offset), 4 * np.hypot(errors[1:-1], np.maximum(errors[:-2], errors[2:])))
    return {int(n[i + 1]): float(np.exp(offset[i])) for i in np.flatnonzero(np.abs(offset) > limit)}


def _jumps(series: str, n: np.ndarray, y: np.ndarray, errors: np.ndarray) -> list[Step]:
    """Jumps between neighbouring sizes that the medians of SIDE points on each side confirm."""
    steps = []
    single = np.diff(y)
    limit = _threshold(single)
    for i in np.flatnonzero(np.abs(single) > np.maximum(limit, 4 * np.hypot(errors[1:], errors[:-1]))):
        before, after = y[max(0, i + 1 - SIDE) : i + 1], y[i + 1 : i + 1 + SIDE]
        across = float(np.median(after) - np.median(before))
        if abs(across) > limit / 2 and across * single[i] > 0:
            steps.append(Step(series, "step", int(n[i]), int(n[i + 1]), float(np.exp(single[i]))))
    return steps


def tilings(rows: Iterable[ProductRow]) -> list[str]:
    """Describe into how many operations the compiler splits a product, by size: one line for each NPU series."""
    lines = []
    for series, points in by_series(rows, square=True).items():
        parts = []
        for count, group in groupby(
            (row for row in points if row.npu_ops is not None), key=lambda row: row.npu_ops
        ):
            sizes = [row.n for row in group]
            parts.append(f"{count} at N = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else ""))
        if len(parts) > 1:
            lines.append(f"{series}, operations that the compiler splits a product into: {', '.join(parts)}")
    return lines


def describe_step(step: Step) -> str:
    """A step or spike in one line."""
    if step.kind == "spike":
        return f"{step.series}: N = {step.before} takes {step.factor:.2f} times as long as its neighbours suggest"
    sizes = f"from N = {step.before} to {step.after}"
    return f"{step.series}: {sizes} the time grows {step.factor:.2f} times as much as a smooth curve"


# -- fits ------------------------------------------------------------------------------------------------

FLOOR = 0.02  # relative error of a median between separate runs
FEWEST = 6  # points that a fit needs
UNIT = 1024.0  # unit of N in a fit, so that the parameters have similar sizes


@dataclass(frozen=True)
class Article:
    """The fit in the article series that inspired this benchmark (2023, RKNN2 1.5.0 on an RK3588)."""

    title: str = "Benchmarking RK3588 NPU matrix multiplication performance"
    constant: float = -2.98728
    constant_error: float = 0.0811982
    slope: float = 0.000918918
    slope_error: float = 2.29814e-05
    chi2: float = 0.0840229
    ndf: int = 29
    edm: float = 5.32403e-09
    calls: int = 68

    def time(self, n: np.ndarray) -> np.ndarray:
        """t(N). The article gives no unit."""
        return np.exp(self.constant + self.slope * n)


ARTICLE = Article()


@dataclass(frozen=True)
class Fit:
    """A model fitted to a series.

    `errors` are Minuit's. With equal weights they come from the scatter about the model, as in ROOT; otherwise from the
    errors of the points. at_limit: t0 of the power law is at its limit 0.
    """

    series: str
    model: str
    weights: str
    parameters: dict[str, float]
    errors: dict[str, float]
    chi2: float
    ndf: int
    edm: float
    calls: int
    valid: bool
    aic: float
    rms_relative: float
    at_limit: bool

    @property
    def reduced(self) -> float:
        return self.chi2 / self.ndf

    @property
    def scale(self) -> float:
        """Factor by which the errors are too small, assuming that the model is right."""
        return float(np.sqrt(self.reduced)) if self.weights == "repeats" else 1.0

    def time(self, n: np.ndarray) -> np.ndarray:
        return MODELS[self.model](n, *self.parameters.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "reduced_chi2": self.reduced}


def exponential(n: np.ndarray, c: float, s: float) -> np.ndarray:
    return np.exp(np.clip(c + s * n, -200.0, 200.0))  # clipped, because Minuit's trial steps could overflow


def power(n: np.ndarray, a: float, b: float, t0: float) -> np.ndarray:
    return a * np.exp(np.clip(b * np.log(n / UNIT), -200.0, 200.0)) + t0


MODELS: dict[str, Callable[..., np.ndarray]] = {"exponential": exponential, "power": power}


def fit_all(rows: Iterable[ProductRow]) -> list[Fit]:
    """Fit every model with both weightings to every series with enough square sizes. Raises UsageError."""
    check_installed()
    fits = []
    for series, points in by_series(rows, square=True).items():
        if len(points) < FEWEST:
            continue
        n = np.array([row.n for row in points], float)
        t = np.array([row.time_s for row in points], float)
        errors = np.hypot(FLOOR * t, [row.time_error_s or 0.0 for row in points])
        for weights, sigma in (("repeats", errors), ("equal", np.ones_like(t))):
            fits += [fit(series, model, weights, n, t, sigma) for model in MODELS]
    return fits


def check_installed() -> None:
    """Raises UsageError if iminuit is missing."""
    try:
        import iminuit  # noqa: F401
    except ImportError:
        raise UsageError(f"fitting needs iminuit: {INSTALL}") from None


def fit(series: str, model: str, weights: str, n: np.ndarray, t: np.ndarray, sigma: np.ndarray) -> Fit:
    """One fit by Migrad with errors by Hesse. Equal weights ignore `sigma` and derive errors from the residuals."""
    equal = weights == "equal"
    unit = float(t.max()) if equal else 1.0
    minuit = _minimise(model, n, t / unit, np.ones_like(t) if equal else sigma, _start(model, n, t / unit))
    calls, scatter = int(minuit.nfcn), 1.0
    if equal:
        # Fit again with errors of the right size, because Minuit's stopping distance is relative to them.
        scatter = max(1e-12, float(np.sqrt(minuit.fval / (len(n) - len(minuit.values)))))
        minuit = _minimise(model, n, t / unit, np.full_like(t, scatter), minuit.values.to_dict())
        calls += int(minuit.nfcn)
    values, errors = _in_seconds(minuit.values.to_dict(), minuit.errors.to_dict(), unit)
    chi2, count = float(minuit.fval) * (scatter * unit) ** 2, len(values)
    residuals = MODELS[model](n, *values.values()) - t
    return Fit(
        series=series,
        model=model,
        weights=weights,
        parameters=values,
        errors=errors,
        chi2=chi2,
        ndf=len(n) - count,
        edm=float(minuit.fmin.edm),
        calls=calls,
        valid=bool(minuit.valid),
        # With known errors chi2 is -2 ln L plus a constant. Unknown errors count as one more parameter.
        aic=len(n) * float(np.log(chi2 / len(n))) + 2 * (count + 1) if equal else chi2 + 2 * count,
        rms_relative=float(np.sqrt(np.mean((residuals / t) ** 2))),
        at_limit=model == "power" and values["t0"] < 1e-3 * float(t.min()),
    )


def _minimise(model: str, n: np.ndarray, t: np.ndarray, sigma: np.ndarray, start: dict[str, float]) -> Any:
    from iminuit import Minuit
    from iminuit.cost import LeastSquares

    minuit = Minuit(LeastSquares(n, t, sigma, MODELS[model]), **start)
    minuit.strategy = 2
    if model == "power":
        minuit.limits["t0"] = (0, None)
        minuit.limits["a"] = (0, None)
    minuit.migrad(ncall=20_000)
    minuit.hesse()
    return minuit


def _start(model: str, n: np.ndarray, t: np.ndarray) -> dict[str, float]:
    """Start values from straight lines through logarithms. The power law uses the larger N, where t0 matters little."""
    if model == "exponential":
        s, c = np.polyfit(n, np.log(t), 1)
        return {"c": float(c), "s": float(s)}
    upper = slice(len(n) // 2, None)
    b, a = np.polyfit(np.log(n[upper] / UNIT), np.log(t[upper]), 1)
    return {"a": float(np.exp(a)), "b": float(b), "t0": float(t.min()) / 10}


def _in_seconds(
    values: dict[str, float], errors: dict[str, float], unit: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Convert the parameters of a fit to t / unit into those of a fit to t."""
    factors = {name: unit if name in ("a", "t0") else 1.0 for name in values}
    shifts = {name: float(np.log(unit)) if name == "c" else 0.0 for name in values}
    return (
        {name: value * factors[name] + shifts[name] for name, value in values.items()},
        {name: error * factors[name] for name, error in errors.items()},
    )


@dataclass(frozen=True)
class CubicTwin:
    """The curve a N^3 + t0 whose exponential fit with equal weights has exactly the article's two parameters.

    chi2: of this fit. The article's is similar, which speaks for cubic times: with exponential times it would come from
    noise alone, and could have any value.
    """

    a: float
    t0: float
    chi2: float
    constant_error: float
    slope_error: float


def cubic_twin(n: Sequence[float] | np.ndarray) -> CubicTwin:
    """Compute the curve over the sizes `n`, by solving two equations that are linear in a and t0."""
    n = np.asarray(n, float)
    e = ARTICLE.time(n)
    # At the best fit, the derivatives of sum (t - e)^2 by c and s are 0: sum e (t - e) = 0 and sum n e (t - e) = 0.
    matrix = np.array([[np.sum(e * n**3), np.sum(e)], [np.sum(n * e * n**3), np.sum(n * e)]])
    a, t0 = np.linalg.solve(matrix, [np.sum(e * e), np.sum(n * e * e)])
    chi2 = float(np.sum((a * n**3 + t0 - e) ** 2))
    jacobian = np.stack([e, n * e])
    # Scaled by chi2/NDf, as in ROOT.
    errors = np.sqrt(np.diag(np.linalg.inv(jacobian @ jacobian.T)) * chi2 / (len(n) - 2))
    return CubicTwin(float(a), float(t0), chi2, float(errors[0]), float(errors[1]))
