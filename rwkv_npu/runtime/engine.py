"""Runs a model on token ids. One forward reads chunks of prompts and single tokens of several sequences together.

The engine knows ids, states and backends. It does not know text, sampling or files. It divides the tokens among
forwards. `waves` runs the forwards, several at a time with an NPU. Each group of a forward is one call to a runner of a
backend: compiled code, ONNX Runtime or the NPU.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rwkv_npu.arguments import check_ids
from rwkv_npu.backends.base import Faults
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.state import State, new_state
from rwkv_npu.kernels.recurrence import Compiled
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Network, Program, Recurrence, ReferenceRecurrence, Steps
from rwkv_npu.models.rows import Rows, check_parts
from rwkv_npu.models.spec import Group, Spec
from rwkv_npu.runtime.dispatch import Assign, Call, Counters, Dispatcher
from rwkv_npu.runtime.waves import Wave, run_waves

OVERLAPPING = 4  # chunks in a call that keep the NPU's cores busy, without delaying other sequences for long
PREFILL_ROWS = 128  # rows of a call on a backend that takes any number


class Piece(NamedTuple):
    """Tokens of a sequence that one forward reads: numbers `start` to `stop` - 1."""

    sequence: int
    start: int
    stop: int


class TimedRecurrence:
    """A recurrence that counts its seconds."""

    def __init__(self, recurrence: Recurrence, counters: Counters):
        self._recurrence, self._counters = recurrence, counters
        self.prepare = recurrence.prepare

    def time_mix(self, p: object, x: Arrays, rows: Rows, layer: int, carry: Arrays) -> np.ndarray:
        begin = time.perf_counter()
        y = self._recurrence.time_mix(p, x, rows, layer, carry)
        self._counters.recurrence_s += time.perf_counter() - begin
        return y


class Engine:
    """A model: token ids and a state -> logits and the next state.

    program, host, fingerprint: the groups of the model, its host tensors by name, and the identity of its weights.
    assign: returns the backend of a group. initial: the tuned state of each layer that has one.
    faults: shared with the backends, which count theirs in it. recurrence: None takes NumPy's.
    fused: use a backend's fused forward if it has one.
    batch: the fewest sequences whose next tokens the prefill backends read together; None: never.
    overlap: run several forwards at a time on an NPU. The results are the same.
    """

    def __init__(
        self,
        program: Program,
        host: Callable[[str], np.ndarray],
        *,
        assign: Assign,
        fingerprint: str,
        initial: dict[int, np.ndarray],
        faults: Faults | None = None,
        recurrence: Compiled | None = None,
        fused: bool = True,
        batch: int | None = None,
        overlap: bool = True,
    ):
        self.program, self.fingerprint, self.batch, self.overlap = program, fingerprint, batch, overlap
        self._dispatcher = Dispatcher(program.groups, assign, faults or Faults(), fused=fused)
        self._recurrence = recurrence
        timed = TimedRecurrence(recurrence or ReferenceRecurrence(program.spec), self.counters)
        self._network = Network(program, host, timed)
        self._dispatcher.open()
        self._initial = initial
        self._lock = threading.Lock()  # one call at a time: runners own their buffers
        self._closed = False
        self.chunk = self._dispatcher.limit(decode=False) or PREFILL_ROWS

    @property
    def spec(self) -> Spec:
        return self.program.spec

    @property
    def window(self) -> int:
        """Prompt tokens that one `forward` should read: a chunk, or OVERLAPPING chunks if forwards overlap."""
        return self.chunk * (OVERLAPPING if self._overlaps(decode=False) else 1)

    @property
    def counters(self) -> Counters:
        return self._dispatcher.counters

    @property
    def fused(self) -> bool:
        """True if decoding uses a backend's fused forward."""
        return self._dispatcher.fused(True) is not None

    @property
    def alike(self) -> bool:
        """True if the same backends read prompts and tokens."""
        return self._dispatcher.alike

    @property
    def backends(self) -> list[str]:
        """Names of the backends in use."""
        return self._dispatcher.backends()

    def describe(self) -> str:
        """Backends, fusion and recurrence, for people."""
        used, calls = self._dispatcher.describe(), self._dispatcher.calls()
        recurrence = self._recurrence.name if self._recurrence else "NumPy"
        return f"{used}, {self.program.fusion} fusion, {calls} calls a token, recurrence in {recurrence}"

    def new_state(self) -> State:
        """The state before the first token, tuned if the model has a tuned state."""
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
        """Read `tokens` after `state` (None: the initial state).

        Returns the logits after the last token, (V,) fp32, or with `all_logits` after each, (T, V), and the new state.
        inplace: updates `state` itself, which is then lost after an exception.
        progress: called with the number of tokens of each chunk.
        Raises UsageError for an empty sequence, ids outside the vocabulary, or a state of another model.
        """
        ids = self._check(tokens)
        if state is None:
            state = self.new_state()
        else:
            self.check_state(state)
            state = state if inplace else state.copy()
        with self._lock:
            logits = self._read([ids], [state], all_logits, progress)[0]
        return (logits if all_logits else logits[0]), state

    def forward_batch(
        self,
        tokens: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
        states: Sequence[State],
        all_logits: bool = False,
        *,
        inplace: bool = False,
    ) -> tuple[np.ndarray | list[np.ndarray], list[State]]:
        """Read B sequences of any lengths together, each after its state.

        Returns the logits after the last token of each sequence, (B, V) fp32, or with `all_logits` a list of (T_i, V)
        after each token, and the B new states.
        inplace: updates `states` themselves, without copies. They are then lost after an exception.
        Raises UsageError as `forward`, and for a state that is given twice or a number of states other than B.
        """
        try:
            tokens, states = list(tokens), list(states)
        except TypeError:
            raise UsageError("forward_batch takes a list of sequences and a list of states") from None
        if not tokens or len(tokens) != len(states):
            raise UsageError(
                f"forward_batch takes one state a sequence: there are {len(tokens)} sequences and {len(states)} states"
            )
        ids = [self._check(piece, f"sequence {number}: ") for number, piece in enumerate(tokens)]
        for state in states:
            self.check_state(state)
        if len({id(state) for state in states}) < len(states):
            raise UsageError("forward_batch got the same state twice: copy it for the second sequence")
        if not inplace:
            states = [state.copy() for state in states]
        with self._lock:
            logits = self._read(ids, states, all_logits)
        return (logits if all_logits else np.concatenate(logits)), states

    def close(self) -> None:
        """Wait for the call in progress, close the backends and free their memory. No call is possible afterwards."""
        with self._lock:
            self._closed = True
            self._dispatcher.close()
            if self._recurrence:
                self._recurrence.close()

    def _read(
        self,
        ids: Sequence[np.ndarray],
        states: Sequence[State],
        all_logits: bool,
        progress: Callable[[int], object] | None = None,
    ) -> list[np.ndarray]:
        """Read each sequence after its state. Returns its logits: (T_i, V) with `all_logits`, otherwise (1, V)."""
        if self._closed:
            raise UsageError("this model is closed")
        collected: list[list[np.ndarray]] = [[] for _ in ids]
        planned = list(self._waves(ids))
        with contextlib.closing(self._run(planned, ids, states, all_logits)) as results:
            for (pieces, _), logits in zip(planned, results, strict=True):
                begin = 0
                for sequence, start, stop in pieces:
                    end = stop == len(ids[sequence])
                    count = stop - start if all_logits else int(end)
                    if logits is not None and count:
                        collected[sequence].append(logits[begin : begin + count])
                        begin += count
                    states[sequence].tokens_seen += stop - start
                    if end:
                        states[sequence].logits = collected[sequence][-1][-1].copy()
                    if progress:
                        progress(stop - start)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in collected]

    def _run(
        self,
        planned: Sequence[tuple[list[Piece], bool]],
        ids: Sequence[np.ndarray],
        states: Sequence[State],
        all_logits: bool,
    ) -> Generator[np.ndarray | None, None, None]:
        """Run forwards as `_waves` yields them. Yields the logits of each, None if none of its rows needs them."""
        dispatcher = self._dispatcher
        # Only neighbouring forwards with the same steps and runners overlap.
        for _, neighbours in itertools.groupby(planned, lambda plan: plan[1] and not dispatcher.alike):
            together = list(neighbours)
            decode = together[0][1]
            overlap = self._overlaps(decode)

            def wave(pieces: list[Piece], decode: bool, keep: bool = overlap) -> Wave:
                def start(group: Group, inputs: Arrays, done: Callable[[Call], object]) -> Call:
                    as_token = decode or (group.role == "head" and not all_logits)
                    return dispatcher.start(group, inputs, done, decode=as_token, keep=keep)

                return Wave(self._steps(pieces, decode, ids, states, all_logits), start)

            waves = (wave(*plan) for plan in together)
            with contextlib.closing(run_waves(waves, self.counters, most=None if overlap else 1)) as ended:
                for finished in ended:
                    yield finished.result

    def _waves(self, ids: Sequence[np.ndarray]) -> Iterator[tuple[list[Piece], bool]]:
        """Divide the tokens among forwards. Yields the pieces of each, and True if it decodes.

        A sequence is cut every `chunk` tokens, independently of the other sequences. A piece of one token decodes,
        unless there are `batch` such pieces. Decoding and prefill share a forward if the same backends run both.
        """
        starts = [0] * len(ids)
        while True:
            wave: list[Piece] = []
            rows, decode = 0, True
            lefts = [len(tokens) - start for tokens, start in zip(ids, starts, strict=True)]
            ones = sum(min(left, self.chunk) == 1 for left in lefts)
            as_prompts = self.batch is not None and ones >= self.batch
            for sequence, left in enumerate(lefts):
                if not left:
                    continue
                start = starts[sequence]
                stop = start + min(left, self.chunk)
                single = stop - start == 1 and not as_prompts
                if wave and single != decode and not self._dispatcher.alike:
                    continue
                limit = self._dispatcher.limit(decode=decode and single) or PREFILL_ROWS
                if wave and rows + stop - start > limit:
                    continue
                wave.append(Piece(sequence, start, stop))
                rows, decode = rows + stop - start, decode and single
                starts[sequence] = stop
            if not wave:
                return
            yield wave, decode

    def _overlaps(self, decode: bool) -> bool:
        """True if several forwards run at a time."""
        return self.overlap and not self._dispatcher.fused(decode) and self._dispatcher.overlaps(decode)

    def _steps(
        self,
        pieces: Sequence[Piece],
        decode: bool,
        ids: Sequence[np.ndarray],
        states: Sequence[State],
        all_logits: bool,
    ) -> Steps:
        """A forward over pieces. Returns the logits of the rows that need them: all, or the last of each sequence."""
        rows = Rows([ids[s][start:stop] for s, start, stop in pieces], [states[s].parts for s, *_ in pieces])
        x = yield from self._hidden(rows, decode)
        ends = [stop == len(ids[sequence]) for sequence, _, stop in pieces]
        x = x.copy() if all_logits else x[rows.lasts[ends]]  # the next forward may overwrite it
        most = self._dispatcher.head_rows(decode or not all_logits) or max(1, len(x))
        logits = []
        for begin in range(0, len(x), most):
            out = yield self.program.group("head"), {"x": x[begin : begin + most]}
            logits.append(out["logits"].astype(np.float32))
        return np.concatenate(logits) if len(logits) > 1 else logits[0] if logits else None

    def _hidden(self, rows: Rows, decode: bool) -> Steps:
        """A forward up to the head: returns its input (M, D). Updates the states."""
        fused = self._dispatcher.fused(decode)
        if fused is None:
            return (yield from self._network.steps(rows))
        begin, runner = time.perf_counter(), fused.open_fused(len(rows))
        self._network.fill(runner.inputs, rows.ids)
        x = runner.run(rows)
        self.counters.add_fused(runner.seconds(), time.perf_counter() - begin)
        return x

    def _check(self, tokens: Sequence[int] | np.ndarray, where: str = "") -> np.ndarray:
        try:
            ids = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            ids = np.empty(0)
        # One id beyond 64 bits makes the whole array float or object.
        if ids.ndim == 1 and ids.dtype.kind in "Of":
            ids = np.array(check_ids(f"{where}tokens", tokens, self.spec.V), np.int64)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"{where}tokens must be a non-empty sequence of integer ids")
        if ids.min() < 0 or ids.max() >= self.spec.V:
            wrong = ids[(ids < 0) | (ids >= self.spec.V)][0]
            raise UsageError(f"{where}token id {wrong} is outside the model's vocabulary of {self.spec.V}")
        return ids.astype(np.int64)

    def check_state(self, state: State) -> None:
        """Check that a state is of this model and whole. Raises UsageError."""
        if not isinstance(state, State):
            raise UsageError(f"a state is needed, not a {type(state).__name__}")
        if state.spec != self.spec:
            raise UsageError("this state belongs to a model of another generation or size")
        check_parts(state.parts, self.spec)
        logits = state.logits
        if logits is not None and (not isinstance(logits, np.ndarray) or logits.shape != (self.spec.V,)):
            raise UsageError(f"logits of a state must be an array of shape ({self.spec.V},)")
