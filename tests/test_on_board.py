"""Models on the emulated board, run from the project's wheel: the NPU's backends compared with NumPy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.models.spec import groups
from tests.emulated import GENERATIONS, EmulatedBoard
from tests.fp16 import check_logits, check_state, forced
from tools.board.calls import Call, bytes_moved, count, read_calls

pytestmark = pytest.mark.board

TOKENS = 64
PROMPT = 21  # read in one go before: a chunk, and a padded one
ON_BOARD = (("rknn", "layer"), ("rknn", "projection"), ("rknn-matmul", "projection"))

# On every (backend, fusion): reads a prompt, then tokens one by one. Keeps the logits after each and the state, and
# says what was counted, and how long the stand-in's log is by then.
FORCED = """
import json, os, sys
import numpy as np
import rwkv_npu
from rwkv_npu.backends import npu_matmul
npu_matmul.MIN_PART = 1 << 12  # the models are small: columns on every core all the same
bundle, folder, ids, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
for pair in sys.argv[5:]:
    backend, fusion = pair.split("/")
    with rwkv_npu.load(bundle, backend=backend, fusion=fusion, threads=1) as model:
        logits, state = model.forward(ids[:prompt])
        rows, calls = [logits], model.engine.counters.calls
        for token in ids[prompt:]:
            logits, state = model.forward([token], state, inplace=True)
            rows.append(logits)
        calls = model.engine.counters.calls - calls
    np.savez(f"{folder}/{backend}.{fusion}.npz", logits=np.stack(rows), **state.parts)
    print(json.dumps({"calls": calls, "log": len(open(os.environ["RKNN_STANDIN_LOG"]).readlines())}))
"""


@dataclass(frozen=True)
class Forced:
    """What came of a text on one backend: logits (1 + TOKENS, V), the state after it, groups run for TOKENS tokens,
    and what the stand-in was asked."""

    logits: np.ndarray
    state: dict[str, np.ndarray]
    calls: int = 0
    log: Sequence[Call] = ()


def ids_of(bundle: Path) -> list[int]:
    vocabulary = open_bundle(bundle).spec.V
    return [
        int(token) for token in np.random.default_rng(3).integers(1, min(vocabulary, 4000), PROMPT + TOKENS)
    ]


@pytest.fixture(scope="module", params=GENERATIONS)
def texts(
    request: pytest.FixtureRequest, emulated_board: EmulatedBoard, board_bundles, tmp_path_factory
) -> tuple[Path, dict[tuple[str, str], Forced]]:
    """A bundle, and the board's results for a text on every backend."""
    bundle, folder = board_bundles[request.param], tmp_path_factory.mktemp("texts")
    pairs = [f"{backend}/{fusion}" for backend, fusion in ON_BOARD]
    log = folder / "log"
    words = [bundle, folder, json.dumps(ids_of(bundle)), PROMPT, *pairs]
    result = emulated_board.run("python", "-c", FORCED, *words, log=log)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "warning" not in result.stderr.lower(), result.stderr
    found, calls, start = {}, read_calls(log), 0
    for pair, line in zip(ON_BOARD, result.stdout.splitlines(), strict=True):
        said, arrays = json.loads(line), dict(np.load(folder / f"{'.'.join(pair)}.npz"))
        found[pair] = Forced(arrays.pop("logits"), arrays, said["calls"], calls[start : said["log"]])
        start = said["log"]
    return bundle, found


@pytest.mark.parametrize("pair", ON_BOARD, ids="/".join)
def test_a_text_on_the_board(texts, pair: tuple[str, str]) -> None:
    (bundle, by_pair), (backend, fusion) = texts, pair
    found = by_pair[pair]
    expected, expected_state = forced(bundle, ids_of(bundle), PROMPT, backend="numpy", fusion=fusion)
    check_logits(found.logits, expected)
    check_state(found.state, expected_state)
    spec = open_bundle(bundle).spec
    per_token = spec.L + 2 if fusion == "layer" else 3 * spec.L + 1
    assert len(groups(spec, fusion)) == per_token and found.calls == TOKENS * per_token
    check = check_rknn_calls if backend == "rknn" else check_matmul_calls
    check(found.log, bundle, fusion)


def check_rknn_calls(calls: Sequence[Call], bundle: Path, fusion: str) -> None:
    """Each artifact is opened once. With one row, each group runs once a token, and once for the self-test."""
    opened = open_bundle(bundle)
    spec, artifacts = opened.spec, [a for a in opened.manifest.artifacts if a.fusion == fusion]
    assert count(calls, "init").total() == len(artifacts)
    assert max(call.number("open") for call in calls if call.name == "init") == len(artifacts)
    assert calls[-1].name == "destroy" and calls[-1].number("open") == 0
    single = [call for call in calls if call.name == "run" and call["rows"] == "1"]
    last_prompt_row = PROMPT % 16 == 1  # read by the artifact for one row
    for group in groups(spec, fusion):
        extra = 1 if group.role == "head" or last_prompt_row else 0  # the logits after the prompt
        assert count(single, "run")[group.name] == 1 + TOKENS + extra, group.name
    token = [call for call in calls if call.name == "run"][-len(groups(spec, fusion)) :]
    assert [call["group"] for call in token] == [group.name for group in groups(spec, fusion)]
    assert bytes_moved(calls) == 0  # memory of ours is bound: the runtime copies nothing


