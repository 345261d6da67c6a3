"""Progress of long work: a bar on a terminal; in a log, a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from tqdm import tqdm

LINE_S = 15.0  # seconds between two lines, and before the first: short work prints none

Progress: TypeAlias = "tqdm[Any]"


class _Lines:
    """A file for tqdm that turns each state of the bar into a line on stderr."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    desc: str, unit: str, *, over: Iterable[Any] | None = None, total: int | None = None, initial: int = 0
) -> Progress:
    """Make a bar on stderr. It counts the items of `over`, or those that `update` reports."""
    shown: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial, "leave": False}
    if not sys.stderr.isatty():
        shown |= {"file": _Lines(), "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed}"}
        shown |= {"delay": LINE_S, "mininterval": LINE_S, "maxinterval": LINE_S, "miniters": 1}
    return tqdm(over, **shown)
