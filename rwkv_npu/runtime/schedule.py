"""Simulates the schedule of `waves.py`: when chunks of a prompt end that follow each other through the layers."""

from __future__ import annotations

from collections.abc import Sequence

Step = tuple[float, float, int]  # milliseconds of the CPU, then of the call, and the core of the call


def schedule_ms(chunks: Sequence[Sequence[Step]]) -> float:
    """Milliseconds until all chunks have ended. chunks: the steps of each, as many for all.

    As in `waves.py`, the CPU computes one step at a time, of the youngest chunk that is ready. A chunk begins a step
    when the chunk before it has begun the call after that step's. A core runs its calls in the order of their start.
    """
    count = len(chunks[0])
    entered, ends = [0] * len(chunks), [0.0] * len(chunks)
    free: dict[int, float] = {}  # when each core is idle
    now = 0.0
    while entered[-1] < count:
        ready = [
            number
            for number, done in enumerate(entered)
            if done < count
            and ends[number] <= now
            and (number == 0 or entered[number - 1] >= min(done + 2, count))
        ]
        if not ready:
            now = min(end for end in ends if end > now)
            continue
        youngest = ready[-1]
        cpu, npu, core = chunks[youngest][entered[youngest]]
        now += cpu
        free[core] = ends[youngest] = max(now, free.get(core, 0.0)) + npu
        entered[youngest] += 1
    return max(ends)
