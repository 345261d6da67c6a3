"""int8 in Rockchip's simulator beside int8 in NumPy: each projection alone, whole groups, and whole models.

A group's inputs reach a product in fp16 there and in fp32 here, which now and then rounds to the next number: it is
counted, and each such difference is of one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rwkv_npu import toolkit
from rwkv_npu.backends.base import relative_error
from rwkv_npu.conversion.calibration import calibrate
from rwkv_npu.conversion.quantise import sizes
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.graphs.trace import compiler_trace
from rwkv_npu.model import demo_model, load
from rwkv_npu.models.maths import log_softmax
from rwkv_npu.models.spec import Group
from rwkv_npu.quant.npu import NPU_WIDTH, Int8Maths, Quantised
from rwkv_npu.quant.ranges import choose
from rwkv_npu.quant.smoothing import smoothings
from rwkv_npu.runtime.selftest import golden_vectors
from rwkv_npu.runtime.weights import CheckpointSource
from rwkv_npu.toolkit import OLDEST_INT8, TARGETS, CompileOptions, compile_graph
from tests.compiler_graphs import compiler_model
from tests.tiny import run_main, write_model

pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    return CheckpointSource(open_checkpoint(demo_model()))


@pytest.fixture(scope="module")
def quantised(source: CheckpointSource) -> dict[str, Quantised]:
    """All projections that can be int8, smoothed, with parameters from a few random tokens."""
    ids = np.random.default_rng(0).integers(1, source.spec.V, 256)
    seen = calibrate(source, ids, rows=64).projections
    found = {}
    for name in sizes(source.spec):
        weight = source.tensor(name)
        ranges = choose(name, weight, seen[name], smoothings(weight, seen[name])[1:]).params
        assert ranges.smoothing is not None
        found[name] = Quantised.of(ranges, weight)
    assert sum(np.ptp(q.params.smoothing) > 0 for q in found.values()) > len(found) / 2
    return found


def group_of(source: CheckpointSource, name: str) -> Group:
    (found,) = [group for group in source.program.groups if group.name == name]
    return found


def simulated(
    source: CheckpointSource,
    group: str,
    rows: int,
    chosen: Mapping[str, Quantised],
    environment: toolkit.Environment,
    folder: Path,
    target: str = "rk3588",
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Simulator and NumPy agree on a group, for rows of a real pass. Nothing is left to the board's CPU."""
    found = group_of(source, group)
    wanted = {port.name for port in found.fixed_inputs(rows)}
    vectors = golden_vectors(source, rows)[group].inputs
    inputs = {name: array for name, array in vectors.items() if name in wanted}
    model = compiler_model(source.program, found, rows, source.tensor, chosen)
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    trace = compiler_trace(source.program, found, rows, {name: q.params for name, q in chosen.items()})
    int8 = {weight: (given.span, made.span) for weight, (given, made) in trace.int8.items()}
    options = CompileOptions(target, int8=int8)
    result = compile_graph(environment, folder / "g.onnx", folder / "g.rknn", options, inputs)
    assert not result.cpu_fallback and result.verify_outputs is not None
    assert sum(layer.dtype == "INT8" and layer.op.startswith("Conv") for layer in result.layers) == len(int8)
    return result.verify_outputs, source.evaluate(found, Int8Maths(source.tensor, chosen.get), dict(vectors))


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(
    ("group", "name", "output"),
    [
        ("head", "head.weight", "logits"),
        ("mid.1", "blocks.2.att.receptance.weight", "r"),
        ("mid.1", "blocks.2.att.key.weight", "k"),
        ("mid.1", "blocks.2.att.value.weight", "v"),
        ("mid.1", "blocks.1.att.output.weight", "x_out"),
        ("mid.1", "blocks.1.ffn.key.weight", "x_out"),
        ("mid.1", "blocks.1.ffn.value.weight", "x_out"),
    ],
)
def test_a_product_equals_the_simulators(
    group: str,
    name: str,
    output: str,
    rows: int,
    source: CheckpointSource,
    quantised: dict[str, Quantised],
    toolkit_environment: toolkit.Environment,
    tmp_path: Path,
) -> None:
    rows = 1 if group == "head" else rows
    chosen = {name: quantised[name]}
    theirs, ours = simulated(source, group, rows, chosen, toolkit_environment, tmp_path)
    if output == "x_out":
        assert relative_error({output: theirs[output]}, {output: ours[output]}) < 0.01
    else:  # the product itself: a step off here and there, where an input in fp16 rounds to the other side
        steps = np.abs(theirs[output] - ours[output]) / quantised[name].params.outputs[0].scale
        assert steps.max() < 1.5 and (steps > 0.5).mean() < 0.08


