"""Runs groups on the backends that a plan assigns to them, in whatever row counts those backends have."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, FusedBackend, Runner
from rwkv_npu.errors import BackendError
from rwkv_npu.models.spec import Group

# Where a backend takes any number of rows, runners of more are made anew: their buffers would add up over the layers.
KEPT_ROWS = 8

# The backend of a group: for decoding, with one row a sequence, or for more.
Assign = Callable[[Group, bool], Backend]


@dataclass
class Counters:
    """The work of the groups since the engine was made, and the time it took.

    calls: into backends, for a group or for the fused forward. run_s: seconds inside the backends, by role of the
    group. recurrence_s: of the recurrences. dispatch_s: choosing runners and filling their inputs.
    faults: those of an NPU, for which the CPU stepped in.
    """

    calls: int = 0
    run_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    recurrence_s: float = 0.0
    dispatch_s: float = 0.0
    faults: Faults = field(default_factory=Faults)

    def add_fused(self, spent: dict[str, float], total: float) -> None:
        """Count a fused forward that took `total` seconds, of which `spent` by role of group and in the recurrence."""
        self.calls += 1
        self.dispatch_s += total - sum(spent.values())
        self.recurrence_s += spent.pop("recurrence")
        for role, seconds in spent.items():
            self.run_s[role] += seconds


class Dispatcher:
    """Every group's backend for decoding and for prefill, and its runners. `fused`: use fused forwards."""

    def __init__(self, groups: Sequence[Group], assign: Assign, faults: Faults, *, fused: bool = True):
        self.counters = Counters(faults=faults)
        self._groups = groups
        # Looked up at every call, asked for once.
        self._assigned = {
            (group.name, decode): (backend, backend.row_counts(group))
            for group in groups
            for decode in (True, False)
            for backend in (assign(group, decode),)
        }
        self._runners: dict[tuple[int, str, int], Runner] = {}
        self._fused = {decode: self._one_fused(decode) if fused else None for decode in (True, False)}
        # Whether the same backends decode and prefill, so that both may share a forward.
        self.alike = all(
            self._assigned[group.name, True][0] is self._assigned[group.name, False][0] for group in groups
        )

    def fused(self, decode: bool) -> FusedBackend | None:
        """The backend of the fused forward; None where several backends share the groups, or theirs has none."""
        return self._fused[decode]

    def _one_fused(self, decode: bool) -> FusedBackend | None:
        backends = [self._assigned[group.name, decode][0] for group in self._groups if group.role != "head"]
        one = all(backend is backends[0] for backend in backends)
        return backends[0] if one and isinstance(backends[0], FusedBackend) else None

    def run(
        self, group: Group, inputs: Mapping[str, np.ndarray], *, decode: bool
    ) -> Mapping[str, np.ndarray]:
        """Run `group` on rows (M, width); the outputs are valid until its next run."""
        rows = len(inputs[group.inputs[0].name])
        backend, counts = self._assigned[group.name, decode]
        if counts is None:
            return self._call(backend, group, inputs, rows, keep=rows <= KEPT_ROWS)
        if rows > counts[-1]:
            return self._in_pieces(group, inputs, counts[-1], decode)
        enough = next(count for count in counts if count >= rows)
        return self._call(backend, group, inputs, enough, keep=True)

    def _call(
        self,
        backend: Backend,
        group: Group,
        inputs: Mapping[str, np.ndarray],
        capacity: int,
        keep: bool,
    ) -> Mapping[str, np.ndarray]:
        """One call of a runner of `capacity` rows; rows see only rows above them, so that padding goes to the end."""
        begin = time.perf_counter()
        key = id(backend), group.name, capacity
        runner = self._runners.get(key) or backend.open(group, capacity)
        if keep:
            self._runners[key] = runner
        targets, rows = runner.inputs, len(inputs[group.inputs[0].name])
        for port in group.inputs:
            target, given = targets[port.name], inputs[port.name]
            target[:rows] = given
            target[rows:] = given[-1]  # a chip might not survive the norm of a row of zeros
        filled = time.perf_counter()
        outputs = runner.run()
        self.counters.calls += 1
        self.counters.run_s[group.role] += time.perf_counter() - filled
        self.counters.dispatch_s += filled - begin
        return outputs if rows == capacity else {name: array[:rows] for name, array in outputs.items()}

    def _in_pieces(
        self, group: Group, inputs: Mapping[str, np.ndarray], step: int, decode: bool
    ) -> Mapping[str, np.ndarray]:
        """More rows than the group is built for, of one whose rows do not see each other: the head."""
        pieces = []
        for start in range(0, len(inputs[group.inputs[0].name]), step):
            rows = {name: array[start : start + step] for name, array in inputs.items()}
            found = self.run(group, rows, decode=decode)
            pieces.append({name: array.copy() for name, array in found.items()})
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def open(self) -> None:
        """Open everything that will be used: an artifact that cannot be opened is reported when a model is loaded."""
        for group in self._groups:
            uses = [(decode, *self._assigned[group.name, decode]) for decode in (True, False)]
            for _, backend, counts in uses:
                if counts == ():
                    raise BackendError(f"backend {backend.name} has no artifact of {group.name}")
            same = uses[0][1] is uses[1][1]
            for decode, backend, counts in uses:
                if self._fused[decode] and group.role != "head":
                    continue  # the fused forward has it
                if decode:
                    chosen = (counts or (1,)) if same else (counts or (1,))[:1]
                else:
                    chosen = () if same or group.role == "head" else counts or ()
                for rows in chosen:
                    if decode or rows > 1:
                        self._runners[id(backend), group.name, rows] = backend.open(group, rows)

    def limit(self, *, decode: bool) -> int | None:
        """The most rows of one forward; None: any number."""
        counts = [self._assigned[group.name, decode][1] for group in self._groups if group.role != "head"]
        return min((count[-1] for count in counts if count is not None), default=None)

    def backends(self) -> list[str]:
        """Names of the backends that serve something."""
        return list(dict.fromkeys(backend.name for backend, _ in self._assigned.values()))

    def calls(self) -> int:
        """Into backends, for a token."""
        return 2 if self._fused[True] else len(self._groups)

    def describe(self) -> str:
        """The backends in a few words."""
        decode, prefill = (
            "/".join(dict.fromkeys(self._assigned[group.name, use][0].name for group in self._groups))
            for use in (True, False)
        )
        return decode if decode == prefill else f"{prefill} for prompts, {decode} for tokens"

    def close(self) -> None:
        self._runners.clear()
        for backend in {id(backend): backend for backend, _ in self._assigned.values()}.values():
            backend.close()
