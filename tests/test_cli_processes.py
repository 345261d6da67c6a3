"""Commands in a process of their own: pipes, full disks, Ctrl-C, terminals, and the memory that they take."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.cli.reading import Interrupt
from rwkv_npu.formats.safetensors import TensorFile
from rwkv_npu.model import Model
from tests.tiny import PROMPT, V, command, continuation, one_line, peak_memory, run_process, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_model(folder / "fast" / "model.pth", "6", D=32, L=1)
    return folder


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's Python is; without a buffer some errors come earlier."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture(scope="module")
def endless(folder: Path) -> tuple[object, ...]:
    """Arguments of a generation that goes on until it is stopped: the end of text is never the likeliest."""
    path = folder / "endless" / "model.safetensors"
    write_model(path)
    head = TensorFile(path).entry("head.weight")
    with path.open("r+b") as file:
        file.seek(head.offset)
        # The end of text gets logit 0, and of so many others one is larger.
        file.write(bytes(head.nbytes // V))
    return ("generate", "-m", path, "--backend", "numpy", "--temp", "0", "-n", "10000000")


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(*arguments), bufsize=0, **{**streams, **options})


def wait_for(stream: Any, text: bytes) -> bytes:
    """Read until `text` was there."""
    seen = b""
    while text not in seen:
        assert select.select([stream], [], [], 30)[0], seen
        seen += os.read(stream.fileno(), 4096)
    return seen


# -- streams ---------------------------------------------------------------------------------------------


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
    """A short text leaves Python's buffer only at the end."""
    process = start(*flags)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_full_disk_at_stdout_is_one_line(endless: tuple[object, ...], checkpoint: Path) -> None:
    with open("/dev/full", "wb") as full:
        for arguments in ((*endless, "-p", PROMPT), ("info", checkpoint)):
            result = run_process(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            assert result.returncode == 1
            assert one_line(result.stderr.decode()) and b"No space left" in result.stderr


def test_closed_streams_and_an_odd_encoding(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    """`<&-`, `>&-` and a terminal that cannot show every letter."""
    shell = " ".join(command("generate", "-m", checkpoint, "--backend", "numpy", "--temp", "0", "-n", "3"))
    state = f"--state {tmp_path / 's'}"
    for redirected in (f"{shell} -p x >&-", f"{shell} -p x {state} <&-", f"{shell} {state} <&-"):
        result = subprocess.run(redirected, shell=True, capture_output=True, timeout=60)
        assert result.returncode == 0
        assert one_line(result.stderr.decode()), result.stderr
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run_process("generate", "-m", checkpoint, "-p", "€", "--echo", "-n", "1", env=environment)
    assert result.returncode == 0 and result.stdout.startswith(b"?")


def test_statistics_begin_on_a_new_line_after_the_text(checkpoint: Path, model: Model) -> None:
    """In `2>&1 | cat` they meet; a file that only the text goes to gets nothing else."""
    arguments = ("generate", "-m", checkpoint, "--backend", "numpy", "--temp", "0", "-n", "12", "-p", PROMPT)
    text = continuation(model)
    joined = run_process(*arguments, capture_output=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert joined.stdout.decode().startswith(f"{text}\nload ")
    apart = run_process(*arguments)
    assert apart.stdout.decode() == text and apart.stderr.startswith(b"load ")


# -- Ctrl-C ----------------------------------------------------------------------------------------------


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


def test_ctrl_c_while_reading_the_prompt(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("the turning and " * 100_000)
    _, old = model.forward(model.encode(PROMPT))
    old.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    common = ("generate", "-m", checkpoint, "--backend", "numpy", "-f", tmp_path / "long", "-v")
    for state in ("state", "new"):
        process = start(*common, "--state", tmp_path / state)
        wait_for(process.stderr, b"opened in")
        time.sleep(5)  # the text is encoded and a part of it read; all of it takes a minute
        out, err = interrupt(process)
        assert out == b"" and "generated 0 tokens" in err and "the same command continues from there" in err
    assert (tmp_path / "state").read_bytes() == before
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert [name.split(".")[0] for name in names] == ["long", "new", "state", "state"]
    assert all(name.endswith(".partial") for name in (names[1], names[3]))


def test_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# -- long prompts ----------------------------------------------------------------------------------------


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
