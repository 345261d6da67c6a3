"""`rwkv-npu generate`: what goes where, states that join runs, and what a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_npu.model import Model
from tests.tiny import PROMPT, Run, Stdin, V, continuation, error_line, one_line, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_model(folder / "large" / "model.pth", D=96)
    write_model(folder / "fast" / "model.pth", "6", D=32, L=1)
    return folder


@pytest.fixture
def generate(run: Run, checkpoint: Path) -> Run:
    """`generate` with the tiny model; greedy, 12 tokens, unless told otherwise."""

    def run_generate(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "-m", checkpoint, "--backend", "numpy", "--temp", "0", "-n", "12", *arguments)

    return run_generate


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what is on stdin."""
    return lambda *a, **k: monkeypatch.setattr("sys.stdin", Stdin(*a, **k))


# -- what goes where -------------------------------------------------------------------------------------


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


def test_escapes(generate: Run, model: Model) -> None:
    text = continuation(model, prompt="the\n\tre\\n")
    assert generate("--escape", "-p", r"the\n\tre\\n")[1] == text
    assert generate("-p", r"the\n")[1] == continuation(model, prompt=r"the\n")
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "generate", lambda *_, **options: given.update(options) or iter(()))
        generate("-e", "-p", "x", "--stop", r"\n\n", "--stop", r"a\b")
    assert given["stop"] == ["\n\n", r"a\b"]


def test_json_lines(generate: Run, model: Model) -> None:
    status, out, err = generate("-p", PROMPT, "--json", "--logprobs", "3")
    *lines, last = map(json.loads, out.splitlines())
    steps = list(model.generate(PROMPT, temperature=0, max_tokens=12))
    assert status == 0 and one_line(err)
    assert "".join(line["text"] for line in lines) == continuation(model)
    assert [line["token"] for line in lines] == [step.token for step in steps]
    assert [line["finish_reason"] for line in lines] == [None] * 11 + ["length"]
    for line, step in zip(lines, steps, strict=True):
        assert line["logprob"] == pytest.approx(step.logprob, abs=1e-5)
        likely = [top["logprob"] for top in line["top"]]
        assert len(likely) == 3 and likely == sorted(likely, reverse=True)
        # Greedily, the token that was taken is the most likely one.
        assert line["top"][0]["token"] == line["token"]
        assert likely[0] == pytest.approx(line["logprob"], abs=1e-5)
    assert last["statistics"]["tokens"] == 12
    assert last["statistics"]["prompt_tokens"] == len(model.encode(PROMPT))
    assert "top" not in json.loads(generate("-p", PROMPT, "--json")[1].splitlines()[0])
    assert "--json" in error_line(generate("-p", PROMPT, "--logprobs", "3"))
    assert "--echo" in error_line(generate("-p", PROMPT, "--json", "--echo"))
    assert "logprobs" in error_line(generate("-p", PROMPT, "--json", "--logprobs", "-1"))


