"""The groups as ONNX graphs: valid, named as the checkpoint, and the same numbers as the maths they record."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rwkv_npu.backends.ort import share_threads
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.graphs import trace
from rwkv_npu.graphs.onnx import inline_model
from rwkv_npu.graphs.trace import Constant, trace_group
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Group, Scaling, groups, tensors
from rwkv_npu.runtime.weights import CheckpointSource
from tests.compiler_graphs import compiler_model
from tests.ragged import ragged_inputs
from tools.make_checkpoint import make_checkpoint, make_spec

# No two sizes are equal, and most are no multiple of SPLIT.
SIZES = {"D": 96, "N": 24, "F": 160, "V": 101, "L": 3}
RANKS = {"6": {"mix": 8, "decay": 40}, "7": {"w": 16, "a": 40, "v": 8, "g": 72}}
RANKS["7a"] = {**RANKS["7"], "s": 9}
SPLIT = 64  # widest matrix that is left whole, here
BOUND = 1e-5  # over the largest value of an output

# What Rockchip's compiler has been seen to place on the NPU, or to fold away.
OPERATORS = {"MatMul", "Add", "Sub", "Mul", "Tanh", "Sigmoid", "Relu"}
OPERATORS |= {"LayerNormalization", "Concat", "Slice"}


@pytest.fixture(scope="module", params=[(g, f) for g in GENERATIONS for f in FUSIONS], ids="-".join)
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CheckpointSource]:
    generation, fusion = request.param
    path = tmp_path_factory.mktemp("graphs") / "model.pth"
    make_checkpoint(path, generation=generation, ranks=RANKS.get(generation), dtype="fp32", **SIZES)
    source = CheckpointSource(open_checkpoint(path), fusion)
    # With every factor that a graph may hold.
    source.program = Program(source.spec, fusion, Scaling(ffn=4.0, residual_every=2))
    yield source


def graph_of(
    source: CheckpointSource, group: Group, rows: int | None = None, split: int | None = None
) -> onnx.ModelProto:
    return inline_model(trace_group(source.program, group, rows=rows, split=split), group.name, source.tensor)


def inputs_of(group: Group, rows: int, begins: tuple[int, ...] = (0,)) -> dict[str, np.ndarray]:
    """Random rows of several sequences, which begin at the rows `begins`."""
    return ragged_inputs(group, rows, begins, np.random.default_rng(rows))


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A graph of one row has no mask."""
    inputs = {end.name: inputs[end.name] for end in model.graph.input}
    share_threads(None)  # as all sessions of this process must, once one does
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(ours) == list(expected)
    for name, array in expected.items():
        assert ours[name].shape == array.shape, name
        assert np.abs(ours[name] - array).max() <= BOUND * max(1.0, np.abs(array).max()), name


