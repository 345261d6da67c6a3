"""Writes the pictures of a matmul sweep (pictures.py), after having made sure that they can be written."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from rwkv_npu.bench import figures, fit_picture, pictures
from rwkv_npu.bench.fit import Fit
from rwkv_npu.bench.record import Document

PICTURES = ("time", "roofline", "bars", "fit")


def check(path: Path) -> None:
    """Raises UsageError now, before anything is measured, where the pictures could not be written then."""
    figures.check(path, [beside(path, name) for name in PICTURES])


def beside(path: Path, name: str) -> Path:
    """FILE-name.png for FILE.png."""
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def draw(document: Document, path: Path, fits: Sequence[Fit] = (), bars: Sequence[int] = ()) -> list[Path]:
    """Write the pictures that the rows allow; returns their paths. Raises UsageError."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    made = []
    with pyplot.rc_context(pictures.STYLE):
        drawn = (
            pictures.time_picture(pyplot, document),
            pictures.roofline_picture(pyplot, document),
            pictures.bar_picture(pyplot, document, bars),
            fit_picture.fit_picture(pyplot, document, fits),
        )
        for name, figure in zip(PICTURES, drawn, strict=True):
            if figure is not None:
                made.append(beside(path, name))
                figures.save(figure, made[-1])
                pyplot.close(figure)
    return made
