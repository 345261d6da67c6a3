"""Models in int8 on the emulated board, where a process on this machine computes as NumPy does in int8, and rounds to
fp16 between the products. Now and then that sends an input to the next step of int8: a product is a step off here and
there, and what comes of a whole text is another draw of the same errors.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.model import demo_model
from rwkv_npu.models.maths import log_softmax
from rwkv_npu.text.corpus import calibration_text
from tests.emulated import EmulatedBoard, run_artifacts
from tools.board.calls import count, read_calls
from tools.board.compute import Bundles, Server

pytestmark = pytest.mark.board

PRECISIONS = ("fp16", "mixed")
CALIBRATED = 128  # tokens: few, since all that matters here is that both sides have the same ranges
TOKENS, PROMPT = 24, 21
READ = 64  # tokens, twenty calls and that of the head
# Outputs that are products as they are, of the attention of a group's last layer.
PRODUCTS = {"r": "att.receptance.weight", "k": "att.key.weight", "v": "att.value.weight"}

# In each precision: the text's logits after the prompt and after each token, and what was opened, as a line of JSON.
# "" leaves the precision to the bundle.
FORCED = """
import json, sys
import numpy as np
import rwkv_npu
bundle, folder, ids, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
for precision in sys.argv[5:]:
    with rwkv_npu.load(bundle, backend="rknn", precision=precision or None, threads=1) as model:
        logits, state = model.forward(ids[:prompt])
        rows = [logits]
        for token in ids[prompt:] if precision else ():
            logits, state = model.forward([token], state, inplace=True)
            rows.append(logits)
        faults = model.engine.counters.faults
        print(json.dumps([model.precision, faults.calls, faults.groups]))
    np.save(f"{folder}/{precision}.npy", np.stack(rows))
"""

# In each precision: opens contexts that are a seventh off their recorded rows; prints what failed, or the error.
OFF = """
import json, sys
import rwkv_npu
from rwkv_npu.runtime import loading
from rwkv_npu.backends.base import GoldenVectors
right = loading.self_test

def off(source):
    rows = right(source).items()
    return {group: GoldenVectors(r.inputs, {k: v * 7 / 6 for k, v in r.outputs.items()}) for group, r in rows}

loading.self_test = off
for precision in sys.argv[2:]:
    try:
        with rwkv_npu.load(sys.argv[1], backend="rknn", precision=precision, threads=1) as model:
            print(json.dumps(list(model.engine.counters.faults.groups)))
    except rwkv_npu.errors.RwkvNpuError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def bundle(board_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with artifacts in fp16, and after them in mixed, which has every large projection in int8."""
    folder = tmp_path_factory.mktemp("int8")
    out = Path(shutil.copytree(board_bundles["7"], folder / "model.rwkv"))
    (folder / "map.json").write_text('{"*": "w8a8"}')
    (folder / "ids.json").write_text(json.dumps(prose()[:CALIBRATED]))
    options = {"precision_map": folder / "map.json", "calibrate": [folder / "ids.json"]}
    return rwkv_npu.convert(demo_model(), out, precision="mixed", rows=16, **options)  # type: ignore[arg-type]


def prose() -> list[int]:
    with rwkv_npu.load(backend="numpy") as model:
        return [int(token) for token in calibration_text(model.encode).ids]


@pytest.fixture(scope="module")
def socket(bundle: Path) -> Iterator[Path]:
    """The socket of the process that computes this bundle's groups."""
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
        path = Path(folder) / "socket"
        with Server(path, Bundles([bundle])):
            yield path


@dataclass(frozen=True)
class Forced:
    """By precision, logits on the board and in NumPy, (1 + TOKENS, V); and a line of what was opened for each of
    PRECISIONS and for none, with the stand-in's log of them."""

    board: dict[str, np.ndarray]
    numpy: dict[str, np.ndarray]
    opened: list[list[object]]
    log: Path


@pytest.fixture(scope="module")
def forced(
    emulated_board: EmulatedBoard, bundle: Path, socket: Path, tmp_path_factory: pytest.TempPathFactory
) -> Forced:
    folder, ids = tmp_path_factory.mktemp("forced"), prose()[CALIBRATED:][: PROMPT + TOKENS]
    words = [bundle, folder, json.dumps(ids), PROMPT, *PRECISIONS, ""]
    result = emulated_board.run("python", "-c", FORCED, *words, socket=socket, log=folder / "log")
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]
    numpy = {}
    for precision in PRECISIONS:
        with rwkv_npu.load(bundle, backend="numpy", precision=precision) as model:
            numpy[precision] = model.forward(ids, all_logits=True)[0][PROMPT - 1 :]
    board = {precision: np.load(folder / f"{precision}.npy") for precision in (*PRECISIONS, "")}
    return Forced(board, numpy, [json.loads(line) for line in result.stdout.splitlines()], folder / "log")


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL of logits (T, V), nats a token."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_int8_error_on_the_board_equals_numpys(forced: Forced) -> None:
    exact = forced.numpy["fp16"]
    expected, found = (divergence(exact, logits["mixed"]) for logits in (forced.numpy, forced.board))
    assert expected / 2 < found < expected * 2
    assert divergence(exact, forced.board["fp16"]) < found / 20  # that int8 it is


