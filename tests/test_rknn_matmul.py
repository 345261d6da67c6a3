"""The matmul backend on the stand-in, on this machine: packing, cutting, row counts, faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.backends import npu_matmul, rknn_matmul
from rwkv_npu.backends.memory import MAX_CONTEXTS
from rwkv_npu.backends.npu_matmul import MAX_K, MIN_PART, Products, cut, pack
from rwkv_npu.backends.rknn_api import CORES, FP16, INT8, OVERRIDE, Library
from rwkv_npu.backends.rknn_matmul import ROWS, _large, _plan
from rwkv_npu.bench import backends as bench_backends
from rwkv_npu.bench.products import make_problem
from rwkv_npu.board.npu import Lock
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.official import official_spec
from rwkv_npu.models.spec import FUSIONS, groups
from rwkv_npu.runtime.weights import CheckpointSource
from tests.tiny import write_model
from tools.board.calls import count, read_calls

SMALL_PART = 1 << 12  # in the place of MIN_PART, where models are small

# -- cutting: no library needed ----------------------------------------------------------------------------


@given(st.integers(1, 40000), st.integers(1, 70000), st.sampled_from([FP16, INT8]), st.integers(1, 3))
def test_parts_cover_a_matrix_and_are_aligned(K: int, N: int, kind, cores: int) -> None:
    how = cut(K, N, kind, cores)
    assert sum(how.depths) - K in range(32) and sum(how.widths) - N in range(kind.b_block)
    assert all(0 < depth <= MAX_K and depth % 32 == 0 for depth in how.depths)
    assert all(width > 0 and width % kind.b_block == 0 for width in how.widths)
    assert len(how.widths) <= cores
    smallest = min(how.depths) * min(how.widths) * kind.operand.itemsize
    rounded = max(how.depths) * kind.b_block * kind.operand.itemsize  # what alignment may take from a part
    assert len(how.widths) == 1 or smallest + rounded >= 0.99 * MIN_PART


@pytest.mark.parametrize(
    ("K", "N", "parts"), [(768, 768, 1), (1024, 1024, 2), (768, 3072, 3), (2048, 2048, 3), (10240, 20, 1)]
)
def test_only_large_products_are_split_over_the_cores(K: int, N: int, parts: int) -> None:
    assert len(cut(K, N, FP16, 3).widths) == parts


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([FP16, INT8]))
def test_packing_follows_the_native_layout(K: int, N: int, kind) -> None:
    matrix = (np.arange(K * N).reshape(K, N) % 251 - 125).astype(np.float32)
    depth, width = sum(cut(K, N, kind, 1).depths), sum(cut(K, N, kind, 1).widths)
    packed = np.ones(depth * width, kind.operand)
    pack(matrix, None, packed, depth, kind)
    blocks = packed.reshape(width // kind.b_block, depth // 32, kind.b_block, 32)
    padded = np.zeros((depth, width), np.float32)
    padded[:K, :N] = matrix
    for k, n in [(0, 0), (K - 1, 0), (0, N - 1), (K - 1, N - 1), (depth - 1, width - 1), (K // 2, N // 3)]:
        assert blocks[n // kind.b_block, k // 32, n % kind.b_block, k % 32] == padded[k, n]
    assert packed.astype(np.int64).sum() == padded.astype(np.int64).sum()


@pytest.mark.parametrize("name", ["v7-0.1b", "v7-1.5b", "v4-3b", "v6-1.6b"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_official_models_stay_below_the_limit_of_contexts(name: str, dynamic: bool) -> None:
    plan, own = _plan(official_spec(name), FP16, 3, dynamic=dynamic)
    assert plan.contexts <= MAX_CONTEXTS
    assert own == (name == "v7-0.1b" and dynamic)  # 12 layers of small parts
    parameters = sum(K * N for K, N in _large(official_spec(name)).values())
    assert 2 * parameters <= plan.weights < 2.05 * parameters


def test_a_model_that_cannot_fit_is_refused_before_loading() -> None:
    plan, _ = _plan(official_spec("v7-2.9b"), FP16, 3, dynamic=True)
    assert not plan.fits and "contexts (of 150)" in plan.arithmetic()
    assert _plan(official_spec("v7-2.9b"), INT8, 3, dynamic=True)[0].fits


def test_without_a_board_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    write_model(tmp_path / "model.pth")
    with pytest.raises(BackendError, match="needs an rk3588, .* no Rockchip NPU: use backend auto"):
        rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul")
    monkeypatch.setenv(OVERRIDE, str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"none.so cannot be used as librknnrt.so .*check RWKV_NPU_RKNNRT"):
        rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul")


def test_an_old_runtime_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning comes before the first call: products of version 2.2 were seen to be all zero."""
    library = SimpleNamespace(path=tmp_path / "librknnrt.so", create_dynamic=None)
    library.path.write_bytes(b"librknnrt version: 2.2.0 (x)")
    monkeypatch.setattr(rknn_matmul, "Library", lambda: library)
    monkeypatch.setattr(rknn_matmul.hardware, "soc", lambda: "rk3588")
    write_model(tmp_path / "model.pth")
    source = CheckpointSource(open_checkpoint(tmp_path / "model.pth"))
    with pytest.warns(UserWarning, match=r"librknnrt 2\.2\.0 is older than the recommended 2\.3\.0"):
        rknn_matmul.RknnMatmulBackend(source).close()


