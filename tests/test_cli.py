"""The command line: what goes where, what a user can get wrong, and what Ctrl-C and closed pipes do."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu import board
from rwkv_npu.bundle import open_bundle
from rwkv_npu.cli import main, parser
from rwkv_npu.commands.generate import Interrupt
from rwkv_npu.model import Model
from rwkv_npu.tensorfile import TensorFile
from tests.tiny import Stdin, V, command, one_line, peak_memory, run_main, run_process, write_model

PROMPT = "the turning über"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "with" / "model.pth")
    write_model(folder / "other" / "model.pth", seed=1)
    write_model(folder / "large" / "model.pth", D=96)
    write_model(folder / "fast" / "model.pth", "6", D=32, L=1)
    write_model(folder / "bare" / "model.pth", vocabulary=False)
    return folder


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return folder / "with" / "model.pth"


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return rwkv_npu.load(path, backend="numpy")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_main(capsys, *arguments)


@pytest.fixture
def generate(run: Run, path: Path) -> Run:
    """`generate` with the tiny model; greedy, 12 tokens, unless told otherwise."""

    def run_generate(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "-m", path, "--backend", "numpy", "--temp", "0", "-n", "12", *arguments)

    return run_generate


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what is on stdin."""
    return lambda *a, **k: monkeypatch.setattr("sys.stdin", Stdin(*a, **k))


def continuation(model: Model, prompt: str | list[int] = PROMPT, **options: Any) -> str:
    options = {"temperature": 0, "max_tokens": 12} | options
    return "".join(step.text for step in model.generate(prompt, **options))


def error_line(result: tuple[int, str, str], status: int = 1) -> str:
    """The one line of a command that failed, and printed nothing else."""
    assert result[0] == status, result
    assert result[1] == ""
    assert one_line(result[2]), result[2]
    assert result[2].startswith("rwkv-npu")
    return result[2]


# generate: what goes where


def test_stdout_is_the_text_and_stderr_the_rest(generate: Run, model: Model) -> None:
    status, out, err = generate("-p", PROMPT)
    assert (status, out) == (0, continuation(model))
    assert one_line(err) and re.search(r"load .* prompt \d+ tokens.* first token .* generated 12 tokens", err)


def test_verbose_says_what_runs(generate: Run, model: Model) -> None:
    status, out, err = generate("-p", PROMPT, "-v")
    assert (status, out) == (0, continuation(model))
    assert "RWKV-7" in err and "numpy" in err and "layer fusion" in err


def test_prompt_from_stdin_and_from_a_file(
    generate: Run, model: Model, type_in: Callable[..., None], tmp_path: Path
) -> None:
    expected = continuation(model)
    type_in(PROMPT.encode())
    assert generate()[:2] == (0, expected)
    type_in(PROMPT.encode())
    assert generate("-p", "-")[:2] == (0, expected)
    (tmp_path / "prompt").write_text(PROMPT, encoding="utf-8")
    type_in(b"not this")
    assert generate("-f", tmp_path / "prompt")[:2] == (0, expected)
    assert generate("-p", PROMPT)[:2] == (0, expected)


def test_echo_prints_the_prompt_first(generate: Run, model: Model) -> None:
    assert generate("-p", PROMPT, "--echo")[1] == PROMPT + continuation(model)


def test_ids_in_and_out(generate: Run, model: Model) -> None:
    ids = model.encode(PROMPT)
    expected = [step.token for step in model.generate(ids, temperature=0, max_tokens=12)]
    status, out, _ = generate("--ids", "-p", ",".join(map(str, ids)))
    assert (status, [int(part) for part in out.split()]) == (0, expected)
    assert [int(p) for p in generate("--ids", "--echo", "-p", " ".join(map(str, ids)))[1].split()] == [
        *ids,
        *expected,
    ]


