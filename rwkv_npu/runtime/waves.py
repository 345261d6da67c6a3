"""Runs waves beside each other: while the NPU computes a group of one wave, the CPU computes another wave.

A wave is a forward of some rows, in steps (`models.network.Steps`): the CPU computes a step, which ends with the call
of a group; the next step takes the outputs of the call. All steps run in the caller's thread. Calls run in the threads
of their queues, some for each core of the NPU. Nothing waits in a loop: a thread without work sleeps.

    one wave; the groups'        core 0   first       mid.2       mid.5
    contexts are distributed     core 1         mid.0       mid.3
    over three cores             core 2            mid.1       mid.4
                                 CPU         s1    s2 s3    s4 s5

Waves keep their order in every layer. A wave begins the step that leads to group g only when the wave before it has
entered group g + 1. By then the earlier wave has written its states of this layer. It no longer reads its outputs of
group g, so they may be overwritten. The results have the same bits as those of waves that run one after the other.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Steps
from rwkv_npu.models.spec import Group
from rwkv_npu.runtime.dispatch import Call, Counters

Start = Callable[[Group, Arrays, Callable[[Call], object]], Call]


@dataclass(eq=False)
class Wave:
    """A forward of some rows. start: starts the call of a group. result: what its steps return at their end."""

    steps: Steps
    start: Start
    before: Wave | None = None  # the wave that it follows
    group: Group | None = None  # of the last call
    entered: int = 0  # number of groups whose calls have begun
    call: Call | None = None  # the call in progress
    outputs: Any = None  # of the last call, for the next step
    ended: bool = False
    result: Any = None

    @property
    def ready(self) -> bool:
        """True if the CPU can compute the next step."""
        follows = self.before is None or self.before.ended or self.before.entered >= self.entered + 2
        return self.call is None and not self.ended and follows

    def step(self, done: Callable[[Call], object]) -> None:
        """Compute the next step and start the call at its end."""
        try:
            group, inputs = self.steps.send(self.outputs)
        except StopIteration as end:
            self.ended, self.result, self.before = True, end.value, None
        else:
            self.entered += group is not self.group
            self.group, self.call = group, self.start(group, inputs, done)


def run_waves(
    waves: Iterable[Wave], counters: Counters, *, most: int | None = None
) -> Generator[Wave, None, None]:
    """Run `waves`, at most `most` at a time (None: any number). Yields each when it and all before it have ended.

    A wave is taken from the iterable when it can begin. After an exception, such as Ctrl-C, this waits for the calls in
    progress.
    """
    waves, exhausted = iter(waves), False
    running: deque[Wave] = deque()  # in order
    ended: queue.SimpleQueue[Call] = queue.SimpleQueue()
    try:
        while running or not exhausted:
            # 1. Let the next wave enter.
            last = running[-1] if running else None
            if not exhausted and len(running) != most and (last is None or last.ended or last.entered >= 2):
                wave = next(waves, None)
                if wave is None:
                    exhausted = True
                else:
                    wave.before = last
                    running.append(wave)
                continue
            # 2. Compute a step. The youngest wave goes first: in a simulation this order kept the cores busiest.
            wave = next((wave for wave in reversed(running) if wave.ready), None)
            if wave is not None:
                wave.step(ended.put)
            if wave is None or not ended.empty():
                _wait(running, ended, counters)
            # 3. Hand out what has ended.
            while running and running[0].ended:
                yield running.popleft()
    finally:
        _stop(running, ended)


def _wait(running: Iterable[Wave], ended: queue.SimpleQueue[Call], counters: Counters) -> None:
    """Sleep until a call ends, or the time limit of one is over, and finish those calls."""
    begin = time.monotonic()
    calls = {wave.call: wave for wave in running if wave.call is not None}
    found: list[Call] = []
    with contextlib.suppress(queue.Empty):
        found.append(ended.get(timeout=max(0.0, min(call.deadline() for call in calls) - begin)))
    counters.waited_s += time.monotonic() - begin
    while not ended.empty():
        found.append(ended.get())
    if not found:
        found = [call for call in calls if call.deadline() <= time.monotonic()]
    for call in found:
        if call in calls:  # otherwise the call was given up before it ended
            calls[call].outputs, calls[call].call = call.finish(), None


def _stop(running: Iterable[Wave], ended: queue.SimpleQueue[Call]) -> None:
    """Cancel the calls that have not begun, and wait for the others."""
    calls = [wave.call for wave in running if wave.call is not None]
    for call in calls:
        call.cancel()
    with contextlib.suppress(queue.Empty):
        # Check the flags of the calls: an interrupted `_wait` may have lost calls that it took from the queue.
        while calls := [call for call in calls if not call.ended]:
            limit = min(call.deadline() for call in calls)
            ended.get(timeout=max(0.0, limit - time.monotonic()))
