"""Pictures of a matmul sweep, in four files for FILE.png: FILE-time.png, -roofline, -bars and -fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.bench.analysis import ARTICLE, Crossover, Fit, crossovers
from rwkv_npu.bench.document import Document, ProductRow, by_series
from rwkv_npu.bench.machine import peaks
from rwkv_npu.bench.plot import BOARD_CPU, GREY, HATCH, NPU, PUBLISHED, check, machine_text, open_pyplot, save
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.rk3588 import TERMS

PICTURES = ("time", "roofline", "bars", "fit")
COLOURS = {
    "numpy fp32": "#0072B2",
    "torch fp32": "#56B4E9",
    "torch bf16": "#009E73",
    "ort fp32": "#7F7F7F",
    "rk3588-cpu fp16 (estimate)": BOARD_CPU,
    "rknn fp16 (estimate)": NPU,
    "rknn fp16": NPU,
    "rknn-matmul fp16 (published)": PUBLISHED,
    "ort int8": "#66A61E",
    "ort int4": "#1B5E20",
}
SPARE = ("#8C564B", "#9467BD", "#17BECF", "#BCBD22", "#444444", "#AA4499", "#882255", "#999933")
MARKERS = "osDv^<>Phxd"
MAX_LINES = 20  # of text beside a picture: legend and crossovers


def check_matmul(path: Path) -> None:
    """Raises UsageError if the pictures cannot be written. Call it before measuring."""
    check(path, [beside(path, name) for name in PICTURES])


def beside(path: Path, name: str) -> Path:
    """FILE-name.png for FILE.png."""
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def draw_matmul(
    document: Document[ProductRow], path: Path, fits: Sequence[Fit] = (), bars: Sequence[int] = ()
) -> list[Path]:
    """Draw the pictures that the rows allow. Returns their paths. Raises UsageError."""
    paths = []
    with open_pyplot() as pyplot:
        figures = (
            _time_picture(pyplot, document),
            _roofline_picture(pyplot, document),
            _bar_picture(pyplot, document, bars),
            _fit_picture(pyplot, document, fits),
        )
        for name, figure in zip(PICTURES, figures, strict=True):
            if figure is not None:
                paths.append(beside(path, name))
                save(pyplot, figure, paths[-1])
    return paths


def _colours(series: Sequence[str]) -> dict[str, str]:
    spare = iter(SPARE * 9)
    return {name: COLOURS.get(name) or next(spare) for name in series}


def _subtitle(axes: Any, document: Document[Any], more: str = "") -> None:
    axes.set_title(axes.get_title(loc="left"), pad=24)
    text = f"measured on {machine_text(document)}{more}"
    axes.text(0, 1.02, text, transform=axes.transAxes, color=GREY, fontsize=9)


def _line(axes: Any, x: Any, y: Any, row: ProductRow, colour: str, index: int, joined: bool = True) -> None:
    """Draw the points of a series, joined if they form a curve. Dashed and hollow: estimated; stars: published."""
    style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4.2 if joined else 5.5}
    style |= {"linestyle": "-", "linewidth": 1.4, "markerfacecolor": colour}
    if row.estimated:
        style |= {"linestyle": (0, (5, 2)), "linewidth": 2.0, "markerfacecolor": "white"}
    if row.published:
        style |= {"marker": "*", "markersize": 13, "linestyle": "none", "zorder": 4}
    if not joined:
        style["linestyle"] = "none"
    axes.plot(x, y, color=colour, markeredgewidth=1.0, label=row.series, **style)


# -- time against N --------------------------------------------------------------------------------------


def _time_picture(pyplot: Any, document: Document[ProductRow]) -> Any:
    """Time against N on log-log axes, with spread or range as a band. Other shapes are drawn against their work."""
    square = by_series(document.results, square=True)
    lines = square if any(len(rows) > 1 for rows in square.values()) else by_series(document.results)
    if not lines:
        return None
    is_square = lines is square
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2))
    colours = _colours(list(lines))
    for index, (name, rows) in enumerate(lines.items()):
        x = [row.n if is_square else row.work / 1e9 for row in rows]
        _line(axes, x, [_ms(row.time_s) for row in rows], rows[0], colours[name], index, is_square)
        if is_square:
            low, high = (
                [_ms(getattr(row, f"time_{p}_s") or row.time_s) for row in rows] for p in ("p10", "p90")
            )
            axes.fill_between(x, low, high, color=colours[name], alpha=0.16, linewidth=0)
    axes.set(xscale="log", yscale="log", ylabel="time of one product, ms")
    if is_square:
        axes.set_xlabel("N  (M = K = N)")
        _size_ticks(axes, sorted({row.n for rows in lines.values() for row in rows}))
        marks = crossovers(document.results, one_machine="board" in document.machine)
        _mark_crossovers(axes, marks, MAX_LINES - len(lines))
    else:
        axes.set_xlabel("work of the product (2 M K N), GFLOP")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Time of a matrix product")
    _subtitle(axes, document, _legend_text(document))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return figure


def _legend_text(document: Document[ProductRow]) -> str:
    parts = []
    if any(row.estimated for row in document.results):
        parts.append("dashed: estimates for an RK3588, with their range")
    if any(row.published for row in document.results):
        parts.append("stars: published board measurements")
    return "".join(f"; {part}" for part in parts)


def _size_ticks(axes: Any, sizes: Sequence[int]) -> None:
    """Label powers of two within the sizes, as plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    ticks = [2**i for i in range(21) if min(sizes) <= 2**i <= max(sizes)]
    axes.xaxis.set_major_locator(FixedLocator(ticks or list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _mark_crossovers(axes: Any, crossings: Sequence[Crossover], max_lines: int) -> None:
    """Mark each crossover with a numbered ring, and explain at most `max_lines` of them beside the picture."""
    shown = sorted(crossings, key=lambda crossing: not crossing.estimated)[: max(0, max_lines)]
    shown = sorted(shown, key=lambda crossing: crossing.size)
    for numbers, first in _overlapping(shown):
        point = (first.size, first.time_s * 1e3)
        ring = {"markersize": 13, "color": "white", "markeredgecolor": "#222222", "zorder": 5, "alpha": 0.9}
        axes.plot([point[0]], [point[1]], "o", **ring)
        size = 8 if len(numbers) < 3 else 6.5
        text = {"ha": "center", "va": "center", "fontsize": size, "zorder": 6, "fontweight": "bold"}
        axes.annotate(numbers, point, **text)
    for number, crossing in enumerate(shown, 1):
        winner, loser = (name.replace(" (estimate)", "~") for name in (crossing.winner, crossing.loser))
        line = f"{number}  N = {crossing.size:.0f}: {winner} passes {loser}"
        height = 0.045 * (len(shown) - number)
        axes.text(1.02, height, line, transform=axes.transAxes, fontsize=8.5, color="#333333")
    if shown:
        heading = "crossovers" + (" (~ estimate)" if any(c.estimated for c in shown) else "")
        axes.text(1.02, 0.045 * len(shown), heading, transform=axes.transAxes, fontsize=9, fontweight="bold")


def _overlapping(crossings: Sequence[Crossover]) -> list[tuple[str, Crossover]]:
    """Group crossovers whose rings would overlap. Returns their numbers, such as 4-6, and the first of each group."""
    groups: list[list[int]] = []
    for i, crossing in enumerate(crossings):
        first = crossings[groups[-1][0]] if groups else crossing
        if groups and crossing.size < 1.05 * first.size and 0.8 < crossing.time_s / first.time_s < 1.25:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [(f"{g[0] + 1}-{g[-1] + 1}" if g[1:] else f"{g[0] + 1}", crossings[g[0]]) for g in groups]


# -- roofline --------------------------------------------------------------------------------------------

Roof = tuple[float, float | None, str, str, bool]  # GFLOP/s, GB/s, label, colour, estimated


def _roofline_picture(pyplot: Any, document: Document[ProductRow]) -> Any:
    """GFLOP/s against operations per byte, with the limits of this machine and of the board."""
    lines = by_series(document.results)
    if not lines:
        return None
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2))
    intensity = {name: np.array([_intensity(row) for row in rows]) for name, rows in lines.items()}
    low = min(float(x.min()) for x in intensity.values()) / 4
    high = max(float(x.max()) for x in intensity.values()) * 1.6
    x = np.geomspace(low, high, 300)
    roofs = _roofs(document)
    for peak, bandwidth, _, colour, estimated in roofs:
        limit = np.minimum(peak, bandwidth * x) if bandwidth else np.full_like(x, peak)
        axes.plot(x, limit, color=colour, linewidth=1.2, linestyle=(0, (2, 2)) if estimated else "-")
    colours = _colours(list(lines))
    for index, (name, rows) in enumerate(lines.items()):
        joined = all(row.is_square for row in rows)
        _line(axes, intensity[name], [row.gflops for row in rows], rows[0], colours[name], index, joined)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte of A, B and C", ylabel="GFLOP/s")
    _plain_ticks(axes)
    _outside_labels(axes, sorted((peak, label, colour) for peak, _, label, colour, _ in roofs))
    axes.set_title("Roofline: speed and its limits")
    measured = document.machine.get("bandwidth_gb_per_s")
    _subtitle(axes, document, f"; memory read at {measured:.0f} GB/s, caches are faster" if measured else "")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.01, -0.1), ncols=3)
    return figure


