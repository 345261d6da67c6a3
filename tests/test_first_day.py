"""The first day of a newcomer, from a clone to text on a board: every step by the command that the pages give."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emulated import EmulatedBoard
from tests.installed import ROOT, call, dependencies, required
from tools.board.build import _wheel

pytestmark = [pytest.mark.board, pytest.mark.compiler, pytest.mark.install]

Step = Callable[..., subprocess.CompletedProcess[str]]
SENTENCE = ("-p", "Return the ", "-n", 12, "--temp", 0)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a clone of this tree has."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone: there is no list of its files")
    folder = tmp_path_factory.mktemp("day") / "clone"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def step(clone: Path) -> Step:
    """Runs a command in the folder of the clone, with a user's environment; it must succeed."""

    def run(*words: object, typed: str = "") -> subprocess.CompletedProcess[str]:
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        ended = subprocess.run(
            [str(word) for word in words],
            cwd=clone,
            env=variables,
            input=typed,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout[-1000:]}{ended.stderr[-2000:]}"
        return ended

    return run


def test_the_first_day(
    clone: Path, step: Step, emulated_board: EmulatedBoard, board_bundles: dict[str, Path]
) -> None:
    # 1. make demo. Its packages are kept from earlier: the wheel's requirements, and neither numba nor torch.
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    packages = dependencies(sys.executable, version, required(_wheel(print)))
    step("make", ".venv/bin/python", f"PYTHON={sys.executable}")
    (site,) = clone.glob(".venv/lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{packages}\n")
    demo = step("make", "-s", "demo", "PIP=-m pip install --quiet --disable-pip-version-check --no-deps")
    assert demo.stdout.startswith("Return the ") and len(demo.stdout) > 100

    # 2. The README's commands: convert, generate, info, chat, models.
    rwkv_npu = clone / ".venv" / "bin" / "rwkv-npu"
    demo_model = clone / "rwkv_npu" / "data" / "demo" / "model.pth"
    made = step(rwkv_npu, "convert", demo_model, "--target", "none", "--cpu", "int8")
    assert made.stdout == "model.rwkv\n"
    then = made.stderr.splitlines()[-1].removeprefix("next: ")
    assert then.startswith("rwkv-npu generate -m model.rwkv")
    text = step(rwkv_npu, "generate", "-m", "model.rwkv", *SENTENCE).stdout
    assert text.startswith("number of the current process")
    assert "int8 (default)" in step(rwkv_npu, "info", "model.rwkv").stdout
    assert step(rwkv_npu, "chat", "-m", "model.rwkv", "-n", 5, typed="What is a file?\n").stdout.strip()
    again = step(rwkv_npu, "convert", demo_model, "--target", "none")
    assert "nothing" in again.stderr
    assert step(rwkv_npu, "models").stdout

    # 3. make board, in this environment without torch; then export for it, and run there what the wheel has installed.
    assert Path(step("make", "-s", "board").stdout.strip()).is_dir()
    out = clone / "board.rwkv"
    step(rwkv_npu, "export", board_bundles["7"], "--for", "rk3588", "--cpu", "int8", "-o", out)
    ran = emulated_board.run("rwkv-npu", "generate", "-v", "-m", out, *SENTENCE, "--backend", "rknn")
    assert ran.returncode == 0 and "failed" not in ran.stderr, ran.stderr
    assert ran.stdout.startswith("number of the current process")
    assert call(rwkv_npu, "--version") == f"rwkv-npu {step(rwkv_npu, '--version').stdout.split()[1]}\n"
