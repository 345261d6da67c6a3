"""Style, checks and saving of the pictures of both benchmarks.

Estimates are dashed or hatched and hollow. Published figures are stars.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_npu.bench import INSTALL
from rwkv_npu.bench.document import Document
from rwkv_npu.errors import UsageError

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
# Okabe and Ito's colours, which colour-blind readers can tell apart. The board has the warm colours.
BOARD_CPU, NPU, PUBLISHED = "#E69F00", "#CC3377", "#111111"
HATCH = "////"
GREY = "#666666"


def check(path: Path, files: Sequence[Path] | None = None) -> None:
    """Raises UsageError if `files` (default: `path`) cannot be written. Call it before measuring."""
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


@contextmanager
def open_pyplot() -> Iterator[Any]:
    """matplotlib's pyplot in this style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):  # type: ignore[arg-type]
        yield pyplot


def save(pyplot: Any, figure: Any, path: Path) -> None:
    """Write a figure and close it. Raises UsageError."""
    # Without a date, the same figure gives the same SVG.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, metadata=metadata)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def machine_text(document: Document[Any]) -> str:
    """The machine's processor, instruction set and cores, for a caption."""
    facts = document.machine
    parts = [
        str(facts.get("cpu", "?")),
        str(facts.get("instruction_set", "")),
        f"{facts.get('cores', '?')} cores",
    ]
    return ", ".join(part for part in parts if part)