def by_the_maths(
    source: CheckpointSource, group: Group, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    outputs = source.evaluate(group, NumpyMaths(source.tensor), inputs)
    return {port.name: outputs[port.name] for port in group.outputs}


# -- form ------------------------------------------------------------------------------------------------

FORMS = [(None, None), (1, None), (4, None), (4, SPLIT)]


@pytest.mark.parametrize(("rows", "split"), FORMS, ids=str)
def test_graphs_are_valid_and_old_enough(
    source: CheckpointSource, rows: int | None, split: int | None
) -> None:
    for group in source.program.groups:
        model = graph_of(source, group, rows, split)
        onnx.checker.check_model(model, full_check=True)
        assert model.ir_version <= 10
        assert [(opset.domain, opset.version <= 19) for opset in model.opset_import] == [("", True)]
        # The row count where it is symbolic; nothing that computes a shape where it is not.
        allowed = OPERATORS | ({"Shape"} if rows is None else set())
        assert {node.op_type for node in model.graph.node} <= allowed


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_inputs_and_outputs_are_those_of_the_group_table(source: CheckpointSource, rows: int | None) -> None:
    """The same names in the same order, (M, width). A single row needs no mask."""
    for group in groups(source.spec, source.program.fusion):
        graph = graph_of(source, group, rows).graph
        inputs = [port for port in group.inputs if port.name != "mask" or rows != 1]
        for ports, ends in ((inputs, graph.input), (group.outputs, graph.output)):
            assert [end.name for end in ends] == [port.name for port in ports]
            for port, end in zip(ports, ends, strict=True):
                first, width = end.type.tensor_type.shape.dim
                assert (first.dim_param, first.dim_value) == (("M", 0) if rows is None else ("", rows))
                assert width.dim_value == port.width
                assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_constants_are_named_as_in_the_checkpoint(source: CheckpointSource) -> None:
    """Every projection in one group, under its name; of a stack, one after the other. Nothing but that, vectors
    and a few literals."""
    table = {tensor.name: tensor for tensor in tensors(source.spec)}
    found: Counter[str] = Counter()
    for group in source.program.groups:
        for constant in graph_of(source, group).graph.initializer:
            name, index = re.fullmatch(r"(.*?)(?:\.([0-4]))?", constant.name).groups()  # type: ignore[union-attr]
            if constant.name.startswith("literal."):
                continue
            expected = source.tensor(name)
            expected = expected if index is None else expected[int(index)]
            assert (onnx.numpy_helper.to_array(constant) == expected).all()
            if table[name].kind.is_projection:
                found[constant.name] += 1
    wanted = []
    for tensor in tensors(source.spec):
        if tensor.kind.is_projection and not tensor.optional:
            stacked = len(tensor.used_shape) == 3
            wanted += [f"{tensor.name}.{i}" for i in range(5)] if stacked else [tensor.name]
    assert found == Counter(wanted)


def test_nodes_are_named_as_in_the_checkpoint(source: CheckpointSource) -> None:
    """What the compiler reports by name can be found in the model."""
    table = {tensor.name for tensor in tensors(source.spec)}
    for group in source.program.groups:
        outputs = {port.name for port in group.outputs}
        names = [node.name for node in graph_of(source, group).graph.node]
        assert len(set(names)) == len(names)
        for node in graph_of(source, group).graph.node:
            if (
                node.op_type == "MatMul"
                and not node.input[1].startswith("literal.")
                and node.output[0] not in outputs
            ):
                plain = re.sub(r"(\.[0-4])?(\.product)?$", "", node.name)
                assert plain in table or f"{plain}.weight" in table


def test_split_leaves_no_wide_matrix(source: CheckpointSource) -> None:
    for group in source.program.groups:
        model = graph_of(source, group, 4, SPLIT)
        constants = {constant.name: constant for constant in model.graph.initializer}
        seen: dict[str, int] = {}
        for node in model.graph.node:
            if node.op_type == "MatMul" and not node.input[1].startswith("literal."):
                assert max(constants[node.input[1]].dims) <= SPLIT
                name = re.sub(r"(\.k\d+)?(\.n\d+)?$", "", node.input[1])
                seen[name] = seen.get(name, 0) + prod(constants[node.input[1]].dims)
        whole = trace_group(source.program, group).projections
        assert seen == {
            label: constant.of(source.tensor(constant.name)).size for label, constant in whole.items()
        }


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("L", [1, 2, 5])
def test_calls_per_token(generation: str, L: int) -> None:
    spec = make_spec(generation, **{**SIZES, "L": L})
    layer, projection = (groups(spec, fusion) for fusion in ("layer", "projection"))
    assert len(layer) == L + 2 and len(projection) == 3 * L + 1
    for cut in (layer, projection):
        assert len({group.name for group in cut}) == len(cut)
        assert cut[-1].name == "head"
    mids = [f"mid.{i}" for i in range(L - 1)]
    assert [group.name for group in layer] == ["first", *mids, "last", "head"]
    with pytest.raises(UsageError, match="fusion='none' is unknown"):
        groups(spec, "none")


# -- numbers ---------------------------------------------------------------------------------------------


SEGMENTS = [(1, (0,)), (4, (0,)), (6, (0, 1, 4)), (3, (0, 1, 2))]


@pytest.mark.parametrize(("rows", "begins"), SEGMENTS, ids=str)
def test_symbolic_graphs_compute_the_maths(
    source: CheckpointSource, rows: int, begins: tuple[int, ...]
) -> None:
    for group in source.program.groups:
        inputs = inputs_of(group, rows, begins)
        assert_same(run(graph_of(source, group), inputs), by_the_maths(source, group, inputs))


@pytest.mark.parametrize("begins", [(0,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize(("rows", "split"), [form for form in FORMS if form[0]], ids=str)
def test_fixed_graphs_compute_the_maths(
    source: CheckpointSource, rows: int, split: int | None, begins: tuple[int, ...]
) -> None:
    for group in source.program.groups:
        inputs = inputs_of(group, rows, begins[:rows])
        assert_same(run(graph_of(source, group, rows, split), inputs), by_the_maths(source, group, inputs))


@pytest.mark.parametrize("split", [32, 64, 96, 128])
def test_any_split_computes_the_same(source: CheckpointSource, split: int) -> None:
    """Matrices are split into equal and unequal parts, along inputs and outputs."""
    for group in source.program.groups:
        inputs = inputs_of(group, 2)
        assert_same(run(graph_of(source, group, 2, split), inputs), by_the_maths(source, group, inputs))


def test_rows_do_not_see_later_ones(source: CheckpointSource) -> None:
    """Padding at the end of a call must not change the other rows."""
    for group in source.program.groups:
        inputs = inputs_of(group, 4)
        changed = {name: array.copy() for name, array in inputs.items()}
        for port in group.inputs:
            if not port.name.endswith(("prev", "mask")):
                changed[port.name][2:] = 9
        model = graph_of(source, group, 4)
        one, other = run(model, inputs), run(model, changed)
        assert all((one[name][:2] == other[name][:2]).all() for name in one)


def test_weights_in_fp16_are_widened(source: CheckpointSource) -> None:
    """Bundles store weights in fp16; the arithmetic stays in fp32."""

    def rounded(name: str) -> np.ndarray:
        tensor = source.tensor(name)
        projection = kinds[name].is_projection
        return tensor.astype(np.float16).astype(np.float32) if projection else tensor

    kinds = {tensor.name: tensor.kind for tensor in tensors(source.spec)}
    for group in source.program.groups:
        inputs = inputs_of(group, 3)
        model = inline_model(trace_group(source.program, group), group.name, source.tensor, np.float16)
        onnx.checker.check_model(model, full_check=True)
        expected = source.evaluate(group, NumpyMaths(rounded), inputs)
        assert_same(run(model, inputs), {port.name: expected[port.name] for port in group.outputs})


def test_the_compiler_gets_one_row_whole_and_many_split(tmp_path: Path) -> None:
    """K or N above 8192 is split at more than one row."""
    make_checkpoint(tmp_path / "wide.pth", generation="7", D=32, N=32, F=8224, V=11, L=1, dtype="fp32")
    source = CheckpointSource(open_checkpoint(tmp_path / "wide.pth"), "projection")
    group = next(group for group in source.program.groups if group.role == "ffn")
    for rows, parts in ((1, 1), (2, 2)):
        model = compiler_model(source.program, group, rows, source.tensor)
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        assert len(products) == 2 * parts
        inputs = inputs_of(group, rows)
        assert_same(run(model, inputs), by_the_maths(source, group, inputs))


def test_literals_with_equal_digests_stay_separate(
    source: CheckpointSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short names may collide, as all of a shape do here."""
    monkeypatch.setattr(trace, "hashlib", SimpleNamespace(blake2b=lambda *_, **__: hashlib.blake2b(b"")))
    for group in source.program.groups:
        inputs = inputs_of(group, 4, (0, 2))
        assert_same(run(graph_of(source, group, 4, SPLIT), inputs), by_the_maths(source, group, inputs))


def test_constants_cut_their_rows_and_columns() -> None:
    stack = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    cut = Constant("a", index=1, rows=(1, 3), columns=(0, 2))
    assert (cut.of(stack) == stack[1, 1:3, 0:2]).all()
    choices = itertools.product((None, 0, 1), (None, (0, 2), (2, 3)), (None, (0, 1), (1, 4)))
    labels = [Constant("a", *choice).label for choice in choices]
    assert len(set(labels)) == len(labels)
