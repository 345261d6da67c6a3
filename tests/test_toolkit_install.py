"""Finding and installing Rockchip's compiler. pip, venv and the network are stand-ins."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest

from rwkv_npu import toolkit
from rwkv_npu.errors import ToolkitError
from rwkv_npu.formats.files import cache_dir
from rwkv_npu.toolkit import environment, install
from tests.fake_compiler import program

# -- where the compiler lives -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a running interpreter without the compiler."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RWKV_NPU_CACHE", str(folder))
    monkeypatch.setattr(environment, "_running", lambda: (None, None))
    return folder


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
    with pytest.raises(ToolkitError, match="2.3.2, is not installed: run `rwkv-npu toolkit install`$"):
        toolkit.require("2.3.2")
    with pytest.raises(ToolkitError, match="run `rwkv-npu toolkit install --version 2.5.0`$"):
        toolkit.require("2.5.0")
    with pytest.raises(ToolkitError, match="1.6.0 is not supported: choose one of 2.5.0, 2.3.2"):
        toolkit.require("1.6.0")


def test_private_environments(cache: Path) -> None:
    older = pretend_installed("2.3.0")
    assert toolkit.find() == toolkit.Environment(older, "2.3.0", private=True)
    assert toolkit.find("2.5.0") is None
    newer = pretend_installed("2.5.0")
    instead = (
        "run `rwkv-npu toolkit install`, or choose the one that is there with toolkit='2.5.0': its files need"
    )
    with pytest.raises(ToolkitError, match=f"{instead} librknnrt 2.5.0 or later on the board$"):
        toolkit.require("2.3.2")
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


# -- installing ---------------------------------------------------------------------------------------------


def test_pins() -> None:
    assert set(install.PINS) >= {"numpy", "onnx", "protobuf", "onnxruntime", "setuptools"}
    assert not {"torch", "rknn-toolkit2"} & set(install.PINS)
    assert all(pin.replace(".", "").isdigit() for pin in install.PINS.values())
    assert toolkit.DEFAULT_VERSION in toolkit.VERSIONS and set(environment.MACHINES) == set(toolkit.VERSIONS)
    assert list(toolkit.VERSIONS) == sorted(toolkit.VERSIONS, reverse=True)  # newest first


def test_stand_in_for_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_bytes(Path(install.__file__).with_name("stand_in_torch.py").read_bytes())
    code = """
        import torch, torch.nn as nn
        class Model(nn.Module): pass
        @torch.no_grad()
        def double(x): return 2 * x
        with torch.no_grad(): assert double(2) == 4
        assert not isinstance(1, torch.Tensor) and Model()
        halves = torch.split(torch.arange(6).reshape(2, 3), [1, 2], 1)
        assert torch.cat([half.reshape(-1) for half in halves]).tolist() == [0, 3, 1, 2, 4, 5]
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


Steps = dict[str, tuple[int, str] | BaseException]


@pytest.fixture
def steps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Answers of an installation's commands, by a word in the command. The default is success."""
    answers: Steps = {}

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
            "pip could not install rknn-toolkit2 2.3.2: No matching distribution for x .*cannot be reached",
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
    partial = cache / "toolkit-2.3.2.partial"
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