def check_matmul_calls(calls: Sequence[Call], bundle: Path, fusion: str) -> None:
    assert calls[-1].name == "matmul_destroy" and calls[-1].number("open") == 0
    assert [call.number("buffers") for call in calls if call.name == "destroy_mem"][-1] == 0
    runs = count(calls, "matmul_run")
    V = open_bundle(bundle).spec.V
    head = [group for group in runs if group.startswith("1x") and group.endswith(f"x{V // 3 // 16 * 16}")]
    assert runs.total() > TOKENS and (V < 1000 or head)


def test_the_shipped_model_in_the_simulator(board_bundles) -> None:
    """The demo model, token by token, in Rockchip's simulator; test_rknn.py has the other generations."""
    bundle, ids = board_bundles["7"], ids_of(board_bundles["7"])
    expected, expected_state = forced(bundle, ids, PROMPT, backend="numpy")
    plan = {"prefill": "numpy", "decode": "rknn-sim"}  # graphs of one row: half of what would be built
    found, state = forced(bundle, ids, PROMPT, backend="numpy", plan=plan)
    check_logits(found, expected)
    check_state(state, expected_state)


def test_the_command_line_on_the_board(emulated_board: EmulatedBoard, board_bundles) -> None:
    """The greedy text is the same as on this machine."""
    prompt, tokens = "Return the ", 12
    with rwkv_npu.load(board_bundles["7"], backend="ort") as model:
        steps = model.generate(prompt, max_tokens=tokens, temperature=0)
        expected = "".join(step.text for step in steps)
    arguments = ["-m", board_bundles["7"], "-p", prompt, "-n", tokens, "--temp", 0, "-t", 1]
    for backend in ("rknn", "rknn-matmul"):
        result = emulated_board.run("rwkv-npu", "generate", *arguments, "--backend", backend, fresh=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.rstrip("\n") == expected.rstrip("\n") != ""


# Reads tokens one by one; says what the process holds at half of them, and at their end.
HELD = """
import gc, json, os, sys
import rwkv_npu
bundle, backend, fusion, tokens = sys.argv[1:]
held = []
with rwkv_npu.load(bundle, backend=backend, fusion=fusion, threads=1) as model:
    state = model.new_state()
    for half in range(2):
        for token in range(int(tokens) // 2):
            _, state = model.forward([1 + token % 200], state, inplace=True)
        gc.collect()
        resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        held.append({"files": len(os.listdir("/proc/self/fd")), "bytes": resident})
print(json.dumps(held))
"""


def check_held(output: str, calls: Sequence[Call]) -> None:
    half, end = json.loads(output.splitlines()[-1])
    assert end["files"] == half["files"]
    assert end["bytes"] < half["bytes"] + (1 << 20)
    for name in ("create_mem", "init", "matmul_create"):  # all before the first token
        made = [number for number, call in enumerate(calls) if call.name == name]
        assert not made or made[-1] < len(calls) // 10


def test_nothing_leaks_through_librknnrt(
    emulated_board: EmulatedBoard, board_bundles, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    result = emulated_board.run("python", "-c", HELD, board_bundles["4"], "rknn", "layer", 2000, log=log)
    assert result.returncode == 0, result.stderr[-2000:]
    check_held(result.stdout, read_calls(log))


def test_nothing_leaks_through_the_matmul_interface(run_alone, board_bundles, tmp_path: Path) -> None:
    """On this machine, which is faster; the calls are the same as on the board."""
    log = tmp_path / "log"
    output = run_alone(HELD, board_bundles["4"], "rknn-matmul", "projection", 2000, RKNN_STANDIN_LOG=str(log))
    check_held(output, read_calls(log))


def test_the_matmul_sweep_runs_on_the_board(emulated_board: EmulatedBoard, tmp_path: Path) -> None:
    """The sweep compares its products with float64."""
    file, log = tmp_path / "rows.json", tmp_path / "log"
    arguments = ["--shapes", "16x96x64", "--backends", "rknn,rknn-matmul", "-r", 1, "-t", 1, "--resume", file]
    result = emulated_board.run("rwkv-npu", "bench", "matmul", *arguments, log=log)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = {row["backend"]: row for row in json.loads(file.read_text())["results"]}
    assert set(rows) == {"rknn", "rknn-matmul"}, result.stderr[-2000:]
    for row in rows.values():
        assert row["failed"] is None and row["max_rel_error"] < 2e-3
        assert row["device"].startswith("RK3588 NPU") and not row["estimated"]
        assert "stand-in" in row["versions"]  # so that nobody takes it for a board's
    calls = read_calls(log)
    assert count(calls, "run")["16x96x64"] > 1 and count(calls, "matmul_run")["16x96x64"] > 1


def test_info_runs_on_the_board(emulated_board: EmulatedBoard, board_bundles) -> None:
    """`info` prints the same on the board as here."""
    found = emulated_board.run("rwkv-npu", "info", board_bundles["7"], "--json")
    assert found.returncode == 0, found.stderr[-2000:]
    here = [sys.executable, "-m", "rwkv_npu", "info", str(board_bundles["7"]), "--json"]
    assert found.stdout == subprocess.run(here, capture_output=True, text=True, check=True).stdout
