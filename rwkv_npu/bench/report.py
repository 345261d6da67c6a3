"""Rows as a table for people, as CSV, and the log of the fits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from rwkv_npu.bench import crossover, steps
from rwkv_npu.bench.fit import ARTICLE, FLOOR, Fit, cubic_twin
from rwkv_npu.bench.record import Document, Row, by_series

ESTIMATE = "~"  # before every estimated time in a table
COLUMNS = ["backend", "dtype", "sums", "M x K x N", "ms", "p10", "p90", "runs", "GFLOP/s", "GB/s", "call ms"]
COLUMNS += ["max error", "device", "flags"]


def table(document: Document) -> str:
    """Markdown: the machine, the rows, what became of them."""
    rows = document.results
    estimated = any(row.estimated for row in rows)
    parts = [machine_lines(document.machine, document.command, document.notes), rows_table(rows)]
    if estimated:
        parts.append(
            f"{ESTIMATE} An estimate, not a measurement: the cycle table of Rockchip's compiler for one core of the "
            "NPU, without the call and without moving A and C. Its error is the simulator's."
        )
    if failed := [row for row in rows if row.failed]:
        parts.append("\n".join(f"- failed: {row.series} {_size(row)}: {row.failed}" for row in failed))
    if lines := by_series(rows, square=True):
        parts.append("## Crossovers\n\n" + _list(crossover.describe(crossover.crossovers(rows), list(lines))))
    if found := [*map(steps.describe, steps.find_steps(rows)), *steps.tilings(rows)]:
        parts.append("## Steps\n\n" + _list(found))
    return "\n\n".join(parts)


def machine_lines(machine: Mapping[str, Any], command: str, notes: Sequence[str]) -> str:
    """Where and how rows came about, as a list."""
    lines = [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in machine.items()]
    if command:
        lines.insert(0, f"command: `{command}`")
    return _list([*lines, *notes])


def rows_table(rows: Iterable[Row]) -> str:
    """Milliseconds, the spread as p10 and p90, and the rates; one row a line."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in sorted(rows, key=lambda row: (row.work, row.size, row.series)):
        if row.failed is not None:
            continue
        mark = ESTIMATE if row.estimated else ""
        cells = [
            row.backend + (" (estimate)" if row.estimated else ""),
            row.dtype,
            row.accumulate,
            _size(row),
            mark + _ms(row.time_s),
            _ms(row.time_p10_s),
            _ms(row.time_p90_s),
            str(row.repeats or ""),
            mark + _figure(row.gflops),
            mark + _figure(row.gb_per_s),
            _ms(row.overhead_s),
            "" if row.max_rel_error is None else f"{row.max_rel_error:.1e}",
            row.device,
            row.flags,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_csv(rows: Iterable[Row]) -> str:
    """One line a row, every field of Row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def fit_log(fits: Sequence[Fit]) -> str:
    """Every fit as Minuit left it, the comparison, and the article's beside ours."""
    lines = ["## Fits of time (s) against N, by Minuit/Migrad", ""]
    lines += [
        "exponential: t = exp(c + s N); power: t = a (N/1024)^b + t0.",
        f'Weights "repeats": the error of a point is that of its median, with {100 * FLOOR:.0f} % of the time added in '
        "quadrature; for an estimate, that alone.",
        'Weights "equal": as in the article, chi2 in s^2; errors from the scatter about the model, as ROOT gives them.',
        "",
    ]
    for one in fits:
        lines += _fit_block(one)
    return "\n".join([*lines, *_comparison(fits), *_article_lines(fits)])


def _fit_block(one: Fit) -> list[str]:
    warning = "" if one.valid else "   NOT CONVERGED"
    lines = [
        f"{one.series}, {one.model}, weights {one.weights}{warning}",
        f"  chi2 {one.chi2:.6g}   NDf {one.ndf}   chi2/NDf {one.reduced:.4g}   EDM {one.edm:.3g}   calls {one.calls}   "
        f"AIC {one.aic:.1f}   rms deviation {100 * one.rms_relative:.1f} %",
    ]
    for name, value in one.parameters.items():
        limit = "   at its limit of 0" if name == "t0" and one.at_limit else ""
        lines.append(f"  {name:<3} {value:>14.6g} +/- {one.errors[name]:.3g}{limit}")
    if one.weights == "repeats" and one.reduced > 1:
        lines.append(f"  (chi2/NDf > 1: the errors would have to be {one.scale:.1f} times as large)")
    return [*lines, ""]


def _comparison(fits: Sequence[Fit]) -> list[str]:
    """Both models of a series side by side."""
    lines = [
        "| series | weights | chi2/NDf exponential | chi2/NDf power | AIC exponential - power | better | b |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = {(one.series, one.weights, one.model): one for one in fits}
    for (series, weights, model), left in pairs.items():
        right = pairs.get((series, weights, "power"))
        if model != "exponential" or right is None:
            continue
        difference = left.aic - right.aic
        b, error = right.parameters["b"], right.errors["b"] * right.scale
        lines.append(
            f"| {series} | {weights} | {left.reduced:.4g} | {right.reduced:.4g} | {difference:+.1f} | "
            f"{'power' if difference > 0 else 'exponential'} | {b:.3f} +/- {error:.3f} |"
        )
    return [*lines, ""]


def _article_lines(fits: Sequence[Fit]) -> list[str]:
    """What the article printed, and what that leaves open."""
    twin = cubic_twin(np.arange(256, 4097, 128))
    same_slope = 3 / ARTICLE.slope
    top = float(ARTICLE.time(np.array(4096.0)))
    rate = 2 * 4096**3 / top / 1e9
    lines = [
        f'The article ("{ARTICLE.title}", 2023): chi2 {ARTICLE.chi2}, NDf {ARTICLE.ndf}, EDM {ARTICLE.edm}, '
        f"{ARTICLE.calls} calls, Constant {ARTICLE.constant} +/- {ARTICLE.constant_error}, "
        f"Slope {ARTICLE.slope} +/- {ARTICLE.slope_error}.",
        "What its figures leave open:",
        f"- No unit. Its t(4096) is {top:.3g}: in seconds {rate:.0f} GFLOP/s; in milliseconds it would be "
        f"{rate:.0f} TFLOP/s, beyond the chip. Seconds is assumed here.",
        "- NDf 29 with 2 parameters is 31 points; 128 to 4096 by 128 is 32. Which one is missing is not said.",
        "- Exponential against cubic. The exponential's slope on log-log axes is s N: 3, a cubic's, at N = "
        f"{same_slope:.0f} only. With equal weights the largest sizes decide, and there the two look alike:",
        f"  the curve {twin.a:.3g} s N^3 + {twin.t0 * 1e3:.0f} ms ({2 / twin.a / 1e9:.0f} GFLOP/s and a constant), "
        "free of noise, at N = 256 to 4096, fitted in the same way, gives the article's Constant and Slope exactly, "
        f"with chi2 {twin.chi2:.3g} (article: {ARTICLE.chi2:.3g}) and errors {twin.constant_error:.2g} and "
        f"{twin.slope_error:.2g} (article: {ARTICLE.constant_error:.2g} and {ARTICLE.slope_error:.2g}). "
        "Such a fit cannot tell them apart.",
    ]
    ours = [one for one in fits if one.weights == "equal" and one.model == "exponential"]
    if ours:
        lines.append("Our own times, fitted as the article's were (exponential, equal weights):")
        lines += [
            f"- {one.series}: Constant {one.parameters['c']:.4g} +/- {one.errors['c']:.2g}, "
            f"Slope {one.parameters['s']:.4g} +/- {one.errors['s']:.2g}, "
            f"chi2 {one.chi2:.3g} s^2, NDf {one.ndf}"
            for one in ours
        ]
    return lines


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(row: Row) -> str:
    return f"{row.m}x{row.k}x{row.n}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else _figure(seconds * 1e3)


def _figure(value: float | None) -> str:
    """Four significant digits, never as a power of ten."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"