def _roofs(document: Document[ProductRow]) -> list[Roof]:
    """This machine's best product of each dtype that is at least as fast as fp32, and the NPU's estimated limit."""
    bandwidth = document.machine.get("bandwidth_gb_per_s")
    best = peaks(document.machine, document.results)
    roofs: list[Roof] = [
        (peak, bandwidth, f"{dtype} {peak:.0f}: best here", "#333333", False)
        for dtype, peak in best.items()
        if peak >= best.get("fp32", 0.0)
    ]
    dtypes = {row.dtype for row in document.results if row.estimated and row.backend == "rknn"}
    read = TERMS["npu_read_lpddr5"].central
    for bits in sorted({8 if dtype == "int8" else 16 for dtype in dtypes}):
        peak = rk3588.NPU_FLOPS[bits] / TERMS["graph_over_table"].central / 1e9
        label = f"{'int8' if bits == 8 else 'fp16'} {peak:.0f}: an RK3588 core,\nestimated ({read:g} GB/s)"
        roofs.append((peak, read, label, NPU, True))
    return roofs


def _outside_labels(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Label lines right of the picture. A label that would overlap the one below is moved up."""
    bottom, top = axes.get_ylim()
    lowest = 0.0
    for y, text, colour in labels:
        level = float(np.log(y / bottom) / np.log(top / bottom))
        height = 0.05 * (1 + text.count("\n"))
        position = max(level, lowest + height / 2)
        lowest = position + height / 2
        axes.annotate(
            text,
            (1, level),
            xytext=(1.03, position),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 0},
        )


def _plain_ticks(axes: Any) -> None:
    """Label 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def _intensity(row: ProductRow) -> float:
    assert row.gflops is not None and row.gb_per_s is not None
    return row.gflops / row.gb_per_s


# -- bars ------------------------------------------------------------------------------------------------


def _bar_picture(pyplot: Any, document: Document[ProductRow], wanted: Sequence[int]) -> Any:
    """One panel for each size, with its own scale from zero: the board above, this machine below, sorted by time."""
    rows = [row for row in document.results if row.time_s is not None]
    square = sorted({row.n for row in rows if row.is_square})
    shapes: list[tuple[int, int, int]] = [(n, n, n) for n in _bar_sizes(square, wanted)]
    shapes = shapes or _bar_shapes({row.size for row in rows})
    if not shapes:
        return None
    colours = _colours(list(by_series(rows)))
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    bars = max(sum(row.size == shape for row in rows) for shape in shapes)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5.6 * columns, 0.9 + lines * (0.95 + 0.36 * bars)), squeeze=False
    )
    for axes, shape in zip(panels.flat, shapes, strict=False):
        of_shape = sorted((row for row in rows if row.size == shape), key=lambda row: -(row.time_s or 0))
        here = [row for row in of_shape if row.is_measured_here]
        _panel(axes, here, [row for row in of_shape if not row.is_measured_here], colours)
        title = f"N = {shape[0]}" if len(set(shape)) == 1 else "x".join(map(str, shape))
        axes.set_title(title, fontsize=11, pad=6)
    for axes in list(panels.flat)[len(shapes) :]:
        axes.set_visible(False)
    figure.suptitle("Time of a matrix product, ms", x=0.01, ha="left", fontsize=13, fontweight="bold")
    text = f"filled: measured on {machine_text(document)}"
    if any(row.estimated for row in rows):
        text += "; hatched: estimates for an RK3588, lines their range"
    if any(row.published for row in rows):
        text += "; dotted: published board measurements"
    figure.supxlabel(text, x=0.01, ha="left", fontsize=9, color=GREY)
    return figure


