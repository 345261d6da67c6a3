"""The engine: states, chunks, batches, backends of a few fixed row counts, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.backends import open_backend
from rwkv_npu.backends.base import Backend, Runner
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.state import State
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Group
from rwkv_npu.runtime.engine import PREFILL_ROWS, Engine
from rwkv_npu.runtime.weights import CheckpointSource
from tests.tiny import write_model

L, V = 3, 50
TOKENS = np.random.default_rng(3).integers(0, V, PREFILL_ROWS + 20).tolist()
BOUND = 2e-5  # between two ways to add up the same fp32 numbers; logits are spread by 2


class ReusedBuffers:
    """A runner that lives by its contract and no longer: the next run overwrites what the last returned, and
    inputs that are not filled anew are not there."""

    def __init__(self, runner: Runner, began: Callable[[], None]):
        self._runner, self.inputs, self._began = runner, runner.inputs, began
        self._outputs: dict[str, np.ndarray] = {}

    def run(self) -> Mapping[str, np.ndarray]:
        self._began()
        assert all(np.isfinite(array).all() for array in self.inputs.values())
        for array in self._outputs.values():
            array.fill(np.nan)
        self._outputs = {name: np.array(array) for name, array in self._runner.run().items()}
        for array in self.inputs.values():
            array.fill(np.nan)
        return self._outputs


class FixedRows(NumpyBackend):
    """The NPU's limits: artifacts for a few row counts, the head for one row only."""

    def __init__(self, source: CheckpointSource, counts: tuple[int, ...] = (1, 16)):
        super().__init__(source)
        self.name, self._counts = f"fixed-{counts}", counts
        self.opened: list[tuple[str, int]] = []
        self.ran: list[tuple[str, int]] = []

    def row_counts(self, group: Group) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) if group.role == "head" else self._counts

    def open(self, group: Group, rows: int) -> ReusedBuffers:  # type: ignore[override]
        assert rows in self.row_counts(group)
        key = group.name, rows
        self.opened.append(key)
        return ReusedBuffers(super().open(group, rows), lambda: self.ran.append(key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    for generation in GENERATIONS:
        sizes = {"D": 32, "L": L, "V": V, "time_state": generation != "4"}
        write_model(folder / f"{generation}.pth", generation, vocabulary=False, **sizes)
    return folder


def source_of(folder: Path, generation: str, fusion: str = "layer") -> CheckpointSource:
    return CheckpointSource(open_checkpoint(folder / f"{generation}.pth"), fusion)


def engine_of(
    source: CheckpointSource, decode: Backend | None = None, prefill: Backend | None = None
) -> Engine:
    decode = decode or NumpyBackend(source)
    return Engine(
        source.program,
        source.tensor,
        assign=lambda group, tokens: decode if tokens or prefill is None else prefill,
        fingerprint=source.fingerprint,
        initial=source.initial_states(),
    )


@pytest.fixture(scope="module", params=GENERATIONS)
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return engine_of(source_of(folder, request.param))


@pytest.fixture(scope="module", params=[(g, f) for g in GENERATIONS for f in FUSIONS], ids="-".join)
def source(request: pytest.FixtureRequest, folder: Path) -> CheckpointSource:
    return source_of(folder, *request.param)


def assert_same(ours: tuple[np.ndarray, State], expected: tuple[np.ndarray, State]) -> None:
    (logits, state), (expected_logits, expected_state) = ours, expected
    assert np.abs(logits - expected_logits).max() < BOUND
    assert state.tokens_seen == expected_state.tokens_seen
    assert state.logits is not None and expected_state.logits is not None
    assert np.abs(state.logits - expected_state.logits).max() < BOUND
    assert state.parts.keys() == expected_state.parts.keys()
    for name, part in expected_state.parts.items():
        assert np.abs(state.parts[name] - part).max() < BOUND * max(1, np.abs(part).max()), name


def parts_of(state: State) -> dict[str, np.ndarray]:
    return {name: part.copy() for name, part in state.parts.items()}


def unchanged(state: State, before: dict[str, np.ndarray]) -> bool:
    return all((state.parts[name] == part).all() for name, part in before.items())


# -- states ----------------------------------------------------------------------------------------------


def test_forward_leaves_the_state_it_is_given(engine: Engine) -> None:
    _, state = engine.forward(TOKENS[:5])
    before, logits_before = parts_of(state), np.array(state.logits)
    _, after = engine.forward(TOKENS[5:9], state)
    assert after is not state and after.tokens_seen == 9
    assert unchanged(state, before) and state.tokens_seen == 5 and (state.logits == logits_before).all()
    assert not unchanged(after, before)


def test_inplace_changes_the_state_it_is_given(engine: Engine) -> None:
    _, state = engine.forward(TOKENS[:5])
    expected = engine.forward(TOKENS[5:9], state)
    logits, same = engine.forward(TOKENS[5:9], state, inplace=True)
    assert same is state
    assert_same((logits, state), expected)


def test_a_state_of_none_is_a_new_one(engine: Engine) -> None:
    assert_same(engine.forward(TOKENS[:5]), engine.forward(TOKENS[:5], engine.new_state()))
    first, second = engine.new_state(), engine.new_state()
    engine.forward(TOKENS[:5], first, inplace=True)
    assert unchanged(second, engine.new_state().parts)  # nothing is shared between states


def test_returned_logits_belong_to_the_caller(engine: Engine) -> None:
    logits, state = engine.forward(TOKENS[:3])
    kept, expected = np.array(state.logits), engine.forward(TOKENS[3:4], state)[0]
    logits.fill(np.nan)
    assert (state.logits == kept).all()
    again, state = engine.forward(TOKENS[3:5], state, all_logits=True)
    again.fill(np.nan)
    assert np.isfinite(state.logits).all() and np.isfinite(expected).all()  # type: ignore[arg-type]


def test_results_outlive_later_calls(source: CheckpointSource) -> None:
    """Returned arrays are not the backend's buffers, which it reuses."""
    engine = engine_of(source, FixedRows(source))
    one, state = engine.forward(TOKENS[:1])
    every, _ = engine.forward(TOKENS[1:2], state, all_logits=True)
    batch, (advanced,) = engine.forward_batch([TOKENS[:1]], [engine.new_state()])
    kept = [array.copy() for array in (one, every, batch, *advanced.parts.values())]
    engine.forward(TOKENS[5:9], all_logits=True)
    for array, copy in zip((one, every, batch, *advanced.parts.values()), kept, strict=True):
        assert (array == copy).all()


def test_all_logits_are_those_after_each_token(engine: Engine) -> None:
    every, state = engine.forward(TOKENS, all_logits=True)
    assert every.shape == (len(TOKENS), V) and every.dtype == np.float32
    last, same = engine.forward(TOKENS)
    assert last.shape == (V,) and last.dtype == np.float32
    assert_same((every[-1], state), (last, same))
    for end in (1, 2, 33, PREFILL_ROWS, PREFILL_ROWS + 1):
        assert np.abs(every[end - 1] - engine.forward(TOKENS[:end])[0]).max() < BOUND


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, len(TOKENS) - 1), max_size=6))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_prompt_may_be_cut_anywhere(generation: str, cuts: list[int], folder: Path, whole: Whole) -> None:
    engine, expected = whole(generation)
    bounds = [0, *sorted(set(cuts)), len(TOKENS)]
    state = None
    for start, stop in zip(bounds, bounds[1:], strict=False):
        logits, state = engine.forward(TOKENS[start:stop], state)
    assert state is not None
    assert_same((logits, state), expected)


