"""Pictures of a matmul sweep: time, roofline, bars. plot.py says when and where to; fit_picture.py has the fits.

What is estimated and not measured is dashed or hatched, hollow, and says so in the legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_npu.bench import figures, rknn
from rwkv_npu.bench.crossover import Crossover, crossovers
from rwkv_npu.bench.record import Document, Row, by_series
from rwkv_npu.bench.roofline import peaks

# Okabe and Ito's colours, which those who see few colours can tell apart; the rest only if many series are asked for.
COLOURS = {
    "numpy fp32": "#0072B2",
    "torch fp32": "#D55E00",
    "torch bf16": "#E69F00",
    "ort fp32": "#009E73",
    "rknn fp16 (estimate)": "#CC3377",
    "rknn fp16": "#CC3377",
    "tinygrad fp32": "#56B4E9",
    "tinygrad OpenCL fp32": "#7F7F7F",
    "ort int8": "#66A61E",
    "ort int4": "#1B5E20",
}
NPU = COLOURS["rknn fp16"]
SPARE = ("#8C564B", "#9467BD", "#17BECF", "#BCBD22", "#444444", "#AA4499", "#882255", "#999933")
MARKERS = "osDv^<>Phx*d"
STYLE = figures.STYLE | {
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 26,
    "axes.grid": True,
    "legend.fontsize": 9,
    "figure.dpi": 130,
}
MOST_LINES = 20  # of text beside a picture: legend and crossovers


def colours_of(series: Sequence[str]) -> dict[str, str]:
    spare = iter(SPARE * 9)
    return {name: COLOURS.get(name) or next(spare) for name in series}


def _subtitle(axes: Any, document: Document, more: str = "") -> None:
    machine = document.machine
    text = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores{more}"
    axes.text(0, 1.02, text, transform=axes.transAxes, color="#666666", fontsize=9)


def _line(axes: Any, x: Any, y: Any, row: Row, colour: str, index: int, joined: bool = True) -> None:
    """Points, joined where they form a curve: dashed and hollow for an estimate."""
    axes.plot(
        x,
        y,
        color=colour,
        linestyle="none" if not joined else (0, (5, 2)) if row.estimated else "-",
        linewidth=1.8,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4.2 if joined else 5.5,
        markerfacecolor="white" if row.estimated else colour,
        markeredgewidth=1.1,
        alpha=1.0 if joined else 0.85,
        label=row.series,
    )


# -- time against N --------------------------------------------------------------------------------------


def time_picture(pyplot: Any, document: Document) -> Any:
    """Log-log, a line a series, its band from p10 to p90; against the work where shapes are not square."""
    square = by_series(document.results, square=True)
    lines = square if any(len(rows) > 1 for rows in square.values()) else by_series(document.results)
    if not lines:
        return None
    is_square = lines is square
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2))
    for index, (name, rows) in enumerate(lines.items()):
        colour = colours_of(list(lines))[name]
        x = [row.n if is_square else row.work / 1e9 for row in rows]
        _line(axes, x, [_ms(row.time_s) for row in rows], rows[0], colour, index, is_square)
        if is_square and not rows[0].estimated:
            low, high = (
                [_ms(getattr(row, f"time_{p}_s") or row.time_s) for row in rows] for p in ("p10", "p90")
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xscale="log", yscale="log", ylabel="time of one product, ms")
    if is_square:
        axes.set_xlabel("N  (M = K = N)")
        size_ticks(axes, sorted({row.n for rows in lines.values() for row in rows}))
        _mark_crossovers(axes, crossovers(document.results), MOST_LINES - len(lines))
    else:
        axes.set_xlabel("work of the product (2 M K N), GFLOP")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Time of a matrix product")
    band = (
        "; bands: p10 to p90" if is_square and any(not rows[0].estimated for rows in lines.values()) else ""
    )
    _subtitle(axes, document, band)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return figure


def size_ticks(axes: Any, sizes: Sequence[int]) -> None:
    """Powers of two within the sizes, as plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    ticks = [2**i for i in range(21) if min(sizes) <= 2**i <= max(sizes)]
    axes.xaxis.set_major_locator(FixedLocator(ticks or list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _mark_crossovers(axes: Any, found: Sequence[Crossover], room: int) -> None:
    """A numbered ring at each, and `room` lines at most of explanation beside the picture, where they hide nothing."""
    chosen = sorted(found, key=lambda one: not one.estimated)[: max(0, room)]
    chosen = sorted(chosen, key=lambda one: one.size)
    for numbers, place in _together(chosen):
        axes.plot(
            [place.size],
            [place.time_s * 1e3],
            "o",
            markersize=13,
            color="white",
            markeredgecolor="#222222",
            zorder=5,
            alpha=0.9,
        )
        axes.annotate(
            numbers,
            (place.size, place.time_s * 1e3),
            ha="center",
            va="center",
            fontsize=8 if len(numbers) < 3 else 6.5,
            zorder=6,
            fontweight="bold",
        )
    for number, one in enumerate(chosen, 1):
        axes.text(
            1.02,
            0.045 * (len(chosen) - number),
            f"{number}  N = {one.size:.0f}: {_short(one.winner)} passes {_short(one.loser)}",
            transform=axes.transAxes,
            fontsize=8.5,
            color="#333333",
        )
    if chosen:
        heading = "crossovers" + (" (~ estimate)" if any(one.estimated for one in chosen) else "")
        axes.text(1.02, 0.045 * len(chosen), heading, transform=axes.transAxes, fontsize=9, fontweight="bold")


def _together(chosen: Sequence[Crossover]) -> list[tuple[str, Crossover]]:
    """The numbers of those that would hide each other, such as 4-6, and the first of them."""
    found: list[list[int]] = []
    for i, one in enumerate(chosen):
        first = chosen[found[-1][0]] if found else one
        if found and one.size < 1.05 * first.size and 0.8 < one.time_s / first.time_s < 1.25:
            found[-1].append(i)
        else:
            found.append([i])
    return [(f"{f[0] + 1}-{f[-1] + 1}" if f[1:] else f"{f[0] + 1}", chosen[f[0]]) for f in found]


def _short(series: str) -> str:
    return series.replace(" (estimate)", "~")


# -- roofline --------------------------------------------------------------------------------------------


def roofline_picture(pyplot: Any, document: Document) -> Any:
    """GFLOP/s against operations per byte, under the machine's roof and under the one of the compiler's model."""
    lines = by_series(document.results)
    if not lines:
        return None
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2))
    intensity = {name: np.array([_intensity(row) for row in rows]) for name, rows in lines.items()}
    low = min(float(x.min()) for x in intensity.values()) / 4
    high = max(float(x.max()) for x in intensity.values()) * 1.6
    x = np.geomspace(low, high, 300)
    labels = []
    for roof in _roofs(document):
        limit = np.minimum(roof.peak, roof.bandwidth * x) if roof.bandwidth else np.full_like(x, roof.peak)
        axes.plot(
            x, limit, color=roof.colour, linewidth=1.2, linestyle=(0, (2, 2)) if roof.estimated else "-"
        )
        labels.append((roof.peak, roof.label, roof.colour))
    colours = colours_of(list(lines))
    for index, (name, rows) in enumerate(lines.items()):
        joined = all(row.is_square for row in rows)
        _line(axes, intensity[name], [row.gflops for row in rows], rows[0], colours[name], index, joined)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte of A, B and C", ylabel="GFLOP/s")
    _plain_ticks(axes)
    _outside_labels(axes, sorted(labels))
    axes.set_title("Roofline: how fast, and what sets the limit")
    measured = document.machine.get("bandwidth_gb_per_s")
    memory = (
        f"; memory read at {measured:.0f} GB/s, what fits into a cache may lie above that" if measured else ""
    )
    _subtitle(axes, document, memory)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.01, -0.1), ncols=4)
    return figure


