"""Format the rows of both benchmarks as Markdown (80 columns) and CSV, and the fits as a log."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from rwkv_npu.bench.analysis import (
    ARTICLE,
    FLOOR,
    Fit,
    crossovers,
    cubic_twin,
    describe_crossovers,
    describe_step,
    find_steps,
    tilings,
)
from rwkv_npu.bench.document import PREFILLS, Document, ModelRow, ProductRow, by_model, by_series
from rwkv_npu.runtime import estimate
from rwkv_npu.runtime.estimate import PARTS

WIDTH = 80
ESTIMATE = "~"  # before every estimated figure
NOTE = (
    f"{ESTIMATE} An estimate, not a measurement: the central value, and the range between all terms at their fast ends "
    "and all at their slow ends. --explain prints every term and its source."
)


# -- products --------------------------------------------------------------------------------------------


def product_table(document: Document[ProductRow], *, explained: bool = False) -> str:
    """Markdown: the machine, a table for each series, failures, crossovers and steps."""
    rows = document.results
    parts = [machine_lines(document)]
    if any(row.estimated for row in rows):
        parts.append(_wrapped(NOTE))
    parts += [f"{_series_head(series[0])}\n\n{_series_table(series)}" for series in by_series(rows).values()]
    if failed := [row for row in rows if row.failed]:
        parts.append(_list(f"failed: {row.series} {_size(row)}: {row.failed}" for row in failed))
    if lines := by_series(rows, square=True):
        crossings = crossovers(rows, one_machine="board" in document.machine)
        parts.append("## Crossovers\n\n" + _list(describe_crossovers(crossings, list(lines))))
    if steps := [*map(describe_step, find_steps(rows)), *tilings(rows)]:
        parts.append("## Steps\n\n" + _list(steps))
    if explained:
        parts.append("## Terms of the estimates\n\n" + _list(estimate.explain()))
    return "\n\n".join(parts)


def _series_head(row: ProductRow) -> str:
    facts = [row.device.removesuffix(": estimate"), f"sums in {row.accumulate}"]
    if row.overhead_s is not None:
        facts.append(f"an empty call takes {_ms(row.overhead_s)} ms")
    return f"### {row.series}\n\n" + _wrapped("; ".join(facts))


def _series_table(rows: Sequence[ProductRow]) -> str:
    square = all(row.is_square for row in rows)
    head = ["N" if square else "M x K x N", "ms", "10 to 90 %", "GFLOP/s", "GB/s", "max error", "flags"]
    if rows[0].estimated:
        head[2] = "range"
    lines = []
    for row in rows:
        mark = ESTIMATE if row.estimated else ""
        lines.append(
            [
                str(row.n) if square else _size(row),
                mark + _ms(row.time_s),
                _span(_ms(row.time_p10_s), _ms(row.time_p90_s)),
                mark + _figure4(row.gflops),
                mark + _figure4(row.gb_per_s),
                "" if row.max_rel_error is None else f"{row.max_rel_error:.1e}",
                row.flags,
            ]
        )
    return markdown(head, lines)


def product_csv(rows: Iterable[ProductRow]) -> str:
    """CSV: one line for each row, with every field of ProductRow."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ProductRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


# -- fits ------------------------------------------------------------------------------------------------


def fit_log(fits: Sequence[Fit]) -> str:
    """Every fit with Minuit's figures, a comparison of both models, and the article's fit."""
    lines = ["## Fits of time (s) against N, by Minuit/Migrad", ""]
    lines += [
        "exponential: t = exp(c + s N); power: t = a (N/1024)^b + t0.",
        _wrapped(
            f'Weights "repeats": the error of a point is the error of its median, plus {100 * FLOOR:.0f} % of the time '
            "in quadrature. A point of an estimate has the second part only."
        ),
        _wrapped(
            'Weights "equal": as in the article. chi2 is in s^2, and errors come from the scatter about the model, as '
            "in ROOT."
        ),
        "",
    ]
    for fit in fits:
        lines += _fit_block(fit)
    return "\n".join([*lines, *_comparison(fits), *_article_lines(fits)])


