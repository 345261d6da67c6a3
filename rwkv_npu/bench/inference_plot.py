"""One picture: each model's speed in writing and in reading, and where the time of a token goes.

CPU and NPU stand side by side. What is estimated and not measured is hatched, and says so in its name and in the
legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_npu.bench import figures
from rwkv_npu.bench.inference_record import PREFILLS, Document, Row, by_model

STYLE = figures.STYLE | {"axes.titlesize": 11.5, "hatch.linewidth": 0.8, "figure.dpi": 110}
# Okabe and Ito's colours, which those who see few colours can tell apart.
PC, BOARD_CPU, NPU = "#0072B2", "#E69F00", "#CC3377"
TERMS = {
    "projections": ("projections", "#0072B2"),
    "head": ("head", "#56B4E9"),
    "recurrence": ("recurrence", "#E69F00"),
    "sampling": ("sampling", "#F0E442"),
    "calls": ("calls of the NPU", "#CC3377"),
    "dispatch": ("dispatch", "#009E73"),
    "rest": ("rest", "#999999"),
}
HATCH = "////"
FAR = 2.5  # a bar so many times as long as the next one is cut, and says how long it is


def check(path: Path) -> None:
    """Raises UsageError now, before anything is measured, where the picture could not be written then."""
    figures.check(path, [path])


def draw(document: Document, path: Path) -> None:
    """Write the picture of all rows that have a speed. Raises UsageError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects = [
        shown for rows in by_model(document.results) if (shown := [row for row in rows if row.decode_tps])
    ]
    counts = [len(rows) for rows in subjects]
    with pyplot.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = pyplot.subplots(
            len(subjects),
            3,
            figsize=(15, 2.0 + sum(0.46 * count + 0.9 for count in counts)),
            squeeze=False,
            gridspec_kw={"width_ratios": (1, 1, 1.35), "height_ratios": [count + 1.5 for count in counts]},
        )
        for line, rows in zip(axes, subjects, strict=True):
            _bars(line[0], rows, "decode_tps", "Writing: tokens/s")
            _bars(line[1], rows, f"prefill_{PREFILLS[0]}_tps", f"Reading {PREFILLS[0]} tokens: tokens/s")
            _stacks(line[2], rows, "Where a token's time goes: ms")
            line[0].set_yticks(range(len(rows)), [_name(row, document.machine) for row in rows])
            first = rows[0]
            title = f"{first.model}\nRWKV-{first.generation}, {first.parameters / 1e6:.3g} M parameters"
            place = {"xytext": (-225, 24), "xycoords": "axes fraction", "textcoords": "offset points"}
            line[0].annotate(title, (0, 1), fontweight="bold", va="center", **place)
        _legends(figure, subjects)
        figures.save(figure, path)
        pyplot.close(figure)


def _name(row: Row, machine: Mapping[str, Any]) -> str:
    if row.estimated:
        chip, how = row.device.split(", ", 1)
        return f"{chip} {row.precision}\n{how} (estimate)"
    return f"{row.backend} {row.precision}\n{machine.get('cpu', 'this machine')}, {machine.get('cores', '?')} cores"


def _colour(row: Row) -> str:
    return NPU if row.backend.startswith("rknn") else BOARD_CPU if row.estimated else PC


def _bars(axes: Any, rows: Sequence[Row], field: str, title: str) -> None:
    """A bar a row, with its value; the spread of the repeats as a line."""
    for place, row in enumerate(rows):
        value = getattr(row, field)
        if value is None:
            axes.text(0, place, "  not measured", va="center", color="#666666")
            continue
        style = {"hatch": HATCH, "facecolor": "white"} if row.estimated else {"facecolor": _colour(row)}
        axes.barh(place, value, 0.68, edgecolor=_colour(row), **style)
        low, high = getattr(row, f"{field}_p10"), getattr(row, f"{field}_p90")
        if low is not None and high is not None:
            axes.plot((low, high), (place, place), color="#222222", linewidth=1.6)
        axes.text(max(value, high or 0), place, f"  {_figure(value, row.estimated)}", va="center")
    _finish(axes, rows, title)
    axes.margins(x=0.2)


def _stacks(axes: Any, rows: Sequence[Row], title: str) -> None:
    totals = [sum(row.decode_ms.values()) for row in rows]
    longest, second = (sorted(totals, reverse=True) + [0.0])[:2]
    limit = 1.35 * second if second and longest > FAR * second else longest
    for place, (row, total) in enumerate(zip(rows, totals, strict=True)):
        left = 0.0
        for term, (_, colour) in TERMS.items():
            width = min(row.decode_ms.get(term, 0.0), max(0.0, limit - left))
            style = {"hatch": HATCH, "facecolor": "white"} if row.estimated else {"facecolor": colour}
            if width:
                axes.barh(place, width, 0.68, left, edgecolor=colour, linewidth=0.8, **style)
            left += width
        cut = "\N{RIGHTWARDS ARROW} " if total > limit else ""
        axes.text(left, place, f"  {cut}{_figure(total, row.estimated)}", va="center")
    _finish(axes, rows, title)
    axes.set_xlim(0, 1.18 * limit)


def _finish(axes: Any, rows: Sequence[Row], title: str) -> None:
    axes.set_title(title)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(axis="x")


def _legends(figure: Any, subjects: Sequence[Sequence[Row]]) -> None:
    from matplotlib.patches import Patch

    present = {term for rows in subjects for row in rows for term, ms in row.decode_ms.items() if ms}
    terms = [Patch(color=colour, label=label) for term, (label, colour) in TERMS.items() if term in present]
    label = "measured (line: 10th to 90th percentile of the repeats)"
    kinds = [Patch(facecolor="#777777", edgecolor="#777777", label=label)]
    if any(row.estimated for rows in subjects for row in rows):
        label = (
            "~ estimate, not measured: compiler's cycles, bandwidths that others measured, CPU's share scaled"
        )
        kinds.append(Patch(facecolor="white", edgecolor="#777777", hatch=HATCH, label=label))
    figure.legend(handles=terms, loc="outside upper right", ncols=len(terms), fontsize=9, handlelength=1.2)
    figure.legend(handles=kinds, loc="outside lower left", ncols=len(kinds), fontsize=9)


def _figure(value: float, estimated: bool) -> str:
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"~{text}" if estimated else text
