"""The pictures: time against N, the roofline, bars for chosen sizes, and the fits.

What is estimated and not measured is dashed or hatched, hollow, and says so in the legend.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.bench import rknn
from rwkv_npu.bench.crossover import Crossover, crossovers
from rwkv_npu.bench.fit import ARTICLE, Fit
from rwkv_npu.bench.record import Document, Row, by_series
from rwkv_npu.bench.roofline import peaks
from rwkv_npu.errors import UsageError

KINDS = ("png", "svg")
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
MOST_LINES = 20  # of text beside a picture: legend and crossovers


def check(path: Path) -> None:
    """Raises UsageError now, before anything is measured, where the pictures could not be written then."""
    if path.suffix.lower().lstrip(".") not in KINDS:
        raise UsageError(f"--plot {path}: the name must end in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'rwkv_npu[bench]'") from None
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        for name in ("time", "roofline", "bars", "fit"):
            if beside(path, name).exists():
                beside(path, name).open("ab").close()
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot write there: {error.strerror}") from error


def beside(path: Path, name: str) -> Path:
    """FILE-name.png for FILE.png."""
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def draw(document: Document, path: Path, fits: Sequence[Fit] = (), bars: Sequence[int] = ()) -> list[Path]:
    """Write the pictures that the rows allow; returns their paths. Raises UsageError."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    made = []
    with pyplot.rc_context(_style()):
        pictures = {
            "time": _time_picture(pyplot, document),
            "roofline": _roofline_picture(pyplot, document),
            "bars": _bar_picture(pyplot, document, bars),
            "fit": _fit_picture(pyplot, document, fits),
        }
        for name, figure in pictures.items():
            if figure is not None:
                try:
                    figure.savefig(
                        beside(path, name), metadata={"Date": None} if path.suffix == ".svg" else None
                    )
                except OSError as error:
                    raise UsageError(f"cannot write {beside(path, name)}: {error.strerror}") from error
                made.append(beside(path, name))
                pyplot.close(figure)
    return made


def _style() -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 26,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#E3E3E3",
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "rwkv_npu",
        "figure.dpi": 130,
        "figure.constrained_layout.use": True,
    }


def _colours(series: Sequence[str]) -> dict[str, str]:
    spare = iter(SPARE * 9)
    return {name: COLOURS.get(name) or next(spare) for name in series}


def _subtitle(axes: Any, document: Document, more: str = "") -> None:
    machine = document.machine
    text = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores{more}"
    axes.text(0, 1.02, text, transform=axes.transAxes, color="#666666", fontsize=9)


def _line(axes: Any, x: Any, y: Any, row: Row, colour: str, index: int, **more: Any) -> None:
    """A line and its points: dashed and hollow for an estimate."""
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=(0, (5, 2)) if row.estimated else "-",
        linewidth=1.8,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4.2,
        markerfacecolor="white" if row.estimated else colour,
        markeredgewidth=1.1,
        label=row.series,
        **more,
    )


# -- time against N --------------------------------------------------------------------------------------


def _time_picture(pyplot: Any, document: Document) -> Any:
    """Log-log, a line a series, its band from p10 to p90; against the work where shapes are not square."""
    square = by_series(document.results, square=True)
    lines = square if any(len(rows) > 1 for rows in square.values()) else by_series(document.results)
    if not lines:
        return None
    is_square = lines is square
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2))
    for index, (name, rows) in enumerate(lines.items()):
        colour = _colours(list(lines))[name]
        x = [row.n if is_square else row.work / 1e9 for row in rows]
        _line(axes, x, [_ms(row.time_s) for row in rows], rows[0], colour, index)
        if not rows[0].estimated:
            low, high = (
                [_ms(getattr(row, f"time_{p}_s") or row.time_s) for row in rows] for p in ("p10", "p90")
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xscale="log", yscale="log", ylabel="time of one product, ms")
    if is_square:
        axes.set_xlabel("N  (M = K = N)")
        _size_ticks(axes, sorted({row.n for rows in lines.values() for row in rows}))
        _mark_crossovers(axes, crossovers(document.results), MOST_LINES - len(lines))
    else:
        axes.set_xlabel("work of the product (2 M K N), GFLOP")
    axes.set_title("Time of a matrix product")
    band = "; bands: p10 to p90" if any(not rows[0].estimated for rows in lines.values()) else ""
    _subtitle(axes, document, band)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return figure


