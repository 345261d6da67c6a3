"""The scheduler: many sequences in one forward, and the same answers alone and among others."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import BackendError, RwkvNpuError
from rwkv_npu.formats.state import State
from rwkv_npu.serve.cache import Checkpoints, StateCache, size_of
from rwkv_npu.serve.scheduler import GRAIN, BusyError, Job, Scheduler
from rwkv_npu.text.sampling import Choice, Sampler, SamplingOptions
from tests.conversions import convert

WAIT = 120.0  # seconds that anything here may take: the sampler may have to be compiled


class Recorder:
    """Writes greedily, so many tokens, and remembers them."""

    def __init__(self, count: int):
        self.count, self.tokens, self.error = count, list[int](), None
        self.ended = threading.Event()
        self.sampler, self.top = Sampler(SamplingOptions(temperature=0)), 0

    def allowed(self) -> np.ndarray | None:
        return None

    def take(self, choice: Choice) -> int | None:
        self.tokens.append(choice.token)
        if len(self.tokens) < self.count:
            return choice.token
        self.ended.set()
        return None

    def fail(self, error: RwkvNpuError) -> None:
        self.error = error  # type: ignore[assignment]
        self.ended.set()

    def wait(self) -> list[int]:
        assert self.ended.wait(WAIT), "the answer does not end"
        if self.error is not None:
            raise self.error
        return self.tokens


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[rwkv_npu.Model]:
    with rwkv_npu.load(checkpoint, backend="numpy") as loaded:
        yield loaded


Make = Callable[..., Scheduler]


@pytest.fixture
def scheduler(model: rwkv_npu.Model) -> Iterator[Make]:
    made: list[Scheduler] = []

    def make(budget: int = 1 << 24, **options: Any) -> Scheduler:
        checkpoints = Checkpoints(model.tokenizer, "test", ["ing "])
        made.append(Scheduler(model.engine, checkpoints, StateCache(budget), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def greedy(model: rwkv_npu.Model, ids: Sequence[int], count: int) -> list[int]:
    """The tokens that the engine alone writes after a prompt."""
    logits, state = model.forward(ids)
    tokens = [int(np.argmax(logits))]
    while len(tokens) < count:
        logits, state = model.forward(tokens[-1:], state)
        tokens.append(int(np.argmax(logits)))
    return tokens


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 250, length).tolist() for length in rng.integers(1, 90, count)]


def test_one_answer(model: rwkv_npu.Model, scheduler: Make) -> None:
    ids, writer = prompts(1)[0], Recorder(10)
    scheduler().submit(Job(ids, [writer]))
    assert writer.wait() == greedy(model, ids, 10)


def test_many_at_once_are_as_if_alone(model: rwkv_npu.Model, scheduler: Make) -> None:
    """More than there are slots, of all lengths, joining and leaving at different times."""
    jobs = [(ids, Recorder(4 + 3 * i)) for i, ids in enumerate(prompts(12))]
    running = scheduler(slots=5)
    for i, (ids, writer) in enumerate(jobs):
        running.submit(Job(ids, [writer]))
        time.sleep(0.01 * (i % 3))
    for ids, writer in jobs:
        assert writer.wait() == greedy(model, ids, writer.count)
    assert running.counters.answers == 12 and not running.writing and not running.reading


def test_several_answers_read_their_prompt_once(model: rwkv_npu.Model, scheduler: Make) -> None:
    ids, writers = prompts(1, 3)[0], [Recorder(n) for n in (3, 9, 5)]
    running = scheduler()
    running.submit(Job(ids, writers))
    expected = greedy(model, ids, 9)
    assert [writer.wait() for writer in writers] == [expected[:3], expected, expected[:5]]
    assert running.counters.prompt_tokens == len(ids)


LONG = [*([40] * 20), *b"returning ", *([41] * 600), *b"turn\n\n", *([42] * 30)]


def test_a_prompt_that_is_known_is_not_read_again(model: rwkv_npu.Model, scheduler: Make) -> None:
    ids = [one + 1 for one in LONG]
    running, writers = scheduler(), [Recorder(6) for _ in range(2)]
    for writer in writers:
        job = Job(ids, [writer])
        running.submit(job)
        writer.wait()
    assert writers[0].tokens == writers[1].tokens == greedy(model, ids, 6)
    assert job.cached > len(ids) - 60 and running.cache.hits == 1


def test_two_of_a_prompt_at_once_read_it_once(scheduler: Make) -> None:
    ids = [one + 1 for one in LONG]
    running, writers = scheduler(), [Recorder(6) for _ in range(3)]
    for writer in writers:
        running.submit(Job(ids, [writer]))
    texts = [writer.wait() for writer in writers]
    assert texts[0] == texts[1] == texts[2]
    assert running.counters.prompt_tokens < 1.5 * len(ids)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.lists(st.sampled_from([b"a ", b"\n\n", b"ing ", b"turn" * 9]), max_size=40), min_size=1, max_size=5
    ),
    st.sampled_from([0, 40_000, 1 << 24]),
)
def test_the_cache_changes_no_answer(model: rwkv_npu.Model, parts: list[list[bytes]], budget: int) -> None:
    """Conversations that share beginnings, with any eviction."""
    encode = model.encode
    asked = [encode(b"".join(sum(parts[: i + 1], [])).decode() + "x") for i in range(len(parts))]
    checkpoints = Checkpoints(model.tokenizer, "test", ["ing "])
    running = Scheduler(model.engine, checkpoints, StateCache(budget))
    try:
        for ids in asked:
            writer = Recorder(4)
            running.submit(Job(ids, [writer]))
            assert writer.wait() == greedy(model, ids, 4)
    finally:
        running.close()


@pytest.fixture(scope="module", params=["int8", "int4"])
def compiled(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[rwkv_npu.Model]:
    bundle = convert(checkpoint, tmp_path_factory.mktemp("numba") / "m.rwkv", cpu=request.param)
    with rwkv_npu.load(bundle, backend="numba", precision=request.param) as loaded:
        yield loaded


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_same_bits_with_and_without_the_cache_and_among_others(
    compiled: rwkv_npu.Model, data: st.DataObject
) -> None:
    """Prompts that share beginnings, all at once or in turn, with any eviction."""
    pieces = st.lists(
        st.sampled_from([b"a ", b"\n\n", b"ing ", b"turn" * 9, b"and so on " * 30]), min_size=1, max_size=12
    )
    begin = data.draw(pieces)
    ids = [
        compiled.encode(b"".join([*begin, *rest, b"x"]).decode())
        for rest in data.draw(st.lists(pieces, min_size=2, max_size=4))
    ]
    size = size_of(compiled.new_state())
    states: list[list[State]] = []
    for budget in (0, data.draw(st.integers(0, 6)) * size):
        checkpoints = Checkpoints(compiled.tokenizer, "test", ["ing "])
        running = Scheduler(compiled.engine, checkpoints, StateCache(budget))
        after = dict[int, State]()
        try:
            writers = [Recorder(1) for _ in ids]
            for i, (prompt, writer) in enumerate(zip(ids, writers, strict=True)):
                keep = functools.partial(after.__setitem__, i)
                running.submit(Job(prompt, [writer], finished=lambda state, keep=keep: keep(state.copy())))
                if budget == 0 or data.draw(st.booleans()):
                    writer.wait()
            for writer in writers:
                writer.wait()
        finally:
            running.close()
        states.append([after[i] for i in range(len(ids))])
    for alone, cached in zip(*states, strict=True):
        for name, part in alone.parts.items():
            np.testing.assert_array_equal(part, cached.parts[name])


def test_a_held_prompt_goes_on_when_the_one_it_waits_for_is_cancelled(
    model: rwkv_npu.Model, scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are found once, however often others pass theirs."""
    ids = [one + 1 for one in LONG]
    running, found, gate = scheduler(), list[int](), threading.Event()
    of, forward = running.checkpoints.of, model.engine.forward_batch
    monkeypatch.setattr(running.checkpoints, "of", lambda ids: found.append(len(ids)) or of(ids))

    def slow(*arguments: Any, **options: Any) -> Any:
        gate.wait(WAIT)
        return forward(*arguments, **options)

    monkeypatch.setattr(model.engine, "forward_batch", slow)
    first, second = Job(ids, [Recorder(3)]), Job([*ids, 7], [Recorder(3)])
    running.submit(first)
    running.submit(second)
    while not running._held:
        time.sleep(0.001)
    first.cancel()
    gate.set()
    assert second.writers[0].wait() == greedy(model, second.ids, 3)  # type: ignore[attr-defined]
    assert found == [len(ids), len(ids) + 1] and not running._held


