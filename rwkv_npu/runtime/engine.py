"""Runs a model on token ids: chunks of a prompt, one token after the other, several sequences at once.

The engine knows ids, states and backends; it knows nothing of text, of sampling or of files.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, Runner, Walker, WalkRunner
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.state import Batch, State, new_state
from rwkv_npu.kernels.recurrence import Compiled
from rwkv_npu.models import MODULES
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Network, Program, Recurrence, Run
from rwkv_npu.models.spec import Group, Spec

PREFILL_ROWS = 128  # tokens a call where the backend takes any number of rows

# The backend of a group: for decoding, with one row a sequence, or for more.
Serve = Callable[[Group, bool], Backend]


@dataclass
class Counters:
    """What the groups were asked to do since the engine was made, and how long it took.

    calls: into backends, for a group or for all of them. run_s: seconds inside the backends, by role of the group.
    recurrence_s: of the recurrences. dispatch_s: choosing runners and filling their inputs.
    faults: what an NPU did wrong, and the CPU made up for.
    """

    calls: int = 0
    run_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    recurrence_s: float = 0.0
    dispatch_s: float = 0.0
    faults: Faults = field(default_factory=Faults)


class Dispatcher:
    """Runs groups on the backends that serve them, in whatever row counts those have them."""

    def __init__(self, groups: Sequence[Group], serve: Serve, faults: Faults):
        self.counters = Counters(faults=faults)
        self._groups = groups
        # Looked up at every call, asked for once.
        self._served = {
            (group.name, decode): (backend, backend.row_counts(group))
            for group in groups
            for decode in (True, False)
            for backend in (serve(group, decode),)
        }
        self._runners: dict[tuple[int, str, int, int], Runner] = {}
        self._walkers = {decode: self._walker(decode) for decode in (True, False)}

    def walk(self, rows: int, batch: int) -> CountedWalk | None:
        """The whole way to the head in one call; None where several backends share it, or one cannot do it."""
        walker = self._walkers[rows == batch]
        return CountedWalk(walker.open_walk(rows, batch), self.counters) if walker else None

    def _walker(self, decode: bool) -> Walker | None:
        backends = [self._served[group.name, decode][0] for group in self._groups if group.role != "head"]
        one = all(backend is backends[0] for backend in backends)
        return backends[0] if one and isinstance(backends[0], Walker) else None

    def run(self, group: Group, inputs: Mapping[str, np.ndarray], *, batch: int) -> Mapping[str, np.ndarray]:
        """Run `group` on rows of `batch` sequences; the outputs are valid until its next run."""
        rows = _rows(group, inputs)
        backend, counts = self._served[group.name, rows == batch]
        if counts is None:
            # Runners for chunks are made anew: their buffers would add up over the layers.
            return self._call(backend, group, inputs, rows, batch, keep=rows == batch)
        if rows > counts[-1]:
            return self._in_pieces(group, inputs, counts[-1], batch)
        enough = next(count for count in counts if count >= rows)
        return self._call(backend, group, inputs, enough, batch, keep=True)

    def _call(
        self,
        backend: Backend,
        group: Group,
        inputs: Mapping[str, np.ndarray],
        capacity: int,
        batch: int,
        keep: bool,
    ) -> Mapping[str, np.ndarray]:
        """One call of a runner of `capacity` rows; rows are causal, so that padding goes to the end."""
        begin = time.perf_counter()
        key = id(backend), group.name, capacity, batch
        runner = self._runners.get(key) or backend.open(group, capacity, batch)
        if keep:
            self._runners[key] = runner
        targets = runner.inputs
        for port in group.inputs:
            target, given = targets[port.name], inputs[port.name]
            target[: len(given)] = given
            target[len(given) :] = given[-1]  # a chip might not survive the norm of a row of zeros
        filled = time.perf_counter()
        outputs = runner.run()
        self.counters.calls += 1
        self.counters.run_s[group.role] += time.perf_counter() - filled
        self.counters.dispatch_s += filled - begin
        rows = _rows(group, inputs)
        return outputs if rows == capacity else {name: array[:rows] for name, array in outputs.items()}

    def _in_pieces(
        self, group: Group, inputs: Mapping[str, np.ndarray], step: int, batch: int
    ) -> Mapping[str, np.ndarray]:
        """For a group without a memory of the row before (the head), more rows than it is built for."""
        pieces = []
        for start in range(0, _rows(group, inputs), step):
            rows = {name: array[start : start + step] for name, array in inputs.items()}
            pieces.append({name: array.copy() for name, array in self.run(group, rows, batch=batch).items()})
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def open(self) -> None:
        """Open what will be used of every group: whatever cannot be opened is said when a model is loaded."""
        at_once = self.walk(1, 1) is not None and self._walkers[True] is self._walkers[False]
        for group in self._groups:
            if at_once and group.role != "head":
                continue
            (token, counts), (prompt, several) = (
                self._served[group.name, decode] for decode in (True, False)
            )
            for backend, found in ((token, counts), (prompt, several)):
                if found == ():
                    raise BackendError(f"backend {backend.name} has no artifact of {group.name}")
            if token is prompt:
                chosen = [(token, rows) for rows in counts or (1,)]
            else:
                more = () if group.role == "head" else several or ()
                chosen = [(token, counts[0] if counts else 1), *((prompt, rows) for rows in more if rows > 1)]
            for backend, rows in chosen:
                self._runners[id(backend), group.name, rows, 1] = backend.open(group, rows)

    def chunk(self) -> int | None:
        """The most tokens of a prompt that can be read at once; None: any number."""
        counts = [self._served[group.name, False][1] for group in self._groups if group.role != "head"]
        return min((count[-1] for count in counts if count is not None), default=None)

    def batches(self) -> bool:
        """Whether several sequences can be read at once: artifacts are built for one."""
        return all(counts is None for _, counts in self._served.values())

    def backends(self) -> list[str]:
        """Names of the backends that serve something."""
        return list(dict.fromkeys(backend.name for backend, _ in self._served.values()))

    def calls(self) -> int:
        """Into backends, for a token."""
        return 2 if self._walkers[True] else len(self._groups)

    def describe(self) -> str:
        """The backends in a few words."""
        decode, prefill = (
            "/".join(dict.fromkeys(self._served[group.name, use][0].name for group in self._groups))
            for use in (True, False)
        )
        return decode if decode == prefill else f"{prefill} for prompts, {decode} for tokens"

    def close(self) -> None:
        self._runners.clear()
        for backend in {id(backend): backend for backend, _ in self._served.values()}.values():
            backend.close()


class CountedWalk:
    """A walk whose calls and seconds are counted."""

    def __init__(self, runner: WalkRunner, counters: Counters):
        self._runner, self._counters, self.inputs = runner, counters, runner.inputs

    def run(self, state: Arrays) -> np.ndarray:
        begin, counters = time.perf_counter(), self._counters
        x = self._runner.run(state)
        spent = self._runner.seconds()
        counters.calls += 1
        counters.dispatch_s += time.perf_counter() - begin - sum(spent.values())
        counters.recurrence_s += spent.pop("recurrence")
        for role, seconds in spent.items():
            counters.run_s[role] += seconds
        return x


class TimedRecurrence:
    """A recurrence whose seconds are counted."""

    def __init__(self, recurrence: Recurrence, counters: Counters):
        self._recurrence, self._counters = recurrence, counters
        self.prepare = recurrence.prepare

    def time_mix(self, p: Any, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
        begin = time.perf_counter()
        y = self._recurrence.time_mix(p, x, state, carry)
        self._counters.recurrence_s += time.perf_counter() - begin
        return y


def _rows(group: Group, inputs: Mapping[str, np.ndarray]) -> int:
    return next(len(inputs[port.name]) for port in group.inputs if not port.per_sequence)


class Engine:
    """A model that maps ids and a state to logits and a state.

    program, host, fingerprint: the model, as a bundle or a checkpoint describes it. `serve` chooses the backends;
    `faults` is where they count theirs. `initial` is the tuned state of each layer that has one. `recurrence`: None is
    NumPy's.
    """

    def __init__(
        self,
        program: Program,
        host: Callable[[str], np.ndarray],
        *,
        serve: Serve,
        fingerprint: str,
        initial: dict[int, np.ndarray],
        faults: Faults | None = None,
        recurrence: Compiled | None = None,
    ):
        self.program, self.fingerprint = program, fingerprint
        self._dispatcher = Dispatcher(program.groups, serve, faults or Faults())
        self._recurrence = recurrence
        timed = TimedRecurrence(recurrence or MODULES[program.spec.generation], self.counters)
        self._network = Network(program, host, timed)
        self._dispatcher.open()
        self._initial = initial
        self._lock = threading.Lock()  # runners own their buffers: one call at a time
        self._closed = False
        self.chunk = self._dispatcher.chunk() or PREFILL_ROWS
        self._batches = self._dispatcher.batches()

    @property
    def spec(self) -> Spec:
        return self.program.spec

    @property
    def counters(self) -> Counters:
        return self._dispatcher.counters

    @property
    def backends(self) -> list[str]:
        """Names of the backends in use."""
        return self._dispatcher.backends()

    def describe(self) -> str:
        """Backends, fusion and what runs the recurrence, in a few words."""
        used, calls = self._dispatcher.describe(), self._dispatcher.calls()
        recurrence = self._recurrence.name if self._recurrence else "NumPy"
        return f"{used}, {self.program.fusion} fusion, {calls} calls a token, recurrence in {recurrence}"

    def new_state(self) -> State:
        return new_state(self.spec, self.fingerprint, self._initial)

    def forward(
        self,
        tokens: Sequence[int] | np.ndarray,
        state: State | None = None,
        all_logits: bool = False,
        *,
        inplace: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[np.ndarray, State]:
        """Read `tokens` after `state` (None: from the start).

        Returns logits, fp32, (V,) after the last token or (T, V) after each, and the new state; `state` is
        left as it was unless `inplace`, and then lost after an exception. `progress` is called with the number of
        tokens of every chunk read.
        Raises UsageError for no tokens at all, ids outside the vocabulary, or a state of another model.
        """
        ids = self._check(tokens)
        if state is None:
            state = self.new_state()
        else:
            self._check_state(state)
            state = state if inplace else state.copy()
        with self._lock:
            return self._read(ids, state, all_logits, progress)

    def _read(
        self, ids: np.ndarray, state: State, all_logits: bool, progress: Callable[[int], object] | None
    ) -> tuple[np.ndarray, State]:
        batched = {name: part[:, None] for name, part in state.parts.items()}
        collected = []
        for start in range(0, len(ids), self.chunk):
            piece = ids[start : start + self.chunk]
            x = self._hidden(piece[:, None], batched)
            state.tokens_seen += len(piece)
            if all_logits:
                collected.append(self._logits(x))
            elif start + len(piece) == len(ids):
                collected.append(self._logits(x[-1:]))
            if progress:
                progress(len(piece))
        logits = collected[0] if len(collected) == 1 else np.concatenate(collected)
        state.logits = logits[-1].copy()
        return (logits if all_logits else logits[-1]), state

    def forward_batch(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, states: Sequence[State], *, inplace: bool = False
    ) -> tuple[np.ndarray, Sequence[State]]:
        """Read T tokens of B sequences at once: (B, T) ids and B states -> logits (B, V) and B new states.

        Pass on the `Batch` that was returned, with `inplace`, and no state is copied; states given so are lost.
        """
        rows = [self._check(row) for row in tokens]
        if not rows or len(rows) != len(states) or len({len(row) for row in rows}) > 1:
            raise UsageError("forward_batch takes as many states as sequences, and sequences of one length")
        for state in states:
            self._check_state(state)
        if not self._batches:
            results = [
                self.forward(row, state, inplace=inplace) for row, state in zip(rows, states, strict=True)
            ]
            return np.stack([logits for logits, _ in results]), [state for _, state in results]
        batch = states if inplace and isinstance(states, Batch) else Batch.of(states)
        with self._lock:
            return self._read_batch(np.stack(rows, axis=1), batch), batch

    def _read_batch(self, ids: np.ndarray, batch: Batch) -> np.ndarray:
        step = max(1, self.chunk // len(batch))
        for start in range(0, len(ids), step):
            x = self._hidden(ids[start : start + step], batch.parts)
        logits = self._logits(x[-len(batch) :], len(batch))
        batch.advance(len(ids), logits.copy())
        return logits

    def close(self) -> None:
        """Give back what the backend holds; the engine cannot be used after it."""
        self._closed = True
        self._dispatcher.close()
        if self._recurrence:
            self._recurrence.close()

    def _hidden(self, tokens: np.ndarray, state: Arrays) -> np.ndarray:
        """(T, B) ids -> (T*B, D), valid until the next call. `state` (L, B, ...) is updated in place."""
        T, B = tokens.shape
        walk = self._dispatcher.walk(T * B, B)
        if walk is None:
            return self._network.hidden(self._run(B), tokens, state)
        return self._network.hidden_at_once(walk, tokens, state)

    def _run(self, batch: int) -> Run:
        return partial(self._dispatcher.run, batch=batch)

    def _logits(self, x: np.ndarray, batch: int = 1) -> np.ndarray:
        return self._network.logits(self._run(batch), x).copy()

    def _check(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        if self._closed:
            raise UsageError("this model is closed")
        try:
            ids = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            ids = np.empty(0)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError("tokens must be a non-empty sequence of integer ids")
        if ids.min() < 0 or ids.max() >= self.spec.V:
            wrong = ids[(ids < 0) | (ids >= self.spec.V)][0]
            raise UsageError(f"token id {wrong} is outside the model's vocabulary of {self.spec.V}")
        return ids.astype(np.int64)

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State):
            raise UsageError(f"a state is needed, not a {type(state).__name__}")
        if state.spec != self.spec:
            raise UsageError("this state belongs to a model of another generation or size")
