"""Waves: forwards that overlap compute the bits of those that run one after the other, under any timing and fault."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.backends import fallback as fallback_module
from rwkv_npu.backends.base import GoldenVectors
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.state import State
from rwkv_npu.models.spec import Group
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.selftest import SELF_TEST_ROWS, golden_vectors
from rwkv_npu.runtime.weights import CheckpointSource
from tests.faulty import KINDS, FaultyNpu, FaultyRunner, engine_with_fallback
from tests.tiny import write_model

L, V = 4, 60
IDS = np.random.default_rng(5).integers(1, V, 64)
PROMPTS = int(os.environ.get("RWKV_PROMPTS", 100))  # in a row; 1000 in `make campaign`
KINDS_OF_MODEL = (("4", "layer"), ("6", "layer"), ("7", "layer"), ("7", "projection"), ("7a", "layer"))


class TimedNpu(FaultyNpu):
    """Calls take some milliseconds, asleep: `pace` has the time of each call in turn. It counts calls at work."""

    def __init__(self, source: CheckpointSource, pace: Sequence[int] = (0,), queues: int = 3, **options):
        super().__init__(source, queues=queues, **options)
        self._pace, self._lock = pace, threading.Lock()
        self.working: list[int] = []  # queues of the calls at work
        self.most, self.calls = 0, 0  # the most at work at a time; calls since it was opened

    def open(self, group: Group, rows: int) -> FaultyRunner:
        runner = super().open(group, rows)
        run = runner.run

        def timed() -> Mapping[str, np.ndarray]:
            with self._lock:
                assert self.queue(group) not in self.working
                self.working.append(self.queue(group))
                self.most, self.calls = max(self.most, len(self.working)), self.calls + self.opened
            time.sleep(self._pace[self.calls % len(self._pace)] / 1e3)
            try:
                return run()
            finally:
                with self._lock:
                    self.working.remove(self.queue(group))

        runner.run = timed
        return runner


@pytest.fixture(scope="module", params=KINDS_OF_MODEL, ids="-".join)
def any_source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    return make_source(tmp_path_factory.mktemp("waves") / "model.pth", *request.param)


@pytest.fixture(scope="module")
def any_recorded(any_source: CheckpointSource) -> Mapping[str, GoldenVectors]:
    return golden_vectors(any_source, SELF_TEST_ROWS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    return make_source(tmp_path_factory.mktemp("waves") / "model.pth", "7", "layer")


def make_source(path: Path, generation: str, fusion: str) -> CheckpointSource:
    write_model(path, generation, vocabulary=False, D=32, L=L, V=V)
    return CheckpointSource(open_checkpoint(path), fusion)


@pytest.fixture(scope="module")
def recorded(source: CheckpointSource) -> Mapping[str, GoldenVectors]:
    return golden_vectors(source, SELF_TEST_ROWS)


def assert_same_bits(ours: tuple[Sequence[np.ndarray], Sequence[State]], theirs: tuple) -> None:
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert np.array_equal(one, other)
    for state, expected in zip(ours[1], theirs[1], strict=True):
        assert state.tokens_seen == expected.tokens_seen
        assert np.array_equal(state.logits, expected.logits)
        for name, part in expected.parts.items():
            assert np.array_equal(state.parts[name], part), name


def read(engine: Engine, tokens: Sequence[np.ndarray], all_logits: bool, *, overlap: bool):
    engine.overlap = overlap
    states = [engine.new_state() for _ in tokens]
    return engine.forward_batch(tokens, states, all_logits)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_bits_are_those_of_the_plain_order(any_source, any_recorded, data) -> None:
    """For any lengths, numbers of waves and of cores, and any times of calls."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4), label="lengths")
    queues = data.draw(st.integers(1, 4), label="queues")
    pace = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=7), label="pace")
    engine, fallback = engine_with_fallback(any_source, TimedNpu(any_source, pace, queues), any_recorded)
    tokens = [IDS[:length] for length in lengths]
    plain = read(engine, tokens, True, overlap=False)
    assert_same_bits(read(engine, tokens, True, overlap=True), plain)
    last = read(engine, tokens, False, overlap=True)
    assert_same_bits((last[0], last[1]), ([logits[-1] for logits in plain[0]], plain[1]))
    assert not fallback.faults.calls
    engine.close()