# -- on the stand-in ---------------------------------------------------------------------------------------

on_the_stand_in = pytest.mark.board


@pytest.fixture
def library(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv(OVERRIDE, str(stand_in))
    return Library()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the columns of small matrices over the cores too."""
    monkeypatch.setattr(npu_matmul, "MIN_PART", SMALL_PART)


@pytest.fixture
def products(library: Library, small_parts: None) -> Iterator[Products]:
    made = Products(library, FP16, CORES, own=False)
    yield made
    made.close()


@on_the_stand_in
@pytest.mark.usefixtures("small_parts")
@settings(max_examples=25, deadline=None)
@given(M=st.sampled_from([1, 16, 64]), K=st.integers(1, 300), N=st.integers(1, 1000), int8=st.booleans())
def test_products_of_any_shape(stand_in: Path, M: int, K: int, N: int, int8: bool) -> None:
    os.environ[OVERRIDE] = str(stand_in)
    made = Products(Library(), INT8 if int8 else FP16, CORES, own=False)
    try:
        rng = np.random.default_rng([M, K, N])
        x, matrix = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
        exact = x.astype(np.float64) @ matrix
        found = made.multiply(x, made.weight("w", matrix, (1, 16, 64)))
        assert found.shape == (M, N) and found.dtype == np.float32
        fp16 = 2.0**-10 * (np.abs(x) @ np.abs(matrix)) + 1e-5  # both operands rounded, half a unit each
        steps_x, steps_w = np.abs(x).max() / 127, np.abs(matrix).max() / 127  # half of one is lost at most
        sums = np.abs(x).sum(1)[:, None] * steps_w + np.abs(matrix).sum(0) * steps_x
        int8_loss = sums / 2 + K * steps_x * steps_w / 4 + 1e-5
        assert (np.abs(found - exact) < (int8_loss if int8 else fp16)).all()
    finally:
        made.close()
        del os.environ[OVERRIDE]


@on_the_stand_in
def test_fp16_operands_and_fp32_sums_are_exact(products: Products) -> None:
    """K is cut, there are several rows, and columns for three cores: exact to the last bits of fp32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, MAX_K + 96)).astype(np.float16).astype(np.float32)
    matrix = rng.standard_normal((MAX_K + 96, 768)).astype(np.float16)
    weight = products.weight("w", matrix, (16,))
    assert len(weight.parts) == 2 and len(weight.parts[0]) == 3
    exact = x.astype(np.float64) @ matrix
    assert np.abs(products.multiply(x, weight) - exact).max() < 1e-5 * np.abs(exact).max()


