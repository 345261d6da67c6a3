"""The picture of the fits: exponential or power law?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rwkv_npu.bench.fit import ARTICLE, Fit
from rwkv_npu.bench.pictures import colours_of, size_ticks
from rwkv_npu.bench.record import Document, Row, by_series

MOST = 5  # columns


def fit_picture(pyplot: Any, document: Document, fits: Sequence[Fit]) -> Any:
    """A column a series: points, both models, the article's curve; below, by how much the models are off."""
    lines = by_series(document.results, square=True)
    names = list(dict.fromkeys(one.series for one in fits))[:MOST]
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
    colours = colours_of(list(lines))
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
    size_ticks(bottom, [int(size) for size in n])
    bottom.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    bottom.tick_params(axis="x", labelrotation=60)
