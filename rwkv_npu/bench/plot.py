"""Pictures of both benchmarks. Estimates are dashed or hatched and hollow, published figures are stars.

Of a matmul sweep there are four files, FILE-time, -roofline, -bars and -fit; of inference one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.bench import INSTALL
from rwkv_npu.bench.analysis import ARTICLE, Crossover, Fit, crossovers
from rwkv_npu.bench.document import PREFILLS, Document, ModelRow, ProductRow, by_model, by_series
from rwkv_npu.bench.machine import peaks
from rwkv_npu.errors import UsageError
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.rk3588 import TERMS

PICTURES = ("time", "roofline", "bars", "fit")
KINDS = ("png", "svg")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "rwkv_npu",
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
}
# Okabe and Ito's colours, which people who see few colours can tell apart. The board has the warm ones.
BOARD_CPU, NPU, PUBLISHED = "#E69F00", "#CC3377", "#111111"
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
HATCH = "////"
GREY = "#666666"
MOST_LINES = 20  # of text beside a picture: legend and crossovers


def check_matmul(path: Path) -> None:
    """Raises UsageError before anything is measured, where the pictures could not be written."""
    check(path, [beside(path, name) for name in PICTURES])


def check(path: Path, files: Sequence[Path] | None = None) -> None:
    """Raises UsageError where `files` (`path` itself) cannot be written."""
    if path.suffix.lower().lstrip(".") not in KINDS:
        raise UsageError(f"--plot {path}: the name must end in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(f"pictures need matplotlib: {INSTALL}") from None
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        for file in [path] if files is None else files:
            if file.exists():
                file.open("ab").close()
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot write there: {error.strerror}") from error


def beside(path: Path, name: str) -> Path:
    """FILE-name.png for FILE.png."""
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


@contextmanager
def _pyplot() -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):  # type: ignore[arg-type]
        yield pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    # A date would make every SVG another file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, metadata=metadata)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def draw_matmul(
    document: Document[ProductRow], path: Path, fits: Sequence[Fit] = (), bars: Sequence[int] = ()
) -> list[Path]:
    """Write the pictures that the rows allow; returns their paths. Raises UsageError."""
    made = []
    with _pyplot() as pyplot:
        figures = (
            _time_picture(pyplot, document),
            _roofline_picture(pyplot, document),
            _bar_picture(pyplot, document, bars),
            _fit_picture(pyplot, document, fits),
        )
        for name, figure in zip(PICTURES, figures, strict=True):
            if figure is not None:
                made.append(beside(path, name))
                _save(pyplot, figure, made[-1])
    return made


def _colours(series: Sequence[str]) -> dict[str, str]:
    spare = iter(SPARE * 9)
    return {name: COLOURS.get(name) or next(spare) for name in series}


def _machine(document: Document[Any]) -> str:
    facts = document.machine
    parts = [
        str(facts.get("cpu", "?")),
        str(facts.get("instruction_set", "")),
        f"{facts.get('cores', '?')} cores",
    ]
    return ", ".join(part for part in parts if part)


def _subtitle(axes: Any, document: Document[Any], more: str = "") -> None:
    axes.set_title(axes.get_title(loc="left"), pad=24)
    text = f"measured on {_machine(document)}{more}"
    axes.text(0, 1.02, text, transform=axes.transAxes, color=GREY, fontsize=9)


def _line(axes: Any, x: Any, y: Any, row: ProductRow, colour: str, index: int, joined: bool = True) -> None:
    """Points, joined where they form a curve: dashed and hollow for an estimate, stars where others measured."""
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
    """Log-log, a line a series, its band the spread or the range; against the work where shapes are not square."""
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
        found = crossovers(document.results, one_machine="board" in document.machine)
        _mark_crossovers(axes, found, MOST_LINES - len(lines))
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
    """Powers of two within the sizes, as plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    ticks = [2**i for i in range(21) if min(sizes) <= 2**i <= max(sizes)]
    axes.xaxis.set_major_locator(FixedLocator(ticks or list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _mark_crossovers(axes: Any, found: Sequence[Crossover], room: int) -> None:
    """A numbered ring at each, and at most `room` lines of explanation beside the picture."""
    chosen = sorted(found, key=lambda one: not one.estimated)[: max(0, room)]
    chosen = sorted(chosen, key=lambda one: one.size)
    for numbers, place in _together(chosen):
        point = (place.size, place.time_s * 1e3)
        ring = {"markersize": 13, "color": "white", "markeredgecolor": "#222222", "zorder": 5, "alpha": 0.9}
        axes.plot([point[0]], [point[1]], "o", **ring)
        size = 8 if len(numbers) < 3 else 6.5
        text = {"ha": "center", "va": "center", "fontsize": size, "zorder": 6, "fontweight": "bold"}
        axes.annotate(numbers, point, **text)
    for number, one in enumerate(chosen, 1):
        line = f"{number}  N = {one.size:.0f}: {_short(one.winner)} passes {_short(one.loser)}"
        height = 0.045 * (len(chosen) - number)
        axes.text(1.02, height, line, transform=axes.transAxes, fontsize=8.5, color="#333333")
    if chosen:
        heading = "crossovers" + (" (~ estimate)" if any(one.estimated for one in chosen) else "")
        axes.text(1.02, 0.045 * len(chosen), heading, transform=axes.transAxes, fontsize=9, fontweight="bold")


def _together(chosen: Sequence[Crossover]) -> list[tuple[str, Crossover]]:
    """The numbers of crossovers that would hide each other, such as 4-6, and the first of them."""
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

Roof = tuple[float, float | None, str, str, bool]  # GFLOP/s, GB/s, label, colour, estimated


def _roofline_picture(pyplot: Any, document: Document[ProductRow]) -> Any:
    """GFLOP/s against operations per byte, under the roofs of this machine and of the board."""
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
    """This machine's best product of each dtype that is no slower than fp32's, and the NPU's by the estimates."""
    bandwidth = document.machine.get("bandwidth_gb_per_s")
    found = peaks(document.machine, document.results)
    roofs: list[Roof] = [
        (peak, bandwidth, f"{dtype} {peak:.0f}: best here", "#333333", False)
        for dtype, peak in found.items()
        if peak >= found.get("fp32", 0.0)
    ]
    dtypes = {row.dtype for row in document.results if row.estimated and row.backend == "rknn"}
    read = TERMS["npu_read_lpddr5"].central
    for bits in sorted({8 if dtype == "int8" else 16 for dtype in dtypes}):
        peak = rk3588.NPU_FLOPS[bits] / TERMS["graph_over_table"].central / 1e9
        label = f"{'int8' if bits == 8 else 'fp16'} {peak:.0f}: an RK3588 core,\nestimated ({read:g} GB/s)"
        roofs.append((peak, read, label, NPU, True))
    return roofs


def _outside_labels(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Texts right of the picture, level with their lines, each at least its own height above the one below."""
    bottom, top = axes.get_ylim()
    lowest = 0.0
    for y, text, colour in labels:
        level = float(np.log(y / bottom) / np.log(top / bottom))
        height = 0.05 * (1 + text.count("\n"))
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


def _intensity(row: ProductRow) -> float:
    assert row.gflops is not None and row.gb_per_s is not None
    return row.gflops / row.gb_per_s


# -- bars ------------------------------------------------------------------------------------------------


def _bar_picture(pyplot: Any, document: Document[ProductRow], wanted: Sequence[int]) -> Any:
    """A panel a size on its own scale from zero: the board above, this machine below, each in order of time."""
    rows = [row for row in document.results if row.time_s is not None]
    square = sorted({row.n for row in rows if row.is_square})
    shapes: list[tuple[int, int, int]] = [(n, n, n) for n in _bar_sizes(square, wanted)]
    shapes = shapes or _bar_shapes({row.size for row in rows})
    if not shapes:
        return None
    colours = _colours(list(by_series(rows)))
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    most = max(sum(row.size == shape for row in rows) for shape in shapes)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5.6 * columns, 0.9 + lines * (0.95 + 0.36 * most)), squeeze=False
    )
    for axes, shape in zip(panels.flat, shapes, strict=False):
        some = sorted((row for row in rows if row.size == shape), key=lambda row: -(row.time_s or 0))
        here = [row for row in some if row.is_measured_here]
        _panel(axes, here, [row for row in some if not row.is_measured_here], colours)
        title = f"N = {shape[0]}" if len(set(shape)) == 1 else "x".join(map(str, shape))
        axes.set_title(title, fontsize=11, pad=6)
    for axes in list(panels.flat)[len(shapes) :]:
        axes.set_visible(False)
    figure.suptitle("Time of a matrix product, ms", x=0.01, ha="left", fontsize=13, fontweight="bold")
    text = f"filled: measured on {_machine(document)}"
    if any(row.estimated for row in rows):
        text += "; hatched: estimates for an RK3588, lines their range"
    if any(row.published for row in rows):
        text += "; dotted: published board measurements"
    figure.supxlabel(text, x=0.01, ha="left", fontsize=9, color=GREY)
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


def _panel(
    axes: Any, here: Sequence[ProductRow], board: Sequence[ProductRow], colours: Mapping[str, str]
) -> None:
    rows = [*here, *board]
    gap = 0.5 if here and board else 0.0
    places = [i + (gap if i >= len(here) else 0.0) for i in range(len(rows))]
    most = max((_ms(row.time_p90_s or row.time_s) for row in rows), default=1.0)
    for place, row in zip(places, rows, strict=True):
        value, colour = _ms(row.time_s), colours[row.series]
        style: dict[str, Any] = {"color": colour}
        if not row.is_measured_here:
            style = {"color": "white", "hatch": HATCH if row.estimated else "...."}
        axes.barh(place, value, height=0.68, edgecolor=colour, linewidth=1.2, **style)
        if row.time_p10_s is not None and row.time_p90_s is not None:
            span = [[value - _ms(row.time_p10_s)], [_ms(row.time_p90_s) - value]]
            axes.errorbar(value, place, xerr=span, color="#222222", linewidth=1, capsize=2)
        end = max(value, _ms(row.time_p90_s or 0.0))
        text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        axes.text(end + most * 0.02, place, ("~" if row.estimated else "") + text, va="center", fontsize=9)
    axes.set_yticks(places, [row.series for row in rows])
    if gap:
        axes.axhline(len(here) - 0.25, color="#BBBBBB", linewidth=0.8)
    axes.set_xlim(0, most * 1.17)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _ms(seconds: float | None) -> float:
    return 0.0 if seconds is None else seconds * 1e3


# -- fits ------------------------------------------------------------------------------------------------

MOST_FITS = 5  # columns
CURVES = {
    ("power", "repeats"): ("#222222", "-", "power law a (N/1024)^b + t0"),
    ("exponential", "repeats"): ("#0072B2", "--", "exponential, weighted by the repeats"),
    ("exponential", "equal"): ("#D55E00", "-.", "exponential, equal weights (as the article)"),
}


def _fit_picture(pyplot: Any, document: Document[ProductRow], fits: Sequence[Fit]) -> Any:
    """A column a series: points, both models, the article's curve; below, measured over model."""
    lines = by_series(document.results, square=True)
    names = list(dict.fromkeys(one.series for one in fits))
    # The board's first: the article is about it.
    names = sorted(names, key=lambda name: lines[name][0].is_measured_here)[:MOST_FITS]
    if not names:
        return None
    shape = {"figsize": (3.5 * len(names) + 1, 6.6), "height_ratios": (3, 1.4)}
    figure, panels = pyplot.subplots(2, len(names), squeeze=False, sharex=True, sharey="row", **shape)
    colours = _colours(list(lines))
    for column, name in enumerate(names):
        chosen = {(f.model, f.weights): f for f in fits if f.series == name}
        _fit_column(panels[:, column], lines[name], chosen, colours[name])
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


# -- models ----------------------------------------------------------------------------------------------

PC = "#0072B2"
PARTS = {
    "projections": ("projections", "#0072B2"),
    "head": ("head", "#56B4E9"),
    "operators": ("other operators", "#332288"),
    "io": ("conversion of inputs and outputs", "#AA4499"),
    "calls": ("calls of the NPU", "#CC3377"),
    "recurrence": ("recurrence", "#E69F00"),
    "sampling": ("sampling", "#F0E442"),
    "dispatch": ("dispatch", "#009E73"),
    "rest": ("rest", "#999999"),
}
FAR = 2.5  # a bar that is so many times as long as the next one is cut, with its length beside it


def draw_inference(document: Document[ModelRow], path: Path) -> list[Path]:
    """Write one picture: speeds in writing and reading, and the parts of a token's time. Raises UsageError.

    Of a board's two kinds of DRAM it shows LPDDR5; the table has both.
    """
    subjects = [shown for rows in by_model(document.results) if (shown := [r for r in rows if _is_shown(r)])]
    counts = [len(rows) for rows in subjects]
    with _pyplot() as pyplot:
        figure, axes = pyplot.subplots(
            len(subjects),
            3,
            figsize=(15, 2.0 + sum(0.46 * count + 0.9 for count in counts)),
            squeeze=False,
            gridspec_kw={"width_ratios": (1, 1, 1.35), "height_ratios": [count + 1.5 for count in counts]},
        )
        for line, rows in zip(axes, subjects, strict=True):
            _speed_bars(line[0], rows, "decode_tps", "Writing: tokens/s")
            _speed_bars(
                line[1], rows, f"prefill_{PREFILLS[0]}_tps", f"Reading {PREFILLS[0]} tokens: tokens/s"
            )
            _stacks(line[2], rows, "A token's time by part: ms")
            line[0].set_yticks(range(len(rows)), [_label(row) for row in rows])
            first = rows[0]
            title = f"{first.model}\nRWKV-{first.generation}, {first.parameters / 1e6:.3g} M parameters"
            place = {"xytext": (-225, 24), "xycoords": "axes fraction", "textcoords": "offset points"}
            line[0].annotate(title, (0, 1), fontweight="bold", va="center", **place)
        _legends(figure, subjects, document)
        _save(pyplot, figure, path)
    return [path]


def _is_shown(row: ModelRow) -> bool:
    return bool(row.decode_tps) and not (row.estimated and row.device.endswith(rk3588.DRAMS[1]))


def _label(row: ModelRow) -> str:
    if not row.estimated:
        return row.name
    device = row.device.removesuffix(f", {rk3588.DRAMS[0]}")
    partitioning = f", {row.fusion}" if row.backend == "rknn" else ""
    return f"{device}\n{row.precision}{partitioning} (estimate)"


def _colour(row: ModelRow) -> str:
    return NPU if row.backend.startswith("rknn") else BOARD_CPU if row.estimated else PC


def _speed_bars(axes: Any, rows: Sequence[ModelRow], field: str, title: str) -> None:
    """A bar a row with its value, and a line from the slow to the fast end."""
    for place, row in enumerate(rows):
        value = getattr(row, field)
        if value is None:
            axes.text(0, place, "  not measured", va="center", color=GREY)
            continue
        style = {"hatch": HATCH, "facecolor": "white"} if row.estimated else {"facecolor": _colour(row)}
        axes.barh(place, value, 0.68, edgecolor=_colour(row), **style)
        low, high = getattr(row, f"{field}_p10"), getattr(row, f"{field}_p90")
        if low is not None and high is not None:
            axes.plot((low, high), (place, place), color="#222222", linewidth=1.6)
        axes.text(max(value, high or 0), place, f"  {_speed_text(value, row.estimated)}", va="center")
    _finish(axes, rows, title)
    axes.margins(x=0.2)


def _stacks(axes: Any, rows: Sequence[ModelRow], title: str) -> None:
    totals = [sum(row.decode_ms.values()) for row in rows]
    longest, second = (sorted(totals, reverse=True) + [0.0])[:2]
    limit = 1.35 * second if second and longest > FAR * second else longest
    for place, (row, total) in enumerate(zip(rows, totals, strict=True)):
        left = 0.0
        for part, (_, colour) in PARTS.items():
            width = min(row.decode_ms.get(part, 0.0), max(0.0, limit - left))
            style = {"hatch": HATCH, "facecolor": "white"} if row.estimated else {"facecolor": colour}
            if width:
                axes.barh(place, width, 0.68, left, edgecolor=colour, linewidth=0.8, **style)
            left += width
        cut = "\N{RIGHTWARDS ARROW} " if total > limit else ""
        axes.text(left, place, f"  {cut}{_speed_text(total, row.estimated)}", va="center")
    _finish(axes, rows, title)
    axes.set_xlim(0, 1.18 * limit)


def _finish(axes: Any, rows: Sequence[ModelRow], title: str) -> None:
    axes.set_title(title, fontsize=11.5)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)


def _legends(figure: Any, subjects: Sequence[Sequence[ModelRow]], document: Document[ModelRow]) -> None:
    from matplotlib.patches import Patch

    present = {part for rows in subjects for row in rows for part, ms in row.decode_ms.items() if ms}
    parts = [Patch(color=colour, label=label) for part, (label, colour) in PARTS.items() if part in present]
    label = f"measured on {_machine(document)} (line: 10th to 90th percentile)"
    kinds = [Patch(facecolor="#777777", edgecolor="#777777", label=label)]
    if any(row.estimated for rows in subjects for row in rows):
        label = f"~ estimate for a board with {rk3588.DRAMS[0]}, not measured (line: its range)"
        kinds.append(Patch(facecolor="white", edgecolor="#777777", hatch=HATCH, label=label))
    figure.legend(handles=parts, loc="outside upper right", ncols=len(parts), fontsize=9, handlelength=1.2)
    figure.legend(handles=kinds, loc="outside lower left", ncols=len(kinds), fontsize=9)


def _speed_text(value: float, estimated: bool) -> str:
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"~{text}" if estimated else text
