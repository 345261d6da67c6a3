"""All-zero constants, which Rockchip's compiler cannot build, are left out of its graphs. Results stay exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from rwkv_npu import toolkit
from rwkv_npu.backends.base import relative_error
from rwkv_npu.conversion.calibration import calibrate
from rwkv_npu.conversion.quantise import sizes
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.graphs import trace as tracing
from rwkv_npu.graphs.onnx import zeros_in
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Group
from rwkv_npu.quant.npu import Int8Maths, Quantised
from rwkv_npu.quant.ranges import choose
from rwkv_npu.runtime.selftest import golden_vectors
from rwkv_npu.runtime.weights import CheckpointSource
from rwkv_npu.toolkit import CompileOptions, compile_graph
from tests.compiler_graphs import compiler_model
from tests.ragged import ragged_inputs
from tests.tiny import V, write_model

# Ends of names of tensors, of every generation: what one model has of zeros. "att" and "ffn" are all matrices there.
CASES = {
    "unused": ("att.v1", "att.v2", "ln2.weight", "ffn.x_k", "ffn.time_maa_k", "ffn.time_mix_k"),
    "attention": ("att.receptance.weight", "att.key.weight", "att.value.weight", "att.gate.weight"),
    "shifts": (
        *(f"att.x_{c}" for c in "rwkvag"),
        *(f"att.time_mix_{c}" for c in "rkvg"),
        *(f"att.time_maa_{c}" for c in "xwkvrg"),
        *(
            "ffn.x_k",
            "ffn.time_mix_k",
            "ffn.time_mix_r",
            "ffn.time_maa_k",
            "ffn.time_maa_r",
            "att.time_maa_w2",
        ),
    ),
    "output": ("att.output.weight", "ffn.value.weight"),
    "channel mix": ("ffn.key.weight", "ffn.receptance.weight", "ffn.s1"),
    "low rank": ("att.w1", "att.a2", "att.g1", "att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1"),
    "vectors": (
        "ln1.weight",
        "ln1.bias",
        "att.a0",
        "att.x_k",
        "att.time_maa_x",
        "att.time_mix_k",
        "ln_out.weight",
    ),
}


class Silent(CheckpointSource):
    """A model in which some tensors are `value` everywhere, in layer 1 and outside of layers."""

    def __init__(self, path: Path, fusion: str, ends: tuple[str, ...], value: float = 0.0):
        super().__init__(open_checkpoint(path), fusion)
        self._ends, self._value = ends, np.float32(value)

    def tensor(self, name: str) -> np.ndarray:
        array = super().tensor(name)
        return np.full_like(array, self._value) if self._is_silent(name) else array

    def _is_silent(self, name: str) -> bool:
        return "blocks.0." not in name and name.endswith(self._ends)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("zeros")

    def made(generation: str) -> Path:
        path = folder / f"{generation}.pth"
        if not path.exists():
            write_model(path, generation, vocabulary=False)
        return path

    return made


def rows_for(group: Group, rows: int) -> dict[str, np.ndarray]:
    return ragged_inputs(group, rows, [0, *range(2, rows, 3)], np.random.default_rng(0))


def check(source: CheckpointSource, group: Group, rows: int) -> onnx.ModelProto:
    """The graph computes what NumPy computes. Only norms are all zero in it, and it reads every input."""
    model = compiler_model(source.program, group, rows, source.tensor)
    onnx.checker.check_model(model, full_check=True)
    given = rows_for(group, rows)
    expected = source.evaluate(group, NumpyMaths(source.tensor), dict(given))
    ports = group.fixed_inputs(rows)
    found = ReferenceEvaluator(model).run(None, {port.name: given[port.name] for port in ports})
    for port, array in zip(group.outputs, found, strict=True):
        assert array.shape == expected[port.name].shape == (rows, port.width)
        np.testing.assert_allclose(array, expected[port.name], rtol=1e-3, atol=1e-5, err_msg=port.name)
    used = {name for node in model.graph.node for name in node.input}
    assert {port.name for port in ports} <= used
    for tensor in model.graph.initializer:
        assert tensor.name in used
        assert onnx.numpy_helper.to_array(tensor).any() or "ln" in tensor.name or "literal" in tensor.name
    return model


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_graph_without_its_zeros_computes_the_same(
    generation: str, case: str, fusion: str, models: Callable[[str], Path]
) -> None:
    source = Silent(models(generation), fusion, CASES[case])
    for group in source.program.groups:
        for rows in (1, 3):
            check(source, group, rows)


def test_every_matrix_but_the_head_may_be_zero(models: Callable[[str], Path]) -> None:
    source = Silent(models("7a"), "layer", ("att.output.weight", "ffn.value.weight", "ffn.s2", "head.weight"))
    for group in source.program.groups:
        check(source, group, 3)


def test_a_part_of_a_wide_matrix_is_left_out(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of the key's columns and of the value's rows are zero, and then all parts of both but one."""
    monkeypatch.setattr(tracing, "NPU_WIDTH", 64)
    source = CheckpointSource(open_checkpoint(models("7")), "projection")
    whole = source.tensor

    def partly(name: str) -> np.ndarray:
        array = whole(name)
        if name.endswith("ffn.key.weight"):
            array = array.copy()
            array[:, 64:128] = 0
        if name.endswith("ffn.value.weight"):
            array = array.copy()
            array[128:192] = 0
        return array

    source.tensor = partly  # type: ignore[method-assign]
    model = check(source, source.program.group("ffn", 1), 3)
    names = {tensor.name for tensor in model.graph.initializer}
    assert "blocks.1.ffn.key.weight.n0" in names and "blocks.1.ffn.key.weight.n64" not in names
    assert not names & {"blocks.1.ffn.value.weight.k64", "blocks.1.ffn.value.weight.k128"}


