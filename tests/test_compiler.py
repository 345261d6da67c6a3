"""Rockchip's real compiler and simulator, on a graph like those between two recurrences."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from rwkv_npu import toolkit
from rwkv_npu.errors import ToolkitError
from rwkv_npu.toolkit import child, compiler

pytestmark = pytest.mark.compiler

WIDTH, HIDDEN = 64, 128
TOLERANCE = 2e-3  # of the largest value: fp16 products
EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """A graph with weights in a file beside it, read by offset; symbolic rows M."""

    path: Path
    weights: dict[str, np.ndarray]

    def inputs(self, rows: int) -> dict[str, np.ndarray]:
        """x, y (rows, WIDTH) and last (1, WIDTH)."""
        random = np.random.default_rng(rows)
        shapes = {"y": (rows, WIDTH), "x": (rows, WIDTH), "last": (1, WIDTH)}
        return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def expected(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same maths in NumPy, fp32."""
        w = {name: array.astype(np.float32) for name, array in self.weights.items()}
        x = inputs["x"] + inputs["y"] @ w["out"]
        centred = x - x.mean(-1, keepdims=True)
        h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * w["scale"] + w["bias"]
        shifted = np.concatenate([inputs["last"], h])[:-1]
        mixed = h + (shifted - h) * w["mix"]
        x = x + np.maximum(mixed @ w["key"], 0) ** 2 @ w["value"]
        return {
            "x_out": x,
            "h": h,
            "gate": 1 / (1 + np.exp(-mixed @ w["gate_w"])),
            "decay": np.tanh(mixed @ w["decay_w"]),
        }

    def options(self, rows: int, **more: object) -> toolkit.CompileOptions:
        shapes = {name: array.shape for name, array in self.inputs(rows).items()}
        return toolkit.CompileOptions(input_shapes=shapes, **more)  # type: ignore[arg-type]


def external(name: str, array: np.ndarray, offset: int) -> onnx.TensorProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=1)
    for key, value in {"location": "weights.bin", "offset": offset, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_graph(folder: Path) -> Case:
    random = np.random.default_rng(0)
    wide = {"out": (WIDTH, WIDTH), "key": (WIDTH, HIDDEN), "value": (HIDDEN, WIDTH), "gate_w": (WIDTH, WIDTH)}
    wide["decay_w"] = (WIDTH, WIDTH)
    big = {n: (random.standard_normal(s) / np.sqrt(s[0])).astype(np.float16) for n, s in wide.items()}
    small = {n: random.uniform(0.2, 1, WIDTH).astype(np.float32) for n in ("scale", "bias", "mix")}
    data, constants = bytearray(64), []
    for name, array in big.items():
        constants.append(external(name, array, len(data)))
        data += array.tobytes()
    (folder / "weights.bin").write_bytes(data)
    constants += [onnx.numpy_helper.from_array(array, name) for name, array in small.items()]
    for name, value in {"zero": 0, "minus_one": -1}.items():
        constants.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    node = onnx.helper.make_node
    nodes = [node("Cast", [name], [f"{name}_32"], to=onnx.TensorProto.FLOAT) for name in big]
    nodes += [
        node("MatMul", ["y", "out_32"], ["projected"]),
        node("Add", ["x", "projected"], ["x1"]),
        node("LayerNormalization", ["x1", "scale", "bias"], ["h"], axis=-1, epsilon=EPSILON),
        node("Concat", ["last", "h"], ["rows"], axis=0),
        node("Slice", ["rows", "zero", "minus_one", "zero"], ["shifted"]),
        node("Sub", ["shifted", "h"], ["difference"]),
        node("Mul", ["difference", "mix"], ["part"]),
        node("Add", ["h", "part"], ["mixed"]),
        node("MatMul", ["mixed", "key_32"], ["k"]),
        node("Relu", ["k"], ["r"]),
        node("Mul", ["r", "r"], ["r2"]),
        node("MatMul", ["r2", "value_32"], ["v"]),
        node("Add", ["x1", "v"], ["x_out"]),
        node("MatMul", ["mixed", "gate_w_32"], ["g"]),
        node("Sigmoid", ["g"], ["gate"]),
        node("MatMul", ["mixed", "decay_w_32"], ["d"]),
        node("Tanh", ["d"], ["decay"]),
    ]
    ends = {name: onnx.helper.make_tensor_value_info(name, 1, ["M", WIDTH]) for name in ("y", "x")}
    ends["last"] = onnx.helper.make_tensor_value_info("last", 1, [1, WIDTH])
    outputs = [
        onnx.helper.make_tensor_value_info(n, 1, ["M", WIDTH]) for n in ("x_out", "h", "gate", "decay")
    ]
    made = onnx.helper.make_graph(nodes, "between", list(ends.values()), outputs, constants)
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "between.onnx")
    return Case(folder / "between.onnx", big | small)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return write_graph(tmp_path)


@pytest.fixture(autouse=True)
def no_files_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(temporary.iterdir()) == []
    assert list(tmp_path.rglob(f"{child.PREFIX}*")) == [] and list(tmp_path.rglob("check*.onnx")) == []


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == np.float32 and actual[name].shape == array.shape
        error = np.abs(actual[name] - array).max() / np.abs(array).max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("rows", [1, 64])