@pytest.mark.parametrize(
    ("target", "version"),
    [*((target, OLDEST_INT8) for target in TARGETS[1:]), *((t, toolkit.VERSIONS[0]) for t in TARGETS)],
)
def test_other_chips_and_compilers(
    target: str,
    version: str,
    source: CheckpointSource,
    quantised: dict[str, Quantised],
    toolkit_environment: toolkit.Environment,
    tmp_path: Path,
) -> None:
    """All products of a layer, at one row: with more, RK3566 and RK3568 leave transposes to the CPU, in fp16 too."""
    environment = toolkit_environment if version == toolkit.DEFAULT_VERSION else toolkit.find(version)
    if environment is None:
        pytest.skip(f"rwkv-npu toolkit install --version {version} installs it")
    members = compiler_trace(source.program, group_of(source, "mid.1"), 1).projections
    chosen = {name: quantised[name] for name in members if name in quantised}
    theirs, ours = simulated(source, "mid.1", 1, chosen, environment, tmp_path, target)
    assert len(chosen) == 6 and relative_error(theirs, ours) < 0.02


@pytest.mark.parametrize("rows", [1, 64])
def test_wide_products_are_sums_of_parts(
    rows: int, toolkit_environment: toolkit.Environment, tmp_path: Path
) -> None:
    """Wider than the compiler's limit for int8 and, at several rows, wider than the NPU's limit."""
    write_model(tmp_path / "m" / "model.pth", F=NPU_WIDTH + 256)
    source = CheckpointSource(open_checkpoint(tmp_path / "m" / "model.pth"))
    name = "blocks.0.ffn.value.weight"
    seen = calibrate(source, np.random.default_rng(0).integers(1, source.spec.V, 300)).projections[name]
    weight = np.asarray(source.tensor(name), np.float32)
    chosen = {name: Quantised.of(choose(name, weight, seen).params, weight)}
    assert len(chosen[name].params.outputs) == 4
    theirs, ours = simulated(source, "mid.0", rows, chosen, toolkit_environment, tmp_path)
    assert relative_error({"x_out": theirs["x_out"]}, {"x_out": ours["x_out"]}) < 0.005


def test_a_model_in_the_simulator_predicts_as_it_does_in_numpy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All large matrices of the demo model are int8, and its predictions hardly change."""
    out = tmp_path / "o"
    options = ("--precision", "mixed", "--rows", "1,64", "--cpu", "fp16", "--verify")
    status, _, err = run_main(capsys, "convert", demo_model(), "-o", out, *options)
    assert status == 0 and "large projections in int8" in err
    manifest = open_bundle(out).manifest
    assert manifest.int8["mixed"].share >= 0.8 and manifest.int8["mixed"].kl < 0.005
    assert not any(artifact.on_cpu for artifact in manifest.artifacts)
    tokens = np.random.default_rng(0).integers(1, manifest.spec.V, 65)
    found = {}
    for backend in ("rknn-sim", "numpy"):
        with load(out, backend=backend, precision="mixed") as model:
            logits, state = model.forward(tokens[:64], all_logits=True)
            last, _ = model.forward(tokens[64:], state)
            found[backend] = np.concatenate([logits, last[None]])
    with load(demo_model(), backend="numpy") as model:
        exact = model.forward(tokens, all_logits=True)[0]
    reference = log_softmax(exact)
    for backend, logits in found.items():
        kl = (np.exp(reference) * (reference - log_softmax(logits))).sum(-1).mean()
        assert kl < 0.02, backend  # of random tokens: what is calibrated with is text
    assert relative_error({"x": found["rknn-sim"]}, {"x": found["numpy"]}) < 0.1


def test_bfloat16_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    options = ("--precision", "bf16", "--rows", "1", "--cpu", "fp16", "--verify")
    assert run_main(capsys, "convert", demo_model(), "-o", out, *options)[0] == 0
    errors = [artifact.error for artifact in open_bundle(out).manifest.artifacts]
    assert all(error is not None and error < 0.05 for error in errors)