@on_the_stand_in
@pytest.mark.parametrize("faults", ["", "no-dynamic"])
@pytest.mark.parametrize("own", [True, False])
def test_weights_and_row_counts_may_alternate(
    stand_in: Path, tmp_path: Path, faults: str, own: bool, run_alone
) -> None:
    """Weights of one shape and row counts in any order: the right weight is bound in each call."""
    log = tmp_path / "log"
    run_alone(
        f"""
        import numpy as np
        from rwkv_npu.backends import npu_matmul
        from rwkv_npu.backends.npu_matmul import Products
        from rwkv_npu.backends.rknn_api import CORES, FP16, Library
        npu_matmul.MIN_PART = {SMALL_PART}
        products = Products(Library(), FP16, CORES, own={own})
        rng = np.random.default_rng(0)
        matrices = [rng.standard_normal((64, 600)).astype(np.float16) for _ in range(3)]
        weights = [products.weight(str(i), matrix, (1, 16)) for i, matrix in enumerate(matrices)]
        for M in (1, 16, 16, 1, 16, 1, 1):
            for matrix, weight in zip(matrices, weights):
                x = rng.standard_normal((M, 64)).astype(np.float16).astype(np.float32)
                assert np.abs(products.multiply(x, weight) - x @ matrix.astype(np.float32)).max() < 1e-3
        products.close()
        """,
        RKNN_STANDIN_FAULTS=faults,
        RKNN_STANDIN_LOG=str(log),
    )
    calls = read_calls(log)
    contexts = 3 * (3 if own else 1) * (2 if faults else 1)
    assert count(calls, "matmul_create", by="code") == {"0": contexts}
    assert count(calls, "matmul_run").total() == 7 * 3 * 3
    assert calls[-1].name == "matmul_destroy" and calls[-1].number("open") == 0
    assert [call.number("buffers") for call in calls if call.name == "destroy_mem"][-1] == 0
    bindings = [call["tensor"] for call in calls if call.name == "matmul_set_io_mem"]
    if own:  # each context, and each of its handles, is given its weight once
        assert bindings.count("B") == contexts


@on_the_stand_in
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("generation", ["4", "5.0", "5.2", "6", "7", "7a"])
def test_every_generation(library: Library, tmp_path: Path, generation: str, fusion: str) -> None:
    spec = write_model(tmp_path / "model.pth", generation)
    ids = np.random.default_rng(0).integers(1, 200, ROWS[-1] + 7)
    with rwkv_npu.load(tmp_path / "model.pth", backend="numpy", fusion=fusion) as reference:
        expected, expected_state = reference.forward(ids)
    with rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul", fusion=fusion) as model:
        logits, state = model.forward(ids)
        calls = model.engine.counters.calls
        model.forward([5], state)
        assert model.engine.counters.calls - calls == len(groups(spec, fusion))
    assert np.abs(logits - expected).max() < 0.01 * expected.std() + 0.01
    for name, part in expected_state.parts.items():
        assert np.abs(state.parts[name] - part).max() < 0.02 * max(1.0, np.abs(part).max())


@on_the_stand_in
@pytest.mark.usefixtures("small_parts")
def test_one_core_is_enough(library: Library, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth")
    found = {}
    for cores in ("auto", "1"):
        with rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul", npu_cores=cores) as model:
            found[cores], _ = model.forward([1, 2, 3])
    assert np.array_equal(found["auto"], found["1"])  # parts of N share no sums
    with pytest.raises(BackendError, match="NPU cores '0,0' are unknown"):
        rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul", npu_cores="0,0")


@on_the_stand_in
@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ("run-fails", "returned -3: the NPU is unavailable"),
        ("init-memory", "out of NPU memory"),
        ("core-mask", "refused"),
    ],
)
def test_return_codes_are_checked(stand_in: Path, run_alone, faults: str, said: str) -> None:
    code = """
        import numpy as np
        from rwkv_npu.backends.npu_matmul import Products
        from rwkv_npu.backends.rknn_api import CORES, FP16, Library
        from rwkv_npu.errors import BackendError, UsageError
        products = Products(Library(), FP16, CORES, own=True)
        try:
            weight = products.weight("w", np.ones((32, 800), np.float16), (1, 16))
            products.multiply(np.ones((1, 32), np.float32), weight)
        except BackendError as error:
            print(error)
        products.close()
        """
    assert said in run_alone(code, RKNN_STANDIN_FAULTS=faults)


