"""The stand-in's log of calls: what was called, for which group, in which context, with how many bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Call:
    """A line of the log: the function without its prefix, and what it says of the call."""

    name: str
    values: dict[str, str]

    def __getitem__(self, key: str) -> str:
        return self.values[key]

    def number(self, key: str) -> int:
        return int(self.values[key])


def read_calls(path: str | os.PathLike[str]) -> list[Call]:
    """All calls, in order; none where the log does not exist yet."""
    file = Path(path)
    calls = []
    for line in file.read_text().splitlines() if file.exists() else ():
        name, *pairs = line.split(" ")
        calls.append(Call(name, {key: value for key, _, value in (pair.partition("=") for pair in pairs)}))
    return calls


def count(calls: Sequence[Call], name: str, by: str = "group") -> Counter[str]:
    """How often `name` was called, by group."""
    return Counter(call[by] for call in calls if call.name == name)


def bytes_moved(calls: Sequence[Call]) -> int:
    """Bytes that were copied into and out of contexts."""
    return sum(call.number("bytes") for call in calls if call.name in ("inputs_set", "outputs_get"))
