"""The command line: help, flags that make no sense, `info` and `convert`."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rwkv_npu
from rwkv_npu.board import hardware
from rwkv_npu.cli import main, parser
from rwkv_npu.conversion.forecast import Graphs, _share, _variant
from rwkv_npu.conversion.request import Request
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.model import Model
from rwkv_npu.models.network import Program
from rwkv_npu.models.official import OFFICIAL, official_spec
from rwkv_npu.models.spec import default_scaling
from tests.tiny import PROMPT, Run, continuation, error_line, run_main


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"rwkv-npu {rwkv_npu.__version__}\n", "")
    commands = re.findall(r"^    (\w+) ", run("--help")[1], re.M)
    assert {"convert", "generate", "eval", "info", "toolkit"} <= set(commands)
    for name in commands:
        status, out, err = run(name, "--help")
        assert (status, err) == (0, "")
        assert out.startswith(f"usage: rwkv-npu {name}")


def test_every_flag_is_explained() -> None:
    (commands,) = [action.choices for action in parser()._actions if isinstance(action.choices, dict)]
    assert len(commands) >= 5
    for name, command_parser in commands.items():
        unexplained = [action.dest for action in command_parser._actions if not action.help]
        assert set(unexplained) <= {"action"}, name


def test_printed_errors_are_one_line(model: Model) -> None:
    state = model.new_state()
    assert str(state) == repr(state) == "State(RWKV-7, 2 layers, 0 tokens seen)"
    assert repr(model).startswith("Model(RWKV-7, 0.1 M parameters, ") and "\n" not in repr(model)


def test_shells_complete_commands_flags_and_files(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install shtab" in error_line(run("completion", "bash"))
    monkeypatch.undo()
    pytest.importorskip("shtab")
    status, script, err = run("completion", "bash")
    assert (status, err) == (0, "")
    (tmp_path / "model.rwkv").touch()
    for words, expected in (
        ("rwkv-npu gen", "generate"),
        ("rwkv-npu generate --backend num", "numpy numba"),
        (f"rwkv-npu generate -m {tmp_path}/mod", f"{tmp_path}/model.rwkv"),
    ):
        count = len(words.split()) - 1
        ask = f"COMP_WORDS=({words}); COMP_CWORD={count}; _shtab_rwkv_npu; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
        assert done.stdout.split() == expected.split(), done.stderr


def test_defaults_of_flags_are_those_of_python() -> None:
    """One default each for what both have."""
    python = inspect.signature(Model.generate).parameters
    flags = vars(parser().parse_args(["generate"]))
    shared = [name for name in python if name in flags and name not in ("prompt", "state", "stop")]
    assert {"max_tokens", "temperature", "top_p", "penalty_decay", "seed"} <= set(shared)
    assert {name: flags[name] for name in shared} == {name: python[name].default for name in shared}


def test_models_fit_as_the_dry_run_says(run: Run) -> None:
    status, out, err = run("models")
    assert (status, err) == (0, "") and all(len(line) <= 80 for line in out.splitlines())
    sizes = json.loads(run("models", "--json")[1])
    assert sizes.keys() == OFFICIAL.keys() and all(name in out for name in sizes)
    for name in ("v7-0.1b", "v7-1.5b"):
        program = Program(official_spec(name), "layer", default_scaling(official_spec(name)))
        request = Request(Path(name), cpu="int8")
        for precision in ("fp16", "w8a8"):
            share = _share(program.spec, precision, None)
            exact = _variant(Graphs(program), request, precision, share, 0, False, ())
            ours = sizes[name]["npu"][precision]
            assert ours["bytes"] == pytest.approx(exact.memory.weights, rel=0.01)
            assert ours["copies"] == len(exact.rows)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["generate", "--backend", "abacus"],
        ["generate", "-n", "many"],
        ["generate", "--temp", "hot"],
        ["generate", "--fusion", "cold"],
        ["generate", "--no-such-flag"],
        ["generate", "surplus"],
        ["convert"],
        ["convert", "model.pth", "-j", "x"],
        ["convert", "model.pth", "--rows", ""],
        ["eval", "-n", "1.5"],
        ["info", "a", "b"],
        ["toolkit"],
        ["toolkit", "fetch"],
    ],
)
def test_wrong_command_lines_are_one_line_and_status_2(run: Run, arguments: list[str]) -> None:
    line = error_line(run(*arguments), status=2)
    assert "usage" not in line and "--help" in line


def test_info_of_a_checkpoint(run: Run, checkpoint: Path, wordless: Path, tmp_path: Path) -> None:
    status, out, err = run("info", checkpoint)
    assert (status, err) == (0, "")
    assert "RWKV-7" in out and "D 64" in out and "vocab.txt" in out
    facts = json.loads(run("info", checkpoint, "--json")[1])
    assert facts["kind"] == "checkpoint" and facts["spec"]["D"] == 64
    assert facts["calls_per_token"] == {"layer": 4, "projection": 7}
    assert "--tokenizer" in run("info", wordless)[1]
    status, _, err = run("info", checkpoint, "--check")
    assert status == 0 and "finite" in err
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2 - 4096 : len(data) // 2] = b"\xff" * 4096
    (tmp_path / "damaged.pth").write_bytes(data)
    assert "NaN" in error_line(run("info", tmp_path / "damaged.pth", "--check"))


def test_convert_and_info_of_the_bundle(
    run: Run, checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("convert", checkpoint, "--target", "none")
    assert (status, out) == (0, "model.rwkv\n")
    assert "CPU  weights in int8 (default), fp16" in err and err.endswith(
        'next: rwkv-npu generate -m model.rwkv -p "Hello"\n'
    )
    assert "Traceback" not in err and [entry.name for entry in tmp_path.iterdir()] == ["model.rwkv"]
    status, out, err = run("info", "model.rwkv", "--check")
    assert status == 0 and "files are as they were written" in err
    assert "no artifacts" in out and "fp16" in out
    facts = json.loads(run("info", "model.rwkv", "--json")[1])
    manifest = open_bundle(tmp_path / "model.rwkv").manifest
    assert facts["kind"] == "bundle" and facts["fingerprint"] == manifest.fingerprint == model.fingerprint
    assert facts["artifacts"] == [] and facts["bytes_on_disk"] > 0
    status, out, _ = run("generate", "-m", "model.rwkv", "-p", PROMPT, "-n", "3", "--temp", "0")
    assert (status, out) == (0, continuation(model, max_tokens=3))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--target", "rk9999"], "rk9999"),
        (["--precision", "int3"], "int3"),
        (["--fusion", "cold"], "cold"),
        (["--cpu", "int3"], "int3"),
        (["--rows", "0"], "rows"),
        (["--rows", "1,x"], "rows"),
        (["--rows", "1025"], "rows"),
        (["--jobs", "0"], "jobs"),
        (["--tokenizer", "no/such/file"], "no/such/file"),
        (["--tokenizer", "world"], "273 rows"),
    ],
)
def test_convert_refuses(run: Run, checkpoint: Path, tmp_path: Path, flags: list[str], names: str) -> None:
    assert names in error_line(run("convert", checkpoint, "--target", "none", "-o", tmp_path / "out", *flags))
    assert list(tmp_path.iterdir()) == []


def test_commands_keep_to_the_large_cores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread of the process is moved, and said so with -v; a library call moves none."""
    moved: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(hardware, "big_cores", lambda: [4, 5])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: moved.append((thread, cores)))
    said = {}
    for threads in (None, 1, 3):
        moved.clear()
        flags = [] if threads is None else ["-t", threads]
        status, _, said[threads] = run_main(
            capsys, "generate", "-p", "a", "-n", 1, "-v", "--backend", "numpy", *flags
        )
        assert status == 0
        assert (os.getpid(), [4, 5]) in moved or threads == 3
    assert "threads: on the large cores, 4, 5" in said[None] and "on the large cores" in said[1]
    # More threads were asked for than there are large cores.
    assert not moved and "large cores" not in said[3]
    rwkv_npu.load(backend="numpy").close()
    assert not moved


def test_interrupt_before_anything_runs(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rwkv_npu.cli.generate.load_model", interrupted)
    assert main(["generate", "-p", "x"]) == 130
    assert capsys.readouterr().err == "rwkv-npu: interrupted\n"
