"""Fixtures shared by the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before NumPy is imported: on busy cores the threads of its BLAS wait for each other more than they work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Stand-ins for the NPU are this session's own: others may be tested on the same machine.
os.environ["RWKV_NPU_LOCKS"] = tempfile.mkdtemp(prefix="rwkv_npu-locks-")
atexit.register(shutil.rmtree, os.environ["RWKV_NPU_LOCKS"], ignore_errors=True)

# Where a shell started us in the background, Ctrl-C is ignored, here and in the processes that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from rwkv_npu import toolkit  # noqa: E402
from rwkv_npu.backends.rknn_api import OVERRIDE  # noqa: E402
from rwkv_npu.model import Model, load  # noqa: E402
from rwkv_npu.toolkit.install import install  # noqa: E402
from tests.conversions import convert  # noqa: E402
from tests.emulated import GENERATIONS, EmulatedBoard, convert_for_board  # noqa: E402
from tests.tiny import Run, run_main, write_model  # noqa: E402
from tools.board import build  # noqa: E402
from tools.board.compute import Bundles, Server  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests among processes: a file stays in one, and all tests of the emulated board in one."""
    for item in items:
        group = "board" if item.get_closest_marker("board") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; gives its exit status, stdout and stderr."""
    return lambda *arguments: run_main(capsys, *arguments)


def tiny(tmp_path_factory: pytest.TempPathFactory, name: str, **options: Any) -> Path:
    """A tiny checkpoint in a folder of its own."""
    path = tmp_path_factory.mktemp(name) / "model.pth"
    write_model(path, **options)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RWKV-7 with its vocabulary beside it. Not to be changed, nor are the next two."""
    return tiny(tmp_path_factory, "checkpoint")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same sizes."""
    return tiny(tmp_path_factory, "other", seed=1)


@pytest.fixture(scope="session")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights without a vocabulary."""
    return tiny(tmp_path_factory, "wordless", vocabulary=False)


@pytest.fixture(scope="session")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an uninterrupted conversion of `checkpoint` for the CPU. Tests must not change it."""
    return convert(checkpoint, tmp_path_factory.mktemp("whole") / "whole.rwkv")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.rwkv"


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Model:
    """`checkpoint`, opened by NumPy."""
    return load(checkpoint, backend="numpy")


@pytest.fixture(scope="session")
def toolkit_environment() -> toolkit.Environment:
    """Rockchip's compiler, installed in the user's cache on first use. For tests marked `compiler`."""
    found = toolkit.find(toolkit.DEFAULT_VERSION)
    return found or install(progress=lambda line: print(line, file=sys.stderr))


@pytest.fixture(scope="session")
def board_bundles(
    tmp_path_factory: pytest.TempPathFactory, toolkit_environment: toolkit.Environment
) -> dict[str, Path]:
    """Bundles for the RK3588 by generation, with both fusions; that of 7 is the demo model's."""
    folder = tmp_path_factory.mktemp("bundles")
    return {generation: convert_for_board(folder, generation) for generation in GENERATIONS}


@pytest.fixture(scope="session")
def emulated_board(board_bundles: dict[str, Path]) -> Iterator[EmulatedBoard]:
    """The emulated board, made on first use, and the process that computes for it. For tests marked `board`."""
    made = build.make(lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:  # a socket's name is short
        path = Path(folder) / "socket"
        with Server(path, Bundles(list(board_bundles.values()))):
            board = EmulatedBoard(made, path)
            yield board
            board.close()


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """The stand-in for librknnrt.so as this machine loads it. For tests marked `board`."""
    return build.make_standin(lambda line: print(line, file=sys.stderr)) / "x86_64" / "librknnrt.so"


@pytest.fixture
def run_alone(stand_in: Path) -> Callable[..., str]:
    """Runs Python code in a process of its own, on the stand-in; gives what it prints. The stand-in reads its
    variables once a process."""

    def run(code: str, *words: object, **variables: str) -> str:
        environment = {**os.environ, OVERRIDE: str(stand_in), **variables}
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run
