"""A chat on the terminal: what each turn reads, and how it ends while turns are being read."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rwkv_npu.cli.conversation import Conversation
from rwkv_npu.errors import BackendError, TokenizerError
from rwkv_npu.model import Model
from rwkv_npu.text.chat import template_named
from tests.tiny import Run, Stdin

GREEDY = {"temperature": 0.0, "seed": 1}


def conversation(model: Model) -> Conversation:
    return Conversation(model, template_named("raven"), max_tokens=6, options=GREEDY)


def answer(chat: Conversation, text: str) -> str:
    return "".join(piece.text for piece in chat.ask(text))


def test_a_turn_is_read_once(model: Model, tmp_path: Path) -> None:
    with contextlib.closing(conversation(model)) as chat:
        answer(chat, "the turning")
        first = chat.prompt_tokens
        expected = answer(chat, "and")
        assert chat.prompt_tokens < first
        chat.undo()
        assert answer(chat, "and") == expected
        chat.undo()
        chat.save(tmp_path / "talk.safetensors")
    with contextlib.closing(conversation(model)) as chat:
        chat.load(tmp_path / "talk.safetensors")
        assert answer(chat, "and") == expected


def test_a_text_that_cannot_be_encoded_leaves_the_chat_as_it_was(model: Model) -> None:
    with contextlib.closing(conversation(model)) as chat:
        answer(chat, "the turning")
        before = list(chat.messages)
        with pytest.raises(TokenizerError, match="lone surrogate"):
            answer(chat, "\udcff")
        assert chat.messages == before
        answer(chat, "and")
        assert [message.content for message in chat.messages if message.role == "user"] == [
            "the turning",
            "and",
        ]


def test_a_retry_forgets_the_state_after_the_old_answer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(conversation(model)) as chat:
        expected = answer(chat, "the turning")
        chat._settle()
        assert set(chat._states) == {2}
        pieces = chat.retry()
        text = next(pieces).text
        assert not chat._states
        assert text + "".join(piece.text for piece in pieces) == expected


def test_an_error_while_turns_are_read_is_one_line(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise BackendError("the NPU has gone: check threads=")

    with contextlib.closing(conversation(model)) as chat:
        pieces = chat.ask("the turning")
        next(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", broken)
            pieces.close()  # type: ignore[attr-defined]
            chat._settle()
            with pytest.raises(BackendError):  # not saved with a state that lacks the turns
                chat.save(tmp_path / "talk.safetensors")
        err = capsys.readouterr().err
        assert err == "the turns were not read ahead: the NPU has gone: check --threads\n"
        assert answer(chat, "and")


def test_an_instruction_is_saved_in_the_state(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    with contextlib.closing(conversation(model)) as chat:
        chat.set_system("the turning of the sea")
        chat.save(path)
        expected = answer(chat, "and")
    with contextlib.closing(conversation(model)) as chat:
        chat.load(path)
        assert model.load_state(path).tokens_seen > 0 and answer(chat, "and") == expected


def test_a_line_that_is_not_utf8_is_left_out(
    checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(b"\xff\xfe\nthe \n"))
    status, printed, err = run("chat", "-m", checkpoint, "-n", "3", "--backend", "numpy")
    assert (status, err.count("\n")) == (0, 1) and "not UTF-8 text was left out" in err and printed


def test_closing_ends_the_reading_of_a_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(ids: Any, state: Any, progress: Any) -> None:
        while True:
            progress(1)
            time.sleep(0.01)

    chat = conversation(model)
    before = threading.active_count()
    pieces = chat.ask("the ")
    next(pieces)
    monkeypatch.setattr(model, "forward", endless)
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before + 1
    chat.close()
    assert threading.active_count() == before


def test_the_command_ends_its_reading_before_the_model_closes(
    checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread inside a backend when Python ends aborts the process."""
    events: list[str] = []
    close, leave = Conversation.close, Model.close
    monkeypatch.setattr(Conversation, "close", lambda chat: (close(chat), events.append("conversation")))
    monkeypatch.setattr(Model, "close", lambda model: (leave(model), events.append("model")))
    monkeypatch.setattr("sys.stdin", Stdin(b"the \n"))
    status, printed, err = run("chat", "-m", checkpoint, "-n", "3", "--backend", "numpy")
    assert (status, events[:2]) == (0, ["conversation", "model"]) and printed
