"""The stand-in's clock: how long runs take, on which core, and which runs are at the same time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rwkv_npu.conversion.forecast import forecast
from rwkv_npu.conversion.request import Request
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import Group, Port
from rwkv_npu.runtime.estimate import on_npu
from tools.board.calls import count, read_calls
from tools.board.clock import table, times
from tools.board.files import write_rknn

pytestmark = pytest.mark.board

US = 20_000

# Opens a file once for each core mask, runs all contexts at once, RUNS times each, and prints seconds and busy cores.
RUN = """
import ctypes, json, os, sys, threading, time
from rwkv_npu.backends.rknn_api import OVERRIDE
from tools.board.clock import busy_seconds
library = ctypes.CDLL(os.environ[OVERRIDE])
path, masks, runs = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
data = open(path, "rb").read()
class Input(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("buf", ctypes.c_void_p), ("size", ctypes.c_uint32),
                ("pass_through", ctypes.c_uint8), ("type", ctypes.c_int32), ("fmt", ctypes.c_int32)]
contexts, buffer = [], ctypes.create_string_buffer(64)
for mask in masks:
    context = ctypes.c_uint64()
    code = library.rknn_init(ctypes.byref(context), data, len(data), 0, None)
    if code:
        raise SystemExit(print(code))
    assert library.rknn_set_core_mask(context, mask) == 0
    given = Input(0, ctypes.cast(buffer, ctypes.c_void_p), 64, 0, 0, 0)
    assert library.rknn_inputs_set(context, 1, ctypes.byref(given)) == 0
    contexts.append(context)
spent = []
def work(context):
    for _ in range(runs):
        assert library.rknn_run(context, None) == 0
    found = ctypes.c_int64()
    assert library.rknn_query(context, 4, ctypes.byref(found), 8) == 0
    spent.append(found.value)
threads = [threading.Thread(target=work, args=(context,)) for context in contexts]
begin, cpu = time.perf_counter(), time.process_time()
[thread.start() for thread in threads]
[thread.join() for thread in threads]
wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
print(json.dumps({"wall": wall, "cpu": cpu, "busy": busy_seconds(os.environ[OVERRIDE]), "spent": spent}))
"""


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_rknn(
        tmp_path / "mid.rknn",
        Group("mid.0", 0, (Port("x", 16),), (Port("y", 16),)),
        1,
        {"fingerprint": "f", "group": "mid.0"},
    )
    (tmp_path / "times").write_text(table({("mid.0", 1): US}))
    return tmp_path / "mid.rknn"


def run(run_alone, artifact: Path, masks: list[int], runs: int, factor: float = 1.0, **variables: str):
    clock = {"RKNN_STANDIN_CLOCK": str(factor), "RKNN_STANDIN_TIMES": str(artifact.with_name("times"))}
    null = {"RKNN_STANDIN_NULL": "1"}
    return json.loads(run_alone(RUN, artifact, json.dumps(masks), runs, **null, **clock, **variables))


@pytest.mark.parametrize(
    ("masks", "rounds", "cores"),
    [
        ([1, 2, 4], 1, [1, 1, 1]),  # three cores at once
        ([2, 2, 2], 3, [0, 3, 0]),  # a queue on one core
        ([7, 1], 2, [2, 1, 1]),  # all cores are held by one context
        ([0, 0, 0], 1, [1, 1, 1]),  # any idle core
    ],
)
def test_runs_take_their_time_on_their_cores(
    run_alone, artifact: Path, masks: list[int], rounds: int, cores: list[int]
) -> None:
    """Lower ends are exact. Upper ends are wide, for a busy machine; the CPU's time shows that runs sleep."""
    runs, one = 3, US / 1e6
    found = run(run_alone, artifact, masks, runs)
    assert found["wall"] >= 0.999 * rounds * runs * one
    if masks != [0, 0, 0]:  # there a thread that starts late may find another core idle
        assert [round(busy / (runs * one) - 0.3) for busy in found["busy"]] == cores
    assert sum(found["busy"]) >= 0.999 * len(masks) * runs * one
    assert min(found["spent"]) >= US
    assert found["cpu"] < 0.5 * found["wall"]


def test_the_factor_stretches(run_alone, artifact: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = run(run_alone, artifact, [1], 2, factor=2.5, RKNN_STANDIN_LOG=str(log))
    assert found["spent"][0] >= 2.5 * US and found["wall"] >= 2 * 2.5 * US / 1e6
    assert count(read_calls(log), "run")["mid.0"] == 2


def test_a_context_without_a_time_is_refused(run_alone, artifact: Path) -> None:
    artifact.with_name("times").write_text(table({("mid.0", 16): US, ("last", 1): US}))
    assert run(run_alone, artifact, [1], 1) == -1


def test_without_a_clock_nothing_waits(run_alone, artifact: Path) -> None:
    found = json.loads(run_alone(RUN, artifact, "[1]", 3, RKNN_STANDIN_NULL="1"))
    assert found["busy"] == [0, 0, 0] and found["spent"][0] < US


def test_times_are_the_estimates(checkpoint: Path) -> None:
    """The parts of the estimate that are the NPU's add up to the clock's times."""
    opened = open_checkpoint(checkpoint)
    (variant, *_) = forecast(opened, Request(checkpoint, rows=(1, 16))).variants
    layers = [artifact for artifact in variant.artifacts if artifact.fusion == "layer"]
    found = times(opened.spec, layers)
    estimate = on_npu(opened.spec, layers, 16, "LPDDR5")
    parts = sum(estimate.ms[part] for part in ("projections", "head", "operators"))
    used = {key: us for key, us in found.items() if key[1] == (1 if key[0] == "head" else 16)}
    assert sum(used.values()) == pytest.approx(1e3 * parts + 40 * len(used))
