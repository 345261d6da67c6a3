"""`rwkv-npu bench matmul`: the check, the clock, the machine, and every backend in its process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_npu.bench import backends, child, machine, measure, products
from rwkv_npu.bench.child import Failed
from rwkv_npu.bench.document import ProductRow
from rwkv_npu.bench.matmul import Measured, Series
from rwkv_npu.board.npu import Lock
from rwkv_npu.errors import BackendError
from tests.bench_rows import square

QUICK = products.Effort(repeats=3, precision=1.0, seconds=0.01)


# --- the check


def test_the_error_is_relative_to_the_largest_element() -> None:
    one = products.make_problem(33, 70, 20)
    exact = one.a.astype(float) @ one.b.astype(float)
    assert one.error(exact) == 0
    wrong = exact.copy()
    wrong[32, 3] += 0.25 * np.abs(exact).max()
    assert one.error(wrong) == pytest.approx(0.25)
    wrong[0, 0] = np.nan
    assert one.error(wrong) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        one.error(exact[:5])


def test_the_check_of_a_large_product_looks_at_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHECKED", 0)
    one = products.make_problem(64, 8, 8)
    wrong = one.a @ one.b
    wrong[63] += 10
    assert one.error(wrong) > 1


def test_problems_are_fixed_and_of_unit_variance() -> None:
    one, again = products.make_problem(64, 256, 64), products.make_problem(64, 256, 64)
    np.testing.assert_array_equal(one.b, again.b)
    assert 0.9 < np.std(one.a @ one.b) < 1.1


# --- timing


def test_stages_are_called_in_turn_and_the_submission_is_timed_apart() -> None:
    calls: list[str] = []
    stages = [
        lambda: calls.append("in"),
        lambda: (calls.append("run"), time.sleep(0.003)),
        lambda: calls.append("out"),
    ]
    found = products.time_calls(stages, 1, replace(QUICK, repeats=5))
    assert calls[:6] == ["in", "run", "out"] * 2 and len(calls) % 3 == 0
    assert found.repeats >= 5 and len(calls) // 3 > found.repeats  # warm-up is not counted
    assert found.submit is not None and found.error is not None
    assert found.p10 is not None and found.p90 is not None
    assert 0.003 <= found.submit <= found.median and found.p10 <= found.median <= found.p90


def test_repeats_go_on_until_the_median_is_known() -> None:
    effort = products.Effort(repeats=3, precision=1e-9, seconds=0.2)
    found = products.time_calls([lambda: time.sleep(0.002)], None, effort)
    assert found.repeats > 20 and found.submit is None
    few = products.time_calls(
        [lambda: time.sleep(0.002)], None, replace(effort, precision=10.0, seconds=0.05)
    )
    assert few.repeats < 15


def test_a_slow_call_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "STOP_S", 0.01)
    calls: list[int] = []
    found = products.time_calls([lambda: (calls.append(1), time.sleep(0.02))], None, QUICK)
    assert found.median > 0.01 and (len(calls), found.repeats, found.p10, found.error) == (1, 1, None, None)


def test_slow_calls_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LONG_S", 0.02)
    assert products.time_calls([lambda: time.sleep(0.01)], None, replace(QUICK, repeats=50)).repeats == 3


def test_the_error_of_a_median() -> None:
    rng = np.random.default_rng(0)
    medians = [np.median(rng.exponential(size=100)) for _ in range(2000)]
    errors = [products.median_error(rng.exponential(size=100)) for _ in range(2000)]
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.15)
    assert products.median_error([3.0]) == 0


# --- the machine


def test_clocks_and_governors(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1800000",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "performance",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "2400000",
        "sys/class/devfreq/dmc/cur_freq": "528000000",
        "sys/class/devfreq/fdab0000.npu/cur_freq": "200000000",
        "sys/class/devfreq/fdab0000.npu/governor": "rknpu_ondemand",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.clocks(tmp_path) == {
        "cpu_governor": "ondemand/performance",
        "cpu_mhz": "1800/2400",
        "ddr_mhz": 528,
        "npu_mhz": 200,
        "npu_governor": "rknpu_ondemand",
    }
    assert machine.clocks(tmp_path / "none") == {}


def test_the_machine_describes_itself() -> None:
    facts = machine.describe()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gb"] > 0
    assert json.loads(json.dumps(facts)) == facts


def test_flags_of_disturbed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"time": 0.0, "work": 0.0, "own": 0.0, "probe": 1.0, "clocks": {"cpu_mhz": "1800/2400"}}
    monkeypatch.setattr(machine.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(machine, "_busy_seconds", lambda: now["work"])
    monkeypatch.setattr(machine, "_own_seconds", lambda: now["own"])
    monkeypatch.setattr(machine, "probe", lambda: now["probe"])
    monkeypatch.setattr(machine, "clocks", lambda: now["clocks"])
    watch = machine.Watch()

    def after(**change: Any) -> str:
        watch.begin()
        now.update({"time": now["time"] + 10, "work": now["work"] + 20, "own": now["own"] + 20, **change})
        return watch.flags()

    assert after() == ""
    assert after(work=now["work"] + 25) == "busy"  # five seconds of ten were somebody else's
    assert after(clocks={"cpu_mhz": "1800/1200"}) == "throttled"
    assert after(probe=1.3) == "throttled"
    assert after(probe=0.7) == ""  # the best so far
    assert after(probe=0.9) == "throttled"


def test_peaks_take_the_fastest_row_of_each_dtype() -> None:
    rows = [square(64, gflops=80.0), square(64, gflops=900.0, dtype="bf16"), square(64, 1e-9, estimated=True)]
    assert machine.peaks({"peak_fp32_gflops": 100.0}, rows) == {"fp32": 100.0, "bf16": 900.0}
    assert machine.peaks({}, rows)["fp32"] == 80.0


def test_roofline_measures_bandwidth_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "PEAK_SIZE", 32)
    found = ask({"task": "roofline", "threads": 2})
    assert set(found) == {"bandwidth_gb_per_s", "peak_fp32_gflops"} and min(found.values()) > 0


# --- backends, each in its process


def test_blas_kernels_are_named_if_threadpoolctl_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.NumpyBackend("fp32", 1, "cpu").versions.endswith(" kernels)")
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert "kernels" not in backends.NumpyBackend("fp32", 1, "cpu").versions


@pytest.fixture(scope="session")
def opencl() -> None:
    """clang and an OpenCL that runs on the CPU: tinygrad needs both. Installed where they are missing."""
    look = "from tinygrad import Device; Device['CPU']; Device['CL']"
    works = [sys.executable, "-c", look]
    if subprocess.run(works, capture_output=True).returncode:
        assert shutil.which("apt-get"), (
            "install pocl and clang: these tests need them, and there is no apt-get here"
        )
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends"]
        install += ["pocl-opencl-icd", "ocl-icd-libopencl1", "clang"]
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        for words in (["apt-get", "update", "-q"], install):
            answer = subprocess.run([*prefix, *words], capture_output=True, text=True)
        assert answer.returncode == 0, f"{' '.join(install)}: {answer.stderr}"
        found = subprocess.run(works, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "worst", "sums", "version"),
    [
        ("numpy", "fp32", "cpu", 3e-6, "fp32", "numpy "),
        ("numpy", "fp16", "cpu", 3e-3, "fp32", "numpy "),
        ("torch", "fp32", "cpu", 3e-6, "fp32", "torch "),
        ("torch", "bf16", "cpu", 2e-2, "fp32", "torch "),
        ("torch", "fp16", "cpu", 3e-3, "fp32", "torch "),
        ("ort", "fp32", "cpu", 3e-6, "fp32", "onnxruntime "),
        ("ort", "int8", "cpu", 5e-2, "int32", "onnxruntime "),
        ("ort", "int4", "cpu", 0.3, "int32+fp32", "onnxruntime "),
    ],
)
def test_measured_rows(backend: str, dtype: str, device: str, worst: float, sums: str, version: str) -> None:
    check_series(Series(backend, dtype, device), worst, sums, version, "CPU (")


@pytest.mark.usefixtures("opencl")
@pytest.mark.parametrize(("device", "where"), [("cpu", "CPU ("), ("opencl", "OpenCL (")])
@pytest.mark.parametrize(("dtype", "worst"), [("fp32", 3e-6), ("fp16", 3e-3)])
def test_tinygrad(device: str, where: str, dtype: str, worst: float) -> None:
    row = check_series(Series("tinygrad", dtype, device), worst, "fp32", "tinygrad ", where)
    assert row.submit_s is not None and 0 < row.submit_s <= row.time_s  # type: ignore[operator]


def check_series(series: Series, worst: float, sums: str, version: str, where: str) -> ProductRow:
    """Time a product whose sizes are odd, and one of a single row."""
    opened = Measured(series, 1, QUICK)
    try:
        row, vector = opened.row((33, 96, 40)), opened.row((1, 64, 32))
    finally:
        opened.close()
    assert (row.backend, row.dtype, row.accumulate, row.size) == (
        series.backend,
        series.dtype,
        sums,
        (33, 96, 40),
    )
    assert row.series == series.name and row.device.startswith(where) and row.versions.startswith(version)
    assert row.threads == 1 and not row.estimated and row.failed is None and row.repeats >= 3
    for one in (row, vector):
        assert (
            one.time_s
            and one.time_p10_s
            and one.time_p90_s
            and one.overhead_s
            and one.gflops
            and one.gb_per_s
        )
        assert one.time_p10_s <= one.time_s <= one.time_p90_s
        assert one.max_rel_error is not None and one.max_rel_error < worst
        assert one.gflops == pytest.approx(one.work / one.time_s / 1e9)
    # The dtype is really the one that was asked for: rounding to it shows.
    exact = {"fp32": 0.0, "fp16": 1e-4, "bf16": 1e-3, "int8": 1e-3, "int4": 1e-2}[series.dtype]
    assert row.max_rel_error is not None and row.max_rel_error >= exact
    return row


def test_int8_does_not_saturate_on_any_processor() -> None:
    """All operands at the largest magnitude: sums of two products would pass int16 with 8 bits of B."""
    a, b = np.ones((3, 64), np.float32), np.ones((64, 16), np.float32)
    b[:, ::2] *= -1
    largest = products.Problem(3, 64, 16, a, b)
    operation = backends.OrtBackend("int8", 1, "cpu").prepare(largest)
    for stage in operation.stages:
        stage()
    assert largest.error(operation.result()) < 1e-6


def test_moved_bytes_are_those_of_the_operands() -> None:
    for dtype, bytes_of_b in (("int8", 1.0), ("fp32", 4.0)):
        opened = Measured(Series("ort", dtype), 1, QUICK)
        try:
            row = opened.row((2, 64, 96))
        finally:
            opened.close()
        assert row.gb_per_s and row.time_s
        expected = 4 * 2 * 64 + bytes_of_b * 64 * 96 + 4 * 2 * 96
        assert row.gb_per_s * row.time_s * 1e9 == pytest.approx(expected)


def test_too_large_for_memory() -> None:
    opened = Measured(Series("numpy", "fp32"), 1, QUICK)
    try:
        with pytest.raises(
            Failed, match="not enough memory: about [0-9.]+ GB are needed, but [0-9.]+ GB are free"
        ) as caught:
            opened.row((1 << 20, 1 << 20, 1 << 20))
        assert caught.value.fatal
        assert opened.row((4, 4, 4)).failed is None
        blank = opened.blank((8, 8, 8), "because")
        assert (blank.failed, blank.time_s, blank.series) == ("because", None, "numpy fp32")
    finally:
        opened.close()


def test_a_process_that_dies() -> None:
    opened = Measured(Series("numpy", "fp32"), 1, QUICK)
    os.kill(opened._child._process.pid, signal.SIGKILL)
    with pytest.raises(Failed, match="killed, most likely for lack of memory") as caught:
        opened.row((4, 4, 4))
    assert caught.value.fatal
    opened.close()
    opened.close()


def test_a_process_that_crashes() -> None:
    opened = Measured(Series("numpy", "fp32"), 1, QUICK)
    process = opened._child._process
    assert process.stdin is not None
    process.stdin.write("this is not JSON\n")
    with pytest.raises(Failed, match="exited with status 1: json"):
        opened.row((4, 4, 4))
    opened.close()


def test_a_process_ends_with_its_parent() -> None:
    code = """
