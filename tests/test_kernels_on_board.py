"""numba on the emulated board: its machine code has an RK3588's instructions, and results equal NumPy's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.formats.files import cache_dir
from rwkv_npu.models.spec import GENERATIONS
from tests.tiny import write_model
from tools.board import build

pytestmark = pytest.mark.board

PRODUCTS = Path(__file__).with_name("board_kernels.py")
SECONDS = 900  # most of it is the compiler, under qemu
IDS = [5, 6, 7, 101, 102, 150, 20, 9]

# Features of a Cortex-A76 that kernels are compiled for, as its auxiliary vector and /proc/cpuinfo show them.
FEATURES = """
import json
from pathlib import Path
from rwkv_npu.kernels import processor
shown = {line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("Features")}
print(json.dumps([sorted(processor.available()), sorted(shown)]))
"""
# Reads the ids as a prompt, and then one by one.
FORWARD = """
import sys, numpy as np, rwkv_npu
bundle, out, precision, *ids = sys.argv[1:]
ids = [int(token) for token in ids]
with rwkv_npu.load(bundle, backend="numba", precision=precision) as model:
    logits, state = model.forward(ids, all_logits=True)
    steps = []
    for token in ids:
        step, state = model.forward([token], state)
        steps.append(step)
np.save(out, np.concatenate([logits, steps]))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The board's Python that has numba."""
    return build.make(lambda line: print(line, file=sys.stderr)) / "bin" / "python-numba"


def start(python: Path, *words: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(python), *map(str, words)],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err[-2000:]
    return out


def test_the_processor_is_that_of_an_rk3588(python: Path) -> None:
    available, shown = json.loads(end(start(python, "-c", FEATURES)))
    assert {"neon", "dotprod", "fullfp16"} <= set(available)
    assert not {"i8mm", "bf16", "sve"} & set(available)
    (features,) = shown  # all cores have the same
    assert {"asimddp", "asimdhp"} <= set(features.split()) and "i8mm" not in features


def test_int8_products_use_sdot(python: Path) -> None:
    """For tokens (gemv) and prompts (gemm), in int8 and int4."""
    found: dict[str, dict[str, Any]] = {}
    for process in [start(python, PRODUCTS, kernel) for kernel in ("gemv", "gemm")]:
        result = json.loads(end(process))
        assert result["set"] == "Arm dotprod"
        found |= result["kernels"]
    assert found.keys() == {f"{kernel} int{bits}" for kernel in ("gemv", "gemm") for bits in (8, 4)}
    for name, one in found.items():
        assert one["sdot"] >= 16 and one["error"] < 1e-6, (name, one)


@pytest.mark.skipif("RWKV_CAMPAIGN" not in os.environ, reason="make campaign: kernels compile for an hour")
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_and_format(generation: str, python: Path, tmp_path: Path) -> None:
    """The board's results equal this machine's, which other tests compare with NumPy's."""
    write_model(tmp_path / "model.pth", generation)
    for cpu in ("int8", "int4", "fp16", "fp32"):
        bundle = rwkv_npu.convert(tmp_path / "model.pth", tmp_path / f"{cpu}.rwkv", target="none", cpu=cpu)
        out = tmp_path / f"{cpu}.npy"
        cache = str(cache_dir() / "board-kernels")
        end(start(python, "-c", FORWARD, bundle, out, cpu, *IDS, RWKV_NPU_CACHE=cache))
        with rwkv_npu.load(bundle, backend="numba", precision=cpu) as model:
            logits, state = model.forward(IDS, all_logits=True)
            steps = []
            for token in IDS:
                step, state = model.forward([token], state)
                steps.append(step)
        expected = np.concatenate([logits, steps])
        np.testing.assert_allclose(np.load(out), expected, atol=1e-3 * np.abs(expected).max(), err_msg=cpu)
