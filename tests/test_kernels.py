"""The compiled recurrences against `time_mix` of `models`: what they return, and the states that they leave.

Letters: T tokens, B sequences, H heads, N head size, A = H*N.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.formats.state import EMPTY_Q
from rwkv_npu.kernels import recurrence
from rwkv_npu.kernels.recurrence import Compiled
from rwkv_npu.models import MODULES, common
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import GENERATIONS, Spec, att_outputs, state_shapes
from tests.tiny import Run
from tools.make_checkpoint import make_spec

Arrays = dict[str, np.ndarray]

# Over the largest value of an output or a state.
BOUND = 1e-5

shapes = st.tuples(
    st.sampled_from([1, 2, 15, 16, 17, 33, 70]),  # T: from 16 tokens on, heads of N = 64 run in chunks of 8
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 16, 64]),
)

# What the inputs that make decays are drawn from, where a decay of v6 is exp(-exp(x)) and of v7 exp(-0.6 sigmoid(x)).
DECAYS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "trained": lambda rng, shape: rng.uniform(-6, 1, shape),
    "none": lambda rng, shape: np.full(shape, -60.0),
    "all at once": lambda rng, shape: np.full(shape, 60.0),
    "beyond fp32": lambda rng, shape: rng.choice([-200.0, 200.0], shape),
    "all kinds": lambda rng, shape: rng.choice([-200.0, -30.0, -1.0, 0.0, 3.0, 5.0, 200.0], shape),
}


@pytest.fixture(scope="module")
def kernels() -> Iterator[Callable[[Spec], Compiled]]:
    """Makes compiled recurrences that use three threads."""
    made: list[Compiled] = []

    def make(spec: Spec) -> Compiled:
        made.append(Compiled(spec, threads=3))
        return made[-1]

    yield make
    for compiled in made:
        compiled.close()


@pytest.fixture(autouse=True)
def threads_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "SHARE", 1 << 12)


class Layer:
    """A layer of random weights for any generation."""

    def __init__(self, generation: str, H: int, N: int, rng: np.random.Generator, decay: str = "trained"):
        spec = make_spec(generation, D=H * N, L=2, V=8, N=N)
        self.spec, self._rng, self._decay = spec, rng, DECAYS[decay]

    def vector(self, name: str) -> np.ndarray:
        spec = self.spec
        per_head = {"att.r_k", "att.time_faaaa"} | ({"att.time_decay"} if spec.generation == "5.2" else set())
        shape: tuple[int, ...] = (spec.H, spec.N) if name in per_head else (spec.A,)
        if spec.generation in ("5.0", "5.1") and name in ("att.time_decay", "att.time_faaaa"):
            shape = (spec.H,)
        if name in ("att.time_decay", "att.w0"):
            # The sum with the data is what is drawn, where there is one.
            values = np.zeros(shape) if spec.generation in ("6", "7", "7a") else self._decay(self._rng, shape)
            return np.clip(values, -80, 80).astype(np.float32)
        return self._rng.standard_normal(shape).astype(np.float32)

    def inputs(self, T: int, B: int, layer: int = 1) -> Arrays:
        found = {}
        for port in att_outputs(self.spec, layer):
            x = self._rng.standard_normal((T, B, port.width))
            if port.name == "w":
                x = self._decay(self._rng, x.shape)
            if port.name in ("a", "vmix"):
                x = 1 / (1 + np.exp(-3 * x))
            found[port.name] = x.astype(np.float32)
        return found

    def state(self, B: int) -> Arrays:
        shapes = {name: shape for name, shape in state_shapes(self.spec).items() if "shift" not in name}
        parts = {
            name: self._rng.standard_normal((B, *shape)).astype(np.float32) for name, shape in shapes.items()
        }
        if "att.q" in parts:
            parts["att.b"] = np.abs(parts["att.b"])
            parts["att.q"][0] = EMPTY_Q  # and one without a past
            parts["att.a"][0] = parts["att.b"][0] = 0
        return parts


def run(compiled: Compiled, table: np.ndarray, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
    """`time_mix` for sequences of equal length as the reference takes them: (T, B, A) and states (B, ...) in place."""
    T, B = next(iter(x.values())).shape[:2]
    rows_of = {name: array.swapaxes(0, 1).reshape(T * B, -1) for name, array in x.items()}
    whole = {name: np.zeros((2, *shape), np.float32) for name, shape in state_shapes(compiled._spec).items()}
    parts = [{**whole, **{name: np.stack([part[b]] * 2) for name, part in state.items()}} for b in range(B)]
    y = compiled.time_mix(table, rows_of, Rows([np.arange(T)] * B, parts), 1, carry)
    for b, own in enumerate(parts):
        for name, part in state.items():
            assert (own[name][0] == part[b]).all(), "another layer's state is left alone"
            part[b] = own[name][1]
    return y.reshape(B, T, -1).swapaxes(0, 1)


def assert_close(ours: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert ours.shape == expected.shape and ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= BOUND * max(1.0, np.abs(expected).max()), what


def enlarged(bound: float, raw: np.ndarray, weight: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    """What a group norm, its weight and the gate make of an error of `bound` in the largest of its inputs: (T, B, A).

    raw (T, B, H, N) is divided by its deviation within the head, which is small where the few channels of a head, or
    what a head remembers of its few tokens, are alike. A gate is no larger than its input.
    """
    T, B, H, N = raw.shape
    deviation = np.sqrt(raw.var(-1, keepdims=True) + common.GROUP_NORM_EPS)
    errors = np.broadcast_to(bound * np.abs(raw).max() / deviation, raw.shape).reshape(T, B, H * N)
    return errors * np.abs(weight) * (1 if gate is None else np.abs(gate))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, decay=st.sampled_from(sorted(DECAYS)), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_recurrences_equal_numpys(
    generation: str, shape: tuple[int, ...], decay: str, seed: int, kernels: Callable[[Spec], Compiled]
) -> None:
    """Layers 0 and 1, over all tokens at once and in two pieces."""
    T, B, H, N = shape
    layer = Layer(generation, H, N, np.random.default_rng(seed), decay)
    reference, compiled = MODULES[generation], kernels(layer.spec)
    vectors: Arrays = {}

    def vector(name: str) -> np.ndarray:
        return vectors.setdefault(name, layer.vector(name))

    p, table = reference.prepare(vector, layer.spec), compiled.prepare(vector, layer.spec)
    inputs, states = [layer.inputs(T, B, i) for i in (0, 1)], [layer.state(B) for _ in (0, 1)]
    expected_states = [{name: part.copy() for name, part in state.items()} for state in states]
    carry: Arrays = {}
    raw: list[np.ndarray] = []  # what goes into the group norms

    def group_norm(y: np.ndarray, *more: np.ndarray) -> np.ndarray:
        raw.append(y.copy())
        return common.group_norm(y, *more)

    with (
        np.errstate(over="ignore"),  # exp(200), whose negative is the logarithm of no memory at all
        mock.patch.object(reference, "group_norm", group_norm, create=True),
    ):
        expected = [
            reference.time_mix(p, x, state, carry) for x, state in zip(inputs, expected_states, strict=True)
        ]

    for cut in {T, T // 2 or T}:
        ours_states = [{name: part.copy() for name, part in state.items()} for state in states]
        pieces: list[list[np.ndarray]] = [[], []]
        for rows in (slice(0, cut), slice(cut, T)):
            carry = {}
            for i in (0, 1) if rows.start < T else ():
                x = {name: np.ascontiguousarray(array[rows]) for name, array in inputs[i].items()}
                kept = {name: array.copy() for name, array in x.items()}
                pieces[i].append(run(compiled, table, x, ours_states[i], carry).copy())
                assert all((x[name] == kept[name]).all() for name in x), "inputs are only read"
        for i in (0, 1):
            difference = np.abs(np.concatenate(pieces[i]) - expected[i])
            allowed = BOUND * max(1.0, np.abs(expected[i]).max())
            if raw:
                allowed += enlarged(BOUND, raw[i], p["ln_x.weight"], inputs[i].get("g"))
            assert (difference <= allowed).all(), f"y of layer {i}"
            for name, part in expected_states[i].items():
                assert_close(ours_states[i][name], part, name)


def test_heads_are_divided_among_threads(
    kernels: Callable[[Spec], Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above need this: otherwise they would run on one thread."""
    layer = Layer("7", 3, 64, np.random.default_rng(0))
    compiled = kernels(layer.spec)
    kernel, shares = compiled._kernel.run.ctypes, []

    def recorded(arguments: int, begin: int, end: int) -> None:
        shares.append((begin, end))
        kernel(arguments, begin, end)

    monkeypatch.setattr(compiled, "_kernel", SimpleNamespace(**vars(compiled._kernel)))
    compiled._kernel.run = SimpleNamespace(ctypes=recorded)
    run(compiled, compiled.prepare(layer.vector, layer.spec), layer.inputs(16, 1, 0), layer.state(1), {})
    assert sorted(shares) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("T", [1, 15, 16, 43])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_sequence_has_the_same_bits_alone_and_among_others(
    generation: str, T: int, kernels: Callable[[Spec], Compiled]
) -> None:
    """A sequence's y and state, whatever else is in the call: chunks are counted from its own first row."""
    layer = Layer(generation, 2, 64, np.random.default_rng(3), "all kinds")
    compiled = kernels(layer.spec)
    table, x, state = compiled.prepare(layer.vector, layer.spec), layer.inputs(T, 3, 0), layer.state(3)
    alone = []
    for b in range(3):
        own = {name: part[b : b + 1].copy() for name, part in state.items()}
        given = {name: np.ascontiguousarray(array[:, b : b + 1]) for name, array in x.items()}
        alone.append((run(compiled, table, given, own, {}).copy(), own))
    together = run(compiled, table, x, state, {})
    for b, (y, own) in enumerate(alone):
        assert (together[:, b] == y[:, 0]).all()
        assert all((part[b] == own[name][0]).all() for name, part in state.items())


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_nan_and_infinity_reach_the_output(
    generation: str, bad: float, T: int, kernels: Callable[[Spec], Compiled]
) -> None:
    """The output is finite exactly where the reference is."""
    rng = np.random.default_rng(1)
    layer = Layer(generation, 2, 64, rng)
    reference, compiled = MODULES[generation], kernels(layer.spec)
    vectors = {}
    p = reference.prepare(lambda name: vectors.setdefault(name, layer.vector(name)), layer.spec)
    table = compiled.prepare(vectors.__getitem__, layer.spec)
    x, state = layer.inputs(T, 1, 0), layer.state(1)
    for name in x.keys() & {"k", "v"}:
        x[name][T // 2, 0, 3] = bad
    theirs = {name: part.copy() for name, part in state.items()}
    with np.errstate(all="ignore"):
        expected = reference.time_mix(p, x, theirs, {})
    ours = run(compiled, table, x, state, {})
    assert not np.isfinite(expected).all()
    head = slice(64) if generation != "4" else slice(3, 4)  # a head's group norm spreads it over the head
    assert not np.isfinite(ours[T // 2 :, 0, head]).any()
    clean = np.isfinite(expected[..., 64:])
    assert np.isfinite(ours[..., 64:])[clean].all()


def test_arrays_of_any_order_and_type_are_accepted(kernels: Callable[[Spec], Compiled]) -> None:
    """A simulator's outputs may be read-only, or not lie row after row."""
    layer = Layer("6", 2, 16, np.random.default_rng(2))
    compiled = kernels(layer.spec)
    table, x, state = compiled.prepare(layer.vector, layer.spec), layer.inputs(4, 1), layer.state(1)
    twin = {name: part.copy() for name, part in state.items()}
    expected = run(compiled, table, x, state, {}).copy()
    rows = {name: np.asfortranarray(array[:, 0]) for name, array in x.items()}
    for array in rows.values():
        array.flags.writeable = False
    parts = {name: np.zeros((2, *shape), np.float32) for name, shape in state_shapes(layer.spec).items()}
    parts |= {name: np.stack([part[0]] * 2) for name, part in twin.items()}
    assert (compiled.time_mix(table, rows, Rows([range(4)], [parts]), 1, {}) == expected[:, 0]).all()


def test_the_exponential_of_decays_is_correctly_rounded() -> None:
    """For a decay near 1, a state accumulates its error over thousands of tokens."""
    from numba import njit

    from rwkv_npu.kernels import common

    @njit
    def exponentials(x, y, z):  # type: ignore[no-untyped-def]
        for i in range(len(x)):
            y[i] = common.exp_of_decay(x[i])
            z[i] = common.exp(x[i])

    x = -np.exp(np.random.default_rng(0).uniform(-20, 5.5, 200_000)).astype(np.float32)
    x[:4] = 0, -0.0, -1e30, -np.inf
    y, z = np.empty_like(x), np.empty_like(x)
    exponentials(x, y, z)
    exact = np.exp(x.astype(np.float64))
    assert np.count_nonzero(y != exact.astype(np.float32)) <= 2  # ties that 1e-11 decides
    normal = exact > 2.0**-125
    assert (np.abs(z - exact)[normal] <= 1.1 * np.spacing(exact.astype(np.float32))[normal]).all()
    assert (z[~normal] < 2.0**-124).all()
    for bad in (np.array([np.nan], np.float32),):
        exponentials(bad, y[:1], z[:1])
        assert np.isnan(y[0]) and np.isnan(z[0])


def test_vector_exponentials_are_accurate() -> None:
    from rwkv_npu.kernels import compiler, simd
    from rwkv_npu.kernels.compiler import Kernel
    from rwkv_npu.quant.cpu import LANES

    def kernel(function: Any) -> Kernel:
        def run(x, y):  # type: ignore[no-untyped-def]
            simd.store_floats(function(simd.load_floats(x)), y)

        return Kernel(run, name=function.py_func.__name__)

    x = np.random.default_rng(0).uniform(-87, 88, (4000, LANES)).astype(np.float32)
    x[1000:] *= np.float32(0.05)
    x[0, :8] = 0, -0.0, 1e-30, -1e30, 1e30, -np.inf, np.inf, np.nan
    exact = np.exp(np.clip(x, -87.3, 88.3).astype(np.float64))
    logistic = exact / (1 + exact)
    for function, expected, bound in [
        (simd.exp, exact, 1.1 * np.spacing(exact.astype(np.float32))),
        (simd.sigmoid, logistic, np.maximum(2.0**-22 * logistic, 2.0**-125)),
        (simd.tanh, np.tanh(x.astype(np.float64)), np.full_like(exact, 2.0**-22)),
    ]:
        y = np.empty_like(x)
        signature = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
        code = signature(compiler._load(kernel(function).compile()))
        for row, out in zip(x, y, strict=True):
            code(row.ctypes.data, out.ctypes.data)
        is_nan = np.isnan(x)
        assert (np.isnan(y) == is_nan).all() and np.isfinite(y[~is_nan]).all()
        assert (np.abs(y - expected) <= bound)[~is_nan].all(), function


def test_exponentials_are_vector_code() -> None:
    """LLVM silently emits scalar code for some operations on vectors."""
    from rwkv_npu.kernels import simd
    from rwkv_npu.kernels.compiler import Kernel

    if platform.machine() != "x86_64":
        pytest.skip("names instructions of x86")

    def run(x, y):  # type: ignore[no-untyped-def]
        simd.store_floats(simd.tanh(simd.load_floats(x)), y)
        simd.store_small_ints(simd.load_floats(x), y + 64)

    assembly = Kernel(run, name="tanh").assembly()
    assert "vfmadd" in assembly or "mulps" in assembly
    scalar = {word for word in assembly.split() if re.fullmatch(r"v?(ucomiss|cvtts?s2si|mulss|divss)", word)}
    assert not scalar


# -- compiling and keeping -------------------------------------------------------------------------------

LOAD = """
from rwkv_npu import kernels
kernel = kernels.load("v4").run
compile = kernel.compile
def counted():
    print("compiled")
    return compile()
kernel.compile = counted
print("called" if kernel.ctypes else "")
"""


def loaded(cache: Path | str, code: str = LOAD, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "RWKV_NPU_CACHE": str(cache), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return " ".join(out.split()), err


def test_compiled_kernels_are_cached(tmp_path: Path) -> None:
    """Two processes that start together compile a kernel once; a damaged file is compiled again."""
    both = [outcome(process) for process in (loaded(tmp_path), loaded(tmp_path))]
    assert sorted(out for out, _ in both) == ["called", "compiled called"]
    assert any("compiling a kernel for this processor: some seconds, this once" in err for _, err in both)
    assert outcome(loaded(tmp_path)) == ("called", "")
    for file in tmp_path.rglob("v4.run"):
        file.write_bytes(file.read_bytes()[:-100])
    assert outcome(loaded(tmp_path))[0] == "compiled called"
    assert outcome(loaded(tmp_path)) == ("called", "")


def test_several_cache_folders(tmp_path: Path) -> None:
    """Kernels are read from a read-only folder, but not kernels for another processor."""
    blocked, shipped = tmp_path / "a file", tmp_path / "shipped"
    blocked.write_bytes(b"")
    out, err = outcome(loaded(blocked))
    assert out == "compiled called" and "a file" in err and "RWKV_NPU_CACHE" in err and "kernels build" in err
    outcome(loaded(shipped))
    assert outcome(loaded(os.pathsep.join([str(blocked), str(shipped)]))) == ("called", "")
    out, _ = outcome(loaded(shipped, NUMBA_CPU_FEATURES="+"))
    assert out == "compiled called"
    assert len(list((shipped / "kernels").iterdir())) == 2


def test_kernels_build_fills_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from rwkv_npu.kernels import build

    names = {kernel.name for kernel in build.every_kernel()}
    generations = {f"{module}.run" for module in ("v4", "v5", "v6", "v7")}
    products = {
        f"linear.{kind}_{f}" for kind in ("gemv", "gemm") for f in ("int4", "int8", "fp16", "bf16", "fp32")
    }
    assert names >= {"pool.work", "sampling.choose"} | generations | products
    monkeypatch.setenv("RWKV_NPU_CACHE", str(tmp_path))
    monkeypatch.setattr(
        build, "every_kernel", lambda: [recurrence.kernel(make_spec("4", D=64, L=2, V=8)).run]
    )
    monkeypatch.setattr(recurrence.kernel(make_spec("4", D=64, L=2, V=8)).run, "_address", 0)
    status, out, err = run("kernels", "build", "--all")
    assert status == 0 and (Path(out.strip()) / "v4.run").exists() and "compiling a kernel" in err
    assert run("kernels", "build", "--all")[1:] == (out, "")


def test_the_cache_folder_depends_on_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv_npu.kernels import cache

    before = cache.key()
    package = Path(cache.__file__).parent.parent
    for name in ("kernels", "models", "quant"):
        shutil.copytree(package / name, tmp_path / name)
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "kernels" / "cache.py"))
    assert cache.key.__wrapped__() == before
    source = tmp_path / "kernels" / "common.py"
    source.write_bytes(source.read_bytes() + b"\n")
    assert cache.key.__wrapped__() != before


def test_without_numba_there_is_no_compiled_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert recurrence.compiled(make_spec("7", D=64, L=2, V=8)) is None
