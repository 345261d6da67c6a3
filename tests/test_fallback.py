"""The fallback: with any fault of an NPU, the results are the CPU's."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.backends import fallback as fallback_module
from rwkv_npu.backends.base import Faults, GoldenVectors, allocate_inputs
from rwkv_npu.backends.fallback import Fallback, Hang, Worker
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.backends.rknn_context import ContextRunner
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.state import State
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import FUSIONS, Group, Port
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.selftest import SELF_TEST_ROWS, golden_vectors
from rwkv_npu.runtime.weights import CheckpointSource
from tests.faulty import ADVICE, KINDS, FaultyNpu, engine_with_fallback, plain_engine
from tests.tiny import write_model

IDS = np.random.default_rng(5).integers(1, 60, 19)
STEPS = 4
BOUND = 2e-5  # between chunks of other sizes


@pytest.fixture(scope="module", params=[(g, f) for g in ("4", "6", "7") for f in FUSIONS], ids="-".join)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    generation, fusion = request.param
    path = tmp_path_factory.mktemp("fallback") / "model.pth"
    write_model(path, generation, vocabulary=False, D=32, L=3, V=60)
    return CheckpointSource(open_checkpoint(path), fusion)


@pytest.fixture(scope="module")
def recorded(source: CheckpointSource):
    return golden_vectors(source, SELF_TEST_ROWS)


@pytest.fixture(scope="module")
def expected(source: CheckpointSource) -> tuple[np.ndarray, State]:
    return read(plain_engine(source, NumpyBackend(source)))


def read(engine: Engine) -> tuple[np.ndarray, State]:
    """Logits of the steps after a prompt, and the final state."""
    _, state = engine.forward(IDS)
    return np.stack([engine.forward([token], state, inplace=True)[0] for token in range(1, STEPS + 1)]), state


def assert_same(found: tuple[np.ndarray, State], expected: tuple[np.ndarray, State]) -> None:
    assert np.abs(found[0] - expected[0]).max() < BOUND
    assert found[1].tokens_seen == expected[1].tokens_seen == len(IDS) + STEPS
    for name, part in expected[1].parts.items():
        assert np.abs(found[1].parts[name] - part).max() < BOUND * max(1, np.abs(part).max()), name


@settings(max_examples=40, deadline=None)
@given(faults=st.lists(st.sampled_from(("", "", *KINDS)), max_size=60))
def test_results_are_right_under_any_pattern_of_faults(source, recorded, expected, faults: list[str]) -> None:
    npu = FaultyNpu(source, faults)
    engine, fallback = engine_with_fallback(source, npu, recorded)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert_same(read(engine), expected)
    assert fallback.faults.calls == npu.made
    assert len(warned) == (1 if fallback.faults.groups else 0)


def test_a_second_attempt_corrects_one_fault(source, recorded, expected) -> None:
    npu = FaultyNpu(source, ["", "nan", "", "", "code"])
    engine, fallback = engine_with_fallback(source, npu, recorded)
    assert_same(read(engine), expected)  # without a warning, which would be an error here
    assert fallback.faults.calls == 2 and not fallback.faults.groups


def test_two_faults_in_a_row_leave_the_group_to_the_cpu(source, recorded, expected) -> None:
    npu = FaultyNpu(source, ["code", "zeros"])
    engine, fallback = engine_with_fallback(source, npu, recorded)
    with pytest.warns(UserWarning, match="faulty failed at .* the CPU runs it from now on") as warned:
        assert_same(read(engine), expected)
    assert len(warned) == 1 and fallback.faults.calls == 2
    assert str(warned[0].message).endswith(ADVICE)  # because the results were wrong
    assert fallback.faults.groups == {source.program.groups[0].name: "all outputs are zero"}
    assert engine.counters.faults is fallback.faults


def test_a_failed_call_causes_no_advice_on_results(source, recorded) -> None:
    engine, _ = engine_with_fallback(source, FaultyNpu(source, ["nan", "code"]), recorded)
    with pytest.warns(UserWarning, match=r"\(rknn_run returned -3\).* counted, not reported$"):
        engine.forward(IDS)


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_hang_is_abandoned(source, recorded, expected, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_module, "CALL_SECONDS", 0.3)
    npu = FaultyNpu(source, [""] * at + ["hang"])
    engine, fallback = engine_with_fallback(source, npu, recorded)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=r"no answer within 0\.3 s.*runs everything from now on") as warned:
        assert_same(read(engine), expected)
    assert len(warned) == 1 and npu.made == fallback.faults.calls == 1  # no further calls, for any group
    assert set(fallback.faults.groups) == {group.name for group in source.program.groups}
    later = fallback.open(source.program.groups[0], 1)  # opens no context on the abandoned NPU
    assert np.isfinite(later.run()[source.program.groups[0].outputs[0].name]).all()
    engine.close()  # does not wait for the hanging call
    assert not npu.closed and time.monotonic() - begin < 20
    npu.never.set()


def test_a_cpu_that_fails_too_is_an_error(source, recorded) -> None:
    engine, fallback = engine_with_fallback(source, FaultyNpu(source, ["code"] * 2), recorded)

    def no_cpu() -> NumpyBackend:
        raise BackendError("no memory")

    fallback._make_cpu = no_cpu
    with pytest.raises(BackendError, match="no memory"), pytest.warns(UserWarning):
        engine.forward(IDS)


# -- self-tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_fails_its_self_test_leaves_its_group_to_the_cpu(
    source, recorded, expected, kind: str
) -> None:
    broken = source.program.groups[1]
    engine, fallback = engine_with_fallback(
        source, FaultyNpu(source, chip=lambda g: kind if g is broken else ""), recorded
    )
    assert set(fallback.faults.groups) == {broken.name}
    with pytest.warns(UserWarning, match=rf"of .* contexts fail .*{broken.name} at 1 rows.*{ADVICE}"):
        fallback.check_self_tests()
    assert_same(read(engine), expected)
    assert fallback.faults.calls == 0


def test_an_npu_that_fails_all_tests_is_an_error(source, recorded) -> None:
    _, fallback = engine_with_fallback(source, FaultyNpu(source, chip=lambda group: "zeros"), recorded)
    with pytest.raises(
        BackendError, match=r"(\d+) of \1 contexts fail their self-test \(\S+ at 1 rows: all outputs are zero"
    ):
        fallback.check_self_tests()


def test_a_hang_while_opening_is_an_error(source, recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_module, "CALL_SECONDS", 0.2)
    npu = FaultyNpu(source, chip=lambda group: "hang")
    with pytest.raises(BackendError, match="cannot open .* at 1 rows: no answer within 0.2 s"):
        engine_with_fallback(source, npu, recorded)
    npu.never.set()


class Narrow(FaultyNpu):
    """A chip whose numbers end at `limit`. Larger inputs overflow, and a norm turns infinity into NaN."""

    limit = np.inf

    def open(self, group: Group, rows: int):  # type: ignore[override]
        runner = super().open(group, rows)
        run = runner.run

        def narrow():
            overflows = any(np.abs(array).max() > self.limit for array in runner.inputs.values())
            return {
                name: np.full_like(array, np.nan) if overflows else array for name, array in run().items()
            }

        runner.run = narrow  # type: ignore[method-assign]
        return runner


def test_the_self_test_finds_a_chip_on_which_the_residual_overflows(tmp_path: Path) -> None:
    """Golden vectors contain the model's largest residual, so the fault is found before the first token."""
    write_model(tmp_path / "model.pth", "7", vocabulary=False, D=32, L=3, V=60)
    source = CheckpointSource(open_checkpoint(tmp_path / "model.pth"), "layer")
    recorded = golden_vectors(source, SELF_TEST_ROWS)
    largest = {name: np.abs(rows.inputs["x"]).max() for name, rows in recorded.items()}
    npu = Narrow(source)
    npu.limit = 0.999 * largest["mid.1"]
    _, fallback = engine_with_fallback(source, npu, recorded)
    assert "mid.1" in fallback.faults.groups and "first" not in fallback.faults.groups
    assert (
        fallback.faults.groups["mid.1"].startswith("self-test: ")
        and "not finite" in fallback.faults.groups["mid.1"]
    )