def test_the_precision_that_is_asked_for_is_opened(forced: Forced, bundle: Path) -> None:
    """By default the bundle's first precision is used. Nothing of the other one is loaded."""
    assert forced.opened == [["fp16", 0, {}], ["mixed", 0, {}], ["fp16", 0, {}]]
    assert (forced.board[""] == forced.board["fp16"][:1]).all()
    artifacts = open_bundle(bundle).manifest.artifacts
    each = [
        sum((a.precision, a.fusion) == (p, "layer") for a in artifacts) for p in ("fp16", "mixed", "fp16")
    ]
    assert count(read_calls(forced.log), "init").total() == sum(each)


def test_products_are_in_steps_of_int8(
    emulated_board: EmulatedBoard, bundle: Path, socket: Path, tmp_path: Path
) -> None:
    """For the same inputs, results equal NumPy's but for single int8 steps. fp16 results lie between the steps."""
    opened, compared = open_bundle(bundle), 0
    off_grid: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for precision in PRECISIONS:
        ran = run_artifacts(emulated_board, tmp_path, bundle, 16, precision, fusions=["layer"], socket=socket)
        for group, outputs, expected in ran:
            for port, found, numpy in zip(group.outputs, outputs, expected, strict=True):
                if port.name not in PRODUCTS or group.role not in ("first", "mid"):
                    continue
                layer = 0 if group.role == "first" else group.layer + 1
                scale = opened.quantised(f"blocks.{layer}.{PRODUCTS[port.name]}").params.outputs[0].scale
                steps = found / scale
                off_grid[precision].append(np.abs(steps - np.rint(steps)).mean())
                if precision == "mixed" and group.role == "first":  # no product in int8 lies before
                    flips = np.abs(found - numpy) / scale
                    assert flips.max() < 1.5 and (flips > 0.5).mean() < 0.08, port.name
                    compared += 1
    assert compared == 3 and len(off_grid["mixed"]) == 3 * opened.spec.L
    assert max(off_grid["mixed"]) < 0.05 and min(off_grid["fp16"]) > 0.2


def test_the_self_test_allows_for_int8(emulated_board: EmulatedBoard, bundle: Path, socket: Path) -> None:
    """The drift that int8 rounding causes passes; in fp16 the same drift does not."""
    result = emulated_board.run("python", "-c", OFF, bundle, "mixed", "fp16", socket=socket)
    assert result.returncode == 0, result.stderr[-2000:]
    mixed, fp16 = result.stdout.splitlines()
    assert json.loads(mixed) == [] and "6 of 6 contexts fail their self-test" in fp16


def test_the_command_line_in_int8(emulated_board: EmulatedBoard, bundle: Path, socket: Path) -> None:
    """Each token written is NumPy's most likely one, or within the rounding error of it."""
    prompt, tokens = prose()[-PROMPT:], 12
    words = [
        "generate",
        "-m",
        bundle,
        "--ids",
        "-p",
        joined(prompt),
        "-n",
        tokens,
        "--temp",
        0,
        "-t",
        1,
        "-v",
    ]
    result = emulated_board.run("rwkv-npu", *words, "--precision", "mixed", socket=socket)
    assert result.returncode == 0, result.stderr[-2000:]
    assert ", mixed weights, rknn, layer fusion, 6 calls a token" in result.stderr
    assert "failed" not in result.stderr and "warning" not in result.stderr
    written = [int(token) for token in result.stdout.split()]
    with rwkv_npu.load(bundle, backend="numpy", precision="mixed") as model:
        logits = model.forward([*prompt, *written], all_logits=True)[0][PROMPT - 1 : -1]
    behind = logits.max(-1) - logits[np.arange(tokens), written]
    assert len(written) == tokens and behind.max() < 0.3 * logits.std() and np.median(behind) == 0


def joined(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))
