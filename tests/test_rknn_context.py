"""librknnrt's own interface, on the native stand-in: what is computed, copied and flushed, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu import kernels
from rwkv_npu.backends import rknn_context
from rwkv_npu.backends.rknn import RknnBackend
from rwkv_npu.backends.rknn_api import OVERRIDE, Memory, Networks
from rwkv_npu.backends.rknn_context import Context
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.models.maths import largest_magnitude, narrow
from rwkv_npu.runtime.weights import BundleSource
from tests.native import computing, native_bundle, variables
from tools.board.calls import bytes_moved, count, read_calls
from tools.board.clock import table

IDS = np.random.default_rng(2).integers(1, 200, 21).tolist()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_bundle(tmp_path_factory.mktemp("rknn"))


@pytest.fixture(scope="module")
def socket(bundle: Path) -> Iterator[Path]:
    with computing(bundle) as path:
        yield path


@pytest.fixture
def npu(stand_in: Path, socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has the stand-in, without faults."""
    monkeypatch.setenv(OVERRIDE, str(stand_in))
    monkeypatch.setenv("RKNN_STANDIN_SOCKET", str(socket))


# -- conversion: no library needed -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 2048), (1, 7), (3, 32)])
def test_conversion_is_numpys(shape: tuple[int, int]) -> None:
    pytest.importorskip("numba")
    halves, rng = kernels.load("halves"), np.random.default_rng(0)
    wide = (rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 7, shape)).astype(np.float32)
    found, expected = np.empty(shape, np.float16), np.empty(shape, np.float16)
    assert halves.narrow(wide, found) == narrow(wide, expected) == np.abs(wide).max()
    assert np.array_equal(found, expected)
    again = np.empty(shape, np.float32)
    halves.widen(found, again)
    assert np.array_equal(again, expected.astype(np.float32))
    for bad in (np.nan, np.inf):
        wide[-1, -1] = bad
        assert not np.isfinite(halves.narrow(wide, found)) and not np.isfinite(largest_magnitude(found))


# -- on the stand-in ---------------------------------------------------------------------------------------

on_the_stand_in = pytest.mark.board