def test_golden_vectors_are_the_references_results(source, recorded) -> None:
    for group in source.program.groups:
        rows = recorded[group.name]
        again = source.evaluate(group, NumpyMaths(source.tensor), dict(rows.inputs))
        assert rows.inputs.keys() == {port.name for port in group.inputs}
        for name, array in rows.outputs.items():
            assert np.array_equal(again[name], array) and np.isfinite(array).all()


# -- the thread ------------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test")
    yield worker
    worker.stop()


def test_calls_return_and_raise(worker: Worker) -> None:
    assert worker.call(lambda: threading.current_thread().name, 5) == "test"
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0, 5)
    assert worker.call(lambda: 2, 5) == 2


def test_a_call_that_does_not_return_raises_hang(worker: Worker) -> None:
    never = threading.Event()
    with pytest.raises(Hang, match=r"no answer within 0\.05 s"):
        worker.call(never.wait, 0.05)
    never.set()


def test_the_result_of_an_interrupted_call_is_not_returned_by_the_next(worker: Worker) -> None:
    def interrupt() -> str:
        time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)
        return "late"

    with pytest.raises(KeyboardInterrupt):
        worker.call(interrupt, 5)
    assert worker.call(lambda: "next", 5) == "next"


class _Networkless:
    """A context of 4 rows whose second run fails."""

    inputs = {"x": np.zeros((4, 8), np.float16)}
    outputs = {"out": np.ones((4, 8), np.float16)}
    runs = 0

    def run(self) -> None:
        self.runs += 1
        if self.runs > 1:
            raise BackendError("fault")

    def npu_seconds(self) -> float:
        return 0.0


def test_few_rows_past_fp16_reach_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the fp32 numbers of the rows that were loaded, and repeats the last one as padding."""
    group = Group("mid", 0, (Port("x", 8),), (Port("out", 8),))
    context: Any = _Networkless()
    npu = SimpleNamespace(
        name="rknn",
        row_counts=lambda group: (4,),
        queue=lambda group: 0,
        open=lambda group, rows: ContextRunner(context, group, rows),
        close=lambda: None,
    )
    inputs = allocate_inputs(group, 4)
    on_cpu = SimpleNamespace(inputs=inputs, run=lambda: {"out": inputs["x"] + 1})
    cpu = SimpleNamespace(name="numpy", open=lambda group, rows: on_cpu, close=lambda: None)
    zeros, ones = np.zeros((4, 8), np.float32), np.ones((4, 8), np.float32)
    golden = {"mid.0": GoldenVectors({"x": zeros}, {"out": ones})}
    fallback = Fallback(cast(Any, npu), lambda: golden, cast(Any, lambda: cpu), Faults())
    runner = fallback.open(group, 4)
    runner.load({"x": np.array([[1e5] * 8, [2e5] * 8], np.float32)})
    with pytest.warns(UserWarning, match="fault"):
        out = runner.run()["out"]
    assert (out[:, 0] == [1e5 + 1, 2e5 + 1, 2e5 + 1, 2e5 + 1]).all()
    fallback.close()
