"""Reads the stand-in's log of calls: function, group, context and bytes of each call."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Call:
    """A line of the log: the function without its prefix, and the values of the call by key."""

    name: str
    values: dict[str, str]

    def __getitem__(self, key: str) -> str:
        return self.values[key]

    def number(self, key: str) -> int:
        return int(self.values[key])


def read_calls(path: str | os.PathLike[str]) -> list[Call]:
    """All calls in order; an empty list if there is no log yet."""
    file = Path(path)
    calls = []
    for line in file.read_text().splitlines() if file.exists() else ():
        name, *pairs = line.split(" ")
        calls.append(Call(name, {key: value for key, _, value in (pair.partition("=") for pair in pairs)}))
    return calls


def count(calls: Sequence[Call], name: str, by: str = "group") -> Counter[str]:
    """Number of calls of `name`, by group or another key."""
    return Counter(call[by] for call in calls if call.name == name)


def bytes_moved(calls: Sequence[Call]) -> int:
    """Bytes copied to and from contexts."""
    return sum(call.number("bytes") for call in calls if call.name in ("inputs_set", "outputs_get"))