def _fit_block(fit: Fit) -> list[str]:
    warning = "" if fit.valid else "   NOT CONVERGED"
    lines = [
        f"{fit.series}, {fit.model}, weights {fit.weights}{warning}",
        f"  chi2 {fit.chi2:.6g}   NDf {fit.ndf}   chi2/NDf {fit.reduced:.4g}   EDM {fit.edm:.3g}",
        f"  calls {fit.calls}   AIC {fit.aic:.1f}   rms deviation {100 * fit.rms_relative:.1f} %",
    ]
    for name, value in fit.parameters.items():
        limit = "   at its limit of 0" if name == "t0" and fit.at_limit else ""
        lines.append(f"  {name:<3} {value:>14.6g} +/- {fit.errors[name]:.3g}{limit}")
    if fit.weights == "repeats" and fit.reduced > 1:
        lines.append(f"  (chi2/NDf > 1: the errors are {fit.scale:.1f} times too small)")
    return [*lines, ""]


def _comparison(fits: Sequence[Fit]) -> list[str]:
    """A table that compares both models for each series."""
    caption = (
        "chi2/NDf of the exponential and of the power law; AIC of the exponential minus AIC of the power law (above 0, "
        "the power law is better); exponent b of the power law:"
    )
    lines = []
    pairs = {(fit.series, fit.weights, fit.model): fit for fit in fits}
    for (series, weights, model), left in pairs.items():
        right = pairs.get((series, weights, "power"))
        if model != "exponential" or right is None:
            continue
        b, error = right.parameters["b"], right.errors["b"] * right.scale
        cells = [f"{left.reduced:.4g}", f"{right.reduced:.4g}", f"{left.aic - right.aic:+.1f}"]
        lines.append([series, weights, *cells, f"{b:.3f} +/- {error:.3f}"])
    head = ["series", "weights", "exponential", "power", "AIC", "b"]
    return [_wrapped(caption), "", markdown(head, lines), ""]


def _article_lines(fits: Sequence[Fit]) -> list[str]:
    """The article's fit, and the questions that it leaves open."""
    twin = cubic_twin(np.arange(256, 4097, 128))
    same_slope = 3 / ARTICLE.slope
    top = float(ARTICLE.time(np.array(4096.0)))
    rate = 2 * 4096**3 / top / 1e9
    lines = [
        f'The article ("{ARTICLE.title}", 2023): chi2 {ARTICLE.chi2}, NDf {ARTICLE.ndf}, EDM {ARTICLE.edm}, '
        f"{ARTICLE.calls} calls, Constant {ARTICLE.constant} +/- {ARTICLE.constant_error}, "
        f"Slope {ARTICLE.slope} +/- {ARTICLE.slope_error}.",
        "Its figures leave open:",
        f"- No unit. Its t(4096) is {top:.3g}. In seconds that is {rate:.0f} GFLOP/s; in milliseconds it would be "
        f"{rate:.0f} TFLOP/s, more than the chip can do. Seconds is assumed here.",
        "- NDf 29 with 2 parameters means 31 points, but 128 to 4096 by 128 has 32. The missing one is not named.",
        "- Exponential or cubic. On log-log axes the exponential's slope is s N. It equals 3, a cubic's slope, only at "
        f"N = {same_slope:.0f}. With equal weights the largest sizes decide, and there the two look alike. "
        f"The curve {twin.a:.3g} s N^3 + {twin.t0 * 1e3:.0f} ms ({2 / twin.a / 1e9:.0f} GFLOP/s and a constant), "
        "without noise, at N = 256 to 4096, fitted in the same way, gives the article's Constant and Slope exactly, "
        f"with chi2 {twin.chi2:.3g} (article: {ARTICLE.chi2:.3g}) and errors {twin.constant_error:.2g} and "
        f"{twin.slope_error:.2g} (article: {ARTICLE.constant_error:.2g} and {ARTICLE.slope_error:.2g}). "
        "Such a fit cannot distinguish them.",
    ]
    ours = [fit for fit in fits if fit.weights == "equal" and fit.model == "exponential"]
    if ours:
        lines.append("The same fit (exponential, equal weights) of the times here:")
        lines += [
            f"- {fit.series}: Constant {fit.parameters['c']:.4g} +/- {fit.errors['c']:.2g}, "
            f"Slope {fit.parameters['s']:.4g} +/- {fit.errors['s']:.2g}, "
            f"chi2 {fit.chi2:.3g} s^2, NDf {fit.ndf}"
            for fit in ours
        ]
    return [_wrapped(line, "  " if line.startswith("-") else "") for line in lines]


