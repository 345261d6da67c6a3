"""The picture of `bench inference`: speeds of writing and reading, and the parts of a token's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_npu.bench.document import PREFILLS, Document, ModelRow, by_model
from rwkv_npu.bench.plot import BOARD_CPU, GREY, HATCH, NPU, machine_text, open_pyplot, save
from rwkv_npu.runtime import rk3588

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
# The longest bar is cut short if it is longer than this times the second. Its value stands beside it.
CUT = 2.5


def draw_inference(document: Document[ModelRow], path: Path) -> list[Path]:
    """Draw the picture of all models. Returns its path in a list. Raises UsageError.

    Board estimates are drawn for LPDDR5 only; the table has both kinds of DRAM.
    """
    subjects = [shown for rows in by_model(document.results) if (shown := [r for r in rows if _is_shown(r)])]
    counts = [len(rows) for rows in subjects]
    with open_pyplot() as pyplot:
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
            position = {"xytext": (-225, 24), "xycoords": "axes fraction", "textcoords": "offset points"}
            line[0].annotate(title, (0, 1), fontweight="bold", va="center", **position)
        _legends(figure, subjects, document)
        save(pyplot, figure, path)
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
    """One bar for each row, with its value and a line from the slow to the fast end."""
    for y, row in enumerate(rows):
        value = getattr(row, field)
        if value is None:
            axes.text(0, y, "  not measured", va="center", color=GREY)
            continue
        style = {"hatch": HATCH, "facecolor": "white"} if row.estimated else {"facecolor": _colour(row)}
        axes.barh(y, value, 0.68, edgecolor=_colour(row), **style)
        low, high = getattr(row, f"{field}_p10"), getattr(row, f"{field}_p90")
        if low is not None and high is not None:
            axes.plot((low, high), (y, y), color="#222222", linewidth=1.6)
        axes.text(max(value, high or 0), y, f"  {_speed_text(value, row.estimated)}", va="center")
    _finish(axes, rows, title)
    axes.margins(x=0.2)


def _stacks(axes: Any, rows: Sequence[ModelRow], title: str) -> None:
    totals = [sum(row.decode_ms.values()) for row in rows]
    longest, second = (sorted(totals, reverse=True) + [0.0])[:2]
    limit = 1.35 * second if second and longest > CUT * second else longest
    for y, (row, total) in enumerate(zip(rows, totals, strict=True)):
        left = 0.0
        for part, (_, colour) in PARTS.items():
            width = min(row.decode_ms.get(part, 0.0), max(0.0, limit - left))
            style = {"hatch": HATCH, "facecolor": "white"} if row.estimated else {"facecolor": colour}
            if width:
                axes.barh(y, width, 0.68, left, edgecolor=colour, linewidth=0.8, **style)
            left += width
        cut = "\N{RIGHTWARDS ARROW} " if total > limit else ""
        axes.text(left, y, f"  {cut}{_speed_text(total, row.estimated)}", va="center")
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
    label = f"measured on {machine_text(document)} (line: 10th to 90th percentile)"
    kinds = [Patch(facecolor="#777777", edgecolor="#777777", label=label)]
    if any(row.estimated for rows in subjects for row in rows):
        label = f"~ estimate for a board with {rk3588.DRAMS[0]}, not measured (line: its range)"
        kinds.append(Patch(facecolor="white", edgecolor="#777777", hatch=HATCH, label=label))
    figure.legend(handles=parts, loc="outside upper right", ncols=len(parts), fontsize=9, handlelength=1.2)
    figure.legend(handles=kinds, loc="outside lower left", ncols=len(kinds), fontsize=9)


def _speed_text(value: float, estimated: bool) -> str:
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"~{text}" if estimated else text