def test_cores_and_cpu_work_at_the_same_time(source, recorded) -> None:
    npu = TimedNpu(source)
    engine, _ = engine_with_fallback(source, npu, recorded)
    read(engine, [IDS], False, overlap=False)
    assert npu.most == 1
    fault, seen = npu.next_fault, list[str]()

    def wait(group: Group) -> str:
        """The first wave in layer 2, and the second in layer 1, until the third works in layer 0."""
        seen.append(group.name)
        deadline = time.monotonic() + 8
        held = group.name == "mid.2" or (group.name == "mid.1" and "mid.2" in seen)
        while held and npu.most < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        return fault(group)

    npu.next_fault = wait
    read(engine, [IDS], False, overlap=True)
    assert npu.most == 3 and set(engine.counters.queue_s) == {0, 1, 2}
    assert engine.window == 4 * engine.chunk  # so that a call that is given as much overlaps too
    engine.close()


def test_progress_is_told_in_order(source, recorded) -> None:
    engine, _ = engine_with_fallback(source, TimedNpu(source), recorded)
    told: list[int] = []
    engine.forward(IDS[:21], progress=told.append)
    assert told == [8, 8, 5]
    engine.close()


# -- cancelling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 9, 17])
def test_an_interruption_lets_calls_end(source, recorded, at: int) -> None:
    npu = TimedNpu(source, [3])
    engine, _ = engine_with_fallback(source, npu, recorded)
    expected = read(engine, [IDS], False, overlap=False)
    npu.calls, interrupted, run = 0, threading.Event(), npu.next_fault

    def interrupt(group: Group) -> str:
        if npu.calls >= at and not interrupted.is_set():
            interrupted.set()
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.05)  # a running call is not cut short
        return run(group)

    npu.next_fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        read(engine, [IDS], False, overlap=True)
    assert not npu.working and npu.calls < 8 * (L + 1)
    assert_same_bits(read(engine, [IDS], False, overlap=True), expected)
    engine.close()
    assert npu.closed


# -- faults ----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(faults=st.lists(st.sampled_from(("", "", "", *KINDS)), max_size=60))
def test_results_are_right_under_any_pattern_of_faults(source, recorded, faults: list[str]) -> None:
    npu = TimedNpu(source, [1, 0, 2], faults=faults)
    engine, fallback = engine_with_fallback(source, npu, recorded)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = read(engine, [IDS[:40], IDS[:3]], True, overlap=True)
    assert fallback.faults.calls == npu.made
    assert len(warned) == (1 if fallback.faults.groups else 0)
    assert_close(found, read(engine, [IDS[:40], IDS[:3]], True, overlap=False))
    engine.close()


def assert_close(found, expected) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert np.abs(one - other).max() < 2e-5
    for state, other in zip(found[1], expected[1], strict=True):
        for name, part in other.parts.items():
            assert np.abs(state.parts[name] - part).max() < 2e-5 * max(1, np.abs(part).max()), name


@pytest.mark.parametrize("at", [0, 7, 20])
def test_a_hang_costs_one_thread(source, recorded, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other calls are not disturbed: those of other threads go on there, those behind it run on the CPU."""
    monkeypatch.setattr(fallback_module, "CALL_SECONDS", 0.3)
    npu = TimedNpu(source, [1], faults=[""] * at + ["hang"])
    engine, fallback = engine_with_fallback(source, npu, recorded)
    with pytest.warns(
        UserWarning, match=r"no answer within 0\.3 s.*CPU runs all groups of its thread"
    ) as warned:
        found = read(engine, [IDS], True, overlap=True)
    assert len(warned) == 1 and fallback.faults.calls == 1
    (hung,) = {npu.queue(group) for group in source.program.groups if group.name in fallback.faults.groups}
    assert set(fallback.faults.groups) == {g.name for g in source.program.groups if npu.queue(g) == hung}
    calls = npu.calls
    assert_close(found, read(engine, [IDS], True, overlap=True))
    assert npu.calls > calls  # in the other threads
    engine.close()
    assert not npu.closed  # closing it would hang too
    npu.never.set()


def test_an_error_on_the_cpu_ends_the_forward(source, recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    npu = TimedNpu(source, [2], faults=["code"] * 2)
    engine, fallback = engine_with_fallback(source, npu, recorded)

    def no_cpu() -> None:
        raise BackendError("no memory")

    fallback._make_cpu = no_cpu
    with pytest.raises(BackendError, match="no memory"), pytest.warns(UserWarning):
        engine.forward(IDS)
    assert not npu.working
    engine.close()


# -- many prompts ----------------------------------------------------------------------------------------


def test_prompts_in_a_row_leak_nothing(source, recorded) -> None:
    npu = TimedNpu(source)
    engine, _ = engine_with_fallback(source, npu, recorded)

    def prompts(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            engine.forward(IDS[:24])
        gc.collect()
        return len(gc.get_objects()), threading.active_count(), len(os.listdir("/proc/self/fd"))

    objects, *before = prompts(5)
    more_objects, *after = prompts(PROMPTS)
    assert after == before and more_objects - objects < PROMPTS // 2
    engine.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before[0] - 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before[0] - 3