def _size_ticks(axes: Any, sizes: Sequence[int]) -> None:
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
    for number, one in enumerate(chosen, 1):
        y = one.time_s * 1e3
        axes.plot(
            [one.size], [y], "o", markersize=13, color="white", markeredgecolor="#222222", zorder=5, alpha=0.9
        )
        axes.text(one.size, y, str(number), ha="center", va="center", fontsize=8, zorder=6, fontweight="bold")
        line = f"{number}  N = {one.size:.0f}: {_short(one.winner)} passes {_short(one.loser)}"
        axes.text(
            1.02,
            0.045 * (len(chosen) - number),
            line,
            transform=axes.transAxes,
            fontsize=8.5,
            color="#333333",
        )
    if chosen:
        heading = "crossovers" + (" (~ estimate)" if any(one.estimated for one in chosen) else "")
        axes.text(1.02, 0.045 * len(chosen), heading, transform=axes.transAxes, fontsize=9, fontweight="bold")


def _short(series: str) -> str:
    return series.replace(" (estimate)", "~")


# -- roofline --------------------------------------------------------------------------------------------


def _roofline_picture(pyplot: Any, document: Document) -> Any:
    """GFLOP/s against operations per byte, under the machine's roof and under the one of the compiler's model."""
    lines = by_series(document.results)
    if not lines:
        return None
    figure, axes = pyplot.subplots(figsize=(11.5, 6.2))
    intensity = {name: np.array([_intensity(row) for row in rows]) for name, rows in lines.items()}
    low = min(float(x.min()) for x in intensity.values()) / 4
    high = max(float(x.max()) for x in intensity.values()) * 1.6
    x = np.geomspace(low, high, 300)
    bandwidth = document.machine.get("bandwidth_gb_per_s")
    labels = []
    for dtype, peak in _roofs(document).items():
        roof = np.minimum(peak, bandwidth * x) if bandwidth else np.full_like(x, peak)
        axes.plot(x, roof, color="#333333", linewidth=1.2)
        labels.append((peak, f"best {dtype} here: {peak:.0f} GFLOP/s", "#333333"))
    if bandwidth:
        axes.plot(
            [],
            [],
            color="#333333",
            linewidth=1.2,
            label=f"this machine: memory {bandwidth:.0f} GB/s, best products",
        )
    estimated = {row.dtype for rows in lines.values() for row in rows if row.estimated}
    for peak in sorted({rknn.PEAK[dtype] / 1e9 for dtype in estimated}):
        dtypes = "/".join(sorted(dtype for dtype in estimated if rknn.PEAK[dtype] / 1e9 == peak))
        roof = np.minimum(peak, rknn.BANDWIDTH / 1e9 * x)
        axes.plot(
            x,
            roof,
            color=NPU,
            linewidth=1.2,
            linestyle=(0, (2, 2)),
            label=f"{dtypes} roof of the compiler's model",
        )
        labels.append(
            (peak, f"RK3588, 1 core, {dtypes}: {peak:.0f} GFLOP/s, {rknn.BANDWIDTH / 1e9:.0f} GB/s", NPU)
        )
    labels.sort()
    _right_labels(axes, high, labels)
    for index, (name, rows) in enumerate(lines.items()):
        _line(
            axes, intensity[name], [row.gflops for row in rows], rows[0], _colours(list(lines))[name], index
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte of A, B and C", ylabel="GFLOP/s")
    _plain_ticks(axes)
    axes.set_title("Roofline: how fast, and what sets the limit")
    _subtitle(axes, document, "; what fits into a cache may lie above the line of memory")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return figure


def _plain_ticks(axes: Any) -> None:
    """1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def _roofs(document: Document) -> dict[str, float]:
    """The peaks that are limits of the machine: a dtype slower than fp32 lacks a good routine, not hardware."""
    found = peaks(document.machine, document.results)
    floor = found.get("fp32", 0.0)
    return {dtype: peak for dtype, peak in sorted(found.items(), key=lambda item: item[1]) if peak >= floor}


def _right_labels(axes: Any, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Texts on horizontal lines, at their right end; a line too near the one below has its text further left."""
    shift, last = 0.0, 0.0
    for y, text, colour in labels:
        shift = shift + 0.27 if last and y < 1.35 * last else 0.0
        last = y
        where = axes.get_yaxis_transform()
        axes.text(
            0.995 - shift,
            y * 1.04,
            text,
            transform=where,
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=colour,
        )


def _intensity(row: Row) -> float:
    assert row.gflops is not None and row.gb_per_s is not None
    return row.gflops / row.gb_per_s


# -- bars ------------------------------------------------------------------------------------------------


def _bar_picture(pyplot: Any, document: Document, wanted: Sequence[int]) -> Any:
    """A panel a size, bars in order of time, each panel on its own scale from zero."""
    rows = [row for row in document.results if row.time_s is not None]
    square = sorted({row.n for row in rows if row.is_square})
    shapes: list[tuple[int, int, int]] = [(n, n, n) for n in _bar_sizes(square, wanted)]
    if not shapes:
        shapes = sorted({row.size for row in rows}, key=lambda size: size[0] * size[1] * size[2])[-4:]
    if not shapes:
        return None
    colours = _colours(list(by_series(rows)))
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


# -- fits ------------------------------------------------------------------------------------------------


def _fit_picture(pyplot: Any, document: Document, fits: Sequence[Fit]) -> Any:
    """A column a series: points, both models, the article's curve; below, by how much the models are off."""
    lines = by_series(document.results, square=True)
    names = list(dict.fromkeys(one.series for one in fits))[:5]
    if not names:
        return None
    figure, panels = pyplot.subplots(
        2,
        len(names),
        figsize=(3.5 * len(names) + 1, 6.6),
        squeeze=False,
        sharex=True,
        sharey="row",
        height_ratios=(3, 1.4),
    )
    colours = _colours(list(lines))
    for column, name in enumerate(names):
        _fit_column(
            panels[:, column],
            lines[name],
            {(f.model, f.weights): f for f in fits if f.series == name},
            colours[name],
        )
        panels[0, column].set_title(name, fontsize=11, pad=6)
    panels[0, 0].set_ylabel("time, s")
    panels[1, 0].set_ylabel("measured / model")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle("Exponential or power law?", x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _fit_column(panels: Any, rows: Sequence[Row], fits: dict[tuple[str, str], Fit], colour: str) -> None:
    top, bottom = panels
    n = np.array([row.n for row in rows], float)
    t = np.array([row.time_s for row in rows], float)
    x = np.geomspace(n.min(), n.max(), 300)
    face = "white" if rows[0].estimated else colour
    top.plot(n, t, "o", color=colour, markerfacecolor=face, markersize=4, label="times (hollow: estimates)")
    styles = {
        ("power", "repeats"): ("#222222", "-", "power law a (N/1024)^b + t0"),
        ("exponential", "repeats"): ("#0072B2", "--", "exponential, weighted by the repeats"),
        ("exponential", "equal"): ("#D55E00", "-.", "exponential, equal weights (as the article)"),
    }
    for key, (tint, dashes, label) in styles.items():
        if key in fits:
            top.plot(x, fits[key].time(x), color=tint, linestyle=dashes, linewidth=1.4, label=label)
            bottom.plot(
                n,
                t / fits[key].time(n),
                color=tint,
                linestyle=dashes,
                linewidth=1.2,
                marker=".",
                markersize=3,
            )
    label = "the article's exponential, RK3588 in 2023 (seconds assumed)"
    top.plot(x, ARTICLE.time(x), color="#999999", linestyle=":", linewidth=1.6, label=label)
    bottom.axhline(1, color="#999999", linewidth=0.8)
    top.set(xscale="log", yscale="log")
    bottom.set(xscale="log", yscale="log", ylim=(0.2, 5), xlabel="N")
    bottom.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    bottom.minorticks_off()
    _size_ticks(bottom, [int(size) for size in n])
    bottom.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    bottom.tick_params(axis="x", labelrotation=60)


def _ms(seconds: float | None) -> float:
    return 0.0 if seconds is None else seconds * 1e3