def test_stop_strings(generate: Run, model: Model) -> None:
    text = continuation(model)
    stop = text[4:6]
    expected = text[: text.index(stop)]
    assert generate("-p", PROMPT, "--stop", stop)[1] == expected
    assert generate("-p", PROMPT, "--stop", "never seen", "--stop", stop)[1] == expected


def test_seed(generate: Run) -> None:
    def text(*seed: str) -> str:
        return generate("-p", PROMPT, "--temp", "1", *seed)[1]

    assert text("-s", "5") == text("--seed", "5")
    assert len({text("-s", "5"), text("-s", "6"), text()}) == 3


def test_sampling_flags_reach_the_model(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 30,
        "min_p": 0.01,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "penalty_decay": 0.95,
        "seed": 3,
        "max_tokens": 7,
        "stop": ["a", "b"],
    }
    given: dict[str, Any] = {}
    monkeypatch.setattr(Model, "generate", lambda *_, **options: given.update(options) or iter(()))
    flags = "--temp 1.5 --top-p 0.9 --top-k 30 --min-p 0.01 --presence-penalty 0.4 --frequency-penalty 0.3"
    flags += " --penalty-decay 0.95 --seed 3 --max-tokens 7 --stop a --stop b"
    assert generate("-p", PROMPT, *flags.split())[0] == 0
    assert {name: given[name] for name in expected} == expected


def test_demo_model_without_a_model(run: Run) -> None:
    status, out, err = run("generate", "-p", "Return the", "-n", "5", "-s", "1", "--backend", "numpy")
    assert status == 0 and out
    assert "demo model" in err.splitlines()[0]


# generate: states


