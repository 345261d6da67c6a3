"""The toolkit package without Rockchip's compiler: a fake child stands in for it where a process is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest

from rwkv_npu import toolkit
from rwkv_npu.errors import BundleError, ToolkitError, UsageError
from rwkv_npu.files import cache_dir
from rwkv_npu.toolkit import child, environment, install, log, schedule
from rwkv_npu.toolkit.worker import Worker

ROOT = Path(__file__).resolve().parent.parent

# Printed by rknn-toolkit2 2.5.0 (dates cut), a Transpose on the CPU put in.
LOG = """\
I rknn-toolkit2 version: 2.5.0
D RKNN: [03:01:29.251] >>>>>> start: rknn::RKNNModelRegCmdbuildPass
D RKNN: [03:01:29.252] --------------------------------------------------------------------------------
D RKNN: [03:01:29.252]                      Network Layer Information Table                            \x20
D RKNN: [03:01:29.252] --------------------------------------------------------------------------------
D RKNN: [03:01:29.252] ID   OpType         DataType Target InputShape                      OutputShape   \
Cycles(DDR/NPU/Total)    RW(KB)       FullName       \x20
D RKNN: [03:01:29.252] --------------------------------------------------------------------------------
D RKNN: [03:01:29.252] 0    InputOperator  FLOAT16  CPU    \\                               (1,768)       \
0/0/0                    0            InputOperator:x\x20
D RKNN: [03:01:29.252] 1    Reshape        FLOAT16  NPU    (1,768),(4)                     (1,768,1,1)   \
0/0/0                    1            Reshape:x_rs   \x20
D RKNN: [03:01:29.252] 2    ConvRelu       FLOAT16  NPU    (1,768,1,1),(3072,768,1,1)      (1,3072,1,1)  \
199809/73728/199809      4609         Conv:a#2       \x20
D RKNN: [03:01:29.252] 3    Transpose      FLOAT16  CPU    (1,3072,1,1)                    (1,1,1,3072)  \
0/0/0                    6            Transpose:c tp \x20
D RKNN: [03:01:29.252] 4    ConvAdd        FLOAT16  NPU    (1,1536,1,1),(768,1536,1,1),... (1,768,1,1)   \
100/36864/36864          2308         Conv:y#2_tile0_ConvAdd
D RKNN: [03:01:29.252] 5    OutputOperator FLOAT16  CPU    (1,768)                         \\             \
0/0/0                    1            OutputOperator:y
D RKNN: [03:01:29.284] Total Internal Memory Size: 16.5KB
D RKNN: [03:01:29.284] Total Weight Memory Size: 2MB
"""


# --- messages between the processes


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


# --- what the compiler prints


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


# --- .rknn files


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


# --- options


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


# --- where the compiler lives


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a running interpreter without the compiler."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RWKV_NPU_CACHE", str(folder))
    monkeypatch.setattr(environment, "_running", lambda: (None, None))
    return folder


def program(path: Path, body: str) -> Path:
    """An executable file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def pretend_installed(version: str) -> Path:
    return program(environment.private_dir(version) / "bin" / "python", "#!/bin/sh\n")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RWKV_NPU_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "rwkv_npu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "rwkv_npu"
    monkeypatch.setenv("RWKV_NPU_CACHE", str(tmp_path / "own"))
    assert environment.private_dir("2.5.0") == tmp_path / "own" / "toolkit-2.5.0"


def test_nothing_installed(cache: Path) -> None:
    assert toolkit.find() is None and toolkit.status() == [] and toolkit.remove() == []
    with pytest.raises(ToolkitError, match="run `rwkv-npu toolkit install`$"):
        toolkit.require()
    with pytest.raises(ToolkitError, match="run `rwkv-npu toolkit install --version 2.3.2`$"):
        toolkit.require("2.3.2")
    with pytest.raises(ToolkitError, match="1.6.0 is not supported: choose one of 2.5.0, 2.3.2"):
        toolkit.require("1.6.0")


def test_private_environments(cache: Path) -> None:
    older = pretend_installed("2.3.0")
    assert toolkit.find() == toolkit.Environment(older, "2.3.0", private=True)
    assert toolkit.find("2.5.0") is None
    newer = pretend_installed("2.5.0")
    assert toolkit.require().python == newer and toolkit.require("2.3.0").python == older
    assert [(s.version, s.problem) for s in toolkit.status()] == [("2.5.0", None), ("2.3.0", None)]
    newer.unlink()  # as when the Python that it was made from is uninstalled
    assert toolkit.require().version == "2.3.0"
    assert [bool(s.problem) for s in toolkit.status()] == [True, False]
    assert toolkit.remove("2.3.0") == [cache / "toolkit-2.3.0"]
    (cache / "toolkit-2.2.0.partial").mkdir()
    assert toolkit.remove() == [cache / "toolkit-2.5.0", cache / "toolkit-2.2.0"]
    assert list(cache.iterdir()) == []