class Whole:
    """Engines, and their logits and states after all TOKENS at once; computed once a generation."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[str, tuple[Engine, tuple[np.ndarray, State]]] = {}

    def __call__(self, generation: str) -> tuple[Engine, tuple[np.ndarray, State]]:
        if generation not in self._known:
            engine = engine_of(source_of(self._folder, generation))
            self._known[generation] = engine, engine.forward(TOKENS)
        return self._known[generation]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Whole:
    return Whole(folder)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_one_layer_is_a_model(generation: str, fusion: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth", generation, vocabulary=False, D=32, L=1, V=V)
    with rwkv_npu.load(tmp_path / "model.pth", backend="numpy", fusion=fusion) as model:
        logits, state = model.forward(TOKENS[:3])
        _, one = model.forward(TOKENS[:1])
        assert_same(model.forward(TOKENS[1:3], one), (logits, state))


# -- several sequences -----------------------------------------------------------------------------------

LENGTHS = [(1, 1), (1, 5, 2), (130, 1, 20)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", ["numpy", "ort", "numba", "torch"])
def test_a_batch_is_separate_sequences(
    source: CheckpointSource, backend: str, lengths: tuple[int, ...]
) -> None:
    engine = engine_of(source, open_backend(backend, source, threads=1 if backend == "torch" else None))
    tokens = [np.random.default_rng(length).integers(0, V, length) for length in lengths]
    # Each from a past of its own.
    states = [engine.forward(TOKENS[: 3 + b])[1] for b in range(len(lengths))]
    before = [parts_of(state) for state in states]
    logits, advanced = engine.forward_batch(tokens, states)
    every, _ = engine.forward_batch(tokens, states, all_logits=True)
    assert (
        isinstance(logits, np.ndarray) and logits.shape == (len(lengths), V) and len(advanced) == len(lengths)
    )
    for b, length in enumerate(lengths):
        assert every[b].shape == (length, V) and every[b].dtype == logits.dtype == np.float32
        assert np.abs(every[b] - engine.forward(tokens[b], states[b], all_logits=True)[0]).max() < BOUND
        assert_same((logits[b], advanced[b]), engine.forward(tokens[b], states[b]))
        assert unchanged(states[b], before[b]) and advanced[b].tokens_seen == 3 + b + length
    engine.close()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_sequences_join_and_leave_in_place(source: CheckpointSource, backend: str) -> None:
    """Without a copy of any state."""
    engine = engine_of(source, open_backend(backend, source))
    a, b, c = (engine.new_state() for _ in range(3))
    where = [{name: part.ctypes.data for name, part in state.parts.items()} for state in (a, b, c)]
    _, same = engine.forward_batch([TOKENS[:3], TOKENS[3:4]], [a, b], inplace=True)
    assert same[0] is a and same[1] is b
    engine.forward_batch([TOKENS[4:5], TOKENS[5:9]], [b, c], inplace=True)  # a leaves, c joins
    engine.forward_batch([TOKENS[9:10], TOKENS[10:11], TOKENS[11:12]], [c, a, b], inplace=True)
    plain = engine_of(source)
    for state, places, read in zip(
        (a, b, c), where, ([0, 1, 2, 10], [3, 4, 11], [5, 6, 7, 8, 9]), strict=True
    ):
        assert {name: part.ctypes.data for name, part in state.parts.items()} == places
        expected, expected_state = plain.forward([TOKENS[i] for i in read])
        assert_same((np.asarray(state.logits), state), (expected, expected_state))
    engine.close()


@pytest.mark.parametrize("counts", [(1, 16), (16,), (1,), (1, 4, 16)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (20, 20), (1, 37, 1, 2)], ids=str)
def test_fixed_rows_serve_any_sequences(
    source: CheckpointSource, lengths: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    """Chunks, tokens of several sequences, and both at once, padded to the artifacts' rows."""
    backend = FixedRows(source, counts)
    engine, plain = engine_of(source, backend), engine_of(source)
    tokens = [TOKENS[7 * b : 7 * b + length] for b, length in enumerate(lengths)]
    pasts = [plain.forward(TOKENS[: 2 + b])[1] for b in range(len(lengths))]
    logits, states = engine.forward_batch(tokens, pasts)
    for b, piece in enumerate(tokens):
        assert_same((logits[b], states[b]), plain.forward(piece, pasts[b]))
    if lengths == (1, 1, 1) and counts[-1] == 16:
        body = [rows for name, rows in backend.ran if name != "head"]
        assert set(body) == {4 if 4 in counts else 16} and len(body) == len(set(backend.ran)) - 1


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6), chunk=st.sampled_from([1, 16, 128]))
def test_where_a_prompt_is_cut_depends_on_its_tokens_alone(
    lengths: list[int], chunk: int, folder: Path
) -> None:
    """Other sequences do not change it. Every token is read once and in order, and no forward has too many rows."""
    source = source_of(folder, "7")
    engine = engine_of(source, FixedRows(source, (1, chunk)) if chunk > 1 else FixedRows(source, (1,)))
    waves = list(engine._waves([np.zeros(length, np.int64) for length in lengths]))
    for sequence, length in enumerate(lengths):
        pieces = [(start, stop) for wave, _ in waves for number, start, stop in wave if number == sequence]
        assert pieces == [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    assert all(sum(stop - start for _, start, stop in wave) <= chunk for wave, _ in waves)
    assert all(decode == all(stop - start == 1 for _, start, stop in wave) for wave, decode in waves)


def test_numpy_quantises_a_matrix_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object that caches quantised matrices must outlive the runners, which are new for every chunk."""
    source, made = source_of(folder, "7"), []
    plain = source.maths
    monkeypatch.setattr(source, "maths", lambda: made.append(1) or plain())
    engine = engine_of(source, NumpyBackend(source))
    engine.forward(TOKENS)
    engine.forward(TOKENS[:40])
    engine.forward(TOKENS[:1])
    assert made == [1]


def test_nothing_is_opened_that_the_fused_forward_does(folder: Path) -> None:
    source = source_of(folder, "7")
    numba, prefill = open_backend("numba", source), FixedRows(source, (8,))
    opened: list[str] = []
    open_group = numba.open
    numba.open = lambda group, rows: (opened.append(group.name), open_group(group, rows))[1]  # type: ignore[method-assign]
    engine = engine_of(source, numba, prefill)
    assert opened == ["head"] and {name for name, _ in prefill.opened} == {"first", "mid.0", "mid.1", "last"}
    assert_same(engine.forward(TOKENS[:9]), engine_of(source).forward(TOKENS[:9]))
    assert opened == ["head"]
    engine.close()


def test_tokens_and_prompts_on_two_backends_run_in_separate_forwards(folder: Path) -> None:
    """The logits of a token must not depend on another sequence's prompt in the same forward."""
    source = source_of(folder, "7")
    decode, prefill = FixedRows(source, (1, 4)), FixedRows(source, (8,))
    engine, plain = engine_of(source, decode, prefill), engine_of(source)
    tokens = [TOKENS[:1], TOKENS[1:12], TOKENS[12:13]]
    logits, states = engine.forward_batch(tokens, [engine.new_state() for _ in tokens])
    assert {rows for name, rows in decode.ran if name != "head"} == {4}
    assert {rows for _, rows in prefill.ran} == {8} and len(prefill.ran) == 2 * (L + 1)
    for b, piece in enumerate(tokens):
        assert_same((logits[b], states[b]), plain.forward(piece))


# -- fixed rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 16), (16,), (1,), (1, 4, 16)], ids=str)
def test_padding_changes_nothing(source: CheckpointSource, counts: tuple[int, ...]) -> None:
    """Reused buffers change nothing either: see ReusedBuffers."""
    plain, backend = engine_of(source), FixedRows(source, counts)
    engine = engine_of(source, backend)
    state, expected = None, None
    for start, stop in [(0, 1), (1, 3), (3, 19), (19, 36), (36, 80), (80, 81), (81, 82)]:
        logits, state = engine.forward(TOKENS[start:stop], state)
        expected_logits, expected = plain.forward(TOKENS[start:stop], expected)
        assert_same((logits, state), (expected_logits, expected))
    assert {rows for name, rows in backend.ran if name != "head"} == set(counts)
    assert len(set(backend.opened)) == len(backend.opened), "a runner was opened twice"


def test_the_smallest_artifact_that_holds_a_chunk_runs_it(folder: Path) -> None:
    source = source_of(folder, "7")
    for tokens, rows in ((1, 1), (2, 4), (4, 4), (5, 16), (16, 16)):
        backend = FixedRows(source, (1, 4, 16))
        engine_of(source, backend).forward(TOKENS[:tokens])
        assert {count for name, count in backend.ran if name != "head"} == {rows}


def test_calls_per_token_and_per_chunk(source: CheckpointSource) -> None:
    per_token = {"layer": L + 2, "projection": 3 * L + 1}[source.program.fusion]
    engine = engine_of(source, FixedRows(source))

    def calls(T: int, **options: bool) -> int:
        before = engine.counters.calls
        engine.forward(TOKENS[:T], **options)
        return engine.counters.calls - before

    assert calls(1) == per_token
    assert calls(16) == per_token  # the head reads the last row only
    assert calls(33) == 3 * (per_token - 1) + 1
    assert calls(33, all_logits=True) == 3 * (per_token - 1) + 33  # and one row a call, for it is built so


def test_all_logits_on_fixed_rows(source: CheckpointSource) -> None:
    fixed, plain = engine_of(source, FixedRows(source)), engine_of(source)
    assert_same(fixed.forward(TOKENS[:37], all_logits=True), plain.forward(TOKENS[:37], all_logits=True))


def test_progress_gets_the_tokens_of_every_chunk(folder: Path) -> None:
    source = source_of(folder, "7")
    told: list[int] = []
    engine_of(source, FixedRows(source)).forward(TOKENS[:37], progress=told.append)
    assert told == [16, 16, 5]
    told.clear()
    engine_of(source).forward(TOKENS, progress=told.append)
    assert told == [PREFILL_ROWS, 20]


# -- backends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["prefill=numpy,decode=ort", "prefill=ort,decode=numpy", "decode=torch"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_prompts_and_tokens_may_have_a_backend_each(plan: str, fusion: str, folder: Path) -> None:
    plain = engine_of(source_of(folder, "7", fusion))
    with rwkv_npu.load(folder / "7.pth", fusion=fusion, plan=plan, backend="numpy") as model:
        _, state = model.forward(TOKENS[:40])
        ours = model.forward(TOKENS[40:41], state)
    assert_same(ours, plain.forward(TOKENS[:41]))


def test_a_plan_uses_each_backend_for_its_share(folder: Path) -> None:
    source = source_of(folder, "7")
    decode, prefill = FixedRows(source, (1,)), FixedRows(source, (8,))
    engine = engine_of(source, decode, prefill)
    _, state = engine.forward(TOKENS[:16])
    assert decode.ran == [("head", 1)]
    assert len(prefill.ran) == 2 * (L + 1) and "head" not in dict(prefill.ran)
    prefill.ran.clear()
    ours = engine.forward(TOKENS[16:17], state)
    assert not prefill.ran and len(decode.ran) == 1 + L + 2
    assert_same(ours, engine_of(source).forward(TOKENS[:17]))


@pytest.fixture(params=["numpy", "ort", "numba", "torch"])
def backend(request: pytest.FixtureRequest, source: CheckpointSource) -> Iterator[Backend]:
    # ONNX Runtime's threads are the process's, and settled by whichever test loads a model first.
    backend = open_backend(request.param, source, threads=1 if request.param == "torch" else None)
    yield backend
    backend.close()


@pytest.mark.parametrize("rows", [1, 6])
def test_runners_keep_their_contract(source: CheckpointSource, backend: Backend, rows: int) -> None:
    """Shapes are right, and outputs stay valid until the next run of the same runner, whatever else runs."""
    rng = np.random.default_rng(1)
    opened = [(group, backend.open(group, rows)) for group in source.program.groups]
    kept = []
    for group, runner in opened:
        assert {name: (array.shape, array.dtype) for name, array in runner.inputs.items()} == {
            port.name: ((rows, port.width), np.float32) for port in group.inputs
        }
        for array in runner.inputs.values():
            array[:] = rng.standard_normal(array.shape)
        given = {name: array.copy() for name, array in runner.inputs.items()}
        outputs = runner.run()
        assert {name: (array.shape, array.dtype) for name, array in outputs.items()} == {
            port.name: ((rows, port.width), np.float32) for port in group.outputs
        }
        assert all((runner.inputs[name] == array).all() for name, array in given.items())
        kept.append((outputs, {name: np.array(array) for name, array in outputs.items()}))
    for outputs, copies in kept:
        assert all((outputs[name] == array).all() for name, array in copies.items())
    for (_, runner), (_, copies) in zip(opened, kept, strict=True):
        for array in runner.inputs.values():
            array += 1
        again = runner.run()
        assert any((again[name] != array).any() for name, array in copies.items())  # inputs are read anew


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [[], np.zeros(0, np.int64), [1.0, 2.0], [True, False], ["1"], [[1, 2]], 3, None, [10**30]],
    ids=str,
)
def test_invalid_tokens_are_refused(tokens: object, folder: Path) -> None:
    with pytest.raises(UsageError, match="non-empty sequence of integer ids|tokens holds 1"):
        engine_of(source_of(folder, "7")).forward(tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, V, 2**40])
