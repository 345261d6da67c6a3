"""The emulated board itself: Rockchip's wheel on the stand-in, which computes what the compiled graphs compute."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulated import EmulatedBoard, run_artifacts
from tools.board import build
from tools.board.calls import bytes_moved, count, read_calls

pytestmark = pytest.mark.board

FP16_ERROR = 3e-3  # relative, rms: as for the simulator in test_rknn.py

# The command line with another RKNNLite before the board's own.
WITH_LITE = """
import sys
sys.path.insert(0, sys.argv[1])
from rwkv_npu import cli
import rknnlite
assert rknnlite.__file__.startswith(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""


def test_the_oldest_rknnlite_that_may_be_installed(emulated_board: EmulatedBoard, board_bundles) -> None:
    """The oldest RKNNLite writes the same text, and faults are handled in the same way."""
    wanted = re.search(r"rknn-toolkit-lite2>=([\d.]+)", (build.REPOSITORY / "pyproject.toml").read_text())
    assert wanted
    lite = build.make_lite(wanted[1], lambda line: print(line, file=sys.stderr))
    words = ["generate", "-m", board_bundles["4"], "--ids", "-p", "5,6,7", "-n", 6, "--temp", 0, "-t", 1]
    words += ["--backend", "rknn"]
    expected = emulated_board.run("rwkv-npu", *words, lite=True).stdout
    for faults, said in (
        ("", "generated 6"),
        ("run-fails@20", "1 calls"),
        ("wrong-size@4+:head", ": head\n"),
    ):
        result = emulated_board.run("python", "-c", WITH_LITE, lite, *words, faults=faults, lite=True)
        assert result.returncode == 0 and result.stdout == expected != "", result.stderr
        assert said in result.stderr


def test_rknnlite_computes_every_group(emulated_board: EmulatedBoard, board_bundles, tmp_path: Path) -> None:
    ran = 0
    for group, found, expected in run_artifacts(emulated_board, tmp_path, board_bundles["7"], 16):
        for port, one, other in zip(group.outputs, found, expected, strict=True):
            error = np.sqrt(np.square(one - other).mean() / np.square(other).mean())
            assert error < FP16_ERROR, f"{group.name}.{port.name}"
            ran += 1
    assert ran > 8


def test_the_log_counts_calls_and_bytes(emulated_board: EmulatedBoard, board_bundles, tmp_path: Path) -> None:
    log = tmp_path / "log"
    groups = [
        group for group, _, _ in run_artifacts(emulated_board, tmp_path, board_bundles["7"], 1, log=log)
    ]
    calls = read_calls(log)
    for name in ("init", "inputs_set", "run", "outputs_get", "destroy"):
        assert count(calls, name).total() == len(groups), name
    assert set(count(calls, "run")) == {group.name for group in groups}
    widths = sum(port.width for group in groups for port in (*group.fixed_inputs(1), *group.outputs))
    assert bytes_moved(calls) == 4 * widths
    assert calls[-1].name == "destroy" and calls[-1].number("open") == 0