def test_what_the_cache_wants_waits_for_idle_times(scheduler: Make) -> None:
    ids = [one + 1 for one in LONG]
    running = scheduler()
    running.read_when_idle(ids)
    for _ in range(500):
        if len(running.cache) >= 2:
            break
        time.sleep(0.01)
    writer = Recorder(2)
    job = Job(ids, [writer])
    running.submit(job)
    writer.wait()
    assert job.cached > 500


def test_a_full_queue_refuses(scheduler: Make) -> None:
    running = scheduler(slots=1, queue=2)
    endless = Recorder(100_000)
    job = Job([1, 2], [endless])
    running.submit(job)
    while not running.writing:
        time.sleep(0.01)
    waiting = [Job([3], [Recorder(1)]) for _ in range(2)]
    for one in waiting:
        running.submit(one)
    assert running.waiting == 2
    with pytest.raises(BusyError, match="2 requests are waiting"):
        running.submit(Job([4], [Recorder(1)]))
    job.cancel()
    for one in waiting:
        one.writers[0].wait()  # type: ignore[attr-defined]
    assert running.counters.cancelled == 1 and len(endless.tokens) < 100_000


def test_a_fault_ends_the_answers_of_its_step_and_no_other(
    model: rwkv_npu.Model, scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, forward = scheduler(), model.engine.forward_batch

    def broken(tokens: Any, states: Any, **options: Any) -> Any:
        if any(99 in list(piece) for piece in tokens):
            raise BackendError("the backend failed")
        return forward(tokens, states, **options)

    monkeypatch.setattr(model.engine, "forward_batch", broken)
    bad, good = Recorder(5), Recorder(5)
    running.submit(Job([99], [bad]))
    with pytest.raises(BackendError, match="the backend failed"):
        bad.wait()
    running.submit(Job([1, 2, 3], [good]))
    assert len(good.wait()) == 5 and running.counters.failed == 1


def test_an_answer_that_has_no_token_left_ends_alone(model: rwkv_npu.Model, scheduler: Make) -> None:
    class Picky(Recorder):
        def allowed(self) -> np.ndarray | None:
            return np.zeros(-(-model.spec.V // 32), np.uint32)

    picky, other = Picky(3), Recorder(3)
    running = scheduler()
    running.submit(Job([1, 2], [picky, other]))
    assert len(other.wait()) == 3
    with pytest.raises(BackendError, match="no token is left to choose"):
        picky.wait()


def test_a_bug_in_one_answer_ends_no_other(
    model: rwkv_npu.Model, scheduler: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class NoMask(Recorder):
        def allowed(self) -> np.ndarray | None:
            raise ValueError("the grammar's own bug")

    class NoText(Recorder):
        def take(self, choice: Choice) -> int | None:
            raise IndexError("the parser's own bug")

    writers = [NoMask(3), Recorder(3), NoText(3)]
    running = scheduler()
    running.submit(Job([1, 2], writers))
    assert len(writers[1].wait()) == 3
    for broken in (writers[0], writers[2]):
        with pytest.raises(RwkvNpuError, match="internal error"):
            broken.wait()
    assert "the grammar's own bug" in caplog.text and "the parser's own bug" in caplog.text
    assert running.counters.failed == 2 and running.counters.answers == 1


def test_no_answer_waits_for_a_prompt_longer_than_two_steps(
    model: rwkv_npu.Model, scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that a forward advances: 5 ms, and 0.2 ms a row of a prompt."""
    now, steps, forward = [0.0], list[tuple[int, float]](), model.engine.forward_batch

    def timed(tokens: Any, states: Any, **options: Any) -> Any:
        rows = sum(len(piece) for piece in tokens if len(piece) > 1)
        now[0] += (seconds := 5e-3 + 0.2e-3 * rows)
        if any(len(piece) == 1 for piece in tokens):
            steps.append((rows, seconds))
        return forward(tokens, states, **options)

    monkeypatch.setattr(model.engine, "forward_batch", timed)
    monkeypatch.setattr("rwkv_npu.serve.scheduler.time.monotonic", lambda: now[0])
    running, writer = scheduler(budget=0), Recorder(400)
    running.submit(Job([1], [writer]))
    while len(writer.tokens) < 5:
        time.sleep(0.001)
    prompts = [Job([1 + (i + j) % 200 for i in range(700)], [Recorder(1)]) for j in range(3)]
    for job in prompts:
        running.submit(job)
    writer.wait()
    beside = [(rows, seconds) for rows, seconds in steps if rows]
    assert len(beside) > 50 and sum(rows for rows, _ in beside) > 2000
    within = [seconds <= 2 * 5e-3 + GRAIN * 0.2e-3 for _, seconds in beside]
    assert all(within[1:]) and np.mean([rows for rows, _ in beside[2:-3]]) > 10


def test_closing_ends_what_runs(model: rwkv_npu.Model) -> None:
    running = Scheduler(model.engine, Checkpoints(model.tokenizer, "t", []), StateCache(0))
    writer = Recorder(100_000)
    running.submit(Job([1], [writer]))
    running.refuse()
    with pytest.raises(BusyError, match="shutting down"):
        running.submit(Job([1], [Recorder(1)]))
    running.close()
    with pytest.raises(RwkvNpuError, match="was stopped"):
        writer.wait()


def test_prompts_are_cut_at_grains_counted_from_a_checkpoint(
    model: rwkv_npu.Model, scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sequences may change where a prompt is cut, but only to other multiples of GRAIN, where chunks begin."""
    cuts: list[int] = []
    forward = model.engine.forward_batch

    def watched(tokens: Any, states: Any, **options: Any) -> Any:
        cuts.extend(len(piece) for piece in tokens if len(piece) > 1)
        return forward(tokens, states, **options)

    monkeypatch.setattr(model.engine, "forward_batch", watched)
    running, endless = scheduler(budget=0), Recorder(100_000)
    job = Job([1], [endless])
    running.submit(job)
    writer = Recorder(1)
    running.submit(Job([1 + i % 200 for i in range(500)], [writer]))
    writer.wait()
    job.cancel()
    assert all(cut % GRAIN == 0 for cut in cuts[:-1]) and sum(cuts) in (500, 499)