def test_ids_outside_the_vocabulary(wrong: int, folder: Path) -> None:
    engine = engine_of(source_of(folder, "7"))
    state = engine.new_state()
    before = parts_of(state)
    with pytest.raises(UsageError, match=f"token id {wrong} is outside .* vocabulary of {V}"):
        engine.forward([1, 2, wrong], state, inplace=True)
    assert unchanged(state, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_any_integers_are_ids(dtype: type[np.integer], folder: Path) -> None:
    engine = engine_of(source_of(folder, "7"))
    assert_same(engine.forward(np.array(TOKENS[:4], dtype)), engine.forward(tuple(TOKENS[:4])))


@pytest.mark.parametrize("other", ["4", "6", "7a"])
def test_a_state_of_another_model(other: str, folder: Path) -> None:
    engine = engine_of(source_of(folder, "7"))
    state = engine_of(source_of(folder, other)).new_state()
    with pytest.raises(UsageError, match="another generation or size"):
        engine.forward([1], state)
    with pytest.raises(UsageError, match="another generation or size"):
        engine.forward_batch([[1]], [state])


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [[1], [2], [3]]], ids=["none", "fewer", "more"])
def test_batches_that_do_not_fit(tokens: list[list[int]], folder: Path) -> None:
    engine = engine_of(source_of(folder, "7"))
    with pytest.raises(UsageError, match=f"there are {len(tokens)} sequences and 2 states"):
        engine.forward_batch(tokens, [engine.new_state(), engine.new_state()])