@dataclass(frozen=True)
class _Roof:
    """GFLOP/s that cannot be passed, and the GB/s that set a lower limit where operations per byte are few."""

    peak: float
    bandwidth: float | None
    label: str
    colour: str
    estimated: bool = False


def _roofs(document: Document) -> list[_Roof]:
    """This machine's: its best product of each dtype, where that is no slower than fp32's (which would be for want of
    a good routine, not a limit of the hardware). And the NPU's, if there are estimates."""
    bandwidth = document.machine.get("bandwidth_gb_per_s")
    found = peaks(document.machine, document.results)
    roofs = [
        _Roof(peak, bandwidth, f"{dtype} {peak:.0f}: best here", "#333333")
        for dtype, peak in found.items()
        if peak >= found.get("fp32", 0.0)
    ]
    estimated = {row.dtype for row in document.results if row.estimated}
    for peak in {rknn.PEAK[dtype] / 1e9 for dtype in estimated}:
        dtypes = "/".join(sorted(dtype for dtype in estimated if rknn.PEAK[dtype] / 1e9 == peak))
        label = (
            f"{dtypes} {peak:.0f}: an RK3588 core by\nthe compiler's model ({rknn.BANDWIDTH / 1e9:.0f} GB/s)"
        )
        roofs.append(_Roof(peak, rknn.BANDWIDTH / 1e9, label, NPU, estimated=True))
    return roofs


