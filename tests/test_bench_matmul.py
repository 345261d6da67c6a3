"""`rwkv-npu bench matmul`: arguments, the sweep, and the command. No test depends on the machine's speed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_npu.bench import machine, matmul, products
from rwkv_npu.bench.child import Failed
from rwkv_npu.bench.document import Document, ProductRow
from rwkv_npu.bench.matmul import Series
from rwkv_npu.cli import bench as command_module
from rwkv_npu.errors import BackendError, ToolkitError, UsageError
from rwkv_npu.models.official import OFFICIAL, official_spec
from tests.bench_rows import estimate, square
from tests.tiny import command, one_line, run_main
from tools import make_checkpoint

QUICK = products.Effort(repeats=3, precision=1.0, seconds=0.01)


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
    assert products.parse_sizes(text) == [(n, n, n) for n in sizes]


def test_the_default_sweep_has_32_sizes() -> None:
    sizes = products.parse_sizes(products.DEFAULT_SIZES)
    assert len(sizes) == 32 and sizes[0] == (128,) * 3 and sizes[-1] == (4096,) * 3


def test_shapes_come_in_order_of_work() -> None:
    assert products.parse_shapes("16x2048x8192,1x4x4,16x2048x8192") == [(1, 4, 4), (16, 2048, 8192)]


@pytest.mark.parametrize("text", ["", "0", "a", "5:1", "1:5:0", "1:2:3:4", "-4", "4096:99999999:1", "1.5"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--sizes"):
        products.parse_sizes(text)


@pytest.mark.parametrize("text", ["", "4x4", "4x4x0", "axbxc", "1x2x3x4", "1x2x99999999"])
def test_invalid_shapes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shapes"):
        products.parse_shapes(text)


def test_official_sizes_are_those_of_the_checkpoints() -> None:
    assert OFFICIAL.keys() == make_checkpoint.SIZES.keys()
    for name, size in make_checkpoint.SIZES.items():
        assert official_spec(name) == make_checkpoint.make_spec(**size), name


def test_shapes_of_a_model(tmp_path: Path) -> None:
    found = products.model_shapes("v7-1.5b")
    assert {(M, 2048, 8192) for M in (1, 16, 64, 128)} | {(1, 2048, 65536), (64, 2048, 96)} <= set(found)
    assert (16, 2048, 65536) not in found
    with pytest.raises(UsageError, match="not a bundle, and not one of v4-169m"):
        products.model_shapes(str(tmp_path))


# --- the sweep


class Scripted:
    """An open series whose rows come from a table: seconds by N, or a Failed."""

    def __init__(self, series: Series, script: dict[int, Any], log: list[str]) -> None:
        self.series, self.script, self.log = series, script, log

    def row(self, shape: products.Shape) -> ProductRow:
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

    def blank(self, shape: products.Shape, reason: str) -> ProductRow:
        return replace(self.row((0, 0, 0)), m=shape[0], k=shape[1], n=shape[2], time_s=None, failed=reason)

    def close(self) -> None:
        self.log.append(f"{self.series.name} closed")


class Stage:
    """A sweep over scripted series. said: its messages. log: what the series were asked for."""

    def __init__(self, scripts: dict[str, Any], file: Path | None = None, **settings: Any) -> None:
        self.said: list[str] = []
        self.log: list[str] = []

        def open_series(series: Series, threads: int, effort: products.Effort) -> Any:
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
            **{**common, "file": file, "log": self.said.append, "open": open_series, **settings}
        )
        self.sweep = matmul.Sweep(self.settings)

    def run(self) -> list[ProductRow]:
        self.steps = list(self.sweep.run())
        return self.sweep.document.results


@pytest.fixture(autouse=True)
def no_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        matmul, "measure_roofline", lambda threads: {"bandwidth_gb_per_s": 20.0, "peak_fp32_gflops": 50.0}
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
    assert stage.said == ["numpy fp32 failed at 16x16x16: it broke"]
    assert sum(count for _, count, _ in stage.steps) == stage.sweep.total == 6


def test_a_fatal_failure_ends_its_series() -> None:
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
    assert stage.said[0] == "torch fp32 is skipped: not installed: No module named 'torch'"
    assert stage.said[-1] == "rknn fp16 (estimate) is skipped: run x"


def test_a_series_ends_after_a_run_of_20_seconds() -> None:
    stage = Stage({"numpy": {16: 21.0}, "rknn": {8: 30.0}})
    assert [(row.backend, row.n) for row in stage.run()] == [
        ("numpy", 8),
        ("numpy", 16),
        *(("rknn", n) for n in (8, 16, 24)),
    ]
    assert stage.said == ["numpy fp32 ends at 16x16x16: a run took 21 s"] == stage.sweep.document.notes


def test_a_sweep_resumes_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first = Stage({"numpy": {8: "busy", 16: Failed("it broke", False), 24: KeyboardInterrupt()}}, file)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.log[-1] == "numpy fp32 closed"
    kept = Document.load(file, ProductRow)
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
    assert Document.load(file, ProductRow).results == third.sweep.document.results
    assert all(not row.flags for row in third.sweep.document.results)


def test_a_series_that_was_too_slow_is_not_resumed(tmp_path: Path) -> None:
    Stage({"numpy": {16: 21.0}}, tmp_path / "rows.json").run()
    again = Stage({"numpy": {}}, tmp_path / "rows.json")
    again.run()
    assert again.log == []


def test_a_file_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_files_of_another_format_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        Stage({"numpy": {}}, tmp_path / "rows.json")
    assert (tmp_path / "rows.json").read_text() == content


def test_plan_selects_the_series_that_can_run() -> None:
    said: list[str] = []
    settings = matmul.Settings([(1, 1, 1)], log=said.append)
    names = [series.name for series in matmul.plan(settings)]
    board = ["rk3588-cpu fp16 (estimate)", "rknn fp16 (estimate)"]
    assert names == ["numpy fp32", "torch fp32", "torch bf16", "ort fp32", *board] and not said
    published = matmul.plan(replace(settings, shapes=[(256, 256, 256), (1, 256, 256)], backends=["rknn"]))
    assert [series.name for series in published] == ["rknn fp16 (estimate)", "rknn-matmul fp16 (published)"]
    published = matmul.plan(replace(settings, shapes=[(256, 256, 256)], backends=["numpy", "rk3588-cpu"]))
    assert not any(series.published for series in published)
    settings = replace(
        settings, backends=["numpy", "tinygrad", "rknn-matmul", "rknn"], dtypes=["fp16", "int4"]
    )
    names = [series.name for series in matmul.plan(settings)]
    assert names == ["numpy fp16", "tinygrad fp16", "tinygrad OpenCL fp16", "rknn fp16 (estimate)"]
    assert said == ["rknn-matmul needs a board"]
    matmul.plan(replace(settings, backends=["numpy"], dtypes=["int4"]))
    assert said[-1] == "numpy supports none of these dtypes, only fp32, fp16"


def test_on_a_board_rknn_is_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.hardware, "soc", lambda: "rk3588")
    monkeypatch.setattr(matmul.importlib.util, "find_spec", lambda name: name == "rknnlite")
    said: list[str] = []
    found = matmul.plan(matmul.Settings([(1, 1, 1)], ["rknn", "rknn-matmul"], log=said.append))
    assert found == [Series("rknn", "fp16"), Series("rknn-matmul", "fp16")]
    assert found[0].name == "rknn fp16" and not said


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "0"], "sizes must be from 1"),
        (["--shapes", "4x4"], "is not MxKxN"),
        (["--model", "v9-1b"], "not a bundle"),
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
    assert status == 1 and f"{package}: in the clone, pip install -e '.[bench]'" in err and one_line(err)


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
        and "### numpy fp32" in out
        and "\n|8 " in out
        and "## Fits of time" in out
        and "## Crossovers" in out
    )
    assert {path.name for path in tmp_path.glob("p-*.png")} == {
        f"p-{name}.png" for name in ("time", "roofline", "bars", "fit")
    }
    last = out.splitlines()[-1]
    assert last.startswith("pictures: ") and all(str(path) in last for path in tmp_path.glob("p-*.png"))
    assert not (tmp_path / "p.png").exists()
    assert max(map(len, out.splitlines()[:-1])) <= 80
    status, out, err = run_main(capsys, *common, "--resume", file, "--fit", "-o", "csv")
    assert len(out.splitlines()) == 9 and "Minuit" in err
    status, out, err = run_main(capsys, *common, "--resume", file, "--fit", "-o", "json")
    assert {one["model"] for one in json.loads(out)["fits"]} == {"exponential", "power"}


def test_no_backend_to_measure_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
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
        try:
            deadline = time.monotonic() + 60
            while not file.exists() or file.stat().st_size < 1500:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:  # or a failure would wait for all the sizes
            process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    rows = json.loads(file.read_text())["results"]
    assert len(rows) >= 1 and len(out.splitlines()) == len(rows) + 1
    assert f"interrupted; {len(rows)} rows were measured, {file} holds them" in err


def test_everything_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_main(capsys, "bench", "matmul", "--sizes", "1000000", "--backends", "numpy")
    assert (
        status == 1 and one_line(err) and "not enough memory: about" in err and "- failed: numpy fp32" in out
    )


def test_progress_on_a_terminal() -> None:
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = command("bench", "matmul", "--sizes", "8:32:8", "--backends", "numpy", "-r", "2")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=end) as process:
        os.close(end)
        assert process.stdout is not None
        table = process.stdout.read().decode()
    shown = b""
    while block := read_terminal(terminal):
        shown += block
    os.close(terminal)
    assert b"matmul:" in shown and b"0/4" in shown and b"numpy fp32 N 8" in shown and "matmul:" not in table


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_help_names_the_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_main(capsys, "bench", "matmul", "--help")
    assert status == 0 and "FILE-time.png" in " ".join(out.split())


def test_the_command_that_is_recorded_names_no_file() -> None:
    import argparse

    names = ("sizes", "shapes", "model", "backends", "dtypes", "repeats", "threads")
    arguments = argparse.Namespace(**dict.fromkeys(names), resume="/secret/a.json", plot="/secret/b.png")
    assert command_module._matmul_command(arguments) == "rwkv-npu bench matmul"


def test_estimates_and_published_rows_need_no_process() -> None:
    """The board's CPU is estimated from static cycles and memory's rate; published rows have published sizes."""
    cpu = matmul.EstimatedCpu(Series("rk3588-cpu", "fp16", estimated=True))
    many, one = cpu.row((1024, 1024, 1024)), cpu.row((1, 1024, 1024))
    assert many.time_s == pytest.approx(1024**3 / (5.6 * 4 * 2.3e9))
    assert one.time_s == pytest.approx((2 * (1024 + 1024**2) + 4 * 1024) / 25e9)
    assert one.time_p10_s is not None and one.time_p90_s is not None
    assert one.time_p10_s < one.time_s < one.time_p90_s and one.estimated and one.repeats == 0
    row = matmul.Published().row((4096, 4096, 4096))
    assert row.time_s == pytest.approx(0.788) and row.time_p10_s is None
    assert not row.estimated and not row.is_measured_here and row.series == "rknn-matmul fp16 (published)"


def test_estimates_are_computed_again_on_resume(tmp_path: Path) -> None:
    """A file of an older version keeps its measured rows; its estimates are replaced."""
    file = tmp_path / "rows.json"
    Stage({"numpy": {}, "rknn": {}}, file).run()
    again = Stage({"numpy": {}, "rknn": {}}, file)
    again.run()
    assert [line for line in again.log if "closed" not in line] == [
        f"rknn fp16 (estimate) {n}" for n in (8, 16, 24)
    ]