import time
from rwkv_npu.bench.child import Child
child = Child(1)
print(child._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Faulty:
    """A backend that fails in the way that the number of rows selects."""

    dtype, device, accumulate, versions = "fp32", "CPU (x)", "fp32", "faulty 1"

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        if dtype == "missing":
            raise ModuleNotFoundError("No module named 'faulty'")

    def prepare(self, one: products.Problem) -> Any:
        from rwkv_npu.bench.backends import Operation

        errors = {
            5: RuntimeError("first line\nsecond line"),
            6: MemoryError(),
            7: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        }
        if one.m in errors:
            raise errors[one.m]
        return Operation([lambda: None], lambda: one.a @ one.b, 1.0)


def test_answers_of_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "faulty", Faulty)
    effort = {"repeats": 1, "precision": 1.0, "seconds": 0.0}
    request = {"backend": "faulty", "dtype": "fp32", "device": "cpu", "threads": 1, "effort": effort}
    reply = ask({**request, "task": "open", "dtype": "missing"})
    assert reply == {"failed": "not installed: No module named 'faulty'", "fatal": True}
    assert ask({**request, "task": "open"})["versions"] == "faulty 1"
    for m, failed, fatal in (
        (5, "first line", False),
        (6, "not enough memory: MemoryError", True),
        (7, "not enough memory: DefaultCPUAllocator", True),
    ):
        reply = ask({"task": "product", "shape": [m, 3, 3]})
        assert reply["failed"].startswith(failed) and reply["fatal"] is fatal
    reply = ask({"task": "product", "shape": [4, 3, 3]})
    assert "failed" not in reply and reply["m"] == 4


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Run a task in this process. Returns its fields, or its failure."""
    messages: list[dict[str, Any]] = []
    child.answer(request, messages.append)
    found = {}
    for message in messages:
        found |= message.get("fields", {name: value for name, value in message.items() if name != "done"})
    return found


# --- the board, with a stand-in for RKNNLite


class FakeLite:
    """The part of RKNNLite that is used. code: the return code of rknn_run."""

    NPU_CORE_0 = 1
    code: Any = 0
    released = 0

    def load_rknn(self, path: str) -> int:
        self.text = Path(path).read_text()
        return 0

    def init_runtime(self, core_mask: int) -> int:
        assert core_mask == 1
        self.rknn_runtime = self
        return 0

    def set_inputs(self, inputs: list[np.ndarray], data_type: None, data_format: None) -> None:
        self.a = inputs[0]

    def run(self, get_frame_id: bool) -> Any:
        return type(self).code

    def get_outputs(self, get_frame_id: bool) -> list[np.ndarray]:
        return [self.a @ PRODUCT.b]

    def release(self) -> None:
        type(self).released += 1


PRODUCT = products.make_problem(4, 32, 16)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "LOCK", Lock(tmp_path))  # which the backends keep
    api = types.ModuleType("rknnlite.api")
    api.RKNNLite = FakeLite  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rknnlite", types.ModuleType("rknnlite"))
    monkeypatch.setitem(sys.modules, "rknnlite.api", api)
    monkeypatch.setattr(backends, "soc", lambda: "rk3588")
    monkeypatch.setattr(backends, "require", lambda: types.SimpleNamespace(version="2.5.0"))

    def compile_product(*_: Any, out: Path, **__: Any) -> Any:
        out.write_text("compiled")
        return types.SimpleNamespace(layers=[types.SimpleNamespace(total_cycles=c) for c in (0, 5, 7)])

    monkeypatch.setattr(backends, "compile_product", compile_product)
    monkeypatch.setattr(FakeLite, "code", 0)
    yield


@pytest.mark.usefixtures("board")
def test_a_board_is_measured() -> None:
    backend = backends.RknnBackend("fp16", 1, "cpu")
    assert backend.device == "RK3588 NPU, core 0" and backend.versions.startswith(
        "rknn-toolkit2 2.5.0, librknnrt "
    )
    operation = backend.prepare(PRODUCT)
    found = products.time_calls(operation.stages, operation.submit, QUICK)
    assert found.submit is not None and operation.npu_ops == 2
    assert PRODUCT.error(operation.result()) < 1e-6
    assert operation.moved_bytes == 2 * (4 * 32 + 32 * 16 + 4 * 16)
    operation.close()
    assert FakeLite.released == 1


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize("code", [-3, (-3, 0)])
def test_a_failed_run_on_a_board_is_an_error(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLite, "code", code)
    operation = backends.RknnBackend("fp16", 1, "cpu").prepare(PRODUCT)
    with pytest.raises(BackendError, match="rknn_run returned -3"):
        products.time_calls(operation.stages, operation.submit, QUICK)


def test_a_disturbed_timing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "faulty", Faulty)
    effort = {"repeats": 1, "precision": 1.0, "seconds": 0.0}
    server = measure.ProductServer(
        {"backend": "faulty", "dtype": "fp32", "device": "cpu", "threads": 1, "effort": effort}
    )
    times: list[float] = []
    monkeypatch.setattr(
        measure, "time_calls", lambda *_: products.Timing(times.pop(0), 1.0, 1.0, 0.1, 5, None)
    )
    flags: list[str] = []
    monkeypatch.setattr(server.watch, "flags", lambda: flags.pop(0))
    times[:], flags[:] = [3.0, 5.0, 1.0], ["busy", "throttled", ""]
    # An undisturbed one counts, whatever it says.
    assert (server.time((2, 2, 2))["time_s"], flags) == (5.0, [""])
    times[:], flags[:] = [3.0, 2.0, 4.0, 1.0], ["busy", "busy throttled", "busy", ""]
    row = server.time((2, 2, 2))
    assert (row["time_s"], row["flags"], flags) == (2.0, "busy throttled", [""])
    monkeypatch.setattr(measure, "PATIENCE_S", -1.0)
    times[:], flags[:] = [3.0, 2.0], ["busy", ""]
    assert server.time((2, 2, 2))["time_s"] == 3.0
