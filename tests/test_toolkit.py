"""The toolkit room and Rockchip's compiler: messages, logs, `.rknn` files, options."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_npu import toolkit
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.toolkit import child, log
from tests.fake_compiler import LOG

ROOT = Path(__file__).resolve().parent.parent


# -- messages between the processes --------------------------------------------------------------------------


def test_messages_survive_the_stream() -> None:
    arrays = {
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.float16),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "turned": np.arange(6, dtype=np.int8).reshape(2, 3).T,
    }
    stream = io.BytesIO()
    child.send(stream, {"action": "run", "text": "é"}, arrays)
    child.send(stream, {"action": "again"})
    stream.seek(0)
    message = child.receive(stream)
    assert message is not None
    header, received = message
    assert header == {"action": "run", "text": "é"} and list(received) == list(arrays)
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype and received[name].shape == array.shape
        np.testing.assert_array_equal(received[name], array)
    assert child.receive(stream) == ({"action": "again"}, {})
    assert child.receive(stream) is None


def test_a_message_cut_off_is_an_error() -> None:
    stream = io.BytesIO()
    child.send(stream, {"action": "run"}, {"x": np.ones(100, np.float32)})
    for size in (20, len(stream.getvalue()) - 1):
        with pytest.raises((EOFError, struct.error)):
            child.receive(io.BytesIO(stream.getvalue()[:size]))


# -- what the compiler prints --------------------------------------------------------------------------------


def test_layer_table() -> None:
    rows = log.layers(LOG + LOG)  # a dynamic graph prints a table a shape: the first counts
    assert [row.op for row in rows] == [
        "InputOperator", "Reshape", "ConvRelu", "Transpose", "ConvAdd", "OutputOperator",
    ]  # fmt: skip
    assert rows[2] == log.Layer(
        "ConvRelu", "FLOAT16", "NPU", "(1,768,1,1),(3072,768,1,1)", "(1,3072,1,1)",
        199809, 73728, 199809, 4609, "Conv:a#2",
    )  # fmt: skip
    assert log.cycles(rows) == log.Cycles(ddr=199909, npu=110592, total=236673)
    assert log.cpu_fallback(rows) == ("Transpose:c tp",)
    assert log.memory(LOG) == (16896, 2 * 1024**2)


def test_the_layer_table_of_the_rk3576_has_a_column_more() -> None:
    row = (
        "D RKNN: [15:27:31.899] 8    Conv               INT8     NPU    (1,192,1,1),(192,192,1,1),(192)          "
        "(1,192,1,1)            5196/576/5196            0%           37           Conv:blocks.1.att.output#2"
    )
    (found,) = log.layers(f"Network Layer Information Table\n{row}\n")
    assert (found.total_cycles, found.kilobytes, found.name) == (5196, 37, "Conv:blocks.1.att.output#2")


def test_no_layer_table() -> None:
    assert log.layers("nothing") == () and log.memory("nothing") == (0, 0)


@pytest.mark.parametrize(
    ("text", "otherwise", "expected"),
    [
        (
            "I rknn building ...\n\x1b[1;31mE\x1b[0m \x1b[1;31mbuild: Traceback (most recent call last):\n"
            "  File \"rknn/api/rknn_base.py\", line 2007, in build\nKeyError: 'LayerNormalization'\n\x1b[0m\n"
            "W build: ===== WARN(2) =====\nE rknn-toolkit2 version: 2.5.0\nTraceback (most recent call last):\n",
            "ValueError: Traceback (most recent call last):\n  File \"x\"\nKeyError: 'LayerNormalization'\n",
            "KeyError: 'LayerNormalization'",
        ),
        (
            "D RKNN: [03:01:29.200] <<<<<<<< end: x\nE RKNN: [03:01:29.201] Can not support request type: tf32\n",
            "the compiler exited with status 1",
            "Can not support request type: tf32 (the compiler exited with status 1)",
        ),
        ("I nothing wrong\n", "RuntimeError: build returned -1", "build returned -1"),
        ("", "ValueError: Unsupport onnx opset 22, need <= 19!", "Unsupport onnx opset 22, need <= 19!"),
    ],
)
def test_last_error(text: str, otherwise: str, expected: str) -> None:
    assert log.last_error(text, otherwise) == expected


# -- .rknn files ---------------------------------------------------------------------------------------------


def rknn_file(path: Path) -> bytes:
    tensors = [
        {"tensor_id": 0, "url": "y", "size": [1, 8]},
        {"tensor_id": 1, "url": "x", "size": [1, 8]},
        {"tensor_id": 2, "url": "out", "size": [1, 4]},
    ]
    links = [("input", 0, 0), ("output", 0, 2), ("input", 1, 1)]
    trailer = {
        "version": "2.5.0",
        "target_platform": ["rk3588"],
        "norm_tensor": tensors,
        "graph": [{"left": a, "left_tensor_id": b, "right_tensor_id": c} for a, b, c in links],
    }
    text = json.dumps(trailer).encode()
    data = struct.pack("<4s4xQQ40x", b"RKNN", 6, 200) + bytes(200) + struct.pack("<Q", len(text)) + text
    path.write_bytes(data)
    return data


def test_rknn_info(tmp_path: Path) -> None:
    path = tmp_path / "a.rknn"
    rknn_file(path)
    assert toolkit.rknn_info(path) == {
        "file_version": 6,
        "version": "2.5.0",
        "targets": ["rk3588"],
        "inputs": [{"name": "y", "shape": [1, 8]}, {"name": "x", "shape": [1, 8]}],
        "outputs": [{"name": "out", "shape": [1, 4]}],
    }


def test_rknn_info_of_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a.rknn"
    data = rknn_file(path)
    for size in (0, 3, 30, 64, 100, 264, 270, 300, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(BundleError):
            toolkit.rknn_info(path)
    for damaged in (b"ONNX" + data[4:], data.replace(b"norm_tensor", b"nerm_tensor"), data[:-1] + b"\xff"):
        path.write_bytes(damaged)
        with pytest.raises(BundleError):
            toolkit.rknn_info(path)
    with pytest.raises(BundleError, match="cannot read"):
        toolkit.rknn_info(tmp_path / "none.rknn")


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "rk3399"}, "unknown target rk3399"),
        ({"precision": "int3"}, "rk3588 cannot run int3"),
        ({"precision": "w4a16"}, "rk3588 cannot run w4a16"),
        ({"precision": "w8a8"}, "needs calibration"),
        ({"custom_string": "x" * 1024}, "custom_string"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        toolkit.CompileOptions(**options)  # type: ignore[arg-type]


def test_options_as_the_child_takes_them() -> None:
    assert toolkit.CompileOptions(input_shapes={"x": (np.int64(2), 3)}, custom_string="hash").request() == {
        "config": {
            "target_platform": "rk3588",
            "optimization_level": 3,
            "float_dtype": "float16",
            "custom_string": "hash",
        },
        "input_shapes": {"x": [2, 3]},
        "int8": {},
    }
    rows = [{"x": np.zeros(2)}, {"x": np.ones(2)}]
    quantized = toolkit.CompileOptions(precision="w8a8", calibration=rows)
    assert quantized.request()["config"]["quantized_dtype"] == "w8a8"
    assert list(quantized.arrays()) == ["0/x", "1/x"]
    chosen = toolkit.CompileOptions(int8={"w": ((-1.0, 2.0), (0.0, 3.0))}).request()
    assert chosen["config"]["quantized_dtype"] == "w8a8"
    assert chosen["int8"] == {"w": {"input": (-1.0, 2.0), "output": (0.0, 3.0)}}


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, rwkv_npu.toolkit; print({'onnx', 'onnxruntime', 'torch', 'rknn', 'tqdm'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert answer.stdout.strip() == "set()"
