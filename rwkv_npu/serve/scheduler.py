"""One thread owns the model and steps all sequences together.

Each step is one forward over rows of many sequences: one token of every answer in progress, and as many prompt tokens
as the time between two tokens allows. A prompt is cut at its checkpoints, and between them at multiples of GRAIN
tokens. So the results of a sequence do not depend on other sequences.
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

GRAIN = 16  # rows. Prompts are cut at multiples of it; the recurrences begin their chunks there too
INTERNAL = "internal error: the server's log has the reason"
SMOOTHING = 0.2  # weight of the newest time in a moving average

log = logging.getLogger("rwkv_npu.serve")


class BusyError(RwkvNpuError):
    """The server cannot take more work now."""


class Writer(Protocol):
    """Receives the tokens of one answer. All calls come from the scheduler's thread.

    sampler: samples the tokens of this answer. top: number of most likely tokens to pass with each sampled token.
    """

    sampler: Sampler
    top: int

    def allowed(self) -> np.ndarray | None:
        """The mask of tokens that may come next, in the form that `sampling.sample` takes. None allows all."""

    def take(self, choice: Choice) -> int | None:
        """Accept a sampled token. Returns the token to continue with, None at the end of the answer."""

    def fail(self, error: RwkvNpuError) -> None:
        """End the answer with an error."""


@dataclass(eq=False)
class Job:
    """A prompt to read, and the answers to write after it.

    ids: all tokens of the prompt. writers: one for each answer; without writers the prompt is read for the cache only.
    state: the initial state; None for the empty one. The cache is used with the empty one only. started: called with
    the number of cached tokens when reading begins. finished: called with the state after the prompt. checkpoints:
    where the cache may have a state or gets one; `Scheduler.prepare` finds them.
    """

    ids: Sequence[int]
    writers: Sequence[Writer]
    state: State | None = None
    started: Callable[[int], None] = lambda cached: None
    finished: Callable[[State], None] = lambda state: None
    checkpoints: Sequence[Checkpoint] | None = None
    cancelled: bool = False
    cached: int = 0

    def cancel(self) -> None:
        """Stop the job within one step. Thread-safe."""
        self.cancelled = True


@dataclass(eq=False)
class _Reading:
    """A prompt in progress: `state` has read its first `position` tokens."""

    job: Job
    checkpoints: deque[Checkpoint]  # after `position`
    state: State
    position: int

    def rows(self, budget: int) -> int:
        """Number of tokens to read next: up to the next checkpoint, or whole grains within `budget`."""
        end = self.checkpoints[0].position if self.checkpoints else len(self.job.ids)
        left = end - self.position
        if left <= budget:
            return left
        rows = budget // GRAIN * GRAIN
        # The kernels compute fewer than GRAIN rows in another way, so a cut leaves at least GRAIN.
        if left - rows < GRAIN:
            rows = left if rows == GRAIN else rows - GRAIN
        return rows


@dataclass(eq=False)
class _Writing:
    """An answer in progress: `token` was sampled, and `state` has not read it yet."""

    job: Job
    writer: Writer
    state: State
    token: int = -1


@dataclass
class Counters:
    """Totals since the start: tokens, seconds, answers."""

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
    """Moving averages: seconds of a step without prompt tokens, and of one row of a prompt."""

    write: float = 0.0
    row: float = 0.0

    def learn(self, seconds: float, writing: int, reading: int) -> None:
        if reading == 0:
            self.write += SMOOTHING * (seconds - self.write) if self.write else seconds
        else:
            row = max(0.0, seconds - (self.write if writing else 0.0)) / reading
            self.row += SMOOTHING * (row - self.row) if self.row else row

    def budget(self, most: int) -> int:
        """Rows of prompts that fit in a step without doubling the time between two tokens."""
        return int(min(most, self.write / self.row)) if self.write and self.row else GRAIN


class Scheduler:
    """Runs jobs on an engine. Any thread may call `submit`; the model runs in the scheduler's own thread.

    slots: answers and prompts in progress at a time. queue: jobs that may wait for a slot.
    """

    def __init__(
        self, engine: Engine, checkpoints: Checkpoints, cache: StateCache, *, slots: int = 8, queue: int = 64
    ):
        self.counters = Counters()
        self.slots, self.queue, self.cache, self.checkpoints = slots, queue, cache, checkpoints
        self._engine = engine
        self._waiting: deque[Job] = deque()
        self._idle_work: deque[Job] = deque(maxlen=slots)  # prompts to read for the cache only
        self._reading: list[_Reading] = []
        self._writing: list[_Writing] = []
        self._held: dict[Job, Checkpoint] = {}  # waiting until another job has read up to the checkpoint
        self._pace = _Pace()
        self._wake = threading.Condition()
        self._closing = self._draining = False
        self.step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="rwkv-npu scheduler", daemon=True)
        self._thread.start()

    # -- from any thread

    def prepare(self, job: Job) -> None:
        """Find a job's checkpoints, and load its last known state from the cache's stores, which may take long."""
        job.checkpoints = self._checkpoints_of(job)
        self.cache.fetch(job.checkpoints)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises BusyError if the queue is full or the server is shutting down."""
        if job.checkpoints is None:
            job.checkpoints = self._checkpoints_of(job)
        with self._wake:
            if self._draining:
                raise BusyError("the server is shutting down")
            if len(self._waiting) >= self.queue:
                self.counters.refused += 1
                raise BusyError(f"{len(self._waiting)} requests are waiting already: try again later")
            self._waiting.append(job)
            self._wake.notify()

    def read_when_idle(self, ids: Sequence[int]) -> None:
        """Read these tokens for the cache when the scheduler is idle. If too many wait, the oldest are dropped."""
        checkpoints = self.checkpoints.of(ids)
        if not checkpoints:
            return
        job = Job(ids[: checkpoints[-1].position], (), checkpoints=checkpoints)
        with self._wake:
            if not self._draining:
                self._idle_work.append(job)
                self._wake.notify()

    def _checkpoints_of(self, job: Job) -> list[Checkpoint]:
        return [] if job.state is not None else self.checkpoints.of(job.ids)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reading(self) -> int:
        return sum(bool(reading.job.writers) for reading in self._reading)

    @property
    def writing(self) -> int:
        return len(self._writing)

    def refuse(self) -> None:
        """Accept no more jobs. Queued and running jobs go on."""
        with self._wake:
            self._draining = True
            self._idle_work.clear()

    def close(self) -> None:
        """Stop the thread. Incomplete answers end with an error."""
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
            except Exception:  # a bug: all answers fail, and the server keeps running
                log.exception("a step failed")
                self._fail_all(RwkvNpuError(INTERNAL))
        self._fail_all(RwkvNpuError("the server was stopped"))

    def _has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._writing or self._held or self._idle_work)

    def _admit(self) -> None:
        """Give free slots to waiting jobs. If the scheduler is idle, take one prompt for the cache."""
        with self._wake:
            admitted = []
            jobs = [reading.job for reading in self._reading if reading.job.writers] + list(self._held)
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
        """Start to read a prompt after its longest cached prefix.

        If another job is reading the same tokens up to a later checkpoint, hold this job until it has read them.
        """
        if job.cancelled:
            self.counters.cancelled += 1
            return
        checkpoints = job.checkpoints or ()
        # The last token of a prompt is always read, for its logits.
        usable = [one for one in checkpoints if one.position < len(job.ids) or not job.writers]
        known = self.cache.position(usable)
        # Checkpoints depend on the tokens alone: jobs that share a later checkpoint share the next one too.
        coming = self._coming()
        shared = next((one for one in usable if one.position > known and one in coming), None)
        if shared is not None:
            self._held[job] = shared
            return
        position, state = self.cache.find(usable)
        job.cached = position
        self.counters.cached_tokens += position
        job.started(position)
        if position == len(job.ids):
            return
        if state is None:
            state = self._engine.new_state() if job.state is None else job.state.copy()
        later = deque(one for one in checkpoints if one.position > position)
        self._reading.append(_Reading(job, later, state, position))

    def _coming(self) -> set[Checkpoint]:
        """The next checkpoint of each prompt in progress."""
        return {reading.checkpoints[0] for reading in self._reading if reading.checkpoints}

    def _release_held(self) -> None:
        coming = self._coming()
        for job in [
            job for job, checkpoint in self._held.items() if job.cancelled or checkpoint not in coming
        ]:
            del self._held[job]
            self._begin(job)

    def _drop_cancelled(self) -> None:
        running = [reading.job for reading in self._reading] + [writing.job for writing in self._writing]
        self.counters.cancelled += sum(job.cancelled for job in running)
        self._reading = [reading for reading in self._reading if not reading.job.cancelled]
        self._writing = [writing for writing in self._writing if not writing.job.cancelled]
        self._release_held()

    def _step(self) -> None:
        """Run one forward over the rows of all sequences, and sample from its logits."""
        writing, prompts = list(self._writing), self._choose_prompts()
        if not writing and not prompts:
            return
        tokens = [[answer.token] for answer in writing]
        tokens += [list(p.job.ids[p.position : p.position + rows]) for p, rows in prompts]
        sequences: list[_Reading | _Writing] = [*writing, *(prompt for prompt, _ in prompts)]
        states = [sequence.state for sequence in sequences]
        self.step_began = begin = time.monotonic()
        try:
            logits, _ = self._engine.forward_batch(tokens, states, inplace=True)
        except RwkvNpuError as error:
            # The states of this step are lost: some layers have read their tokens, others have not.
            self._fail_these(sequences, error)
            return
        finally:
            self.step_began = None
        self._count(time.monotonic() - begin, len(writing), sum(rows for _, rows in prompts))
        samples = [(answer, row) for row, answer in enumerate(writing)]
        for row, (prompt, rows) in enumerate(prompts, len(writing)):
            samples += [(answer, row) for answer in self._advance(prompt, rows)]
        self._sample(samples, np.asarray(logits))

    def _choose_prompts(self) -> list[tuple[_Reading, int]]:
        """The prompts of this step in order of arrival, with the number of rows of each."""
        most = self._engine.window - len(self._writing)
        budget = min(most, max(GRAIN, self._pace.budget(most))) if self._writing else most
        prompts = []
        awaited = set(self._held.values())

        def for_later(reading: _Reading) -> bool:
            return not (reading.job.writers or reading.checkpoints[0] in awaited)

        for reading in sorted(self._reading, key=for_later):
            rows = reading.rows(budget)
            if rows <= 0:
                break
            prompts.append((reading, rows))
            budget -= rows
        return prompts

    def _count(self, seconds: float, writing: int, reading: int) -> None:
        self._pace.learn(seconds, writing, reading)
        share = reading / (reading + writing)
        self.counters.prompt_tokens += reading
        self.counters.written_tokens += writing
        self.counters.prompt_seconds += seconds * share
        self.counters.write_seconds += seconds * (1 - share)

    def _advance(self, reading: _Reading, rows: int) -> list[_Writing]:
        """Count `rows` tokens of a prompt as read. Cache the state at a checkpoint; return the answers at the end."""
        reading.position += rows
        if reading.checkpoints and reading.checkpoints[0].position == reading.position:
            self.cache.keep(reading.checkpoints.popleft().key, reading.state)
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

    def _sample(self, samples: Sequence[tuple[_Writing, int]], logits: np.ndarray) -> None:
        """Sample the next token of each answer from its row of the logits, or end the answer."""
        ready, masks = [], []
        for answer, row in samples:
            try:
                masks.append(answer.writer.allowed())
                ready.append((answer, row))
            except Exception as error:
                self._fail_answer(answer, error)
        if not ready:
            return
        choices = sample(
            logits[[row for _, row in ready]],
            [answer.writer.sampler for answer, _ in ready],
            allowed=masks,
            top=max(answer.writer.top for answer, _ in ready),
        )
        for (answer, _), choice in zip(ready, choices, strict=True):
            try:
                if isinstance(choice, BackendError):
                    raise choice
                token = answer.writer.take(choice)
            except Exception as error:
                self._fail_answer(answer, error)
                continue
            if token is None:
                self._writing.remove(answer)
                self.counters.answers += 1
            else:
                answer.token = token

    def _fail_answer(self, answer: _Writing, error: Exception) -> None:
        """End one answer with an error. An unexpected one is a bug: its details go to the log."""
        if not isinstance(error, RwkvNpuError):
            log.error("an answer failed", exc_info=error)
            error = RwkvNpuError(INTERNAL)
        self._fail_these([answer], error)

    def _fail_these(self, sequences: Sequence[_Reading | _Writing], error: RwkvNpuError) -> None:
        for sequence in sequences:
            if isinstance(sequence, _Reading):
                self._reading.remove(sequence)
                self._fail(sequence.job.writers, error)
            else:
                self._writing.remove(sequence)
                self._fail([sequence.writer], error)

    def _fail_all(self, error: RwkvNpuError) -> None:
        with self._wake:
            waiting = [*self._held, *self._waiting]
            self._held.clear()
            self._waiting.clear()
            self._idle_work.clear()
        self._fail_these([*self._reading, *self._writing], error)
        for job in waiting:
            self._fail(job.writers, error)

    def _fail(self, writers: Sequence[Writer], error: RwkvNpuError) -> None:
        for writer in writers:
            self.counters.failed += 1
            with contextlib.suppress(Exception):  # its client may have gone
                writer.fail(error)