def test_state_joins_two_runs(generate: Run, type_in: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "chat.st"
    first = generate("-p", PROMPT, "--state", file, "-n", "5")
    assert first[0] == 0 and file.is_file()
    type_in(terminal=True)
    second = generate("--state", file, "-n", "7")
    assert first[1] + second[1] == generate("-p", PROMPT)[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.st"]


def test_state_joins_two_prompts(generate: Run, type_in: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "chat.st"
    first = generate("--ids", "-p", "5 6 7", "--state", file, "-n", "3")[1]
    second = generate("--ids", "-p", "8 9", "--state", file, "-n", "4")[1]
    whole = generate("--ids", "-p", f"5 6 7 {first} 8 9", "-n", "4")[1]
    assert second == whole


def test_state_continues_with_nothing_on_stdin(
    generate: Run, type_in: Callable[..., None], tmp_path: Path
) -> None:
    generate("-p", PROMPT, "--state", tmp_path / "s", "-n", "5")
    type_in(b"")
    status, out, _ = generate("--state", tmp_path / "s")
    assert status == 0 and out


def test_state_of_another_model(generate: Run, run: Run, folder: Path, tmp_path: Path) -> None:
    generate("-p", PROMPT, "--state", tmp_path / "s", "-n", "2")
    before = (tmp_path / "s").read_bytes()
    common = ("--backend", "numpy", "-p", "x", "-n", "1", "--state", tmp_path / "s")
    assert "(96,)" in error_line(run("generate", "-m", folder / "large" / "model.pth", *common))
    assert "RWKV-7" in error_line(run("generate", "-m", folder / "fast" / "model.pth", *common))
    assert (tmp_path / "s").read_bytes() == before
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = run("generate", "-m", folder / "other" / "model.pth", *common)
    assert status == 0
    assert err.splitlines()[0].startswith("rwkv-npu: warning: state ") and "other weights" in err


def test_state_that_cannot_be_used_is_refused_before_anything_is_generated(
    generate: Run, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no state")
    for place in ("folder", "text", "missing/s", "text/s"):
        assert str(tmp_path / place) in error_line(generate("-p", "x", "--state", tmp_path / place))
    assert (tmp_path / "text").read_text() == "no state"


# generate: what a user can get wrong


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["-n", "-2"], "max-tokens"),
        (["--temp", "-0.5"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--temp", "inf"], "--temp"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-p", "-0.1"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--min-p", "1.5"], "--min-p"),
        (["--presence-penalty", "1e9"], "--presence-penalty"),
        (["--frequency-penalty", "nan"], "--frequency-penalty"),
        (["--penalty-decay", "-1"], "--penalty-decay"),
        (["--penalty-decay", "1.1"], "--penalty-decay"),
        (["--seed", "-1"], "--seed"),
        (["--threads", "0"], "threads"),
        (["--stop", ""], "stop string"),
        (["--precision", "fp8"], "fp8"),
        (["--plan", "decode"], "plan"),
        (["--plan", "decode=abacus"], "abacus"),
        (["--plan", "both=numpy"], "both"),
        (["--tokenizer", "no/such/file"], "no/such/file"),
        (["--tokenizer", "world"], "273 rows"),
        (["--file", "prompt"], "--prompt or --file"),
    ],
)
def test_flags_out_of_range(generate: Run, flags: list[str], names: str) -> None:
    assert names in error_line(generate("-p", PROMPT, *flags)).replace("max_tokens", "max-tokens")


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
        ["eval", "-n", "1.5"],
        ["info", "a", "b"],
        ["toolkit"],
        ["toolkit", "fetch"],
    ],
)
def test_wrong_command_lines_are_one_line_and_status_2(run: Run, arguments: list[str]) -> None:
    line = error_line(run(*arguments), status=2)
    assert "usage" not in line and "--help" in line


def test_text_that_is_no_text(generate: Run, type_in: Callable[..., None], tmp_path: Path) -> None:
    type_in(b"ab\xff")
    assert "stdin is not UTF-8 text: byte 0xff at 2" in error_line(generate())
    (tmp_path / "latin").write_bytes("über".encode("latin-1"))
    assert str(tmp_path / "latin") in error_line(generate("-f", tmp_path / "latin"))
    assert "UTF-8" in error_line(generate("-p", os.fsdecode(b"ab\xff")))


def test_files_that_cannot_be_read(generate: Run, run: Run, tmp_path: Path) -> None:
    assert "No such file" in error_line(generate("-f", tmp_path / "missing"))
    assert "directory" in error_line(generate("-f", tmp_path))
    for path in (tmp_path / "missing", tmp_path, __file__, "/dev/null"):
        assert str(path) in error_line(run("generate", "-m", path, "-p", "x"))
        assert str(path) in error_line(run("info", path))
        assert str(path) in error_line(run("convert", path, "--target", "none", "-o", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_empty_prompt_without_a_state(generate: Run, type_in: Callable[..., None], tmp_path: Path) -> None:
    assert "prompt is empty" in error_line(generate("-p", ""))
    assert "prompt is empty" in error_line(generate("-p", "", "--state", tmp_path / "new"))
    assert "prompt is empty" in error_line(generate("--ids", "-p", " "))
    type_in(b"")
    assert "prompt is empty" in error_line(generate())
    type_in(terminal=True)
    assert "no prompt" in error_line(generate())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("ids", ["1 two", "-1", str(V), "1.5", "99999999999999999999999"])
def test_ids_that_are_none(generate: Run, ids: str) -> None:
    error_line(generate("--ids", "-p", ids))


def test_model_without_a_vocabulary(run: Run, folder: Path, tmp_path: Path) -> None:
    bare = ("generate", "-m", folder / "bare" / "model.pth", "--backend", "numpy", "-n", "3")
    assert run(*bare, "--ids", "-p", "5 6", "--state", tmp_path / "s")[0] == 0
    assert "--tokenizer" in error_line(run(*bare, "-p", "x"))
    assert "--tokenizer" in error_line(run(*bare, "-p", "", "--state", tmp_path / "s"))
    assert "--tokenizer" in error_line(run(*bare, "--ids", "-p", "5", "--stop", "x"))
    status, _, _ = run(*bare, "-p", "x", "--tokenizer", folder / "with" / "vocab.txt")
    assert status == 0


# The other commands


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


def test_eval(run: Run, path: Path, model: Model, tmp_path: Path) -> None:
    text = "the turning and über the turning"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    flags = ("eval", "-m", path, "--backend", "numpy", "--text", tmp_path / "text")
    status, out, err = run(*flags, "--json")
    figures = json.loads(out)
    assert (status, err) == (0, "")
    ids = model.encode(text)
    logits, _ = model.forward([0, *ids[:-1]], all_logits=True)
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    nats = -log_p[range(len(ids)), ids].sum()
    assert figures["tokens"] == len(ids) and figures["bytes"] == len(text.encode())
    assert figures["perplexity"] == pytest.approx(np.exp(nats / len(ids)), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-4)
    assert figures["kl_mean"] is None
    status, table, _ = run(*flags)
    assert status == 0 and f"{figures['bits_per_byte']:.4f}" in table and "KL" not in table
    assert json.loads(run(*flags, "-n", "5", "--json")[1])["tokens"] == 5


def test_eval_has_a_model_and_a_text_of_its_own(run: Run) -> None:
    status, out, err = run("eval", "-n", "40", "--backend", "numpy", "--json")
    assert (status, json.loads(out)["tokens"]) == (0, 40)
    assert one_line(err) and "demo model" in err


def test_eval_against_another_model_and_backend(run: Run, path: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the turning and the " * 5)
    flags = ("eval", "-m", path, "--text", tmp_path / "text", "--json")
    same = json.loads(run(*flags, "--backend", "ort", "--against-backend", "numpy")[1])
    assert abs(same["kl_mean"]) < 1e-6 and abs(same["kl_p99"]) < 1e-5 and same["top1"] == 1
    other = json.loads(run(*flags, "--backend", "numpy", "--against", folder / "other" / "model.pth")[1])
    assert other["kl_mean"] > 0.1 and other["kl_p99"] >= other["kl_mean"] and other["top1"] < 1
    table = run(*flags[:-1], "--backend", "numpy", "--against-backend", "numpy")[1]
    assert "KL" in table and "top-1 agrees   100.00 %" in table


def test_eval_refuses(run: Run, path: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the turning")
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"\xfc")
    write_model(tmp_path / "wide" / "model.pth", V=V + 8)
    flags = ("eval", "-m", path, "--backend", "numpy")
    text = ("--text", tmp_path / "text")
    assert "max-tokens" in error_line(run(*flags, *text, "-n", "0"))
    assert "empty" in error_line(run(*flags, "--text", tmp_path / "empty"))
    assert "UTF-8" in error_line(run(*flags, "--text", tmp_path / "latin"))
    assert "missing" in error_line(run(*flags, "--text", tmp_path / "missing"))
    assert "missing" in error_line(run(*flags, *text, "--against", tmp_path / "missing"))
    assert "vocabular" in error_line(run(*flags, *text, "--against", tmp_path / "wide" / "model.pth"))
    bare = folder / "bare" / "model.pth"
    assert "--tokenizer" in error_line(run("eval", "-m", bare, "--backend", "numpy", *text))


def test_info_of_a_checkpoint(run: Run, path: Path, folder: Path) -> None:
    status, out, err = run("info", path)
    assert (status, err) == (0, "")
    assert "RWKV-7" in out and "D 64" in out and "vocab.txt" in out
    facts = json.loads(run("info", path, "--json")[1])
    assert facts["kind"] == "checkpoint" and facts["spec"]["D"] == 64
    assert facts["calls_per_token"] == {"layer": 4, "projection": 7}
    assert "--tokenizer" in run("info", folder / "bare" / "model.pth")[1]
    status, _, err = run("info", path, "--check")
    assert status == 0 and "finite" in err
    write_model(folder / "damaged" / "model.pth")
    data = bytearray((folder / "damaged" / "model.pth").read_bytes())
    data[len(data) // 2 - 4096 : len(data) // 2] = b"\xff" * 4096
    (folder / "damaged" / "model.pth").write_bytes(data)
    assert "NaN" in error_line(run("info", folder / "damaged" / "model.pth", "--check"))


def test_convert_and_info_of_the_bundle(
    run: Run, path: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("convert", path, "--target", "none")
    assert (status, out) == (0, "model.rwkv\n")
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
        (["--rows", ""], "rows"),
        (["--jobs", "0"], "jobs"),
        (["--tokenizer", "no/such/file"], "no/such/file"),
        (["--tokenizer", "world"], "273 rows"),
    ],
)
def test_convert_refuses(run: Run, path: Path, tmp_path: Path, flags: list[str], names: str) -> None:
    assert names in error_line(run("convert", path, "--target", "none", "-o", tmp_path / "out", *flags))
    assert list(tmp_path.iterdir()) == []


# In a process of its own: pipes, signals, terminals


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's Python is; without a buffer some errors come earlier."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(*arguments), bufsize=0, **{**streams, **options})


@pytest.fixture(scope="module")
def endless(folder: Path) -> tuple[object, ...]:
    """Arguments of a generation that goes on until it is stopped: the end of text is never the likeliest."""
    path = folder / "endless" / "model.safetensors"
    write_model(path)
    head = TensorFile(path).entry("head.weight")
    with path.open("r+b") as file:
        file.seek(head.offset)
        file.write(
            bytes(head.nbytes // V)
        )  # the end of text has logit 0, and of so many others one is larger
    return ("generate", "-m", path, "--backend", "numpy", "--temp", "0", "-n", "10000000")


def test_closed_pipe_ends_silently(endless: tuple[object, ...]) -> None:
    process = start(*endless, "-p", PROMPT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("flags", [["--help"], ["generate", "--help"], ["--version"], ["info", "--json"]])
def test_output_that_nobody_reads(flags: list[str]) -> None:
    """What is short leaves Python's buffer when all else is done."""
    process = start(*flags)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_full_disk_at_stdout_is_one_line(endless: tuple[object, ...], path: Path) -> None:
    with open("/dev/full", "wb") as full:
        for arguments in ((*endless, "-p", PROMPT), ("info", path)):
            result = run_process(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            assert result.returncode == 1
            assert one_line(result.stderr.decode()) and b"No space left" in result.stderr


def test_closed_streams_and_an_odd_encoding(path: Path, model: Model, tmp_path: Path) -> None:
    """`<&-`, `>&-` and a terminal that cannot show every letter."""
    shell = f"{' '.join(command('generate', '-m', path, '--backend', 'numpy', '--temp', '0', '-n', '3'))}"
    state = f"--state {tmp_path / 's'}"
    for redirected in (f"{shell} -p x >&-", f"{shell} -p x {state} <&-", f"{shell} {state} <&-"):
        result = subprocess.run(redirected, shell=True, capture_output=True, timeout=60)
        assert result.returncode == 0
        assert one_line(result.stderr.decode()), result.stderr
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run_process("generate", "-m", path, "-p", "€", "--echo", "-n", "1", env=environment)
    assert result.returncode == 0 and result.stdout.startswith(b"?")


def interrupt(process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
    """Press Ctrl-C; (rest of stdout, stderr)."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    return out, err.decode()


def test_ctrl_c_while_generating(endless: tuple[object, ...], tmp_path: Path) -> None:
    """The text ends, statistics come, and the state is that of the text that was printed."""
    model = rwkv_npu.load(str(endless[2]), backend="numpy")
    ids = model.encode(PROMPT)
    file = tmp_path / "state"
    process = start(*endless, "--ids", "-p", ",".join(map(str, ids)), "--state", file)
    assert process.stdout is not None
    begin = wait_for(process.stdout, b" ")
    out, err = interrupt(process)
    printed = [int(part) for part in (begin + out).split()]
    assert f"generated {len(printed)} tokens" in err and one_line(err)
    state = model.load_state(file)
    assert state.tokens_seen == len(ids) + len(printed)
    _, expected = model.forward([*ids, *printed])
    assert state.logits is not None and expected.logits is not None
    np.testing.assert_allclose(state.logits, expected.logits, atol=1e-3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def wait_for(stream: Any, text: bytes) -> bytes:
    """Read until `text` was there."""
    seen = b""
    while text not in seen:
        assert select.select([stream], [], [], 30)[0], seen
        seen += os.read(stream.fileno(), 4096)
    return seen


def test_ctrl_c_while_reading_the_prompt(path: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("the turning and " * 100_000)
    _, old = model.forward(model.encode(PROMPT))
    old.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    common = ("generate", "-m", path, "--backend", "numpy", "-f", tmp_path / "long", "-v")
    for state in ("state", "new"):
        process = start(*common, "--state", tmp_path / state)
        wait_for(process.stderr, b"opened in")
        time.sleep(0.5)  # the handler is installed, and the prompt takes a minute
        out, err = interrupt(process)
        assert out == b"" and "generated 0 tokens" in err
    assert (tmp_path / "state").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["long", "state"]


def test_long_prompt_needs_no_more_memory_than_a_short_one(folder: Path, tmp_path: Path) -> None:
    fast = ("generate", "-m", folder / "fast" / "model.pth", "--backend", "numpy", "-n", "1", "-f")
    (tmp_path / "short").write_text("the turning")
    (tmp_path / "long").write_text("the and ing re turn " * 14_300)  # 7 tokens each
    model = rwkv_npu.load(folder / "fast" / "model.pth", backend="numpy")
    assert len(model.encode((tmp_path / "long").read_text())) > 100_000
    short, long = peak_memory(*fast, tmp_path / "short"), peak_memory(*fast, tmp_path / "long")
    assert short[0] == long[0] == 0
    assert long[1] - short[1] < 30e6, "an activation kept per token would be more"


def test_progress_of_a_long_prompt_is_for_terminals(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("the turning and " * 20_000)
    fast = ("generate", "-m", folder / "fast" / "model.pth", "--backend", "numpy", "-n", "1", "-f")
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    process = start(*fast, tmp_path / "long", stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(controller, 65536):
            shown += data
    except OSError:  # Linux's way of saying that the terminal was closed
        pass
    os.close(controller)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"prompt" in shown and b"token" in shown and b"%|" in shown
    assert b"%|" not in out
    piped = run_process(*fast, tmp_path / "long")
    assert piped.returncode == 0 and one_line(piped.stderr.decode())


def test_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_before_anything_runs(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rwkv_npu.commands.generate.load_model", interrupted)
    assert main(["generate", "-p", "x"]) == 130
    assert capsys.readouterr().err == "rwkv-npu: interrupted\n"


def test_reading_a_prompt_into_a_state_and_going_on_to_the_end(generate: Run, tmp_path: Path) -> None:
    state = str(tmp_path / "s")
    status, out, _ = generate("-p", "the turning", "-n", "0", "--state", state)
    assert (status, out) == (0, "") and (tmp_path / "s").is_file()
    _, whole, _ = generate("-p", "the turning", "-n", "12", "--temp", "0")
    _, rest, _ = generate("--state", state, "-p", "", "-n", "12", "--temp", "0")
    assert whole and whole == rest


# -- large cores -----------------------------------------------------------------------------------------


def test_commands_keep_to_the_large_cores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread of the process is moved, and said so with -v; a library call moves none."""
    moved: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(board, "big_cores", lambda: [4, 5])
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
    assert (
        not moved and "large cores" not in said[3]
    )  # more threads were asked for than there are large cores
    rwkv_npu.load(backend="numpy").close()
    assert not moved
