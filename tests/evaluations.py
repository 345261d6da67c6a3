"""Texts for the tests of evaluations, and a progress that interrupts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

IDS = np.random.default_rng(5).integers(1, 264, 700)
TEXTS = [
    "the turning and the turn",
    "re and the über",
    "a b  c",
    "turning the and\nre turn",
    "and and and and",
]


def stopping(after: int) -> Callable[[int], None]:
    """A progress that is interrupted at its call number `after`."""
    calls = iter(range(after))

    def progress(_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("\n".join(json.dumps({"text": one, "more": 1}) for one in texts) + "\n", encoding="utf-8")
    return path