# -- models ----------------------------------------------------------------------------------------------


def model_table(document: Document[ModelRow], *, explained: bool = False) -> str:
    """Markdown: the machine, and for each model its speeds, memory and the parts of its times."""
    reads = [row.read_gb_per_s for row in document.results if row.read_gb_per_s]
    bandwidth = [f"memory read before each row: {min(reads):.0f} to {max(reads):.0f} GB/s"] if reads else []
    parts = [machine_lines(document, bandwidth)]
    if any(row.precision != row.weights for row in document.results):
        parts.append(_wrapped("`fp32 of fp16`: fp16 in the file, converted to fp32 when the file is opened."))
    if any(row.estimated for row in document.results):
        parts.append(_wrapped(NOTE))
    for rows in by_model(document.results):
        first = rows[0]
        parts.append(f"## {first.model}: RWKV-{first.generation}, {first.parameters / 1e6:.3g} M parameters")
        parts += ["Tokens per second, with their range:", _speeds(rows)]
        if measured := [row for row in rows if not row.estimated]:
            parts += ["Measured here:", _measured(measured)]
        parts += ["Milliseconds for a token:", _list(_sum(row, "decode") for row in rows if row.decode_ms)]
        parts.append(f"Milliseconds for a prompt of {PREFILLS[0]} tokens and the first sampled token:")
        name = f"prefill_{PREFILLS[0]}"
        parts.append(_list(_sum(row, name) for row in rows if getattr(row, f"{name}_ms")))
        if failed := [row for row in rows if row.failed]:
            parts.append(_list(f"failed: {row.name}: {row.failed}" for row in failed))
        parts += [_profile(row) for row in rows if row.profile]
    if explained:
        bases = dict.fromkeys(row.basis for row in document.results if row.basis)
        parts.append("## Terms of the estimates\n\n" + _list([*bases, *estimate.explain()]))
    return "\n\n".join(parts)


def _speeds(rows: Sequence[ModelRow]) -> str:
    names = [*(f"prefill_{count}" for count in PREFILLS), "decode"]
    head = ["backend", *(f"read {count}" for count in PREFILLS), "write"]
    lines = []
    for row in rows:
        mark = ESTIMATE if row.estimated else ""
        cells = []
        for name in names:
            value, low, high = (getattr(row, f"{name}_tps{end}") for end in ("", "_p10", "_p90"))
            span = _span(_figure(low), _figure(high))
            cells.append(f"{mark}{_figure(value)} {span}".strip() if value is not None else "")
        lines.append([row.name, *cells])
    return markdown(head, lines)