def _outside_labels(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Texts right of the picture, level with what they name, each at least its own height above the one below."""
    bottom, top = axes.get_ylim()
    lowest = 0.0
    for y, text, colour in labels:
        level = float(np.log(y / bottom) / np.log(top / bottom))
        height = 0.042 * (1 + text.count("\n"))
        place = max(level, lowest + height / 2)
        lowest = place + height / 2
        axes.annotate(
            text,
            (1, level),
            xytext=(1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 0},
        )


def _plain_ticks(axes: Any) -> None:
    """1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def _intensity(row: Row) -> float:
    assert row.gflops is not None and row.gb_per_s is not None
    return row.gflops / row.gb_per_s


# -- bars ------------------------------------------------------------------------------------------------


def bar_picture(pyplot: Any, document: Document, wanted: Sequence[int]) -> Any:
    """A panel a size, bars in order of time, each panel on its own scale from zero."""
    rows = [row for row in document.results if row.time_s is not None]
    square = sorted({row.n for row in rows if row.is_square})
    shapes: list[tuple[int, int, int]] = [(n, n, n) for n in _bar_sizes(square, wanted)]
    if not shapes:
        shapes = _bar_shapes({row.size for row in rows})
    if not shapes:
        return None
    colours = colours_of(list(by_series(rows)))
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    series = max(sum(row.size == shape for row in rows) for shape in shapes)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns, 0.9 + lines * (0.85 + 0.36 * series)), squeeze=False
    )
    for axes, shape in zip(panels.flat, shapes, strict=False):
        some = sorted((row for row in rows if row.size == shape), key=lambda row: -(row.time_s or 0))
        _panel(axes, some, colours)
        title = f"N = {shape[0]}" if len(set(shape)) == 1 else "x".join(map(str, shape))
        axes.set_title(title, fontsize=11, pad=6)
    for axes in list(panels.flat)[len(shapes) :]:
        axes.set_visible(False)
    hatched = (
        "; hatched: the compiler's estimate for one RK3588 core" if any(row.estimated for row in rows) else ""
    )
    machine = document.machine
    figure.suptitle("Time of a matrix product, ms", x=0.01, ha="left", fontsize=13, fontweight="bold")
    text = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores{hatched}; lines: p10 to p90"
    figure.supxlabel(text, x=0.01, ha="left", fontsize=9, color="#666666")
    return figure


def _bar_sizes(square: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The measured sizes nearest to those wanted."""
    targets = wanted or (512, 1024, 2048, 4096)
    return sorted({min(square, key=lambda size: abs(size - target)) for target in targets}) if square else []


def _bar_shapes(sizes: set[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The matrix with the most row counts, the largest of several, at four of those."""
    matrices: dict[tuple[int, int], list[int]] = {}
    for m, k, n in sizes:
        matrices.setdefault((k, n), []).append(m)
    if not matrices:
        return []
    (k, n), rows = max(matrices.items(), key=lambda item: (len(item[1]), item[0][0] * item[0][1], item[0]))
    return [(m, k, n) for m in sorted(rows)[:4]]


def _panel(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    most = max((_ms(row.time_p90_s or row.time_s) for row in rows), default=1.0)
    for place, row in enumerate(rows):
        value = _ms(row.time_s)
        axes.barh(
            place,
            value,
            height=0.68,
            color="white" if row.estimated else colours[row.series],
            edgecolor=colours[row.series],
            hatch="////" if row.estimated else None,
            linewidth=1.2,
        )
        if row.time_p10_s is not None and row.time_p90_s is not None:
            span = [[value - _ms(row.time_p10_s)], [_ms(row.time_p90_s) - value]]
            axes.errorbar(value, place, xerr=span, color="#222222", linewidth=1, capsize=2)
        end = max(value, _ms(row.time_p90_s or 0.0))
        text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        axes.text(end + most * 0.02, place, ("~" if row.estimated else "") + text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.series for row in rows])
    axes.set_xlim(0, most * 1.17)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _ms(seconds: float | None) -> float:
    return 0.0 if seconds is None else seconds * 1e3
