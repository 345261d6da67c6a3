"""One thread that owns the model and steps all sequences together.

Each step is one forward over rows of many sequences: a token of every answer that is being written, and as many tokens
of waiting prompts as the time between two tokens allows. Prompts are read from checkpoint to checkpoint, in steps of
GRAIN tokens counted from the last one: so the numbers of a sequence do not depend on what else runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rwkv_npu.errors import BackendError, RwkvNpuError
from rwkv_npu.formats.state import State
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.serve.cache import Checkpoint, Checkpoints, StateCache
from rwkv_npu.text.sampling import Choice, Sampler, sample

GRAIN = 16  # rows: prompts are cut at multiples of it, at which the recurrences begin a chunk too
SMOOTHING = 0.2  # of a measured time, in the average of all before

log = logging.getLogger("rwkv_npu.serve")


class BusyError(RwkvNpuError):
    """The server takes no more work now."""


class Writer(Protocol):
    """Whoever receives the tokens of one answer. All calls come from the scheduler's thread.

    sampler: draws its tokens. top: how many of the most likely tokens it wants with each.
    """

    sampler: Sampler
    top: int

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, as `sampling.sample` takes them; None for all."""

    def take(self, choice: Choice) -> int | None:
        """Take what was drawn; the token to go on with, None where the answer has ended."""

    def fail(self, error: RwkvNpuError) -> None:
        """The answer ends here, for this reason."""


@dataclass(eq=False)
class Job:
    """A prompt to read and the answers to write after it.

    ids: all tokens of the prompt. writers: one for each answer; none only reads, for the cache. state: what to begin
    with instead of an empty one, which the cache knows nothing of. started: called with the number of tokens that the
    cache had, when the prompt's turn comes. finished: called with the state after the prompt.
    """

    ids: Sequence[int]
    writers: Sequence[Writer]
    state: State | None = None
    started: Callable[[int], None] = lambda cached: None
    finished: Callable[[State], None] = lambda state: None
    cancelled: bool = False
    cached: int = 0

    def cancel(self) -> None:
        """End it within a step. Safe from any thread."""
        self.cancelled = True


@dataclass(eq=False)
class _Reading:
    """A prompt that is being read: `position` tokens of it are in `state`."""

    job: Job
    checkpoints: deque[Checkpoint]  # still to come
    state: State
    position: int

    def rows(self, budget: int) -> int:
        """Tokens to read next: to the next checkpoint, or whole grains within `budget`."""
        end = self.checkpoints[0].position if self.checkpoints else len(self.job.ids)
        left = end - self.position
        return left if left <= budget else budget // GRAIN * GRAIN


@dataclass(eq=False)
class _Writing:
    """An answer that is being written: `token` is chosen and not yet read by `state`."""

    job: Job
    writer: Writer
    state: State
    token: int = -1


