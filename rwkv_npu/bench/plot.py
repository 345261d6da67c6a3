"""Writes the pictures of a matmul sweep (pictures.py), after having made sure that they can be written."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rwkv_npu.bench import fit_picture, pictures
from rwkv_npu.bench.fit import Fit
from rwkv_npu.bench.record import Document
from rwkv_npu.errors import UsageError

KINDS = ("png", "svg")


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
    with pyplot.rc_context(pictures.style()):
        figures = {
            "time": pictures.time_picture(pyplot, document),
            "roofline": pictures.roofline_picture(pyplot, document),
            "bars": pictures.bar_picture(pyplot, document, bars),
            "fit": fit_picture.fit_picture(pyplot, document, fits),
        }
        # A date would make every SVG another file.
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        for name, figure in figures.items():
            if figure is not None:
                made.append(beside(path, name))
                try:
                    figure.savefig(made[-1], metadata=metadata)
                except OSError as error:
                    raise UsageError(f"cannot write {made[-1]}: {error.strerror}") from error
                pyplot.close(figure)
    return made
