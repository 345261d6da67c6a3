"""The processes that compile and simulate, with a fake child that does what its "graph" says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from rwkv_npu import toolkit
from rwkv_npu.errors import ToolkitError, UsageError
from rwkv_npu.toolkit import child, log, schedule
from rwkv_npu.toolkit.worker import Worker
from tests.fake_compiler import LOG, program

ROOT = Path(__file__).resolve().parent.parent

FAKE = """\
#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from rwkv_npu.toolkit.child import receive, send
scratch = sys.argv[-1]
source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
while message := receive(source):
    request, arrays = message
    if request["action"] == "run":
        send(sink, {{"peak_rss_bytes": 2}}, {{name + "_out": 2 * array for name, array in arrays.items()}})
        continue
    words = open(request["onnx"]).read().split()
    with open(scratch + "/log", "w") as log:
        log.write({log!r})
        if words[0] == "exit":
            log.write("E RKNN: [00:00:00.000] Bad thing\\n")
    with open(os.path.dirname(request["onnx"]) + "/events", "a") as events:
        events.write("start " + os.path.basename(request["onnx"]) + "\\n")
    if words[0] == "exit":
        sys.exit(int(words[1]))
    if words[0] == "kill":
        os.kill(os.getpid(), 9)
    if words[0] == "fail":
        send(sink, {{"error": "ValueError: " + words[1]}})
        continue
    time.sleep(float(words[1]))
    if request["out"]:
        open(request["out"], "w").write("artifact")
    with open(os.path.dirname(request["onnx"]) + "/events", "a") as events:
        events.write("end " + os.path.basename(request["onnx"]) + "\\n")
    send(sink, {{"inputs": ["x"], "outputs": ["x_out"], "peak_rss_bytes": 1}})