def _measured(rows: Sequence[ModelRow]) -> str:
    head = ["backend", "first ms", "load s", "peak GB", "own GB", "runs", "flags"]
    lines = [
        [
            row.name,
            _figure(row.first_token_s, 1e3),
            _figure(row.load_s),
            _figure(row.peak_bytes, 1e-9),
            _figure(row.own_bytes, 1e-9),
            f"{row.decode_repeats} of {row.decode_tokens}" if row.decode_repeats else "",
            row.flags + (" failed" if row.failed else ""),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def _sum(row: ModelRow, what: str) -> str:
    """A time as the sum of its parts. For a token also NPU calls, bytes and bandwidth."""
    parts: Mapping[str, float] = getattr(row, f"{what}_ms")
    mark = ESTIMATE if row.estimated else ""
    terms = " + ".join(f"{part} {_figure(parts[part])}" for part in PARTS if parts.get(part))
    text = f"{row.name}: {mark}{_figure(sum(parts.values()))} = {terms}"
    if what != "decode":
        return text
    extra = [] if row.calls_per_token is None else [f"{row.calls_per_token:g} calls"]
    if row.bytes_per_token and row.gb_per_s:
        extra.append(f"{row.bytes_per_token / 1e6:.0f} MB at {mark}{_figure(row.gb_per_s)} GB/s")
    if row.bandwidth_share is not None:
        extra.append(f"{100 * row.bandwidth_share:.0f} % of the best read")
    return "; ".join([text, ", ".join(extra)]) if extra else text


def _profile(row: ModelRow) -> str:
    """A token's time by role of group and by function. Older files have no bytes."""
    roles = []
    for role, calls, ms, weights, *size in row.profile["roles"]:
        rate = size[0] / ms / 1e6 if ms and size else None
        share = f"{100 * rate / row.read_gb_per_s:.0f} %" if rate and row.read_gb_per_s else ""
        megabytes = _figure(size[0] * calls, 1e-6) if size else ""
        cells = [_figure(ms), _figure(calls * ms), _figure(weights / 1e6), megabytes, _figure(rate), share]
        roles.append([role, str(calls), *cells])
    functions = [[name, f"{calls:.1f}", _figure(ms)] for name, calls, ms in row.profile["functions"]]
    head = ["group", "times", "ms", "ms a token", "M weights", "MB a token", "GB/s", "of the read"]
    return "\n\n".join(
        [
            f"Profile of {row.name}, {row.profile['tokens']} tokens:",
            markdown(head, roles),
            "Time in functions themselves (Python's profiler makes small ones look slower):",
            markdown(["function", "times a token", "ms a token"], functions),
        ]
    )


def model_csv(rows: Iterable[ModelRow]) -> str:
    """CSV: one line for each row. Nested fields have columns `outer.inner`; profiles are omitted."""
    names = [name for field in fields(ModelRow) for name in _columns(field.name)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        flat: dict[str, Any] = {}
        for name, value in asdict(row).items():
            if isinstance(value, dict):
                flat |= {f"{name}.{key}": inner for key, inner in value.items() if name != "profile"}
            else:
                flat[name] = value
        writer.writerow(flat)
    return text.getvalue()


def _columns(name: str) -> list[str]:
    if name == "profile":
        return []
    return [f"{name}.{part}" for part in PARTS] if name.endswith("_ms") else [name]


# -- text ------------------------------------------------------------------------------------------------


def machine_lines(document: Document[Any], extra: Sequence[str] = ()) -> str:
    """The command, the machine and the notes of a document, as a list."""
    lines = [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in document.machine.items()]
    if document.command:
        lines.insert(0, f"command: `{document.command}`")
    return _list([*lines, *extra, *document.notes])


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left, the others to the right. Omits empty columns."""
    rows = list(lines)
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    widths = [max(len(head[i]), *(len(row[i]) for row in rows), 3) for i in kept]

    def line(cells: Sequence[str]) -> str:
        texts = [
            cells[i].ljust(width) if i == 0 else cells[i].rjust(width)
            for i, width in zip(kept, widths, strict=True)
        ]
        return "|" + "|".join(texts) + "|"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in zip(kept, widths, strict=True)]
    return "\n".join([line(head), "|" + "|".join(rule) + "|", *map(line, rows)])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(_wrapped(f"- {line}", "  ") for line in lines)


def _span(low: str, high: str) -> str:
    return f"{low}-{high}" if low and high else ""


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(row: ProductRow) -> str:
    return f"{row.m}x{row.k}x{row.n}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else _figure4(seconds * 1e3)


def _figure4(value: float | None) -> str:
    """Format with four significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.4g}"


def _figure(value: float | None, factor: float = 1.0) -> str:
    """Format with three significant digits, without an exponent."""
    if value is None:
        return ""
    value *= factor
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