@on_the_stand_in
def test_running_out_of_file_descriptors_is_reported(stand_in: Path, run_alone) -> None:
    code = """
        import numpy as np
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        from rwkv_npu.backends.npu_matmul import Products
        from rwkv_npu.backends.rknn_api import CORES, FP16, Library
        from rwkv_npu.errors import BackendError, UsageError
        products = Products(Library(), FP16, CORES, own=True)
        try:
            for number in range(40):
                products.weight(str(number), np.ones((32, 32), np.float16), (1,))
        except BackendError as error:
            print(error)
        products.close()
        """
    assert "out of NPU memory, or of file descriptors" in run_alone(code)


@on_the_stand_in
def test_eight_bits_are_the_users_choice(library: Library, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth")
    ids = list(range(1, 40))
    found = {}
    for precision in ("fp16", "w8a8"):
        with rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul", precision=precision) as model:
            found[precision], _ = model.forward(ids)
    difference = np.abs(found["w8a8"] - found["fp16"]).max() / found["fp16"].std()
    assert 1e-3 < difference < 0.3
    with pytest.raises(UsageError, match="no w8a8 weights: it has fp32"):
        rwkv_npu.load(tmp_path / "model.pth", backend="numpy", precision="w8a8")
    with pytest.raises(BackendError, match="computes in fp16 or w8a8, not in fp32"):
        rwkv_npu.load(tmp_path / "model.pth", backend="rknn-matmul", precision="fp32")


@on_the_stand_in
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("dtype", "worst"), [("fp16", 1e-3), ("int8", 0.05)])
def test_products_of_the_matmul_benchmark(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, worst: float
) -> None:
    """`bench matmul` splits columns over all cores, and its results equal NumPy's."""
    monkeypatch.setattr(bench_backends, "LOCK", Lock(tmp_path))
    backend, problem = bench_backends.RknnMatmulBackend(dtype, 1, "cpu"), make_problem(16, 100, 768)
    assert "stand-in" in backend.versions and backend.device.endswith("NPU, 3 cores")
    operation = backend.prepare(problem)
    try:
        for stage in operation.stages:
            stage()
        assert problem.error(operation.result()) < worst
    finally:
        operation.close()


# Reads tokens one by one and prints the logits' deviation from NumPy's, relatively, then the faults that were counted.
THROUGH_FAULTS = """
import sys, warnings
import numpy as np
import rwkv_npu
found = {}
for backend in ("numpy", "rknn-matmul"):
    with warnings.catch_warnings(record=True) as warned, rwkv_npu.load(sys.argv[1], backend=backend) as model:
        warnings.simplefilter("always")
        state, found[backend] = None, []
        for token in range(1, 13):
            logits, state = model.forward([token], state)
            found[backend].append(logits)
expected, logits = map(np.stack, found.values())
print(np.abs(logits - expected).max() / expected.std(), len(warned))
"""


@on_the_stand_in
@pytest.mark.parametrize(
    "faults", ["run-fails@60", "run-fails@60+", "nan@60", "nan@60+", "zeros@4+:1x64x288"]
)
def test_a_fault_is_neither_seen_nor_repeated(run_alone, tmp_path: Path, faults: str) -> None:
    """With the fallback: one fault is repeated; a lasting fault leads to the CPU and one warning."""
    write_model(tmp_path / "model.pth")
    log = tmp_path / "log"
    variables = {"RKNN_STANDIN_FAULTS": faults, "RKNN_STANDIN_LOG": str(log)}
    deviation, warned = run_alone(THROUGH_FAULTS, tmp_path / "model.pth", **variables).split()
    assert float(deviation) < 0.02
    assert int(warned) == (1 if "+" in faults else 0)
    assert count(read_calls(log), "fault", by="name").total() > 0