"""


@pytest.fixture
def fake(tmp_path: Path) -> toolkit.Environment:
    text = FAKE.format(python=sys.executable, root=str(ROOT), log=LOG)
    return toolkit.Environment(program(tmp_path / "bin" / "python", text), "2.5.0", private=True)


def graph(folder: Path, name: str, words: str) -> Path:
    path = folder / name
    path.write_text(words)
    return path


def left_over(folder: Path) -> list[Path]:
    # os.walk passes over a folder that its owner removes meanwhile, where rglob raises.
    return [
        Path(at, name)
        for at, folders, _ in os.walk(folder)
        for name in folders
        if name.startswith(child.PREFIX)
    ]


# -- one at a time -------------------------------------------------------------------------------------------


def test_compile_graph(fake: toolkit.Environment, tmp_path: Path) -> None:
    path, out = graph(tmp_path, "a.onnx", "sleep 0"), tmp_path / "a.rknn"
    result = toolkit.compile_graph(fake, path, out)
    assert (result.path, result.size, result.version) == (out, 8, "2.5.0")
    assert result.cycles == log.Cycles(199909, 110592, 236673) and result.verify_outputs is None
    assert (result.cpu_fallback, result.npu_weight_bytes) == (("Transpose:c tp",), 2 * 1024**2)
    verified = toolkit.compile_graph(fake, path, out, verify_inputs={"x": np.ones(3, np.float32)})
    assert verified.verify_outputs is not None and verified.peak_rss_bytes == 2
    np.testing.assert_array_equal(verified.verify_outputs["x_out"], np.full(3, 2, np.float32))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fail reason", "a.onnx cannot be compiled for rk3588: reason"),
        ("exit 1", r"a.onnx cannot be compiled for rk3588: Bad thing \(Rockchip's compiler exited with status 1\)"),
        ("kill", "killed, most likely for lack of memory"),
    ],
)  # fmt: skip
def test_failed_builds(fake: toolkit.Environment, tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        toolkit.compile_graph(fake, graph(tmp_path, "a.onnx", words), tmp_path / "a.rknn")
    assert not (tmp_path / "a.rknn").exists() and left_over(tmp_path) == []


def test_graphs_and_folders_that_are_not_there(fake: toolkit.Environment, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no such graph"):
        toolkit.compile_graph(fake, tmp_path / "none.onnx", tmp_path / "a.rknn")
    path = graph(tmp_path, "a.onnx", "sleep 0")
    with pytest.raises(ToolkitError, match="cannot write in .*none: No such file"):
        toolkit.compile_graph(fake, path, tmp_path / "none" / "a.rknn")
    missing = toolkit.Environment(tmp_path / "no-python", "2.5.0", private=True)
    with pytest.raises(ToolkitError, match="cannot run .*no-python"):
        toolkit.compile_graph(missing, path, tmp_path / "a.rknn")
    assert left_over(tmp_path) == []


def test_simulator(fake: toolkit.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = graph(tmp_path, "a.onnx", "sleep 0")
    with toolkit.Simulator(fake, path) as simulator:
        assert (simulator.inputs, simulator.outputs) == (("x",), ("x_out",))
        for value in (1, 2):
            outputs = simulator.run({"x": np.full(2, value, np.float32)})
            np.testing.assert_array_equal(outputs["x_out"], np.full(2, 2 * value))
        with pytest.raises(ToolkitError, match="inputs are x, but got z"):
            simulator.run({"z": np.ones(1)})
    simulator.close()
    with pytest.raises(ToolkitError):
        simulator.run({"x": np.ones(1)})
    with pytest.raises(ToolkitError, match="reason"):
        toolkit.Simulator(fake, graph(tmp_path, "b.onnx", "fail reason"))
    assert left_over(tmp_path) == []


# -- many at a time ------------------------------------------------------------------------------------------


def jobs(folder: Path, *words: str, weight_bytes: int = 0) -> list[toolkit.Job]:
    return [
        toolkit.Job(graph(folder, f"{i}.onnx", text), folder / f"{i}.rknn", weight_bytes)
        for i, text in enumerate(words)
    ]


def most_at_once(folder: Path) -> int:
    running = most = 0
    for line in (folder / "events").read_text().splitlines():
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    return most


def test_results_come_as_they_end(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 1.5", "sleep 0", "sleep 0")
    done = [job for job, _ in toolkit.compile_many(fake, work, parallel=2, memory_limit_bytes=10**10)]
    assert done[-1] is work[0] and len(done) == 3 and most_at_once(tmp_path) == 2
    assert all(job.out_path.exists() for job in work) and left_over(tmp_path) == []
    assert list(toolkit.compile_many(fake, [])) == []


def test_memory_bounds_the_number_of_processes(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, *["sleep 0.1"] * 3, weight_bytes=10**8)  # 0.85 GB each
    list(toolkit.compile_many(fake, work, parallel=3, memory_limit_bytes=2 * 10**9))
    assert most_at_once(tmp_path) == 1  # two would be above four fifths of the limit


def test_the_next_job_is_the_largest_that_fits() -> None:
    big, middle, small = (toolkit.Job(Path(), Path(), n * 10**8) for n in (10, 5, 1))
    waiting = [big, middle, small]
    assert schedule._next(waiting, [], 2, 7 * 10**9) is big  # alone, it may exceed four fifths
    assert schedule._next(waiting, [big], 2, 10**10) is small
    assert schedule._next(waiting, [big], 2, 8 * 10**9) is None
    assert schedule._next(waiting, [big], 1, 10**12) is None
    assert waiting == [middle]


def test_a_job_above_the_limit_is_refused(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 0", weight_bytes=10**9)
    with pytest.raises(ToolkitError, match=r"0.rknn needs about 6.2 GB .*6 x 1.00 GB.* 5.0 GB are available"):
        toolkit.compile_many(fake, work, memory_limit_bytes=5 * 10**9)
    with pytest.raises(UsageError):
        toolkit.compile_many(fake, work, parallel=0)
    assert 10**7 < toolkit.available_memory() < 10**15


def test_a_failure_stops_the_others(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 60", "exit 3")
    start = time.monotonic()
    with pytest.raises(ToolkitError, match="Bad thing"):
        list(toolkit.compile_many(fake, work, parallel=2))
    assert time.monotonic() - start < 30 and left_over(tmp_path) == []


def test_closing_the_iterator_stops_the_others(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 0", "sleep 60", "sleep 60")
    start = time.monotonic()
    results = toolkit.compile_many(fake, work, parallel=2)
    assert next(results)[0] is work[0]
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30 and left_over(tmp_path) == []
    assert not work[1].out_path.exists()


def test_graphs_written_when_their_turn_comes(fake: toolkit.Environment, tmp_path: Path) -> None:
    path = tmp_path / "late.onnx"
    job = toolkit.Job(path, tmp_path / "late.rknn", 0, write_graph=lambda: path.write_text("sleep 0"))
    ((_, result),) = toolkit.compile_many(fake, [job])
    assert result.size == 8 and not path.exists()


# -- the real child ------------------------------------------------------------------------------------------


def test_an_orphan_ends_and_cleans_up(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from rwkv_npu.toolkit import Environment
        from rwkv_npu.toolkit.worker import Worker
        worker = Worker(Environment(Path(sys.executable), "0", False), Path({str(tmp_path)!r}))
        print(worker._process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 30
        while not any((folder / "log").exists() for folder in left_over(tmp_path)):  # until it serves
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    while left_over(tmp_path) or Path(f"/proc/{pid}/cmdline").exists():
        if not left_over(tmp_path) and not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # a zombie that nobody waits for, in a container without init
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_child_deletes_only_scratch_folders(tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, child.__file__, str(tmp_path)], capture_output=True, check=False)
    assert answer.returncode == 1 and b"not a scratch folder" in answer.stderr and tmp_path.exists()


def test_a_real_child_without_the_compiler(tmp_path: Path) -> None:
    with Worker(toolkit.Environment(Path(sys.executable), "0", False), tmp_path) as worker:
        with pytest.raises(ToolkitError, match="ModuleNotFoundError|Error"):
            worker.request({"action": "build", "onnx": "none", "options": {}})
        assert "Traceback" in worker.log()
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("version", "rows", "changed"), [("2.3.2", 1, True), ("2.3.2", 2, False), ("2.5.0", 1, False)]
)
def test_squares_are_rewritten_for_older_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, rows: int, changed: bool
) -> None:
    helper = onnx.helper
    nodes = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Mul", ["r", "r"], ["y"])]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, 4]) for name in "ay"]
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    for key, value in {"location": "weights.bin", "offset": "8", "length": "8"}.items():
        weights.external_data.add(key=key, value=value)
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights]))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path / "scratch")
    path = str(tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="weights.bin, which holds w, is missing or too short"):
        child._adapt(model, path, [[rows, 4]])
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    adapted = child._adapt(model, path, [[rows, 4]])
    assert (adapted != path) == changed
    if changed:
        assert list(onnx.load(adapted, load_external_data=False).graph.node[1].input) == ["r", "a"]
        assert (tmp_path / "scratch" / "weights.bin").read_bytes() == bytes(16)


@pytest.mark.parametrize(
    ("version", "rows", "changed"), [("2.3.2", 2, True), ("2.3.2", 1, False), ("2.5.0", 2, False)]
)
def test_a_mask_that_two_products_read_becomes_two_for_older_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, rows: int, changed: bool
) -> None:
    helper = onnx.helper
    nodes = [helper.make_node("Mul", ["a", "mask"], ["b"]), helper.make_node("Mul", ["b", "mask"], ["y"])]
    shapes = {"a": [rows, 4], "mask": [rows, 1], "y": [rows, 4]}
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name]) for name in shapes]
    graph = helper.make_graph(nodes, "g", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.chdir(tmp_path)
    adapted = child._adapt(model, "a.onnx", [shapes["a"], shapes["mask"]])
    assert (adapted != "a.onnx") == changed
    if changed:
        found = onnx.load(adapted).graph.node
        assert [list(node.input) for node in found] == [["a", "mask"], ["mask"], ["b", "mask.2"]]
        assert found[1].op_type == "Relu"


def test_small_builds_share_a_process(
    fake: toolkit.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Worker] = []

    class Counted(Worker):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            started.append(self)

    monkeypatch.setattr(schedule, "Worker", Counted)
    builds = jobs(tmp_path, *["sleep 0"] * 4)
    assert len(list(schedule.compile_many(fake, builds, parallel=1))) == 4
    assert len(started) == 1 and not started[0].scratch.exists()
    monkeypatch.setattr(schedule, "SMALL", 0)
    builds = jobs(tmp_path, *["sleep 0"] * 4, weight_bytes=1)
    assert len(list(schedule.compile_many(fake, builds, parallel=1))) == 4
    assert len(started) == 5 and not any(worker.scratch.exists() for worker in started)
