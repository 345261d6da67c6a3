"""Where one series becomes faster than another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from math import exp, log

from rwkv_npu.bench.record import Row, by_series


@dataclass(frozen=True)
class Crossover:
    """From N = `size` on, up to the largest size of both, `winner` is faster. `size` is interpolated between the two
    neighbouring sizes on log-log axes; `time_s` is the time of both there."""

    winner: str
    loser: str
    size: float
    time_s: float
    estimated: bool


def crossovers(rows: Iterable[Row]) -> list[Crossover]:
    """Of every pair of series over square sizes: the last change of the lead, if there is one."""
    lines = by_series(rows, square=True)
    found = []
    for winner, loser in permutations(lines, 2):
        fast, slow = ({row.n: row for row in lines[name]} for name in (winner, loser))
        sizes = sorted(fast.keys() & slow.keys())
        # Positive: the winner is ahead.
        leads = [log(_time(slow[size]) / _time(fast[size])) for size in sizes]
        before = max((i for i, lead in enumerate(leads) if lead <= 0), default=-1)
        if not 0 <= before < len(sizes) - 1:
            continue
        low, high = sizes[before], sizes[before + 1]
        share = -leads[before] / (leads[before + 1] - leads[before])
        size = exp(log(low) + share * log(high / low))
        time = exp(log(_time(fast[low])) + share * log(_time(fast[high]) / _time(fast[low])))
        estimated = fast[low].estimated or slow[low].estimated
        found.append(Crossover(winner, loser, size, time, estimated))
    return sorted(found, key=lambda one: (one.winner, one.size))


def _time(row: Row) -> float:
    assert row.time_s is not None
    return row.time_s


def describe(found: Iterable[Crossover], lines: list[str]) -> list[str]:
    """A line each; then the series that lead at every size."""
    text = []
    for one in found:
        label = ", an estimate against a clock" if one.estimated else ""
        text.append(
            f"{one.winner} is faster than {one.loser} from N = {one.size:.0f} on ({_ms(one.time_s)}{label})"
        )
    return text or [f"no crossovers among {', '.join(lines)}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