def test_own_interpreter_is_preferred_if_it_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"rknn-toolkit2": "2.3.2", "onnx": "1.18.0", "setuptools": "75.8.0", "protobuf": "4.25.4"}

    def version_of(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setenv("RWKV_NPU_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    private = pretend_installed("2.5.0")
    own = toolkit.Environment(Path(sys.executable), "2.3.2", private=False)
    assert toolkit.find() == own and toolkit.find("2.3.2") == own
    assert toolkit.require("2.5.0").python == private
    assert own.command(Path("a.py"), "b") == [sys.executable, "a.py", "b"]
    assert toolkit.require("2.5.0").command(Path("a.py")) == [str(private), "-I", "a.py"]
    versions["onnx"] = "1.19.0"  # it imports onnx.mapping, which is gone
    assert toolkit.require().python == private
    assert toolkit.status()[0].problem == "onnx 1.19.0 is too new for it"
    with pytest.raises(ToolkitError, match="onnx 1.19.0 is too new"):
        toolkit.require("2.3.2")


# --- installing


def test_pins() -> None:
    assert set(install.PINS) >= {"numpy", "onnx", "protobuf", "onnxruntime", "setuptools"}
    assert not {"torch", "rknn-toolkit2"} & set(install.PINS)
    assert all(pin.replace(".", "").isdigit() for pin in install.PINS.values())
    assert toolkit.VERSIONS[0] == toolkit.DEFAULT_VERSION and set(environment.MACHINES) == set(
        toolkit.VERSIONS
    )


def test_stand_in_for_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_bytes(Path(install.__file__).with_name("stand_in_torch.py").read_bytes())
    code = """
        import torch, torch.nn as nn
        class Model(nn.Module): pass
        @torch.no_grad()
        def double(x): return 2 * x
        with torch.no_grad(): assert double(2) == 4
        assert not isinstance(1, torch.Tensor) and Model()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)


def answering(path: Path, answer: str) -> Path:
    """A fake interpreter that prints `answer` to whatever it is asked."""
    return program(path, f"#!/bin/sh\necho {answer}\n")


def test_find_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.find_python() == Path(sys.executable)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(ToolkitError, match="needs Python 3.12 or 3.11 or 3.10; .* none of python3.12"):
        install.find_python()
    program(tmp_path / "python3.12", "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
    answering(tmp_path / "python3.11", "pypy 3 11")
    python = answering(tmp_path / "python3", "cpython 3 10")
    assert install.find_python() == python
    assert install.find_python("python3") == python
    newer = answering(tmp_path / "newer", "cpython 3 13")
    with pytest.raises(ToolkitError, match="this is 3.13; 3.12 or 3.11 or 3.10 is needed"):
        install.find_python(newer)
    with pytest.raises(ToolkitError, match="not a working CPython"):
        install.find_python(tmp_path / "python3.12")
    with pytest.raises(ToolkitError, match="no such program"):
        install.find_python(tmp_path / "none")


@pytest.fixture
def steps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, str] | BaseException]:
    """What the commands of an installation answer, by a word in them; the default is to succeed."""
    answers: dict[str, tuple[int, str] | BaseException] = {}

    def run(command: list[str], settings: dict[str, str], say: object = None) -> tuple[int, list[str]]:
        if "venv" in command:
            folder = Path(command[-1])
            shutil.rmtree(folder, ignore_errors=True)
            pretend = program(folder / "bin" / "python3", "#!/bin/sh\n")
            (folder / "bin" / "python").symlink_to(pretend.name)
            program(folder / "bin" / "pip", "#!/bin/sh\n")
            (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        for word, answer in answers.items():
            if word in command:
                if isinstance(answer, BaseException):
                    raise answer
                return answer[0], answer[1].splitlines()
        return 0, []

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
    return answers


Steps = dict[str, tuple[int, str] | BaseException]


def test_install(cache: Path, steps: Steps) -> None:
    lines: list[str] = []
    made = install.install("2.3.2", sys.executable, lines.append)
    assert made == toolkit.find("2.3.2") and made.python.exists()
    site = cache / "toolkit-2.3.2" / "lib" / "python3.11" / "site-packages"
    assert "class no_grad" in (site / "torch.py").read_text()
    assert sorted(p.name for p in (cache / "toolkit-2.3.2" / "bin").iterdir()) == ["python", "python3"]
    assert not (cache / "toolkit-2.3.2.partial").exists()
    steps["venv"] = AssertionError("installed twice")
    assert install.install("2.3.2", progress=lines.append) == made and "already installed" in lines[-1]


@pytest.mark.parametrize(
    ("step", "answer", "message"),
    [
        (
            "pip",
            (1, "WARNING: Retrying (Retry(total=1)) after NewConnectionError\nERROR: No matching distribution for x"),
            "pip could not install rknn-toolkit2 2.5.0: No matching distribution for x .*cannot be reached",
        ),
        (
            "pip",
            (1, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"),
            "No space left on device$",
        ),
        ("venv", (1, "Error: [Errno 13] Permission denied"), "cannot make a virtual environment: Error: .* denied"),
        ("venv", (1, "created unsuccessfully because ensurepip is not\navailable."), "apt install python3-venv"),
        ("import rknn.api", (1, "ImportError: libGL.so.1"), "installed but cannot be imported: ImportError: libGL"),
    ],
)  # fmt: skip
def test_failed_installation_leaves_nothing(
    cache: Path, steps: Steps, step: str, answer: tuple[int, str], message: str
) -> None:
    steps[step] = answer
    with pytest.raises(ToolkitError, match=message) as caught:
        install.install(python=sys.executable)
    assert "\n" not in str(caught.value)
    assert [p.name for p in cache.iterdir()] == ["lock"]


def test_interrupted_installation_leaves_nothing(cache: Path, steps: Steps) -> None:
    steps["pip"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        install.install(python=sys.executable)
    assert [p.name for p in cache.iterdir()] == ["lock"]


def test_debian_python_without_ensurepip(cache: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    original, commands = install._run, []

    def run(command: list[str], settings: dict[str, str], say: object = None) -> tuple[int, list[str]]:
        commands.append(command)
        if "venv" in command and "--without-pip" not in command:
            return 1, ["ensurepip is not available"]
        return original(command, settings)

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    install.install(python=sys.executable)  # with the running interpreter's pip
    partial = cache / "toolkit-2.5.0.partial"
    assert commands[2][:5] == [sys.executable, "-m", "pip", "--python", str(partial / "bin" / "python")]


def test_machines_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(ToolkitError, match="for Linux on x86_64 and aarch64 only .this is Darwin on arm64"):
        install.install()
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ToolkitError, match="2.2.0 for Linux on x86_64 only"):
        install.install("2.2.0")
    assert not cache.exists()


def test_no_room(cache: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**8))
    with pytest.raises(ToolkitError, match=r"1.2 GB are needed, 0.1 GB are free"):
        install.install(python=sys.executable)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RWKV_NPU_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(ToolkitError, match="cannot install in .*: Not a directory"):
        install.install()


# --- processes, with a fake child: the "graph" says what it does

FAKE = """\
#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from rwkv_npu.toolkit.child import receive, send
scratch = sys.argv[-1]
source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
while message := receive(source):
    request, arrays = message
    if request["action"] == "run":
        send(sink, {{"peak_rss_bytes": 2}}, {{name + "_out": 2 * array for name, array in arrays.items()}})
        continue
    words = open(request["onnx"]).read().split()
    with open(scratch + "/log", "w") as log:
        log.write({log!r})
        if words[0] == "exit":
            log.write("E RKNN: [00:00:00.000] Bad thing\\n")
    with open(os.path.dirname(request["onnx"]) + "/events", "a") as events:
        events.write("start " + os.path.basename(request["onnx"]) + "\\n")
    if words[0] == "exit":
        sys.exit(int(words[1]))
    if words[0] == "kill":
        os.kill(os.getpid(), 9)
    if words[0] == "fail":
        send(sink, {{"error": "ValueError: " + words[1]}})
        continue
    time.sleep(float(words[1]))
    if request["out"]:
        open(request["out"], "w").write("artifact")
    with open(os.path.dirname(request["onnx"]) + "/events", "a") as events:
        events.write("end " + os.path.basename(request["onnx"]) + "\\n")
    send(sink, {{"inputs": ["x"], "outputs": ["x_out"], "peak_rss_bytes": 1}})
"""


@pytest.fixture
def fake(tmp_path: Path) -> toolkit.Environment:
    text = FAKE.format(python=sys.executable, root=str(ROOT), log=LOG)
    return toolkit.Environment(program(tmp_path / "bin" / "python", text), "2.5.0", private=True)


def graph(folder: Path, name: str, words: str) -> Path:
    path = folder / name
    path.write_text(words)
    return path


def left_over(folder: Path) -> list[Path]:
    # os.walk passes over a folder that its owner removes meanwhile, where rglob raises.
    return [
        Path(at, name)
        for at, folders, _ in os.walk(folder)
        for name in folders
        if name.startswith(child.PREFIX)
    ]


def test_compile_graph(fake: toolkit.Environment, tmp_path: Path) -> None:
    path, out = graph(tmp_path, "a.onnx", "sleep 0"), tmp_path / "a.rknn"
    result = toolkit.compile_graph(fake, path, out)
    assert (result.path, result.size, result.version) == (out, 8, "2.5.0")
    assert result.cycles == log.Cycles(199909, 110592, 236673) and result.verify_outputs is None
    assert (result.cpu_fallback, result.npu_weight_bytes) == (("Transpose:c tp",), 2 * 1024**2)
    verified = toolkit.compile_graph(fake, path, out, verify_inputs={"x": np.ones(3, np.float32)})
    assert verified.verify_outputs is not None and verified.peak_rss_bytes == 2
    np.testing.assert_array_equal(verified.verify_outputs["x_out"], np.full(3, 2, np.float32))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fail reason", "a.onnx cannot be compiled for rk3588: reason"),
        ("exit 1", r"a.onnx cannot be compiled for rk3588: Bad thing \(Rockchip's compiler exited with status 1\)"),
        ("kill", "killed, most likely for lack of memory"),
    ],
)  # fmt: skip
def test_failed_builds(fake: toolkit.Environment, tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        toolkit.compile_graph(fake, graph(tmp_path, "a.onnx", words), tmp_path / "a.rknn")
    assert not (tmp_path / "a.rknn").exists() and left_over(tmp_path) == []


def test_graphs_and_folders_that_are_not_there(fake: toolkit.Environment, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no such graph"):
        toolkit.compile_graph(fake, tmp_path / "none.onnx", tmp_path / "a.rknn")
    path = graph(tmp_path, "a.onnx", "sleep 0")
    with pytest.raises(ToolkitError, match="cannot write in .*none: No such file"):
        toolkit.compile_graph(fake, path, tmp_path / "none" / "a.rknn")
    missing = toolkit.Environment(tmp_path / "no-python", "2.5.0", private=True)
    with pytest.raises(ToolkitError, match="cannot run .*no-python"):
        toolkit.compile_graph(missing, path, tmp_path / "a.rknn")
    assert left_over(tmp_path) == []


def test_simulator(fake: toolkit.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = graph(tmp_path, "a.onnx", "sleep 0")
    with toolkit.Simulator(fake, path) as simulator:
        assert (simulator.inputs, simulator.outputs) == (("x",), ("x_out",))
        for value in (1, 2):
            outputs = simulator.run({"x": np.full(2, value, np.float32)})
            np.testing.assert_array_equal(outputs["x_out"], np.full(2, 2 * value))
        with pytest.raises(ToolkitError, match="inputs are x; given are z"):
            simulator.run({"z": np.ones(1)})
    simulator.close()
    with pytest.raises(ToolkitError):
        simulator.run({"x": np.ones(1)})
    with pytest.raises(ToolkitError, match="reason"):
        toolkit.Simulator(fake, graph(tmp_path, "b.onnx", "fail reason"))
    assert left_over(tmp_path) == []


def test_an_orphan_ends_and_cleans_up(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from rwkv_npu.toolkit import Environment
        from rwkv_npu.toolkit.worker import Worker
        worker = Worker(Environment(Path(sys.executable), "0", False), Path({str(tmp_path)!r}))
        print(worker._process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 30
        while not any((folder / "log").exists() for folder in left_over(tmp_path)):  # until it serves
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    while left_over(tmp_path) or Path(f"/proc/{pid}/cmdline").exists():
        if not left_over(tmp_path) and not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # a zombie that nobody waits for, in a container without init
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("version", "rows", "changed"), [("2.3.2", 1, True), ("2.3.2", 2, False), ("2.5.0", 1, False)]
)
def test_squares_are_rewritten_for_older_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, rows: int, changed: bool
) -> None:
    helper = onnx.helper
    nodes = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Mul", ["r", "r"], ["y"])]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, 4]) for name in "ay"]
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    for key, value in {"location": "weights.bin", "offset": "8", "length": "8"}.items():
        weights.external_data.add(key=key, value=value)
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights]))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path / "scratch")
    path = str(tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="weights.bin, which holds w, is missing or too short"):
        child._adapt(model, path, [[rows, 4]])
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    adapted = child._adapt(model, path, [[rows, 4]])
    assert (adapted != path) == changed
    if changed:
        assert list(onnx.load(adapted, load_external_data=False).graph.node[1].input) == ["r", "a"]
        assert (tmp_path / "scratch" / "weights.bin").read_bytes() == bytes(16)


def test_the_child_deletes_only_scratch_folders(tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, child.__file__, str(tmp_path)], capture_output=True, check=False)
    assert answer.returncode == 1 and b"not a scratch folder" in answer.stderr and tmp_path.exists()


def test_a_real_child_without_the_compiler(tmp_path: Path) -> None:
    with Worker(toolkit.Environment(Path(sys.executable), "0", False), tmp_path) as worker:
        with pytest.raises(ToolkitError, match="ModuleNotFoundError|Error"):
            worker.request({"action": "build", "onnx": "none", "options": {}})
        assert "Traceback" in worker.log()
    assert left_over(tmp_path) == []


# --- many at a time


def jobs(folder: Path, *words: str, weight_bytes: int = 0) -> list[toolkit.Job]:
    return [
        toolkit.Job(graph(folder, f"{i}.onnx", text), folder / f"{i}.rknn", weight_bytes)
        for i, text in enumerate(words)
    ]


def most_at_once(folder: Path) -> int:
    running = most = 0
    for line in (folder / "events").read_text().splitlines():
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    return most


def test_results_come_as_they_end(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 1.5", "sleep 0", "sleep 0")
    done = [job for job, _ in toolkit.compile_many(fake, work, parallel=2, memory_limit_bytes=10**10)]
    assert done[-1] is work[0] and len(done) == 3 and most_at_once(tmp_path) == 2
    assert all(job.out_path.exists() for job in work) and left_over(tmp_path) == []
    assert list(toolkit.compile_many(fake, [])) == []


def test_memory_bounds_the_number_of_processes(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, *["sleep 0.1"] * 3, weight_bytes=10**8)  # 0.85 GB each
    list(toolkit.compile_many(fake, work, parallel=3, memory_limit_bytes=2 * 10**9))
    assert most_at_once(tmp_path) == 1  # two would be above four fifths of the limit


def test_the_next_job_is_the_largest_that_fits() -> None:
    big, middle, small = (toolkit.Job(Path(), Path(), n * 10**8) for n in (10, 5, 1))
    waiting = [big, middle, small]
    assert schedule._next(waiting, [], 2, 7 * 10**9) is big  # alone, it may exceed four fifths
    assert schedule._next(waiting, [big], 2, 10**10) is small
    assert schedule._next(waiting, [big], 2, 8 * 10**9) is None
    assert schedule._next(waiting, [big], 1, 10**12) is None
    assert waiting == [middle]


def test_a_job_above_the_limit_is_refused(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 0", weight_bytes=10**9)
    with pytest.raises(ToolkitError, match=r"0.rknn needs about 6.2 GB .*6 x 1.00 GB.* 5.0 GB are available"):
        toolkit.compile_many(fake, work, memory_limit_bytes=5 * 10**9)
    with pytest.raises(UsageError):
        toolkit.compile_many(fake, work, parallel=0)
    assert 10**7 < toolkit.available_memory() < 10**15


def test_a_failure_stops_the_others(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 60", "exit 3")
    start = time.monotonic()
    with pytest.raises(ToolkitError, match="Bad thing"):
        list(toolkit.compile_many(fake, work, parallel=2))
    assert time.monotonic() - start < 30 and left_over(tmp_path) == []


def test_closing_the_iterator_stops_the_others(fake: toolkit.Environment, tmp_path: Path) -> None:
    work = jobs(tmp_path, "sleep 0", "sleep 60", "sleep 60")
    start = time.monotonic()
    results = toolkit.compile_many(fake, work, parallel=2)
    assert next(results)[0] is work[0]
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 30 and left_over(tmp_path) == []
    assert not work[1].out_path.exists()


def test_graphs_written_when_their_turn_comes(fake: toolkit.Environment, tmp_path: Path) -> None:
    path = tmp_path / "late.onnx"
    job = toolkit.Job(path, tmp_path / "late.rknn", 0, write_graph=lambda: path.write_text("sleep 0"))
    ((_, result),) = toolkit.compile_many(fake, [job])
    assert result.size == 8 and not path.exists()


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
