"""How far something long is: a bar on a terminal, and elsewhere, in a log or under nohup, a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from tqdm import tqdm

LINE_S = 15.0  # between two lines, and before the first: what is short says nothing

Progress: TypeAlias = "tqdm[Any]"


class _Lines:
    """stderr for a bar that is written anew again and again: a line each time that there is anything in it."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    desc: str, unit: str, *, over: Iterable[Any] | None = None, total: int | None = None, initial: int = 0
) -> Progress:
    """A bar on stderr that counts what `over` yields, or what it is told by `update`."""
    shown: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial, "leave": False}
    if not sys.stderr.isatty():
        shown |= {"file": _Lines(), "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed}"}
        shown |= {"delay": LINE_S, "mininterval": LINE_S, "maxinterval": LINE_S, "miniters": 1}
    return tqdm(over, **shown)
