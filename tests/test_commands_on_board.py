"""Commands about the machine, on the emulated board: doctor, info, tune, and generate with a plan."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from rwkv_npu.conversion.export import export
from rwkv_npu.runtime.placement import TUNED
from tests.emulated import EmulatedBoard
from tools.board import chip

pytestmark = pytest.mark.board

# Every command in one process, since most of a command's time on the board is Python's start.
COMMANDS = """
import json, sys
from rwkv_npu.runtime import tuning
from rwkv_npu.cli import main
tuning.SECONDS = 0.1
for argv in json.loads(sys.argv[1]):
    print("\\f", main(argv), flush=True)
    print("\\f", file=sys.stderr, flush=True)
"""


# qemu asks the host, and not the root folder, whether a user who is not root may use a file: the NPU's node is closed.
ORDINARY = os.geteuid() != 0


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def bundle(board_bundles: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to which a test may add a plan."""
    return Path(shutil.copytree(board_bundles["4"], tmp_path_factory.mktemp("commands") / "model.rwkv"))


@pytest.fixture(scope="module")
def exported(bundle: Path) -> Path:
    return export(bundle, bundle.with_name("board.rwkv"), target="rk3588", cpu="int8")


@pytest.fixture(scope="module")
def ended(emulated_board: EmulatedBoard, bundle: Path, exported: Path) -> dict[str, Ended]:
    generate = ["generate", "-m", bundle, "--ids", "-p", "5,6,7", "-n", 4, "--temp", 0, "-v"]
    commands = {
        "doctor": ["doctor", "-m", bundle, "--json"],
        "info": ["info", bundle],
        "auto": generate,
        "tune": ["tune", "-m", bundle, "-t", 1, "--json"],
        "tuned": generate,
        "exported": [*generate, "-m", exported, "--backend", "rknn"],
        "plan": [*generate, "--plan", "prefill=rknn,decode=rknn-matmul", "--fusion", "projection"],
    }
    words = json.dumps([[str(word) for word in argv] for argv in commands.values()])
    result = emulated_board.run("python", "-c", COMMANDS, words, fresh=True)
    assert result.returncode == 0, result.stderr[-2000:]
    out, err = [], result.stderr.split("\f\n")
    rest = result.stdout
    for _ in commands:
        text, _, rest = rest.partition("\f")
        status, _, rest = rest.partition("\n")
        out.append((int(status), text))
    return {name: Ended(*out[n], err[n]) for n, name in enumerate(commands)}


def test_doctor(ended: dict[str, Ended]) -> None:
    findings = {finding["what"]: finding for finding in json.loads(ended["doctor"].out)}
    node = findings.pop("NPU node")
    assert node["level"] == ("bad" if ORDINARY else "ok") and ended["doctor"].status == int(ORDINARY)
    assert {finding["level"] for finding in findings.values()} <= {"ok", "note"}
    assert {findings[what]["level"] for what in ("rknn-toolkit-lite2", "versions")} == {"ok"}
    assert findings["board"]["found"] == f"{chip.MODEL}, rk3588"
    assert findings["NPU driver"]["found"] == chip.DRIVER
    assert (
        findings["librknnrt"]["found"]
        == "2.5.0 (/usr/lib/librknnrt.so), reads artifacts of toolkit 2.5.0 and older"
    )
    assert "4, 5, 6, 7" in findings["cores"]["found"]
    assert findings["ddr clock"]["found"] == "2112 of 2112 MHz, governor performance"
    assert findings["versions"]["found"] == "librknnrt 2.5.0 reads the artifacts of toolkit 2.3.2"
    assert findings["NPU memory"]["found"].startswith("7 contexts (of 150)")


def test_info(ended: dict[str, Ended]) -> None:
    assert ended["info"].status == 0 and ended["info"].err == ""
    assert (
        "rk3588 fp16 (default), layer fusion, rows 1, 16\n    artifacts  7, by toolkit" in ended["info"].out
    )


def test_tune_measures_the_npu_and_generate_follows(ended: dict[str, Ended], bundle: Path) -> None:
    facts = json.loads(ended["tune"].out)
    for fusion in ("layer", "projection"):
        for backend in ("rknn", "rknn-matmul", "ort", "numpy"):
            taken = facts["measured"][f"{fusion} {backend}"]
            assert all(value > 0 for use in taken.values() for value in use.values())
            assert (taken["decode"]["rows"], taken["prefill"]["rows"]) == (1, 16)
    assert (bundle / TUNED).exists() and facts["machine"].startswith("rk3588, ")
    assert (
        "backend: rknn reads prompts" in ended["auto"].err and "rwkv-npu tune measures" in ended["auto"].err
    )
    assert "backend: measured by rwkv-npu tune on this machine: decode" in ended["tuned"].err
    assert f", {facts['fusion']} fusion" in ended["tuned"].err


def test_a_plan_mixes_the_npus_backends(ended: dict[str, Ended]) -> None:
    assert "rknn for prompts, rknn-matmul for tokens, projection fusion" in ended["plan"].err
    texts = {ended[name].out for name in ("auto", "tuned", "plan")}
    assert len(texts) == 1 and len(texts.pop().split()) == 4


def test_an_exported_bundle_runs_on_its_npu(ended: dict[str, Ended]) -> None:
    assert ended["exported"].out == ended["auto"].out
    assert "backend: as asked" in ended["exported"].err and "failed" not in ended["exported"].err


def test_prints_of_rockchips_libraries_are_hidden(ended: dict[str, Ended]) -> None:
    for name, one in ended.items():
        assert one.status == int(ORDINARY and name == "doctor")
        lines = (one.out + one.err).splitlines()
        assert not [line for line in lines if line.startswith(("W ", "E ", "I ")) or "RKNN_ERR" in line]