def test_a_batch_with_an_empty_sequence_or_a_state_twice(folder: Path) -> None:
    """Refused before anything is read."""
    engine = engine_of(source_of(folder, "7"))
    states = [engine.new_state(), engine.new_state()]
    before = parts_of(states[0])
    with pytest.raises(UsageError, match="sequence 1: tokens must be a non-empty sequence"):
        engine.forward_batch([[1], []], states, inplace=True)
    with pytest.raises(UsageError, match="sequence 1: token id 99 is outside"):
        engine.forward_batch([[1], [2, 99]], states, inplace=True)
    with pytest.raises(UsageError, match="the same state twice"):
        engine.forward_batch([[1], [2]], [states[0], states[0]])
    assert unchanged(states[0], before)


@pytest.mark.parametrize("backend", ["numpy", "ort", "numba"])
def test_threads_may_share_a_model(backend: str, folder: Path) -> None:
    """Each thread has its own state. Only one thread at a time uses the backend's buffers."""
    with rwkv_npu.load(folder / "7.pth", backend=backend) as model:

        def decode(seed: int) -> np.ndarray:
            state, logits = model.new_state(), None
            for token in np.random.default_rng(seed).integers(1, model.spec.V, 30):
                logits, state = model.forward([token], state, inplace=True)
            return logits

        expected = [decode(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for found, want in zip(pool.map(decode, range(4)), expected, strict=True):
                np.testing.assert_array_equal(found, want)


def test_a_closed_model_raises_an_error(folder: Path) -> None:
    model = rwkv_npu.load(folder / "7.pth", backend="numpy")
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.forward([1])


def test_a_state_of_another_type_is_refused(folder: Path) -> None:
    with (
        rwkv_npu.load(folder / "7.pth", backend="numpy") as model,
        pytest.raises(UsageError, match="not a dict"),
    ):
        model.forward([1], {})