def _bar_sizes(square: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The measured sizes nearest to the wanted ones."""
    targets = wanted or (512, 1024, 2048, 4096)
    return sorted({min(square, key=lambda size: abs(size - target)) for target in targets}) if square else []


def _bar_shapes(sizes: set[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """At most four shapes of one matrix: the matrix with the most row counts, or the largest of several."""
    matrices: dict[tuple[int, int], list[int]] = {}
    for m, k, n in sizes:
        matrices.setdefault((k, n), []).append(m)
    if not matrices:
        return []
    (k, n), rows = max(matrices.items(), key=lambda item: (len(item[1]), item[0][0] * item[0][1], item[0]))
    return [(m, k, n) for m in sorted(rows)[:4]]


def _panel(
    axes: Any, here: Sequence[ProductRow], board: Sequence[ProductRow], colours: Mapping[str, str]
) -> None:
    rows = [*here, *board]
    gap = 0.5 if here and board else 0.0
    positions = [i + (gap if i >= len(here) else 0.0) for i in range(len(rows))]
    longest = max((_ms(row.time_p90_s or row.time_s) for row in rows), default=1.0)
    for position, row in zip(positions, rows, strict=True):
        value, colour = _ms(row.time_s), colours[row.series]
        style: dict[str, Any] = {"color": colour}
        if not row.is_measured_here:
            style = {"color": "white", "hatch": HATCH if row.estimated else "...."}
        axes.barh(position, value, height=0.68, edgecolor=colour, linewidth=1.2, **style)
        if row.time_p10_s is not None and row.time_p90_s is not None:
            span = [[value - _ms(row.time_p10_s)], [_ms(row.time_p90_s) - value]]
            axes.errorbar(value, position, xerr=span, color="#222222", linewidth=1, capsize=2)
        end = max(value, _ms(row.time_p90_s or 0.0))
        text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        axes.text(
            end + longest * 0.02, position, ("~" if row.estimated else "") + text, va="center", fontsize=9
        )
    axes.set_yticks(positions, [row.series for row in rows])
    if gap:
        axes.axhline(len(here) - 0.25, color="#BBBBBB", linewidth=0.8)
    axes.set_xlim(0, longest * 1.17)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _ms(seconds: float | None) -> float:
    return 0.0 if seconds is None else seconds * 1e3


# -- fits ------------------------------------------------------------------------------------------------

MAX_FITS = 5  # columns
CURVES = {
    ("power", "repeats"): ("#222222", "-", "power law a (N/1024)^b + t0"),
    ("exponential", "repeats"): ("#0072B2", "--", "exponential, weighted by the repeats"),
    ("exponential", "equal"): ("#D55E00", "-.", "exponential, equal weights (as the article)"),
}


def _fit_picture(pyplot: Any, document: Document[ProductRow], fits: Sequence[Fit]) -> Any:
    """One column for each series: points, both models and the article's curve; below, measured over model."""
    lines = by_series(document.results, square=True)
    names = list(dict.fromkeys(fit.series for fit in fits))
    # Board series first: the article is about a board.
    names = sorted(names, key=lambda name: lines[name][0].is_measured_here)[:MAX_FITS]
    if not names:
        return None
    shape = {"figsize": (3.5 * len(names) + 1, 6.6), "height_ratios": (3, 1.4)}
    figure, panels = pyplot.subplots(2, len(names), squeeze=False, sharex=True, sharey="row", **shape)
    colours = _colours(list(lines))
    for column, name in enumerate(names):
        of_series = {(f.model, f.weights): f for f in fits if f.series == name}
        _fit_column(panels[:, column], lines[name], of_series, colours[name])
        panels[0, column].set_title(name, fontsize=11, pad=6)
    panels[0, 0].set_ylabel("time, s")
    panels[1, 0].set_ylabel("measured / model")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle("Exponential or power law?", x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _fit_column(
    panels: Any, rows: Sequence[ProductRow], fits: Mapping[tuple[str, str], Fit], colour: str
) -> None:
    top, bottom = panels
    n = np.array([row.n for row in rows], float)
    t = np.array([row.time_s for row in rows], float)
    x = np.geomspace(n.min(), n.max(), 300)
    face = "white" if rows[0].estimated else colour
    marks = {"color": colour, "markerfacecolor": face, "markersize": 4}
    top.plot(n, t, "o", label="times (hollow: estimates)", **marks)
    for key, (tint, dashes, label) in CURVES.items():
        if key in fits:
            top.plot(x, fits[key].time(x), color=tint, linestyle=dashes, linewidth=1.4, label=label)
            style = {"color": tint, "linestyle": dashes, "linewidth": 1.2, "marker": ".", "markersize": 3}
            bottom.plot(n, t / fits[key].time(n), **style)
    label = "the article's exponential, RK3588 in 2023 (seconds assumed)"
    top.plot(x, ARTICLE.time(x), color="#999999", linestyle=":", linewidth=1.6, label=label)
    bottom.axhline(1, color="#999999", linewidth=0.8)
    top.set(xscale="log", yscale="log")
    bottom.set(xscale="log", yscale="log", ylim=(0.2, 5), xlabel="N")
    _size_ticks(bottom, [int(size) for size in n])
    bottom.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    bottom.minorticks_off()
    bottom.tick_params(axis="x", labelrotation=60)
