"""Starts groups on the backends of their placement, padded to the row counts that a backend has."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, FusedBackend, QueuedBackend, QueuedRunner, Runner, fill
from rwkv_npu.errors import BackendError
from rwkv_npu.models.spec import Group

# On a backend that takes any number of rows, only runners of at most this many rows are kept. Buffers of larger ones
# would add up over the layers.
KEPT_ROWS = 8

# Returns the backend of a group. The flag is True for decoding (one row of each sequence), False for prefill.
Assign = Callable[[Group, bool], Backend]


@dataclass
class Counters:
    """Calls and seconds since the engine was opened.

    calls: calls to backends, for groups or the fused forward. run_s: seconds in backends, by role of group.
    npu_s: the part of run_s in which an NPU worked, as it reports.
    recurrence_s: seconds in recurrences. dispatch_s: seconds to select runners and fill their inputs.
    queue_s: seconds of calls by queue. Queues run at the same time as each other and as the CPU: the sum may exceed the
    time that has passed.
    waited_s: seconds in which the CPU had no work, because all forwards waited for calls.
    faults: failed calls of an NPU, and the groups that the CPU runs instead.
    """

    calls: int = 0
    run_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    npu_s: float = 0.0
    recurrence_s: float = 0.0
    dispatch_s: float = 0.0
    queue_s: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    waited_s: float = 0.0
    faults: Faults = field(default_factory=Faults)

    def add_fused(self, spent: dict[str, float], total: float) -> None:
        """Count a fused forward. total: its seconds. spent: seconds by role of group, and of the `recurrence`."""
        self.calls += 1
        self.dispatch_s += total - sum(spent.values())
        self.recurrence_s += spent.pop("recurrence")
        for role, seconds in spent.items():
            self.run_s[role] += seconds


class Call:
    """A call that was started.

    queued: the runner, if `queue` runs the call; None if `start` itself runs it and sets `outputs`.
    rows: the number of the runner's rows that are used.
    """

    def __init__(self, counters: Counters, group: Group, rows: int):
        self._counters, self._role, self._rows = counters, group.role, rows
        self.queued: QueuedRunner | None = None
        self.queue, self.ended = 0, False
        self.outputs: Mapping[str, np.ndarray] = {}

    def start(self, runner: Runner, queue: int | None, done: Callable[[Call], object], keep: bool) -> None:
        """Start the run in its queue, or run it here if the backend has no queues.

        keep: copy the outputs, because other runs may overwrite them.
        """

        def end() -> None:
            self.ended = True
            done(self)

        if queue is not None:
            self.queued, self.queue = cast(QueuedRunner, runner), queue
            self.queued.start(end)
            return
        begin = time.perf_counter()
        outputs = runner.run()
        self.outputs = (
            {name: array[: self._rows].copy() for name, array in outputs.items()} if keep else outputs
        )
        self._count(time.perf_counter() - begin)
        end()

    def deadline(self) -> float:
        """The time (`time.monotonic`) after which `finish` is called even if the call has not ended."""
        return self.queued.deadline() if self.queued else 0.0

    def cancel(self) -> None:
        """Cancel the call if it has not begun."""
        if self.queued:
            self.queued.cancel()

    def finish(self) -> Mapping[str, np.ndarray]:
        """The outputs of a call that has ended, (rows, width) each, valid until the next run of its runner."""
        if self.queued is not None:
            self.outputs, seconds = self.queued.finish()
            self._count(seconds)
            self._counters.queue_s[self.queue] += seconds
            self._counters.npu_s += getattr(self.queued, "npu_seconds", 0.0)
        return {name: array[: self._rows] for name, array in self.outputs.items()}

    def _count(self, seconds: float) -> None:
        self._counters.calls += 1
        self._counters.run_s[self._role] += seconds


class Dispatcher:
    """The backends of all groups, for decoding and for prefill, and their open runners.

    assign: returns the backend of a group. fused: use a backend's fused forward if it has one.
    """

    def __init__(self, groups: Sequence[Group], assign: Assign, faults: Faults, *, fused: bool = True):
        self.counters = Counters(faults=faults)
        self._groups = groups
        self._assigned = {  # (group, decode) -> backend and its row counts
            (group.name, decode): (backend, backend.row_counts(group))
            for group in groups
            for decode in (True, False)
            for backend in (assign(group, decode),)
        }
        self._runners: dict[tuple[int, str, int], Runner] = {}
        self._fused = {decode: self._fused_backend(decode) if fused else None for decode in (True, False)}
        # True if the same backends decode and prefill: then both may share a forward.
        self.alike = all(
            self._assigned[group.name, True][0] is self._assigned[group.name, False][0] for group in groups
        )

    def fused(self, decode: bool) -> FusedBackend | None:
        """The backend of the fused forward; None if several backends share the groups, or the backend has none."""
        return self._fused[decode]

    def _fused_backend(self, decode: bool) -> FusedBackend | None:
        backends = [self._assigned[group.name, decode][0] for group in self._groups if group.role != "head"]
        same = all(backend is backends[0] for backend in backends)
        return backends[0] if same and isinstance(backends[0], FusedBackend) else None

    def overlaps(self, decode: bool) -> bool:
        """True if the calls of some group run while the CPU does other work."""
        backends = (self._assigned[group.name, decode][0] for group in self._groups)
        return any(isinstance(backend, QueuedBackend) for backend in backends)

    def start(
        self,
        group: Group,
        inputs: Mapping[str, np.ndarray],
        done: Callable[[Call], object],
        *,
        decode: bool,
        keep: bool = False,
    ) -> Call:
        """Start a group on inputs (M, width) by name, which are copied. `done` is called when the call has ended.

        keep: the outputs stay valid when other groups run.
        """
        begin = time.perf_counter()
        rows = len(inputs[group.inputs[0].name])
        backend, counts = self._assigned[group.name, decode]
        capacity = rows if counts is None else next(count for count in counts if count >= rows)
        key = id(backend), group.name, capacity
        runner = self._runners.get(key) or backend.open(group, capacity)
        if counts is not None or rows <= KEPT_ROWS:
            self._runners[key] = runner
        fill(runner, {port.name: inputs[port.name] for port in group.inputs})
        self.counters.dispatch_s += time.perf_counter() - begin
        call = Call(self.counters, group, rows)
        call.start(runner, backend.queue(group) if isinstance(backend, QueuedBackend) else None, done, keep)
        return call

    def head_rows(self, decode: bool) -> int | None:
        """The most rows of a call of the head; None: any."""
        counts = next(self._assigned[group.name, decode][1] for group in self._groups if group.role == "head")
        return counts[-1] if counts else None

    def open(self) -> None:
        """Open every runner that will be used, so that loading a model reports all errors. Raises BackendError."""
        for group in self._groups:
            uses = [(decode, *self._assigned[group.name, decode]) for decode in (True, False)]
            for _, backend, counts in uses:
                if counts == ():
                    raise BackendError(f"backend {backend.name} has no artifact of {group.name}")
            same = uses[0][1] is uses[1][1]
            for decode, backend, counts in uses:
                if self._fused[decode] and group.role != "head":
                    continue  # part of the fused forward
                if decode:
                    used = (counts or (1,)) if same else (counts or (1,))[:1]
                else:
                    used = () if same or group.role == "head" else counts or ()
                for rows in used:
                    if decode or rows > 1:
                        self._runners[id(backend), group.name, rows] = backend.open(group, rows)

    def limit(self, *, decode: bool) -> int | None:
        """The largest number of rows of one forward; None: any."""
        counts = [self._assigned[group.name, decode][1] for group in self._groups if group.role != "head"]
        return min((count[-1] for count in counts if count is not None), default=None)

    def backends(self) -> list[str]:
        """Names of the backends in use."""
        return list(dict.fromkeys(backend.name for backend, _ in self._assigned.values()))

    def calls(self) -> int:
        """Number of calls to backends for one token."""
        return 2 if self._fused[True] else len(self._groups)

    def describe(self) -> str:
        """The backends, for people."""
        decode, prefill = (
            "/".join(dict.fromkeys(self._assigned[group.name, use][0].name for group in self._groups))
            for use in (True, False)
        )
        return decode if decode == prefill else f"{prefill} for prompts, {decode} for tokens"

    def close(self) -> None:
        self._runners.clear()
        for backend in {id(backend): backend for backend, _ in self._assigned.values()}.values():
            backend.close()