def test_nothing_is_loaded_for_a_prompt_that_is_missing(
    run: Run, checkpoint: Path, type_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_npu.cli.generate.load_model", None)
    for terminal in (True, False):
        type_in(b"", terminal=terminal)
        assert "prompt" in error_line(run("generate", "-m", checkpoint))
        assert "prompt" in error_line(run("generate", "-m", checkpoint, "--ids"))


# -- states ----------------------------------------------------------------------------------------------


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


def test_reading_a_prompt_into_a_state_and_going_on_to_the_end(generate: Run, tmp_path: Path) -> None:
    state = str(tmp_path / "s")
    status, out, _ = generate("-p", "the turning", "-n", "0", "--state", state)
    assert (status, out) == (0, "") and (tmp_path / "s").is_file()
    _, whole, _ = generate("-p", "the turning", "-n", "12", "--temp", "0")
    _, rest, _ = generate("--state", state, "-p", "", "-n", "12", "--temp", "0")
    assert whole and whole == rest


def test_state_of_another_model(generate: Run, run: Run, other: Path, folder: Path, tmp_path: Path) -> None:
    generate("-p", PROMPT, "--state", tmp_path / "s", "-n", "2")
    before = (tmp_path / "s").read_bytes()
    common = ("--backend", "numpy", "-p", "x", "-n", "1", "--state", tmp_path / "s")
    assert "(96,)" in error_line(run("generate", "-m", folder / "large" / "model.pth", *common))
    assert "RWKV-7" in error_line(run("generate", "-m", folder / "fast" / "model.pth", *common))
    assert (tmp_path / "s").read_bytes() == before
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = run("generate", "-m", other, *common)
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


def test_state_in_is_read_and_never_written(generate: Run, tmp_path: Path) -> None:
    system, chat = tmp_path / "system", tmp_path / "chat"
    generate("-p", "the ", "-n", "0", "--state", system)
    before = system.read_bytes()
    whole = generate("-p", "the return", "-n", "4")[1]
    assert generate("--state-in", system, "-p", "return", "-n", "4")[1] == whole
    first = generate("--state-in", system, "--state", chat, "-p", "return", "-n", "2")[1]
    # The file of --state is there now, and goes before that of --state-in.
    assert first + generate("--state-in", system, "--state", chat, "-p", "", "-n", "2")[1] == whole
    assert system.read_bytes() == before
    assert "no such file" in error_line(generate("--state-in", tmp_path / "none", "-p", "x"))


def test_a_state_that_may_not_be_written_is_refused_at_once(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate("-p", "x", "-n", "0", "--state", tmp_path / "s")
    monkeypatch.setattr("rwkv_npu.cli.generate.os.access", lambda path, mode: Path(path).is_dir())
    monkeypatch.setattr("rwkv_npu.cli.generate.load_model", None)
    assert "--state-in" in error_line(generate("-p", "x", "--state", tmp_path / "s"))


def test_ctrl_c_in_a_long_prompt_keeps_what_was_read(
    generate: Run, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state file stays as it was; the same command goes on, and another prompt does not."""
    old, file = tmp_path / "old", tmp_path / "s"
    generate("-p", "x", "-n", "0", "--state", old)
    (tmp_path / "prompt").write_text("the turning and re" * 600)
    command = ("-f", tmp_path / "prompt", "-n", "3", "--state", file)
    file.write_bytes(old.read_bytes())
    expected = generate(*command)
    finished = model.load_state(file)
    read: list[int] = []
    forward = Model.forward

    def interrupted(self: Model, tokens: Any, *arguments: Any, **options: Any) -> Any:
        result = forward(self, tokens, *arguments, **options)
        read.append(len(tokens))
        if len(read) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    file.write_bytes(old.read_bytes())
    monkeypatch.setattr(Model, "forward", interrupted)
    status, out, err = generate(*command)
    assert (status, out) == (130, "") and sum(read) == 1024
    assert "keeps 1024 of" in err and "the same command continues" in err
    assert file.read_bytes() == old.read_bytes()
    (kept,) = tmp_path.glob("s.*.partial")
    monkeypatch.setattr(Model, "forward", forward)
    other = generate("-p", "x", "-n", "1", "--state", tmp_path / "s2")
    assert "going on" not in other[2] and kept.exists()
    status, out, err = generate(*command)
    assert (status, out) == expected[:2] and "1024 of" in err.splitlines()[0]
    state = model.load_state(file)
    assert state.tokens_seen == finished.tokens_seen
    np.testing.assert_array_equal(state.parts["att.wkv"], finished.parts["att.wkv"])
    assert not kept.exists()


# -- what a user can get wrong ---------------------------------------------------------------------------


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


def test_model_without_a_vocabulary(run: Run, wordless: Path, checkpoint: Path, tmp_path: Path) -> None:
    bare = ("generate", "-m", wordless, "--backend", "numpy", "-n", "3")
    assert run(*bare, "--ids", "-p", "5 6", "--state", tmp_path / "s")[0] == 0
    assert "--tokenizer" in error_line(run(*bare, "-p", "x"))
    assert "--tokenizer" in error_line(run(*bare, "-p", "", "--state", tmp_path / "s"))
    assert "--tokenizer" in error_line(run(*bare, "--ids", "-p", "5", "--stop", "x"))
    status, _, _ = run(*bare, "-p", "x", "--tokenizer", checkpoint.with_name("vocab.txt"))
    assert status == 0
