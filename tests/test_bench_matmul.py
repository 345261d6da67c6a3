"""`rwkv-npu bench matmul`: sweeps, honest timing, fits, pictures. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import csv
import io
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

from rwkv_npu.bench import (
    child,
    crossover,
    fit,
    machine,
    matmul,
    plot,
    problem,
    record,
    report,
    rknn,
    roofline,
    shapes,
    steps,
    timing,
)
from rwkv_npu.bench.record import Row
from rwkv_npu.bench.series import Failed, Measured, Series
from rwkv_npu.commands import bench as command_module
from rwkv_npu.errors import BackendError, ToolkitError, UsageError
from tests.tiny import command, one_line, run_main
from tools import make_checkpoint

QUICK = timing.Effort(repeats=3, precision=1.0, seconds=0.01)


def square(n: int, seconds: float | None = None, **fields: Any) -> Row:
    """A row of an invented series, as fast as 1 GFLOP/s unless told otherwise."""
    seconds = 2e-9 * n**3 if seconds is None else seconds
    common = {"backend": "numpy", "device": "CPU (x)", "dtype": "fp32", "accumulate": "fp32", "threads": 2}
    spread = {"time_p10_s": 0.9 * seconds, "time_p90_s": 1.2 * seconds, "time_error_s": 0.01 * seconds}
    rates = record.with_rates({"time_s": seconds, "m": n, "k": n, "n": n}, 12 * n * n)
    return Row(**{**common, **spread, **rates, "repeats": 9, **fields})


def estimate(n: int, seconds: float | None = None) -> Row:
    where = {
        "backend": "rknn",
        "device": "RK3588: estimate",
        "dtype": "fp16",
        "estimated": True,
        "threads": None,
    }
    return square(n, seconds, **where, time_p10_s=None, time_p90_s=None, time_error_s=None, repeats=0)


# --- what to multiply


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("128:512:128", [128, 256, 384, 512]),
        ("64", [64]),
        ("512, 64,64", [64, 512]),
        ("3:5", [3, 4, 5]),
        ("10:20:7,1", [1, 10, 17]),
    ],
)
def test_sizes(text: str, sizes: list[int]) -> None:
    assert shapes.parse_sizes(text) == [(n, n, n) for n in sizes]


def test_the_default_sweep_has_32_sizes() -> None:
    sizes = shapes.parse_sizes(shapes.DEFAULT_SIZES)
    assert len(sizes) == 32 and sizes[0] == (128,) * 3 and sizes[-1] == (4096,) * 3


def test_shapes_come_in_order_of_work() -> None:
    assert shapes.parse_shapes("16x2048x8192,1x4x4,16x2048x8192") == [(1, 4, 4), (16, 2048, 8192)]


@pytest.mark.parametrize("text", ["", "0", "a", "5:1", "1:5:0", "1:2:3:4", "-4", "4096:99999999:1", "1.5"])
def test_senseless_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--sizes"):
        shapes.parse_sizes(text)


@pytest.mark.parametrize("text", ["", "4x4", "4x4x0", "axbxc", "1x2x3x4", "1x2x99999999"])
def test_senseless_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="--shapes"):
        shapes.parse_shapes(text)


def test_official_sizes_are_those_of_the_checkpoints() -> None:
    assert shapes.OFFICIAL.keys() == make_checkpoint.SIZES.keys()
    for name, size in make_checkpoint.SIZES.items():
        assert shapes.official_spec(name) == make_checkpoint.make_spec(**size), name


def test_shapes_of_a_model(tmp_path: Path) -> None:
    found = shapes.model_shapes("v7-1.5b")
    assert {(M, 2048, 8192) for M in (1, 16, 64, 128)} | {(1, 2048, 65536), (64, 2048, 96)} <= set(found)
    assert (16, 2048, 65536) not in found
    with pytest.raises(UsageError, match="neither a bundle nor one of v4-169m"):
        shapes.model_shapes(str(tmp_path))


# --- the check


def test_the_error_is_relative_to_the_largest_element() -> None:
    one = problem.make_problem(33, 70, 20)
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
    monkeypatch.setattr(problem, "CHECKED", 0)
    one = problem.make_problem(64, 8, 8)
    wrong = one.a @ one.b
    wrong[63] += 10
    assert one.error(wrong) > 1


def test_problems_are_fixed_and_of_unit_variance() -> None:
    one, again = problem.make_problem(64, 256, 64), problem.make_problem(64, 256, 64)
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
    found = timing.time_calls(stages, 1, replace(QUICK, repeats=5))
    assert calls[:6] == ["in", "run", "out"] * 2 and len(calls) % 3 == 0
    assert found.repeats >= 5 and len(calls) // 3 > found.repeats  # warm-up is not counted
    assert found.submit is not None and found.error is not None
    assert found.p10 is not None and found.p90 is not None
    assert 0.003 <= found.submit <= found.median and found.p10 <= found.median <= found.p90


def test_repeats_go_on_until_the_median_is_known() -> None:
    effort = timing.Effort(repeats=3, precision=1e-9, seconds=0.2)
    found = timing.time_calls([lambda: time.sleep(0.002)], None, effort)
    assert found.repeats > 20 and found.submit is None
    few = timing.time_calls([lambda: time.sleep(0.002)], None, replace(effort, precision=10.0, seconds=0.05))
    assert few.repeats < 15


def test_a_slow_call_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "STOP_S", 0.01)
    calls: list[int] = []
    found = timing.time_calls([lambda: (calls.append(1), time.sleep(0.02))], None, QUICK)
    assert found.median > 0.01 and (len(calls), found.repeats, found.p10, found.error) == (1, 1, None, None)


def test_the_error_of_a_median() -> None:
    rng = np.random.default_rng(0)
    medians = [np.median(rng.exponential(size=100)) for _ in range(2000)]
    errors = [timing.median_error(rng.exponential(size=100)) for _ in range(2000)]
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.15)
    assert timing.median_error([3.0]) == 0


# --- the machine


def test_clocks_and_governors(tmp_path: Path) -> None:
    files = {
        "devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand",
        "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1800000",
        "devices/system/cpu/cpufreq/policy4/scaling_governor": "performance",
        "devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "2400000",
        "class/devfreq/dmc/cur_freq": "528000000",
        "class/devfreq/fdab0000.npu/cur_freq": "200000000",
        "class/devfreq/fdab0000.npu/governor": "rknpu_ondemand",
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


def test_a_board_is_known_by_its_device_tree(tmp_path: Path) -> None:
    tree = tmp_path / "compatible"
    assert machine.board(tree) is None
    tree.write_bytes(b"radxa,rock-5b\0rockchip,rk3588\0")
    assert machine.board(tree) == "rk3588"
    tree.write_bytes(b"raspberrypi,4\0")
    assert machine.board(tree) is None


def test_the_machine_describes_itself() -> None:
    facts = machine.describe()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gb"] > 0
    assert json.loads(json.dumps(facts)) == facts


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert after(probe=0.7) == ""
    assert after(probe=0.9) == "throttled"


def test_the_roof() -> None:
    rows = [square(64, gflops=80.0), square(64, gflops=900.0, dtype="bf16"), square(64, 1e-9, estimated=True)]
    assert roofline.peaks({"peak_fp32_gflops": 100.0}, rows) == {"fp32": 100.0, "bf16": 900.0}
    assert roofline.peaks({}, rows)["fp32"] == 80.0


# --- backends, each in its process


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


def check_series(series: Series, worst: float, sums: str, version: str, where: str) -> Row:
    """Times a product of a shape that divides by nothing; a row vector too."""
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


def test_bytes_are_those_of_the_operands() -> None:
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
            Failed, match="not enough memory: about [0-9.]+ GB are needed, [0-9.]+ GB are free"
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
from rwkv_npu.bench.series import Child
import time
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
    """A backend that fails as told by the number of rows."""

    dtype, device, accumulate, versions = "fp32", "CPU (x)", "fp32", "faulty 1"

    def __init__(self, dtype: str, threads: int, device: str) -> None:
        if dtype == "missing":
            raise ModuleNotFoundError("No module named 'faulty'")

    def prepare(self, one: problem.Problem) -> Any:
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
    monkeypatch.setitem(child.BACKENDS, "faulty", Faulty)
    effort = {"repeats": 1, "precision": 1.0, "seconds": 0.0}
    request = {"backend": "faulty", "dtype": "fp32", "device": "cpu", "threads": 1, "effort": effort}
    _, reply = child.answer(None, {**request, "dtype": "missing"})
    assert reply == {"failed": "not installed: No module named 'faulty'", "fatal": True}
    server, reply = child.answer(None, request)
    assert server is not None and reply["versions"] == "faulty 1"
    for m, failed, fatal in (
        (5, "first line", False),
        (6, "not enough memory: MemoryError", True),
        (7, "not enough memory: DefaultCPUAllocator", True),
    ):
        _, reply = child.answer(server, {"shape": [m, 3, 3]})
        assert reply["failed"].startswith(failed) and reply["fatal"] is fatal
    _, reply = child.answer(server, {"shape": [4, 3, 3]})
    assert "failed" not in reply and reply["m"] == 4


# --- the board, with a stand-in for RKNNLite


class FakeLite:
    """RKNNLite as far as it is used; `code` is what rknn_run returns."""

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


PRODUCT = problem.make_problem(4, 32, 16)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    api = types.ModuleType("rknnlite.api")
    api.RKNNLite = FakeLite  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rknnlite", types.ModuleType("rknnlite"))
    monkeypatch.setitem(sys.modules, "rknnlite.api", api)
    monkeypatch.setattr(machine, "board", lambda: "rk3588")
    monkeypatch.setattr(rknn, "require", lambda: types.SimpleNamespace(version="2.5.0"))

    def compile_product(*_: Any, out: Path, **__: Any) -> Any:
        out.write_text("compiled")
        return types.SimpleNamespace(layers=[types.SimpleNamespace(total_cycles=c) for c in (0, 5, 7)])

    monkeypatch.setattr(rknn, "compile_product", compile_product)
    monkeypatch.setattr(FakeLite, "code", 0)
    yield


@pytest.mark.usefixtures("board")
def test_a_board_is_measured() -> None:
    backend = rknn.RknnBackend("fp16", 1, "cpu")
    assert backend.device == "RK3588 NPU, core 0" and backend.versions == "rknn-toolkit2 2.5.0"
    operation = backend.prepare(PRODUCT)
    found = timing.time_calls(operation.stages, operation.submit, QUICK)
    assert found.submit is not None and operation.npu_ops == 2
    assert PRODUCT.error(operation.result()) < 1e-6
    assert operation.moved_bytes == 2 * (4 * 32 + 32 * 16 + 4 * 16)
    operation.close()
    assert FakeLite.released == 1


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize("code", [-3, (-3, 0)])
def test_a_run_that_fails_on_a_board(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLite, "code", code)
    operation = rknn.RknnBackend("fp16", 1, "cpu").prepare(PRODUCT)
    with pytest.raises(BackendError, match="rknn_run returned -3"):
        timing.time_calls(operation.stages, operation.submit, QUICK)


@pytest.mark.usefixtures("board")
def test_on_a_board_rknn_is_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.importlib.util, "find_spec", lambda name: name == "rknnlite")
    said: list[str] = []
    found = matmul.plan(matmul.Settings([(1, 1, 1)], ["rknn", "rknn-matmul"], say=said.append))
    assert found == [Series("rknn", "fp16")] and found[0].name == "rknn fp16"
    assert said == ["rknn-matmul has no driver for the C matmul API in this version"]


# --- the sweep


class Scripted:
    """An open series whose rows come from a table: seconds by N, or a Failed."""

    def __init__(self, series: Series, script: dict[int, Any], log: list[str]) -> None:
        self.series, self.script, self.log = series, script, log

    def row(self, shape: shapes.Shape) -> Row:
        self.log.append(f"{self.series.name} {shape[0]}")
        answer = self.script.get(shape[0], 1e-3)
        if isinstance(answer, BaseException):
            raise answer
        flags = answer if isinstance(answer, str) else ""
        seconds = 1e-3 if flags else answer
        make = estimate if self.series.estimated else square
        return replace(
            make(shape[0], seconds), backend=self.series.backend, dtype=self.series.dtype, flags=flags
        )

    def blank(self, shape: shapes.Shape, reason: str) -> Row:
        return replace(self.row((0, 0, 0)), m=shape[0], k=shape[1], n=shape[2], time_s=None, failed=reason)

    def close(self) -> None:
        self.log.append(f"{self.series.name} closed")


class Stage:
    """A sweep over scripted series, with what it said and did."""

    def __init__(self, scripts: dict[str, Any], file: Path | None = None, **settings: Any) -> None:
        self.said: list[str] = []
        self.log: list[str] = []

        def open_series(series: Series, threads: int, effort: timing.Effort) -> Any:
            script = scripts.get(series.backend, {})
            if isinstance(script, Exception):
                raise script
            return Scripted(series, script, self.log)

        common = {
            "shapes": [(n, n, n) for n in (8, 16, 24)],
            "backends": list(scripts),
            "dtypes": None,
            "threads": 2,
        }
        self.settings = matmul.Settings(
            **{**common, "file": file, "say": self.said.append, "open": open_series, **settings}
        )
        self.sweep = matmul.Sweep(self.settings)

    def run(self) -> list[Row]:
        self.steps = list(self.sweep.run())
        return self.sweep.document.results


@pytest.fixture(autouse=True)
def no_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        matmul, "roofline", lambda threads: {"bandwidth_gb_per_s": 20.0, "peak_fp32_gflops": 50.0}
    )


def test_a_backend_that_fails_in_the_middle() -> None:
    stage = Stage({"numpy": {16: Failed("it broke", False)}, "ort": {}})
    rows = stage.run()
    assert [(row.backend, row.n, row.failed) for row in rows] == [
        ("numpy", 8, None),
        ("numpy", 16, "it broke"),
        ("numpy", 24, None),
        *(("ort", n, None) for n in (8, 16, 24)),
    ]
    assert stage.said == ["numpy fp32 failed at 16x16x16: it broke"] == stage.sweep.document.notes
    assert sum(count for _, count, _ in stage.steps) == stage.sweep.total == 6


def test_what_fails_for_good_ends_its_series() -> None:
    stage = Stage({"numpy": {16: Failed("not enough memory", True)}, "ort": {}})
    assert [(row.backend, row.n) for row in stage.run()] == [
        ("numpy", 8),
        ("numpy", 16),
        *(("ort", n) for n in (8, 16, 24)),
    ]
    assert "numpy fp32 closed" in stage.log


def test_a_missing_backend_is_one_line() -> None:
    stage = Stage(
        {"torch": BackendError("not installed: No module named 'torch'"), "rknn": ToolkitError("run x")}
    )
    assert stage.run() == []
    assert stage.said[0] == "torch fp32 is left out: not installed: No module named 'torch'"
    assert stage.said[-1] == "rknn fp16 (estimate) is left out: run x"


def test_a_series_ends_after_a_run_of_20_seconds() -> None:
    stage = Stage({"numpy": {16: 21.0}, "rknn": {8: 30.0}})
    assert [(row.backend, row.n) for row in stage.run()] == [
        ("numpy", 8),
        ("numpy", 16),
        *(("rknn", n) for n in (8, 16, 24)),
    ]
    assert stage.said == ["numpy fp32 ends at 16x16x16: a run took 21 s"]


def test_resuming(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first = Stage({"numpy": {8: "busy", 16: Failed("it broke", False), 24: KeyboardInterrupt()}}, file)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.log[-1] == "numpy fp32 closed"
    kept = record.load(file)
    assert [row.n for row in kept.results] == [8, 16] and kept.machine["bandwidth_gb_per_s"] == 20.0
    second = Stage({"numpy": {}, "ort": {}}, file)
    rows = second.run()
    assert second.log == [
        *("numpy fp32 16", "numpy fp32 24", "numpy fp32 closed"),
        *(f"ort fp32 {n}" for n in (8, 16, 24)),
        "ort fp32 closed",
    ]
    assert [row.n for row in rows if row.backend == "numpy"] == [8, 16, 24] and all(
        not row.failed for row in rows
    )
    assert sum(count for _, count, _ in second.steps) == second.sweep.total
    third = Stage({"numpy": {}}, file, redo=True)
    assert len(third.run()) == 6 and third.log == ["numpy fp32 8", "numpy fp32 closed"]
    assert record.load(file).results == third.sweep.document.results
    assert all(not row.flags for row in third.sweep.document.results)


def test_a_series_that_was_too_slow_is_not_resumed(tmp_path: Path) -> None:
    Stage({"numpy": {16: 21.0}}, tmp_path / "rows.json").run()
    again = Stage({"numpy": {}}, tmp_path / "rows.json")
    again.run()
    assert again.log == []


def test_resuming_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stage({"numpy": {}}, tmp_path / "rows.json").run()
    with pytest.raises(UsageError, match="with 2 threads, not 1: name another file, or give -t 2"):
        Stage({"numpy": {}}, tmp_path / "rows.json", threads=1)
    monkeypatch.setattr(machine, "cpu_model", lambda: "another")
    with pytest.raises(UsageError, match="on another machine .cpu: .*here: another.: name another file"):
        Stage({"numpy": {}}, tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not hold results"),
        ("[]", "does not hold results"),
        ('{"format": 7, "results": [], "machine": {}}', "format 7; this version reads 1"),
        ('{"format": 1, "command": "", "machine": {}, "results": [{"m": 1}]}', "does not hold results"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        Stage({"numpy": {}}, tmp_path / "rows.json")
    assert (tmp_path / "rows.json").read_text() == content


def test_the_plan() -> None:
    said: list[str] = []
    settings = matmul.Settings([(1, 1, 1)], say=said.append)
    names = [series.name for series in matmul.plan(settings)]
    assert (
        names == ["numpy fp32", "torch fp32", "torch bf16", "ort fp32", "rknn fp16 (estimate)"] and not said
    )
    settings = replace(
        settings, backends=["numpy", "tinygrad", "rknn-matmul", "rknn"], dtypes=["fp16", "int4"]
    )
    names = [series.name for series in matmul.plan(settings)]
    assert names == ["numpy fp16", "tinygrad fp16", "tinygrad OpenCL fp16", "rknn fp16 (estimate)"]
    assert said == ["rknn-matmul needs a board"]
    matmul.plan(replace(settings, backends=["numpy"], dtypes=["int4"]))
    assert said[-1] == "numpy does none of these dtypes: it does fp32, fp16"


# --- tables, crossovers, steps


def test_estimates_are_marked_everywhere() -> None:
    document = record.Document({"cpu": "x"}, "rwkv-npu bench matmul", [square(64), estimate(64)])
    table = report.table(document)
    (line,) = [line for line in table.splitlines() if line.startswith("| rknn")]
    assert "rknn (estimate)" in line and "~" in line and "An estimate, not a measurement" in table
    (line,) = [line for line in table.splitlines() if line.startswith("| numpy")]
    assert "~" not in line and "- command: `rwkv-npu bench matmul`" in table
    assert [row["estimated"] for row in json.loads(document.to_json())["results"]] == [False, True]
    parsed = list(csv.DictReader(io.StringIO(report.as_csv(document.results))))
    assert [row["estimated"] for row in parsed] == ["False", "True"]


def test_the_fields_that_were_promised() -> None:
    promised = "backend device dtype m k n time_s time_p10_s time_p90_s gflops gb_per_s"
    promised += " max_rel_error estimated threads versions"
    (row,) = json.loads(record.Document({}, "", [square(8)]).to_json())["results"]
    assert set(promised.split()) <= row.keys()
    assert all(not isinstance(value, (list, dict)) for value in row.values())


def test_failures_are_in_the_table() -> None:
    rows = [square(8), replace(square(16), time_s=None, gflops=None, gb_per_s=None, failed="it broke")]
    table = report.table(record.Document({}, "", rows))
    assert "- failed: numpy fp32 16x16x16: it broke" in table and "16x16x16 |" not in table


def test_crossovers() -> None:
    sizes = (100, 200, 400, 800)
    rows = [square(n, 1e-6 * n) for n in sizes]
    rows += [square(n, 1e-6 * n**2 / 300, backend="ort") for n in sizes]  # equal at 300
    rows += [estimate(n, 1e-6 * n / 2) for n in sizes]
    found = {(one.winner, one.loser): one for one in crossover.crossovers(rows)}
    one = found["numpy fp32", "ort fp32"]
    assert one.size == pytest.approx(300) and one.time_s == pytest.approx(3e-4) and not one.estimated
    assert found["rknn fp16 (estimate)", "ort fp32"].size == pytest.approx(150)
    assert found["rknn fp16 (estimate)", "ort fp32"].estimated
    assert len(found) == 2
    (line,) = crossover.describe([one], [])
    assert line == "numpy fp32 is faster than ort fp32 from N = 300 on (0.3 ms)"
    assert crossover.describe([], ["a", "b"]) == ["no crossovers among a, b"]


def test_the_last_change_of_the_lead_counts() -> None:
    rows = [square(n, 1.0) for n in (100, 200, 400, 800)]
    rows += [square(n, t, backend="ort") for n, t in ((100, 0.5), (200, 2.0), (400, 2.0), (800, 0.5))]
    (one,) = crossover.crossovers(rows)
    assert one.winner == "ort fp32" and 400 < one.size < 800


def test_steps_and_spikes() -> None:
    rng = np.random.default_rng(0)
    n = np.arange(128, 4097, 128)
    t = 1e-11 * n**3 * np.exp(0.005 * rng.standard_normal(len(n)))
    assert (
        steps.find_steps([square(int(a), b, time_error_s=0.005 * b) for a, b in zip(n, t, strict=True)]) == []
    )
    t[n >= 1024] *= 1.3
    t[n == 2048] *= 1.5
    step, spike = steps.find_steps(
        [square(int(a), b, time_error_s=0.005 * b) for a, b in zip(n, t, strict=True)]
    )
    assert (step.kind, step.before, step.after) == ("step", 896, 1024) and step.factor == pytest.approx(
        1.3, abs=0.03
    )
    assert (spike.kind, spike.before) == ("spike", 2048) and spike.factor == pytest.approx(1.5, abs=0.05)
    assert "from N = 896 to 1024 the time grows 1.3" in steps.describe(step)
    assert "N = 2048 takes 1.5" in steps.describe(spike)


# --- fits

SIZES = np.arange(128, 4097, 128)


def rows_of(t: np.ndarray, error: float = 0.0, **fields: Any) -> list[Row]:
    return [square(int(n), float(s), time_error_s=error * s, **fields) for n, s in zip(SIZES, t, strict=True)]


def test_the_fit_finds_a_power_law() -> None:
    rng = np.random.default_rng(1)
    t = (0.02 * (SIZES / 1024) ** 2.9 + 3e-5) * np.exp(0.02 * rng.standard_normal(len(SIZES)))
    found = {(one.model, one.weights): one for one in fit.fit_all(rows_of(t))}
    power, exponential = found["power", "repeats"], found["exponential", "repeats"]
    for name, value in (("a", 0.02), ("b", 2.9), ("t0", 3e-5)):
        assert abs(power.parameters[name] - value) < 4 * power.errors[name]
    assert (
        power.valid
        and 0.4 < power.reduced < 1.8
        and power.ndf == 29
        and power.edm < 1e-3
        and power.calls > 10
    )
    assert exponential.ndf == 30 and exponential.reduced > 100 and exponential.aic > power.aic + 1000
    equal = found["power", "equal"]
    assert equal.aic < found["exponential", "equal"].aic and equal.parameters["b"] == pytest.approx(
        2.9, abs=0.3
    )


def test_the_fit_finds_the_article_in_its_own_curve() -> None:
    t = fit.ARTICLE.time(SIZES.astype(float))
    noise = np.sqrt(fit.ARTICLE.chi2 / fit.ARTICLE.ndf)
    t = t + noise * np.random.default_rng(2).standard_normal(len(t))
    n = SIZES.astype(float)
    one = fit.fit("x", "exponential", "equal", n, t, np.ones_like(t))
    for name, value, error in (("c", -2.98728, 0.0811982), ("s", 0.000918918, 2.29814e-05)):
        assert abs(one.parameters[name] - value) < 4 * error
        assert one.scale * one.errors[name] == pytest.approx(error, rel=0.4)  # as ROOT gave them
    assert one.chi2 == pytest.approx(fit.ARTICLE.chi2, rel=0.5)


def test_errors_do_not_depend_on_the_unit() -> None:
    n = SIZES.astype(float)
    t = 0.01 * (n / 1024) ** 3 + 1e-4 * np.sin(n)
    seconds = fit.fit("x", "power", "equal", n, t, np.ones_like(t))
    thousands = fit.fit("x", "power", "equal", n, 1e3 * t, np.ones_like(t))
    assert thousands.chi2 == pytest.approx(1e6 * seconds.chi2, rel=1e-3)
    for name, factor in (("a", 1e3), ("b", 1.0)):
        assert thousands.parameters[name] == pytest.approx(factor * seconds.parameters[name], rel=1e-3)
        scaled = [one.scale * one.errors[name] for one in (seconds, thousands)]
        assert scaled[1] == pytest.approx(factor * scaled[0], rel=1e-2)


def test_a_cubic_passes_for_the_article() -> None:
    n = np.arange(256, 4097, 128).astype(float)
    twin = fit.cubic_twin(n)
    one = fit.fit("x", "exponential", "equal", n, twin.a * n**3 + twin.t0, np.ones_like(n))
    assert one.parameters["c"] == pytest.approx(fit.ARTICLE.constant, abs=1e-4)
    assert one.parameters["s"] == pytest.approx(fit.ARTICLE.slope, rel=1e-4)
    assert one.chi2 == pytest.approx(twin.chi2, rel=1e-4) and twin.chi2 < fit.ARTICLE.chi2
    assert one.scale * one.errors["s"] == pytest.approx(twin.slope_error, rel=1e-2)


def test_the_fit_log() -> None:
    rows = rows_of(1e-11 * SIZES.astype(float) ** 3 + 1e-5, 0.01)
    log = report.fit_log(fit.fit_all(rows))
    for words in (
        "chi2 ",
        "NDf 29",
        "EDM",
        "calls",
        "AIC",
        "| numpy fp32 | repeats |",
        "Constant -2.98728 +/- 0.0811982, Slope 0.000918918",
        "No unit",
        "31 points",
        "Exponential against cubic",
    ):
        assert words in log
    assert "NOT CONVERGED" not in log


def test_few_points_are_not_fitted() -> None:
    assert fit.fit_all([square(n) for n in (8, 16, 24, 32, 40)]) == []


# --- pictures


def many_rows() -> list[Row]:
    sizes = SIZES.astype(float)
    rows = rows_of(2e-11 * sizes**3, 0.01) + rows_of(1e-12 * sizes**3.2, 0.01, backend="torch")
    return rows + [estimate(int(n), 3e-4 + 1e-12 * n**3) for n in sizes]


DRAWN = ("time", "roofline", "bars", "fit")


def test_pictures(tmp_path: Path) -> None:
    rows = many_rows()
    facts = {"cpu": "A & B <C>", "cores": 2, "bandwidth_gb_per_s": 30.0, "peak_fp32_gflops": 90.0}
    document = record.Document(facts, "", rows)
    paths = plot.draw(document, tmp_path / "a.svg", fit.fit_all(rows), bars=[500, 4000])
    assert [path.name for path in paths] == [f"a-{name}.svg" for name in DRAWN]
    assert "estimate" in paths[0].name or all(path.stat().st_size > 5000 for path in paths)
    again = [path.read_bytes() for path in paths]
    assert [
        p.read_bytes() for p in plot.draw(document, tmp_path / "a.svg", fit.fit_all(rows), [500, 4000])
    ] == again


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_what_the_pictures_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    said: dict[str, str] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: said.update({path.stem[2:]: texts(self)}))
    rows = many_rows()
    facts = {"cpu": "this one", "cores": 2, "bandwidth_gb_per_s": 30.0, "peak_fp32_gflops": 90.0}
    plot.draw(record.Document(facts, "", rows), tmp_path / "a.png", fit.fit_all(rows))
    assert all("rknn fp16 (estimate)" in text for text in said.values())
    assert (
        "passes" in said["time"] and "crossovers (~ estimate)" in said["time"] and "this one" in said["time"]
    )
    assert "30 GB/s" in said["roofline"] and "compiler's model" in said["roofline"]
    assert "hatched: the compiler's estimate" in said["bars"] and "N = 4096" in said["bars"]
    assert "the article's exponential" in said["fit"]


def test_pictures_of_shapes_that_are_not_square(tmp_path: Path) -> None:
    rows = [replace(square(64), m=m, k=64, n=n) for m in (1, 16) for n in (64, 256)]
    paths = plot.draw(record.Document({}, "", rows), tmp_path / "a.png")
    assert [path.name for path in paths] == ["a-time.png", "a-roofline.png", "a-bars.png"]
    assert plot.draw(record.Document({}), tmp_path / "b.png") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pdf", "must end in .png or .svg"),
        ("a", "must end in .png or .svg"),
        ("none/a.png", "cannot write there: No such file"),
        ("file/a.png", "cannot write there: Not a directory"),
        ("taken.png", "cannot write there: Is a directory"),
    ],
)
def test_pictures_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken-bars.png").mkdir()
    with pytest.raises(UsageError, match=message):
        plot.check(tmp_path / name)


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "0"], "sizes go from 1"),
        (["--shapes", "4x4"], "is not MxKxN"),
        (["--model", "v9-1b"], "neither a bundle"),
        (["--sizes", "8", "--model", "v7-0.1b"], "give one of --sizes and --model, not both"),
        (["--backends", "numpy,cuda"], "backend 'cuda' is unknown"),
        (["--dtypes", "fp8"], "dtype 'fp8' is unknown"),
        (["-r", "0"], "at least 1"),
        (["-t", "0"], "at least 1"),
        (["--bars", "x"], "--bars x: 'x'"),
        (["--plot", "/none/a.png"], "cannot write there"),
        (["--plot", "a.gif"], "must end in"),
        (["--resume", "/none/a.json"], "cannot write there"),
    ],
)
def test_bad_command_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(matmul.Sweep, "run", lambda self: pytest.fail("it went on to measure"))
    status, out, err = run_main(capsys, "bench", "matmul", *arguments)
    assert (status, out) == (1, "") and message in err and one_line(err)


@pytest.mark.parametrize("package", ["matplotlib", "iminuit"])
def test_packages_that_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(matmul.Sweep, "run", lambda self: pytest.fail("it went on to measure"))
    option = ["--fit"] if package == "iminuit" else ["--plot", tmp_path / "a.png"]
    status, _, err = run_main(capsys, "bench", "matmul", *option)
    assert status == 1 and f"{package}: pip install 'rwkv_npu[bench]'" in err and one_line(err)


def test_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    common = ["bench", "matmul", "--sizes", "8:64:8", "--backends", "numpy,rknn-matmul", "-r", "2", "-t", "1"]
    status, out, err = run_main(capsys, *common, "--resume", file, "-o", "json")
    found = json.loads(out)
    assert status == 0 and "rwkv-npu: rknn-matmul needs a board\n" in err
    assert found["machine"]["cores"] >= 1 and len(found["results"]) == 8
    command_line = "rwkv-npu bench matmul --sizes 8:64:8 --backends numpy,rknn-matmul --repeats 2 --threads 1"
    assert found["command"] == command_line
    assert json.loads(file.read_text())["results"] == found["results"]
    status, out, err = run_main(capsys, *common, "--resume", file, "--fit", "--plot", tmp_path / "p.png")
    assert (
        status == 0
        and "| numpy | fp32 | fp32 | 8x8x8 |" in out
        and "## Fits of time" in out
        and "## Crossovers" in out
    )
    assert {path.name for path in tmp_path.glob("p-*.png")} == {f"p-{name}.png" for name in DRAWN}
    assert "p-time.png" in err
    status, out, err = run_main(capsys, *common, "--resume", file, "--fit", "-o", "csv")
    assert len(out.splitlines()) == 9 and "Minuit" in err
    status, out, err = run_main(capsys, *common, "--resume", file, "--fit", "-o", "json")
    assert {one["model"] for one in json.loads(out)["fits"]} == {"exponential", "power"}


def test_nothing_to_measure_with(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_main(capsys, "bench", "matmul", "--backends", "rknn-matmul", "--sizes", "8")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "rwkv-npu: rknn-matmul needs a board",
        "rwkv-npu: error: nothing was measured: none of these backends can run here",
    ]


def test_control_c_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = command(
        "bench",
        "matmul",
        "--sizes",
        "8:4096:8",
        "--backends",
        "numpy",
        "-t",
        "1",
        "--resume",
        file,
        "-o",
        "csv",
    )
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not file.exists() or file.stat().st_size < 1500:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    rows = json.loads(file.read_text())["results"]
    assert len(rows) >= 1 and len(out.splitlines()) == len(rows) + 1
    assert f"interrupted; {len(rows)} rows were measured, {file} holds them" in err


def test_help_says_what_the_pictures_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_main(capsys, "bench", "matmul", "--help")
    assert status == 0 and "FILE-time" in " ".join(out.split())


def test_the_command_that_is_recorded_names_no_file() -> None:
    import argparse

    names = ("sizes", "shapes", "model", "backends", "dtypes", "repeats", "threads")
    arguments = argparse.Namespace(**dict.fromkeys(names), resume="/secret/a.json", plot="/secret/b.png")
    assert command_module._command(arguments) == "rwkv-npu bench matmul"
