"""A chat on the terminal: what each turn reads, and how it ends while turns are being read."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rwkv_npu.cli.conversation import Conversation
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