def test_zero_in_fp16_is_zero(models: Callable[[str], Path]) -> None:
    source = Silent(models("7"), "layer", ("att.key.weight",), value=1e-9)
    group = source.program.group("mid", 0)
    names = {t.name for t in compiler_model(source.program, group, 1, source.tensor).graph.initializer}
    assert "blocks.1.att.key.weight" not in names and "blocks.1.att.value.weight" in names


def test_a_model_without_zeros_is_traced_as_before(models: Callable[[str], Path]) -> None:
    source = CheckpointSource(open_checkpoint(models("6")))
    for group in source.program.groups:
        plain = tracing.compiler_trace(source.program, group, 3)
        asked = tracing.compiler_trace(source.program, group, 3, is_zero=lambda constant: False)
        for name in ("nodes", "projections", "int8", "vectors", "inputs", "outputs"):
            assert getattr(asked, name) == getattr(plain, name)
        assert asked.literals.keys() == plain.literals.keys()
        for name, literal in plain.literals.items():
            np.testing.assert_array_equal(asked.literals[name], literal)


@pytest.mark.compiler
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_compiler_builds_graphs_with_zeros(
    generation: str,
    rows: int,
    models: Callable[[str], Path],
    tmp_path: Path,
    toolkit_environment: toolkit.Environment,
) -> None:
    """In fp16: the zeros of a trained model, and outputs that are all zero."""
    cases = CASES["unused"], CASES["attention"] + CASES["output"]
    for number, ends in enumerate(cases):
        source = Silent(models(generation), "layer", ends)
        group = source.program.group("mid", 0)
        file = tmp_path / f"{number}.onnx"
        file.write_bytes(compiler_model(source.program, group, rows, source.tensor).SerializeToString())
        given = rows_for(group, rows)
        ports = [port.name for port in group.fixed_inputs(rows)]
        inputs = {name: given[name] for name in ports}
        result = compile_graph(toolkit_environment, file, tmp_path / "a.rknn", CompileOptions(), inputs)
        assert result.cpu_fallback == () and result.verify_outputs is not None
        info = toolkit.rknn_info(tmp_path / "a.rknn")
        assert [port["name"] for port in info["inputs"]] == ports
        expected = source.evaluate(group, NumpyMaths(source.tensor), dict(given))
        assert relative_error(result.verify_outputs, expected) < 0.01


@pytest.mark.compiler
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("generation", ["4", "6", "7"])
def test_the_compiler_builds_int8_graphs_with_zeros(
    generation: str,
    rows: int,
    models: Callable[[str], Path],
    tmp_path: Path,
    toolkit_environment: toolkit.Environment,
) -> None:
    """Every large projection is in int8, the all-zero ones too."""
    source = Silent(models(generation), "layer", CASES["unused"] + ("att.key.weight", "ffn.value.weight"))
    samples = calibrate(source, np.random.default_rng(0).integers(1, V, 128), rows=32).projections
    chosen = {}
    for name in sizes(source.spec):
        weight = source.tensor(name)
        chosen[name] = Quantised.of(choose(name, weight, samples[name]).params, weight)
    group = source.program.group("mid", 0)
    parameters = {name: quantised.params for name, quantised in chosen.items()}
    trace = tracing.compiler_trace(source.program, group, rows, parameters, zeros_in(source.tensor))
    int8 = {weight: (given.span, made.span) for weight, (given, made) in trace.int8.items()}
    assert int8 and not any(name.startswith("blocks.1.att.key") for name in int8)
    (tmp_path / "g.onnx").write_bytes(
        compiler_model(source.program, group, rows, source.tensor, chosen).SerializeToString()
    )
    recorded = golden_vectors(source, rows)[group.name].inputs
    given = {port.name: recorded[port.name] for port in group.fixed_inputs(rows)}
    options = CompileOptions(int8=int8)
    result = compile_graph(toolkit_environment, tmp_path / "g.onnx", tmp_path / "g.rknn", options, given)
    assert result.cpu_fallback == () and result.verify_outputs is not None
    expected = source.evaluate(group, Int8Maths(source.tensor, chosen.get), dict(recorded))
    for name, array in expected.items():
        if not array.any():
            assert not result.verify_outputs[name].any(), name
        else:  # an input in fp16 may round to another number
            assert relative_error({name: result.verify_outputs[name]}, {name: array}) < 0.05, name
