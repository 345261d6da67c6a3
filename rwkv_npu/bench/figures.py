"""What all pictures have in common: how they look, and that they can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rwkv_npu.errors import UsageError

KINDS = ("png", "svg")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "rwkv_npu",
    "figure.constrained_layout.use": True,
}


def check(path: Path, files: Iterable[Path]) -> None:
    """Raises UsageError now, before anything is measured, where `files` could not be written then; `path` is what was
    asked for."""
    if path.suffix.lower().lstrip(".") not in KINDS:
        raise UsageError(f"--plot {path}: the name must end in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'rwkv_npu[bench]'") from None
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        for file in files:
            if file.exists():
                file.open("ab").close()
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot write there: {error.strerror}") from error


def save(figure: Any, path: Path) -> None:
    """Raises UsageError."""
    # A date would make every SVG another file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, metadata=metadata)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
