"""Imports point down only, the command line starts at once, and the linters have nothing to say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rwkv_npu"

# The rooms of rwkv_npu, from top to bottom: each imports from rows below its own, itself, and nothing else, be it when
# it is loaded, in a function or for its types. So models know no backend, and backends no engine.
ROOMS = """
__main__
cli
serve bench evaluation
conversion model
text
runtime
backends
kernels
graphs toolkit
formats
quant
models board
arguments
errors progress
"""
ROWS = [row.split() for row in ROOMS.strip().splitlines()]
ROW = {unit: number for number, row in enumerate(ROWS) for unit in row}

# What may import these; everything else is the standard library's, or a matter of taste.
HOMES = {
    "onnx": {"graphs", "toolkit", "bench"},
    "onnxruntime": {"backends", "bench"},
    "torch": {"backends", "bench"},
    "rknn": {"toolkit"},
    "rknnlite": {"backends", "bench"},
    "tokenizers": {"text"},
    "safetensors": {"formats"},
    "gguf": {"formats"},
    "lm_eval": {"evaluation"},
    "huggingface_hub": {"formats"},
    "numba": {"kernels", "backends"},
    "llvmlite": {"kernels"},
    "starlette": {"serve", "cli"},
    "uvicorn": {"serve", "cli"},
    "llguidance": {"serve"},
    "prompt_toolkit": {"cli"},
}
NUMPY_ONLY = {"errors", "models", "runtime"}
# Modules of distributions with other names, and what only serves a benchmark where somebody installed it.
ON_A_BOARD = {"rknn", "rknnlite", "tinygrad"}
HEAVY = {
    "numpy",
    "onnx",
    "onnxruntime",
    "torch",
    "tokenizers",
    "safetensors",
    "ml_dtypes",
    "numba",
    "tqdm",
    "asyncio",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it: `a.b` for `import a.b` and `from a import b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit_of(name: str) -> str | None:
    """The module or package directly in rwkv_npu that a dotted name lies in; None for a name of its __init__."""
    part = name.split(".")[1] if "." in name else ""
    return part if (PACKAGE / part).is_dir() and part or (PACKAGE / f"{part}.py").is_file() else None


def unit_at(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_at(path)
    if unit == "__init__":  # the public names, from wherever they are
        return
    assert unit in ROW, f"{unit} has no place in ROOMS"
    for name in imports(path):
        if name.split(".")[0] != "rwkv_npu":
            continue
        other = unit_of(name)
        if other not in (None, unit):
            assert ROW[other] > ROW[unit], f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_are_imported_where_they_belong(path: Path) -> None:
    declared = re.findall(r'"([a-zA-Z0-9_-]+)[>=\[]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    always = {"rwkv_npu", "numpy", *sys.stdlib_module_names}
    known = {name.replace("-", "_") for name in declared} | always | ON_A_BOARD
    for name in imports(path):
        package, unit = name.split(".")[0], unit_at(path)
        assert package in known, f"{path.name} imports {package}, which pyproject.toml does not ask for"
        assert unit in HOMES.get(package, {unit}), f"{path.name} imports {package}"
        assert unit not in NUMPY_ONLY or package in always, f"{path.name} imports {package}"


def test_every_room_exists() -> None:
    assert all(unit_of(f"rwkv_npu.{unit}") for unit in ROW)


def test_the_rules_see_what_breaks_them(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import onnx.helper\ndef f():\n    from rwkv_npu.backends.ort import OrtBackend\n")
    found = list(imports(file))
    assert found == ["onnx.helper", "rwkv_npu.backends.ort.OrtBackend"]
    assert unit_of(found[1]) == "backends" and not ROW["backends"] > ROW["models"]
    assert unit_of("rwkv_npu.errors") == "errors" and unit_of("rwkv_npu.__version__") is None


# -- what is loaded --------------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import rwkv_npu", "from rwkv_npu import cli; cli.parser()"])
def test_the_command_line_is_light(statement: str) -> None:
    assert not loaded_by(statement) & HEAVY


def test_the_engine_is_light() -> None:
    loaded = loaded_by(
        "import rwkv_npu.runtime.engine, rwkv_npu.text.generation, rwkv_npu.backends.numpy, rwkv_npu.runtime.weights"
    )
    assert not loaded & {"onnx", "onnxruntime", "torch", "rknn", "rknnlite", "tokenizers", "numba"}


def cpu_seconds(*arguments: str) -> float:
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_help_is_there_at_once() -> None:
    """In the time of `import numpy` and half as much again: processor time, the best of several, in turns."""
    runs = [(cpu_seconds("-m", "rwkv_npu", "--help"), cpu_seconds("-c", "import numpy")) for _ in range(7)]
    helped, imported = (min(times) for times in zip(*runs, strict=True))
    assert helped <= 1.5 * imported


# -- linters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["ruff check --output-format concise", "ruff format --check --quiet", "mypy", "mypy -p tools.board"],
)
def test_the_linters_are_content(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[:4000]
