"""What can go wrong on a board, on the emulated one: the text stays the same, or one line says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rwkv_npu.backends import NPU_BACKENDS
from tests.emulated import EmulatedBoard
from tools.board.calls import read_calls

pytestmark = pytest.mark.board

IDS, TOKENS = "5,6,7", 10

# The command line with a short patience for calls.
IMPATIENT = """
import sys
from rwkv_npu import cli
from rwkv_npu.backends import fallback
fallback.CALL_SECONDS = 3.0
sys.exit(cli.main(sys.argv[1:]))
"""

OWNER = "from rwkv_npu.board.npu import LOCK; LOCK.acquire(); print('has it', flush=True); input()"


@pytest.fixture(scope="module")
def bundle(board_bundles) -> Path:
    return board_bundles["4"]


# How the NPU is reached: backends, and the backend `rknn` through RKNNLite.
WAYS = (*NPU_BACKENDS, "rknnlite")


def arguments(bundle: Path, *more: object, backend: str = "rknn") -> list[object]:
    greedy = ["--ids", "-p", IDS, "-n", TOKENS, "--temp", 0, "-t", 1]
    return [
        "generate",
        "-m",
        bundle,
        *greedy,
        "--backend",
        "rknn" if backend == "rknnlite" else backend,
        *more,
    ]


@pytest.fixture(scope="module")
def texts(emulated_board: EmulatedBoard, bundle: Path) -> dict[str, str]:
    """The text that each NPU backend writes without faults."""
    found = {}
    for backend in WAYS:
        words = arguments(bundle, backend=backend)
        result = emulated_board.run("rwkv-npu", *words, lite=backend == "rknnlite")
        assert result.returncode == 0 and len(result.stdout.split()) == TOKENS
        assert "warning" not in result.stderr and "failed" not in result.stderr
        found[backend] = result.stdout
    return found


# Contexts of rknn are groups; of rknn-matmul they are products, of which 29 are made by the self-tests.
@pytest.mark.parametrize(
    ("backend", "faults", "said"),
    [
        ("rknn", "run-fails@20", "| 1 calls to the NPU failed\n"),
        ("rknn", "run-fails/7", "calls to the NPU failed\n"),
        (
            "rknn",
            "no-io-memory",
            "warning: RKNNLite drives the NPU, more slowly, because rknn_set_io_mem of ",
        ),
        ("rknn", "native-blocks", "generated 10 tokens"),
        ("rknnlite", "run-fails@20", "| 1 calls to the NPU failed\n"),
        (
            "rknnlite",
            "run-fails@5+:mid.0,nan@6+:last,zeros@7+:first,wrong-size@5+:head",
            "| 8 calls to the NPU failed, on the CPU: ",
        ),
        ("rknn", "nan@6+:mid.0", " is not finite): the CPU runs it from now on"),
        # 7000 descriptors: the limit was raised.
        (
            "rknn",
            "old-version,fds=1000",
            "warning: librknnrt 1.5.2 is older than the artifacts' compiler, 2.3.2",
        ),
        ("rknn-matmul", "run-fails@40", "| 1 calls to the NPU failed\n"),
        ("rknn-matmul", "nan@45,zeros@60", "calls to the NPU failed\n"),
        ("rknn-matmul", "run-fails/31", "calls to the NPU failed\n"),
        ("rknn-matmul", "run-fails@3+:1x128x256", "| 2 calls to the NPU failed, on the CPU: head\n"),
        ("rknn-matmul", "nan@9+:1x512x128", "where the residual leaves fp16's range, --fusion projection"),
        ("rknn-matmul", "no-dynamic,fds=100", "generated 10 tokens"),
    ],
)
def test_faults_do_not_change_the_text(
    emulated_board: EmulatedBoard, bundle: Path, texts: dict[str, str], backend: str, faults: str, said: str
) -> None:
    words = arguments(bundle, backend=backend)
    result = emulated_board.run("rwkv-npu", *words, faults=faults, lite=backend == "rknnlite")
    assert result.returncode == 0 and said in result.stderr, result.stderr
    assert result.stdout == texts[backend]
    assert result.stderr.count("rwkv-npu: warning: ") <= 1


@pytest.mark.parametrize(
    ("backend", "at", "left"), [("rknn", 30, "all groups of its thread"), ("rknn-matmul", 70, "everything")]
)
def test_a_hang_is_abandoned(
    emulated_board: EmulatedBoard, bundle: Path, texts: dict[str, str], backend: str, at: int, left: str
) -> None:
    words = "python", "-c", IMPATIENT, *arguments(bundle, backend=backend)
    result = emulated_board.run(*words, faults=f"hang@{at}", timeout=60)
    assert result.returncode == 0 and f"no answer within 3 s): the CPU runs {left}" in result.stderr
    assert result.stdout == texts[backend] and "| 1 calls to the NPU failed" in result.stderr


@pytest.fixture(scope="module")
def waves(emulated_board: EmulatedBoard, board_bundles: dict[str, Path]) -> tuple[list[object], str]:
    """A command whose prompt is three chunks, which are on their way through four layers together, and its text."""
    arguments = ["generate", "-m", board_bundles["7"], "--ids", "-p", ",".join(map(str, range(5, 45)))]
    arguments += ["-n", 4, "--temp", 0, "-t", 1, "--backend", "rknn"]
    result = emulated_board.run("rwkv-npu", *arguments)
    assert result.returncode == 0 and len(result.stdout.split()) == 4, result.stderr
    return arguments, result.stdout


# 13 runs are self-tests. Then there are 18 of the prompt.
@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ("run-fails/6", "calls to the NPU failed"),
        ("nan@16,zeros@19", "| 2 calls to the NPU failed\n"),
        ("nan@4+:mid.0,run-fails@3+:mid.2,zeros@3+:first", "on the CPU: "),
        ("core-mask", "warning: the runtime chooses the NPU core, and calls run one at a time"),
    ],
)
def test_the_text_stays_with_waves_in_flight(
    emulated_board: EmulatedBoard, waves: tuple[list[object], str], faults: str, said: str
) -> None:
    arguments, text = waves
    result = emulated_board.run("rwkv-npu", *arguments, faults=faults)
    assert result.returncode == 0 and said in result.stderr, result.stderr
    assert result.stdout == text


def test_a_hang_with_waves_in_flight(emulated_board: EmulatedBoard, waves: tuple[list[object], str]) -> None:
    arguments, text = waves
    result = emulated_board.run("python", "-c", IMPATIENT, *arguments, faults="hang@20", timeout=60)
    assert result.returncode == 0 and "the CPU runs all groups of its thread" in result.stderr, result.stderr
    assert result.stdout == text and "| 1 calls to the NPU failed" in result.stderr


def test_sigterm_lets_running_calls_end_and_releases_the_npu(
    emulated_board: EmulatedBoard, waves: tuple[list[object], str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    variables = emulated_board.variables(faults="hang@20,hang-seconds=6", log=log)
    command = emulated_board.command("rwkv-npu", *waves[0])
    with subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while (
            not (hangs := [c for c in read_calls(log) if c.name == "fault"]) and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        begin = time.monotonic()
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM and process.stdout and not process.stdout.read()
    names = [call.name for call in read_calls(log)]
    assert hangs and time.monotonic() - begin > 1  # the run that hung for a while has ended
    assert names.count("destroy") == names.count("init") and names.index("destroy") > names.index("fault")


@pytest.mark.parametrize(
    ("backend", "faults", "more", "said"),
    [
        (
            "rknn",
            "zeros",
            [],
            "4 of 4 contexts fail their self-test (first at 1 rows: all outputs are zero)",
        ),
        ("rknn", "init-memory@5", [], " bytes of NPU memory: end other programs"),
        ("rknnlite", "init-memory@5", [], "failed to allocate NPU memory for last: end other programs"),
        ("rknn", "old-runtime", [], "rwkv-npu convert --toolkit 2.3.0"),
        ("rknnlite", "old-runtime", [], "rwkv-npu convert --toolkit 2.3.0"),
        ("rknn", "core-mask", ["--npu-cores", "0"], "this chip does not have the NPU core 0: use auto"),
        ("rknn", "fds=200000", [], "failed to allocate NPU memory for first"),
        (
            "rknn-matmul",
            "zeros",
            [],
            "4 of 4 contexts fail their self-test (first at 1 rows: its relative error is",
        ),
        ("rknn-matmul", "init-memory@5", [], "out of NPU memory, or of file descriptors: end other programs"),
        ("rknn-matmul", "core-mask", [], "a parameter is refused; choose other NPU cores"),
        (
            "rknn-matmul",
            "fds=200000",
            [],
            "returned -4: out of NPU memory, or of file descriptors: end other programs",
        ),
    ],
)
def test_a_permanent_fault_is_one_line(
    emulated_board: EmulatedBoard, bundle: Path, backend: str, faults: str, more: list[str], said: str
) -> None:
    words = arguments(bundle, *more, backend=backend)
    result = emulated_board.run("rwkv-npu", *words, faults=faults, lite=backend == "rknnlite")
    assert result.returncode == 1 and result.stdout == ""
    assert said in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_auto_goes_on_without_the_npu(emulated_board: EmulatedBoard, bundle: Path) -> None:
    result = emulated_board.run("rwkv-npu", *arguments(bundle, "-v", backend="auto"), faults="zeros")
    assert result.returncode == 0 and len(result.stdout.split()) == TOKENS
    assert (
        "warning: the NPU is not used: rknn: 3 of 3 contexts" in result.stderr
    )  # those of prompts, but the head's
    assert ", since the NPU: rknn: 3 of 3 contexts" in result.stderr


def test_one_client_at_a_time(emulated_board: EmulatedBoard, bundle: Path) -> None:
    owner = subprocess.Popen(
        emulated_board.command("python", "-c", OWNER),
        env={**os.environ, **emulated_board.variables()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout and owner.stdout.readline() == "has it\n"
        for backend in NPU_BACKENDS:
            result = emulated_board.run("rwkv-npu", *arguments(bundle, backend=backend))
            assert result.returncode == 1 and "the NPU is in use by process " in result.stderr
        owner.communicate("\n")


def test_a_killed_process_blocks_nobody(
    emulated_board: EmulatedBoard, bundle: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    """Killed within a token: the output is the start of the text, no state is saved, and the next run works."""
    state, text = tmp_path / "state", texts["rknn"]
    result = emulated_board.run("rwkv-npu", *arguments(bundle, "--state", state), faults="killed@40")
    assert result.returncode in (-9, 137) and text.startswith(result.stdout) and result.stdout != text
    assert not list(tmp_path.iterdir())
    result = emulated_board.run("rwkv-npu", *arguments(bundle, "-v", backend="auto"))
    assert result.returncode == 0 and "backend: rknn reads prompts" in result.stderr