@on_the_stand_in
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("fusion", ["layer", "projection"])
def test_it_computes_what_numpy_computes(
    npu: None, bundle: Path, fusion: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without numba: a prompt, its padding, a token, two sequences at once."""
    monkeypatch.setattr(kernels, "available", lambda: compiled and kernels.load("halves") is not None)
    monkeypatch.setattr("rwkv_npu.kernels.recurrence.available", kernels.available)
    with (
        rwkv_npu.load(bundle, backend="rknn", fusion=fusion) as model,
        rwkv_npu.load(bundle, backend="numpy", fusion=fusion) as other,
    ):
        found, expected = [], []
        for one, results in ((model, found), (other, expected)):
            logits, state = one.forward(IDS)
            results += [logits, one.forward([7], state)[0]]
            results += list(one.engine.forward_batch([IDS[:5], [3]], [state, one.engine.new_state()])[0])
    for logits, exact in zip(found, expected, strict=True):
        assert logits.dtype == np.float32 and np.abs(logits - exact).max() < 0.02 * exact.std()


# Reads a prompt and tokens. Prints the logits' deviation from NumPy's, faults, warnings, and the backends' seconds.
READ = """
import sys, warnings
import numpy as np
import rwkv_npu
found = {}
for backend in ("numpy", "rknn"):
    with warnings.catch_warnings(record=True) as warned, rwkv_npu.load(sys.argv[1], backend=backend) as model:
        warnings.simplefilter("always")
        found[backend], state = model.forward(range(1, 20))
        for token in range(1, 9):
            logits, state = model.forward([token], state)
            found[backend] = np.append(found[backend], logits)
        counters = model.engine.counters
print(np.abs(found["rknn"] - found["numpy"]).max() / found["numpy"].std())
print(counters.faults.calls, len(warned), counters.npu_s, *(str(one.message) for one in warned), sep="|")
"""


@on_the_stand_in
@pytest.mark.parametrize(
    ("faults", "failed", "said"),
    [
        ("", 0, ""),
        ("native-blocks", 0, ""),  # the runtime converts, as the native layout is another
        ("run-fails@20+", 0, "rknn failed at "),  # as when the driver is gone
        ("nan@6+:mid.0", 2, "is not finite): the CPU runs it"),
    ],
)
def test_text_stays_right(
    run_alone, bundle: Path, socket: Path, tmp_path: Path, faults: str, failed: int, said: str
) -> None:
    log = tmp_path / "log"
    lines = run_alone(READ, bundle, **variables(socket=socket, faults=faults, log=log))
    deviation, line = lines.splitlines()
    counted, warned, *_ = line.split("|")
    assert float(deviation) < 0.02 and said in line
    assert int(warned) == bool(said) and (not failed or int(counted) == failed)
    calls = read_calls(log)
    assert bytes_moved(calls) == 0  # nothing is copied by the runtime
    assert ("0" in count(calls, "set_io_mem", by="native")) == ("blocks" in faults)
    assert [call.number("buffers") for call in calls if call.name == "destroy_mem"][-1] == 0
    assert calls[-1].name == "destroy" and calls[-1].number("open") == 0


@on_the_stand_in
@pytest.mark.parametrize(
    ("faults", "cores", "said"),
    [
        (
            "no-io-memory",
            "auto",
            "rknn_set_io_mem of .* returned -5; RKNNLite may work, but it is not installed",
        ),
        ("core-mask", "0", "core mask 1 is refused: this chip does not have the NPU core 0: use auto"),
        ("init-memory@2", "auto", "end other programs, or convert with one row count"),
        ("old-runtime", "auto", "rwkv-npu convert --toolkit"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    run_alone, bundle: Path, socket: Path, tmp_path: Path, faults: str, cores: str, said: str
) -> None:
    code = """
        import sys
        import rwkv_npu
        from rwkv_npu.errors import BackendError
        try:
            rwkv_npu.load(sys.argv[1], backend="rknn", npu_cores=sys.argv[2])
        except BackendError as error:
            print(error)
        """
    log = tmp_path / "log"
    printed = run_alone(code, bundle, cores, **variables(socket=socket, faults=faults, log=log))
    with pytest.raises(BackendError, match=said):
        raise BackendError(printed)
    assert printed.count("\n") == 1 and len(printed) < 420
    destroyed = [call for call in read_calls(log) if call.name == "destroy"]
    assert not destroyed or destroyed[-1].number("open") == 0


@pytest.fixture
def context(npu: None, bundle: Path) -> Iterator[Context]:
    """The group `mid.0` at 16 rows."""
    opened = open_bundle(bundle)
    artifact = next(a for a in opened.manifest.artifacts if (a.group, a.rows) == ("mid.0", 16))
    made = Context.open(Networks(), (opened.path / artifact.path).read_bytes())
    for array in made.inputs.values():
        array[...] = np.random.default_rng(0).standard_normal(array.shape)
    yield made
    made.close()


@on_the_stand_in
@pytest.mark.parametrize("direction", [1, 2])
def test_without_a_flush_the_npu_or_the_caller_sees_what_was_before(
    context: Context, direction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.run()
    before = context.outputs["x_out"].copy()
    sync = Memory.sync
    monkeypatch.setattr(Memory, "sync", lambda self, way: way == direction or sync(self, way))
    context.inputs["x"][...] += 1
    context.run()
    assert np.array_equal(context.outputs["x_out"], before)
    monkeypatch.undo()
    context.run()
    assert not np.array_equal(context.outputs["x_out"], before)


@on_the_stand_in
def test_a_duplicate_computes_the_same_on_another_core(context: Context) -> None:
    other = context.duplicate(2)
    for name, array in context.inputs.items():
        other.inputs[name][...] = array
    context.run()
    other.run()
    assert all(np.array_equal(array, other.outputs[name]) for name, array in context.outputs.items())
    other.close()
    context.run()


@on_the_stand_in
def test_a_layer_on_each_core(npu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for a third core: two work, and the reason is known."""
    source = BundleSource(open_bundle(bundle))
    backend, group = RknnBackend(source), source.program.groups[1]
    runners, refused = backend.on_each_core(group, 16)
    assert len(runners) == 3 and refused == ""
    outputs = [{name: array.copy() for name, array in runner.run().items()} for runner in runners]
    assert all(np.array_equal(outputs[0]["x_out"], other["x_out"]) for other in outputs[1:])
    head = source.program.groups[-1]
    assert len(backend.on_each_core(head, min(backend.row_counts(head)))[0]) == 3
    assert backend._networks is not None
    dup, codes = backend._networks.dup, iter([0, -4])
    monkeypatch.setattr(backend._networks, "dup", lambda *pair: next(codes) or dup(*pair))
    runners, refused = backend.on_each_core(source.program.groups[0], 16)
    assert len(runners) == 2 and "rknn_dup_context returned -4: out of NPU memory" in refused
    backend.close()


@on_the_stand_in
def test_inputs_past_fp16_are_kept_for_the_cpu(npu: None, bundle: Path) -> None:
    """The CPU computes with the numbers that came, not with infinity."""
    source = BundleSource(open_bundle(bundle))
    backend, group = RknnBackend(source), source.program.groups[1]
    runner = backend.open(group, 16)
    assert isinstance(runner, rknn_context.ContextRunner)
    large = np.full((16, source.spec.D), 1e5, np.float32)
    runner.load({port.name: np.ones((9, port.width), np.float32) for port in group.inputs} | {"x": large})
    assert np.isinf(runner.inputs["x"]).all() and np.array_equal(runner.kept["x"], large)
    assert runner.kept["y"] is runner.inputs["y"] and (runner.inputs["y"] == 1).all()
    backend.close()


@on_the_stand_in
def test_the_npus_time_is_counted(run_alone, bundle: Path, socket: Path, tmp_path: Path) -> None:
    """27 calls of 2 ms, of which the self-tests are not counted."""
    times = {(a.group, a.rows): 2000.0 for a in open_bundle(bundle).manifest.artifacts}
    (tmp_path / "times").write_text(table(times))
    lines = run_alone(READ, bundle, **variables(socket=socket, clock=1, times=tmp_path / "times"))
    npu_s = float(lines.splitlines()[1].split("|")[2])
    calls = 2 * 3 + 1 + 8 * 4  # two chunks and the head, then eight tokens
    assert 2e-3 * calls <= npu_s < 1.0