@dataclass
class Counters:
    """What was done since the start: tokens, seconds, answers."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    prompt_seconds: float = 0.0
    write_seconds: float = 0.0
    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0


@dataclass
class _Pace:
    """Average seconds of a step that only writes, and of a row of a prompt."""

    write: float = 0.0
    row: float = 0.0

    def learn(self, seconds: float, writing: int, reading: int) -> None:
        if reading == 0:
            self.write += SMOOTHING * (seconds - self.write) if self.write else seconds
        else:
            row = max(0.0, seconds - (self.write if writing else 0.0)) / reading
            self.row += SMOOTHING * (row - self.row) if self.row else row

    def budget(self, most: int) -> int:
        """Rows of prompts that fit beside answers without doubling the time of a step."""
        return int(min(most, self.write / self.row)) if self.write and self.row else GRAIN


class Scheduler:
    """Runs jobs on an engine. `submit` from any thread; everything else happens in one thread of its own.

    slots: answers and prompts at a time. queue: jobs that may wait for a slot.
    """

    def __init__(
        self, engine: Engine, checkpoints: Checkpoints, cache: StateCache, *, slots: int = 8, queue: int = 64
    ):
        self.counters = Counters()
        self.slots, self.queue, self.cache, self.checkpoints = slots, queue, cache, checkpoints
        self._engine = engine
        self._waiting: deque[Job] = deque()
        self._idle_work: deque[Job] = deque(maxlen=slots)  # prompts that only the cache wants
        self._reading: list[_Reading] = []
        self._writing: list[_Writing] = []
        self._held: list[Job] = []  # until another job has read what they begin with
        self._pace = _Pace()
        self._wake = threading.Condition()
        self._closing = self._draining = False
        self.step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="rwkv-npu scheduler", daemon=True)
        self._thread.start()

    # -- from any thread

    def submit(self, job: Job) -> None:
        """Queue a job. Raises BusyError where too many wait, or the server is about to stop."""
        with self._wake:
            if self._draining:
                raise BusyError("the server is shutting down")
            if len(self._waiting) >= self.queue:
                self.counters.refused += 1
                raise BusyError(f"{len(self._waiting)} requests are waiting already: try again later")
            self._waiting.append(job)
            self._wake.notify()

    def read_when_idle(self, ids: Sequence[int]) -> None:
        """Have the cache know these tokens, once nothing else is to be done. Forgotten where too much is."""
        with self._wake:
            if not self._draining:
                self._idle_work.append(Job(ids, ()))
                self._wake.notify()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reading(self) -> int:
        return sum(bool(one.job.writers) for one in self._reading)

    @property
    def writing(self) -> int:
        return len(self._writing)

    def place(self, job: Job) -> int | None:
        """How many jobs are before this one in the queue; None once its turn has come."""
        with self._wake:
            return self._waiting.index(job) if job in self._waiting else None

    def refuse(self) -> None:
        """Take no more jobs. Those there are go on."""
        with self._wake:
            self._draining = True
            self._idle_work.clear()

    def close(self) -> None:
        """Stop, with errors for the answers that are not complete."""
        with self._wake:
            self._closing = self._draining = True
            self._wake.notify()
        self._thread.join()

    # -- the scheduler's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._has_work()):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._admit()
                self._drop_cancelled()
                self._step()
            except Exception:  # a fault of ours: the answers end, the server stays
                log.exception("a step failed")
                self._fail_all(RwkvNpuError("the server failed inside; its log has the reason"))
        self._fail_all(RwkvNpuError("the server was stopped"))

    def _has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._writing or self._held or self._idle_work)

    def _admit(self) -> None:
        """Give waiting jobs the free slots; where there are none, and nothing else, one prompt for the cache."""
        with self._wake:
            admitted = []
            jobs = [one.job for one in self._reading if one.job.writers] + self._held
            busy = sum(len(job.writers) for job in jobs) + len(self._writing)
            while self._waiting:
                needed = len(self._waiting[0].writers)
                if busy and busy + needed > self.slots:
                    break
                admitted.append(self._waiting.popleft())
                busy += needed
            if not admitted and not busy and not self._reading and self._idle_work:
                admitted.append(self._idle_work.popleft())
        for job in admitted:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        """Find out how much of a prompt is known, and start to read the rest.

        Where another job is about to read what this one needs next, it waits for that.
        """
        if job.cancelled:
            self.counters.cancelled += 1
            return
        try:
            position, checkpoints = 0, deque[Checkpoint]()
            state = job.state.copy() if job.state is not None else None
            if state is None:
                # The last token of a prompt is always read, for its logits.
                known = [
                    one
                    for one in self.checkpoints.of(job.ids)
                    if one.position < len(job.ids) or not job.writers
                ]
                position, state = self.cache.find(known)
                checkpoints.extend(one for one in known if one.position > position)
                coming = {one.checkpoints[0] for one in self._reading if one.checkpoints}
                if checkpoints and checkpoints[0] in coming:
                    self._held.append(job)
                    return
            job.cached = position
            self.counters.cached_tokens += position
            job.started(position)
            if position < len(job.ids):
                state = state or self._engine.new_state()
                self._reading.append(_Reading(job, checkpoints, state, position))
        except RwkvNpuError as error:
            self._fail(job.writers, error)

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for job in held:
            self._begin(job)

    def _drop_cancelled(self) -> None:
        running = [one.job for one in self._reading] + [one.job for one in self._writing]
        self.counters.cancelled += sum(job.cancelled for job in running)
        self._reading = [one for one in self._reading if not one.job.cancelled]
        self._writing = [one for one in self._writing if not one.job.cancelled]
        if not self._reading:
            self._release_held()

    def _step(self) -> None:
        """One forward over the rows of all sequences, and what follows from its logits."""
        writing, chosen = list(self._writing), self._choose_prompts()
        if not writing and not chosen:
            return
        tokens = [[one.token] for one in writing]
        tokens += [list(one.job.ids[one.position : one.position + rows]) for one, rows in chosen]
        sequences: list[_Reading | _Writing] = [*writing, *(one for one, _ in chosen)]
        states = [one.state for one in sequences]
        self.step_began = begin = time.monotonic()
        try:
            logits, _ = self._engine.forward_batch(tokens, states, inplace=True)
        except RwkvNpuError as error:
            # States of this step are lost: some layers have read their tokens, others have not.
            self._fail_these(sequences, error)
            return
        finally:
            self.step_began = None
        self._count(time.monotonic() - begin, len(writing), sum(count for _, count in chosen))
        drawing = [(one, row) for row, one in enumerate(writing)]
        for row, (reading, count) in enumerate(chosen, len(writing)):
            drawing += [(one, row) for one in self._advance(reading, count)]
        self._draw(drawing, np.asarray(logits))

    def _choose_prompts(self) -> list[tuple[_Reading, int]]:
        """The prompts of this step, in the order of their arrival, and how many rows of each."""
        most = self._engine.chunk - len(self._writing)
        budget = min(most, max(GRAIN, self._pace.budget(most))) if self._writing else most
        chosen = []
        for reading in sorted(self._reading, key=lambda one: not one.job.writers):
            rows = reading.rows(budget)
            if rows <= 0:
                break
            chosen.append((reading, rows))
            budget -= rows
        return chosen

    def _count(self, seconds: float, writing: int, reading: int) -> None:
        self._pace.learn(seconds, writing, reading)
        share = reading / (reading + writing)
        self.counters.prompt_tokens += reading
        self.counters.written_tokens += writing
        self.counters.prompt_seconds += seconds * share
        self.counters.write_seconds += seconds * (1 - share)

    def _advance(self, reading: _Reading, rows: int) -> list[_Writing]:
        """A prompt has been read further: keep its checkpoint. At its end, its answers."""
        reading.position += rows
        if reading.checkpoints and reading.checkpoints[0].position == reading.position:
            self.cache.keep(reading.checkpoints.popleft().key, reading.state)
            self._release_held()
        if reading.position < len(reading.job.ids):
            return []
        self._reading.remove(reading)
        reading.job.finished(reading.state)
        first = [reading.state, *(reading.state.copy() for _ in reading.job.writers[1:])]
        answers = [
            _Writing(reading.job, writer, state)
            for writer, state in zip(reading.job.writers, first, strict=False)
        ]
        self._writing += answers
        return answers

    def _draw(self, drawing: Sequence[tuple[_Writing, int]], logits: np.ndarray) -> None:
        """Draw the next token of each answer, from a row of the logits, or end it."""
        if not drawing:
            return
        writers = [one.writer for one, _ in drawing]
        choices = sample(
            logits[[row for _, row in drawing]],
            [writer.sampler for writer in writers],
            allowed=[writer.allowed() for writer in writers],
            top=max(writer.top for writer in writers),
        )
        for (one, _), choice in zip(drawing, choices, strict=True):
            try:
                if isinstance(choice, BackendError):
                    raise choice
                token = one.writer.take(choice)
            except RwkvNpuError as error:
                self._fail_these([one], error)
                continue
            if token is None:
                self._writing.remove(one)
                self.counters.answers += 1
            else:
                one.token = token

    def _fail_these(self, sequences: Sequence[_Reading | _Writing], error: RwkvNpuError) -> None:
        for one in sequences:
            if isinstance(one, _Reading):
                self._reading.remove(one)
                self._fail(one.job.writers, error)
            else:
                self._writing.remove(one)
                self._fail([one.writer], error)

    def _fail_all(self, error: RwkvNpuError) -> None:
        with self._wake:
            waiting = [*self._held, *self._waiting]
            self._held = []
            self._waiting.clear()
            self._idle_work.clear()
        self._fail_these([*self._reading, *self._writing], error)
        for job in waiting:
            self._fail(job.writers, error)

    def _fail(self, writers: Sequence[Writer], error: RwkvNpuError) -> None:
        for writer in writers:
            self.counters.failed += 1
            with contextlib.suppress(Exception):  # one that cannot be told anything more is gone
                writer.fail(error)