def test_build_and_verify(
    toolkit_environment: toolkit.Environment, case: Case, tmp_path: Path, rows: int
) -> None:
    inputs, out = case.inputs(rows), tmp_path / "between.rknn"
    options = case.options(rows, custom_string="0123456789abcdef")
    result = toolkit.compile_graph(toolkit_environment, case.path, out, options, inputs)
    assert result.verify_outputs is not None
    assert_close(result.verify_outputs, case.expected(inputs))
    assert result.cpu_fallback == ()
    # Of one row the square is rewritten (child.py), and its Relu stays an operator of its own.
    relu = "Relu" if rows == 1 else "ConvRelu"
    assert {relu, "exNorm"} <= {layer.op for layer in result.layers}
    # Five matrices: NPU = ceil(M / 16) x 16 x K x N / 512.
    products = 3 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    assert result.cycles is not None and result.cycles.npu == -(-rows // 16) * 16 * products // 512
    assert result.cycles.total >= max(result.cycles.ddr, result.cycles.npu) > 0
    assert result.size == out.stat().st_size > result.npu_weight_bytes > 2 * products
    assert result.npu_internal_bytes > 0 and 5e7 < result.peak_rss_bytes < 1e9
    assert b"0123456789abcdef" in out.read_bytes()
    assert toolkit.rknn_info(out) == {
        "file_version": 6,
        "version": toolkit_environment.version,
        "targets": ["rk3588"],
        "inputs": [{"name": name, "shape": list(array.shape)} for name, array in inputs.items()],
        "outputs": [{"name": n, "shape": [rows, WIDTH]} for n in ("x_out", "h", "gate", "decay")],
    }


def test_simulators(toolkit_environment: toolkit.Environment, case: Case) -> None:
    one = toolkit.Simulator(toolkit_environment, case.path, case.options(1))
    many = toolkit.Simulator(toolkit_environment, case.path, case.options(64))
    with one, many:
        assert one.inputs == ("y", "x", "last") and many.outputs == ("x_out", "h", "gate", "decay")
        for _ in range(2):
            assert_close(one.run(case.inputs(1)), case.expected(case.inputs(1)))
            assert_close(many.run(case.inputs(64)), case.expected(case.inputs(64)))
        with pytest.raises(ToolkitError, match=r"input y has shape \[1, 64\]; \[64, 64\] is expected"):
            many.run(case.inputs(1))
        assert_close(many.run(case.inputs(64)), case.expected(case.inputs(64)))


def test_two_at_a_time(toolkit_environment: toolkit.Environment, case: Case, tmp_path: Path) -> None:
    work = [
        toolkit.Job(case.path, tmp_path / f"m{rows}.rknn", 10**6, case.options(rows), case.inputs(rows))
        for rows in (1, 32, 64)
    ]
    results = dict(toolkit.compile_many(toolkit_environment, work, parallel=2))
    assert len(results) == 3
    for job, rows in zip(work, (1, 32, 64), strict=True):
        outputs = next(result.verify_outputs for done, result in results.items() if done is job)
        assert outputs is not None
        assert_close(outputs, case.expected(case.inputs(rows)))


def test_quantized(toolkit_environment: toolkit.Environment, case: Case, tmp_path: Path) -> None:
    options = case.options(1, precision="w8a8", calibration=[case.inputs(1)] * 2)
    result = toolkit.compile_graph(
        toolkit_environment, case.path, tmp_path / "a.rknn", options, case.inputs(1)
    )
    assert result.verify_outputs is not None
    for name, array in case.expected(case.inputs(1)).items():
        error = np.linalg.norm(result.verify_outputs[name] - array) / np.linalg.norm(array)
        assert 1e-3 < error < 0.2, f"{name}: {error:.1e}"


def edit(case: Case, change: object) -> None:
    model = onnx.load(case.path, load_external_data=False)
    change(model)  # type: ignore[operator]
    onnx.save(model, case.path)


def drop_epsilon(model: onnx.ModelProto) -> None:
    (norm,) = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    del norm.attribute[:]


def rename_op(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "Nope"


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_epsilon, "KeyError: 'LayerNormalization'"),
        (rename_op, "No Op registered for Nope"),
        (newer_opset, "opset 21"),
    ],
)
def test_refused_graphs(
    toolkit_environment: toolkit.Environment, case: Case, tmp_path: Path, change: object, message: str
) -> None:
    edit(case, change)
    out = tmp_path / "a.rknn"
    out.write_text("an earlier one")
    with pytest.raises(
        ToolkitError, match=f"between.onnx cannot be compiled for rk3588: .*{message}"
    ) as caught:
        toolkit.compile_graph(toolkit_environment, case.path, out, case.options(1))
    assert "\n" not in str(caught.value) and out.read_text() == "an earlier one"


def test_missing_weights_are_an_error(
    toolkit_environment: toolkit.Environment, case: Case, tmp_path: Path
) -> None:
    # The compiler only warns about external data that it cannot read, and goes on with random numbers.
    weights = tmp_path / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    with pytest.raises(ToolkitError, match="weights.bin, which holds decay_w, is missing or too short"):
        toolkit.compile_graph(toolkit_environment, case.path, tmp_path / "a.rknn", case.options(1))
    (tmp_path / "beyond").mkdir()
    (tmp_path / "beyond" / "between.onnx").write_bytes(
        case.path.read_bytes().replace(b"weights.bin", b"../weights.")
    )
    (tmp_path / "weights.").write_bytes(data)
    with pytest.raises(ToolkitError, match="the weights beside the graph cannot be read"):
        toolkit.compile_graph(
            toolkit_environment, tmp_path / "beyond" / "between.onnx", tmp_path / "a.rknn", case.options(1)
        )


def test_a_compiler_that_exits(
    toolkit_environment: toolkit.Environment, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compiler.FLOATS, "fp16", "tfloat32")
    with pytest.raises(
        ToolkitError, match=r"Can not support .* tfloat32 \(Rockchip's compiler exited with status 1\)"
    ):
        toolkit.compile_graph(toolkit_environment, case.path, tmp_path / "a.rknn", case.options(1))
