"""The compiled backend: quantised products against exact ones, the order of a program, threads, faults."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends.numba import NumbaBackend, Weights
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.files import cache_dir
from rwkv_npu.kernels import instructions, pool, recurrence
from rwkv_npu.kernels.program import Layout
from rwkv_npu.kernels.recorder import Recorder, fuse_mixes, record, record_forward
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import FUSIONS
from rwkv_npu.quant.cpu import BLOCK
from rwkv_npu.runtime.dispatch import Dispatcher
from rwkv_npu.runtime.weights import BundleSource
from tests.ragged import ragged_inputs
from tests.tiny import RANKS, write_model

# v5 differs from v4 in nothing that a backend sees.
GENERATIONS = ("4", "6", "7", "7a")
ROWS = (1, 2, 5, 8, 67)


@pytest.fixture(scope="module", params=GENERATIONS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles in int8 and int4, of odd widths."""
    folder = tmp_path_factory.mktemp("numba")
    write_model(folder / "m" / "model.pth", request.param, D=80, N=16, ranks=RANKS[request.param])
    for cpu in ("int8", "int4"):
        rwkv_npu.convert(folder / "m" / "model.pth", folder / "out", target="none", cpu=cpu)
    return folder / "out"


class QuantisedMaths(NumpyMaths):
    """Reference products: rows rounded to int8 in blocks, times the dequantised weights."""

    def block(self, layer: int) -> NumpyMaths:
        return QuantisedMaths(self._weight, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        rows, width = x.shape
        blocks = np.zeros((rows, -(-width // BLOCK) * BLOCK), np.float32)
        blocks[:, :width] = x
        blocks = blocks.reshape(rows, -1, BLOCK)
        peaks = np.abs(blocks).max(-1, keepdims=True)
        q = np.rint(blocks * np.divide(np.float32(127), peaks, out=np.zeros_like(peaks), where=peaks > 0))
        return super().linear((q * peaks / np.float32(127)).reshape(rows, -1)[:, :width], name, index)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_groups_equal_the_reference_with_quantised_products(
    bundle: Path, fusion: str, precision: str
) -> None:
    source = BundleSource(open_bundle(bundle), fusion, precision)
    backend = NumbaBackend(source, threads=2)
    for group in source.program.groups:
        for rows in ROWS:
            runner = backend.open(group, rows)
            inputs = ragged_inputs(group, rows, [0, *range(3, rows, 4)], np.random.default_rng(rows))
            for name, array in inputs.items():
                runner.inputs[name][:] = array
            found = runner.run()
            expected = source.evaluate(group, QuantisedMaths(source.weight), dict(inputs))
            for port in group.outputs:
                want = expected[port.name]
                error = np.abs(found[port.name] - want) / np.abs(want).max()
                # A number that another product made may fall on the other side of the middle between two steps.
                direct = group.role in ("head", "att.out") or (group.role, port.name) == ("att.in", "r")
                assert error.max() <= (1e-5 if direct and source.spec.generation != "6" else 0.05), port.name


def test_all_threads_compute_the_same(bundle: Path) -> None:
    results = []
    for threads in (1, 2, 3):
        with rwkv_npu.load(bundle, backend="numba", threads=min(threads, os.cpu_count() or 1)) as model:
            logits, state = model.forward(list(range(1, 40)))
            more, _ = model.forward([7], state)
        results.append((logits, more))
    for logits, more in results[1:]:
        assert (logits == results[0][0]).all() and (more == results[0][1]).all()


def test_any_order_of_pieces_gives_the_same_bits(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more threads than cores, pieces run in any order. A helper that never runs delays nothing."""
    source = BundleSource(open_bundle(bundle), "layer")
    backend = NumbaBackend(source, threads=1)
    pools = [pool.Pool(1), pool.Pool(5), pool.Pool(3)]
    for group in (source.program.groups[1], source.program.groups[-1]):
        for rows in ROWS:
            runner = backend.open(group, rows)
            random = np.random.default_rng(rows)
            for array in runner.inputs.values():
                array[:] = random.standard_normal(array.shape)
            results = []
            for runner._pool in pools:
                with monkeypatch.context() as patch:
                    if runner._pool is pools[-1]:
                        patch.setattr(threading.Thread, "start", lambda thread: None)
                    results += [{n: part.copy() for n, part in runner.run().items()} for _ in range(20)]
            for result in results[1:]:
                assert all((part == results[0][name]).all() for name, part in result.items())
    pools[-1]._helpers.clear()
    for made in pools:
        made.close()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_operations_have_a_safe_order_and_memory(bundle: Path, fusion: str) -> None:
    """Nothing is read before it is written, nor written within the stage in which another thread may read it, and no
    two values that are alive at a time lie in the same place."""
    source = BundleSource(open_bundle(bundle), fusion)
    program, layout = source.program, Layout.of(source.spec)
    recordings = [record(program, group, Weights(source)) for group in program.groups]
    recordings.append(record_forward(program, Weights(source), recurrence.kernel(source.spec).inputs))
    for recording in recordings:
        ops = recording.ops
        stage = dict.fromkeys(recording.inputs.values(), -1)
        read: dict[object, int] = {}  # the last stage that reads a value, or a row of the states
        for op in ops:
            for value in op.inputs:
                made = stage[value]  # KeyError: read before it is written
                shifts = (instructions.SHIFT, instructions.SHIFT_STATE)
                shared = op.code in (instructions.LINEAR, instructions.WKV, *shifts)
                assert made < op.stage if shared or made % 2 == 1 else made <= op.stage
                read[value] = op.stage
            if op.code == instructions.STORE_STATE:
                assert op.out is None and read[op.state] < op.stage
            else:
                assert op.out is not None and op.out not in stage  # written once
                stage[op.out] = op.stage
                if op.state is not None:
                    read[op.state] = op.stage
        assert [op.stage for op in ops] == sorted(op.stage for op in ops)
        for rows in (1, 7):
            offsets, size = layout.place(recording, rows)
            ends = {*recording.inputs.values(), *recording.outputs.values()}
            assert {value for value, offset in enumerate(offsets) if offset is None} >= ends
            spans = []
            for op in ops:
                if op.out is not None and op.out not in ends:
                    begin = offsets[op.out]
                    assert begin is not None
                    last = max([other.stage for other in ops if op.out in other.inputs], default=op.stage)
                    spans.append(
                        (begin, begin + layout.bytes_of(recording.values[op.out], rows), op.stage, last)
                    )
            assert all(end <= size for _, end, _, _ in spans)
            for i, (begin, end, born, died) in enumerate(spans):
                for other_begin, other_end, other_born, other_died in spans[:i]:
                    apart = end <= other_begin or other_end <= begin
                    assert apart or other_died < born or died < other_born


def test_a_product_with_two_readers_is_not_fused() -> None:
    """a + x * vector becomes one MIX, unless x * vector has another reader, or is an output."""
    mul, add, mix = instructions.MUL_VECTOR, instructions.ADD, instructions.MIX
    for expected in ([mix], [mul, add, add], [mul, add]):
        recorder = Recorder({})
        a, x = recorder.input(8), recorder.input(8)
        product = x * recorder.vector("v")
        total = a + product
        if len(expected) == 3:
            total = total + product
        outputs = {total.number} | ({product.number} if len(expected) == 2 else set())
        notes = recorder.notes
        assert [op.code for op in fuse_mixes(notes.ops, len(notes.values), outputs)] == expected


def read_all_ways(model: rwkv_npu.Model) -> list[np.ndarray]:
    """Logits and states of a prompt, of tokens after it, and of three sequences side by side."""
    logits, state = model.forward(list(range(1, 40)))
    found = [logits]
    for token in (7, 9):
        logits, state = model.forward([token], state, inplace=token == 9)
        found.append(logits)
    others = [model.forward([token] * token)[1] for token in (2, 5)]
    logits, batch = model.forward_batch([[1, 2, 8], [3], [5, 6]], [state, *others])
    found.append(np.asarray(logits))
    logits, batch = model.forward_batch([[3], [2], [1]], batch, inplace=True)
    parts = [part for one in (state, *batch) for part in one.parts.values()]
    return [*found, np.asarray(logits), *parts, *(one.logits for one in batch)]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_token_has_the_same_bits_alone_and_among_others(bundle: Path, precision: str, fusion: str) -> None:
    """Few rows or many, tokens beside prompts: seeded sampling and cached states need this."""
    rng = np.random.default_rng(0)
    with rwkv_npu.load(bundle, backend="numba", precision=precision, fusion=fusion, threads=2) as model:
        tokens = [rng.integers(1, 40, length) for length in (1, 3, 1, 40, 1, 7)]
        states = [model.forward(rng.integers(1, 40, 5 + i))[1] for i in range(len(tokens))]
        alone = [model.forward(*pair, all_logits=True) for pair in zip(tokens, states, strict=True)]
        every, after = model.forward_batch(tokens, states, all_logits=True)
        last, _ = model.forward_batch(tokens, states)
        two, _ = model.forward_batch(tokens[:2], states[:2])
        for i, (logits, state) in enumerate(alone):
            np.testing.assert_array_equal(every[i], logits)
            np.testing.assert_array_equal(last[i], logits[-1])
            for name, part in state.parts.items():
                np.testing.assert_array_equal(after[i].parts[name], part, err_msg=name)
        np.testing.assert_array_equal(two, last[:2])


WIDTHS = {
    "4": {"D": 82},
    "5.0": {"D": 85, "N": 5},
    "5.2": {"D": 80, "A": 96},
    "6": {"D": 72, "N": 24},
    "7": {"D": 60, "N": 20},
}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("generation", WIDTHS)
def test_the_fused_forward_equals_group_by_group(
    generation: str, fusion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and heads of any width, in fp32."""
    path = tmp_path / "m" / "model.pth"
    write_model(path, generation, vocabulary=False, L=3, **WIDTHS[generation])
    _compare(path, fusion, monkeypatch, exact=fusion == "layer")


def test_the_fused_forward_of_a_quantised_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compare(bundle, "layer", monkeypatch, exact=True)


def _compare(path: Path, fusion: str, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    with rwkv_npu.load(path, backend="numba", fusion=fusion, threads=2) as model:
        assert "2 calls a token" in model.describe()
        found = read_all_ways(model)
        counted = model.engine.counters
        assert counted.recurrence_s > 0 and set(counted.run_s) == {
            g.role for g in model.engine.program.groups
        }
    monkeypatch.setattr(Dispatcher, "fused", lambda *arguments: None)
    with rwkv_npu.load(path, backend="numba", fusion=fusion, threads=2) as model:
        expected = read_all_ways(model)
    for one, other in zip(found, expected, strict=True):
        # With projection fusion NumPy computes norms and mixes there.
        bound = 0 if exact else 2e-5 * np.abs(other).max()
        assert np.abs(one - other).max() <= bound


def test_results_do_not_depend_on_padding_or_old_memory(tmp_path: Path) -> None:
    """Padding and unused memory are filled with NaN, in all formats of matrices, of odd sizes."""
    path = tmp_path / "m" / "model.pth"
    ranks = {"w": 5, "a": 6, "v": 7, "g": 9}
    write_model(path, "7", vocabulary=False, L=3, D=60, N=20, ranks=ranks)
    for cpu in ("fp16", "int8", "int4"):
        rwkv_npu.convert(path, tmp_path / "out", target="none", cpu=cpu)
    for precision in ("fp16", "int8", "int4", "fp32"):
        where = path if precision == "fp32" else tmp_path / "out"
        with rwkv_npu.load(where, backend="numba", precision=precision, threads=2) as model:
            expected = read_all_ways(model)
            backend = model.engine._dispatcher._assigned["head", True][0]
            for shared in backend._shared.values():
                for memory in [memory for pair in shared.memories.values() for memory in pair]:
                    for whole in memory.whole.values():
                        whole[:] = np.nan
                for arena in shared.arenas:
                    arena[:] = 255  # NaN, read as floats
            found = read_all_ways(model)
            for one, other in zip(found, expected, strict=True):
                assert (one == other).all(), precision


def test_states_that_cannot_be_updated_in_place_are_refused(bundle: Path) -> None:
    with rwkv_npu.load(bundle, backend="numba") as model:
        for change in (lambda part: part.astype(np.float64), lambda part: part[:, :1], np.asfortranarray):
            state = model.new_state()
            name = max(state.parts, key=lambda name: state.parts[name].size)
            state.parts[name] = change(state.parts[name])
            with pytest.raises(UsageError, match="float32"):
                model.forward([1], state, inplace=True)


def test_nan_reaches_the_output(bundle: Path) -> None:
    source = BundleSource(open_bundle(bundle), "layer")
    backend = NumbaBackend(source, threads=2)
    group = source.program.groups[-1]
    for rows in (1, 5):
        runner = backend.open(group, rows)
        for broken in (np.nan, np.inf):
            runner.inputs["x"][:] = 1
            runner.inputs["x"][-1, 3] = broken
            assert not np.isfinite(runner.run()["logits"][-1]).any()
        runner.inputs["x"][:] = 1
        assert np.isfinite(runner.run()["logits"]).all()


def test_memory_is_shared_by_row_counts_of_one_capacity(bundle: Path) -> None:
    with rwkv_npu.load(bundle, backend="numba") as model:
        backend = model.engine._dispatcher._assigned["head", True][0]
        for length in range(2, 30):
            model.forward(list(range(1, length + 1)))
        assert sorted(backend._shared) == [1, 2, 4, 8, 16, 32]


def test_a_closed_backend_frees_its_memory(bundle: Path) -> None:
    """It keeps no address of freed memory, and unmaps files without waiting for a garbage collection."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(bundle))

    gc.collect()
    gc.disable()
    try:
        before, source = mapped(), BundleSource(open_bundle(bundle), "layer", "int8")
        backend = NumbaBackend(source, threads=2)

        def logits(backend: NumbaBackend, source: BundleSource) -> np.ndarray:
            runner = backend.open(source.program.groups[-1], 1)
            runner.inputs["x"][:] = 1
            return runner.run()["logits"].copy()

        expected = logits(backend, source)
        backend.open_fused(3)
        backend.close()
        held = (backend._kept, backend._vectors, backend._matrices, backend._recordings, backend._shared)
        assert not any(held) and backend._code is None
        assert (logits(backend, source) == expected).all()  # the weights are read again
        backend.close()
        del backend, source, held
        assert mapped() == before
        with rwkv_npu.load(bundle, backend="numba", precision="int4") as model:
            model.forward([1, 2, 3])
            assert mapped() > before
        del model
        assert mapped() == before
    finally:
        gc.enable()


def test_two_models_in_two_threads(bundle: Path) -> None:
    models = [rwkv_npu.load(bundle, backend="numba", precision=name) for name in ("int8", "int4")]
    alone = [model.forward(list(range(1, 20)))[0] for model in models]
    wrong = []

    def read(model: rwkv_npu.Model, expected: np.ndarray) -> None:
        for _ in range(30):
            if (model.forward(list(range(1, 20)))[0] != expected).any():
                wrong.append(model)

    threads = [threading.Thread(target=read, args=pair) for pair in zip(models, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_helpers_fall_asleep_and_wake_up(bundle: Path) -> None:
    source = BundleSource(open_bundle(bundle), "layer")
    backend = NumbaBackend(source, threads=2)
    runner = backend.open(source.program.groups[-1], 1)
    runner.inputs["x"][:] = 1
    expected = runner.run()["logits"].copy()
    for pause in (0, 0.05, 0, 0.05):
        threading.Event().wait(pause)
        assert (runner.run()["logits"] == expected).all()


def test_a_forked_child_has_threads_of_its_own() -> None:
    script = (
        "import os, warnings, rwkv_npu\n"
        "warnings.simplefilter('ignore')\n"
        "model = rwkv_npu.load(backend='numba', threads=2)\n"
        "expected = model.forward([1, 2, 3])[0]\n"
        "child = os.fork()\n"
        "same = bool((model.forward([1, 2, 3])[0] == expected).all())\n"
        "if child == 0: os._exit(0 if same else 3)\n"
        "print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.stdout == "True 0\n", done.stderr


def test_the_second_start_compiles_nothing() -> None:
    """A cache at a wrong path would silently be filled again at every start."""
    script = "import rwkv_npu; rwkv_npu.load(backend='numba', threads=2).forward([1, 2, 3])"

    def start() -> tuple[dict[Path, int], str]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        kept = (cache_dir() / "kernels").rglob("*.*")
        return {file: file.stat().st_mtime_ns for file in kept if file.suffix != ".lock"}, done.stderr

    first, _ = start()
    second, said = start()
    assert first and first.items() <= second.items() and not said


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_has_the_same_bits_alone_and_among_others(bundle: Path, precision: str) -> None:
    """A row among other sequences, by gemv and by gemm: a server's answer must not depend on other clients."""
    source = BundleSource(open_bundle(bundle), "layer", precision)
    backend = NumbaBackend(source, threads=2)
    for group in source.program.groups:
        for rows in (3, 21):
            together, alone = backend.open(group, rows), backend.open(group, 1)
            inputs = ragged_inputs(group, rows, range(rows), np.random.default_rng(rows))
            for name, array in inputs.items():
                together.inputs[name][:] = array
            expected = {name: array.copy() for name, array in together.run().items()}
            for row in range(rows):
                for name, array in inputs.items():
                    alone.inputs[name][:] = array[row : row + 1]
                for name, array in alone.run().items():
                    assert (array[0] == expected[name][row]).all(), (group.name, name)
