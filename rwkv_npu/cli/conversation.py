"""A chat with one model: turns, the state after them, and going back.

The state after the finished turns is what the next prompt begins with. It comes from reading those turns as text, not
from writing the answer: so thoughts are left out, and the tokens are those of the whole text. It is read while the user
types.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_npu.errors import StateError, UsageError
from rwkv_npu.formats.state import State, read_notes
from rwkv_npu.model import Model
from rwkv_npu.text.chat import THINKING, AnswerParser, Message, Piece, Template, history, render

KEPT_STATES = 16  # turns that can be undone without reading anything again
NOTE = "messages"


class Conversation:
    """A chat. think: one of `chat.THINKING`. options: sampling, by the names of `Model.generate`.

    prompt_tokens, answer_tokens, finish_reason: of the last answer.
    """

    def __init__(
        self,
        model: Model,
        template: Template,
        *,
        system: str = "",
        think: str = "off",
        max_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        if model.tokenizer is None:
            raise UsageError("this model has no vocabulary, and a chat needs one: give --tokenizer FILE")
        self.model, self.template, self.max_tokens = model, template, max_tokens
        self.options = {**template.sampling, **(options or {})}
        self.think = think
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.prompt_tokens = self.answer_tokens = 0
        self.finish_reason = ""
        self._states: dict[int, State] = {}  # after so many messages
        self._reader: threading.Thread | None = None

    @property
    def think(self) -> str:
        return self._think

    @think.setter
    def think(self, way: str) -> None:
        if way not in THINKING:
            raise UsageError(f"there is no way to think {way[:20]!r}: there are {', '.join(THINKING)}")
        if way != "off" and not self.template.thinks:
            raise UsageError(f"models of the template {self.template.name} do not think")
        self._think = way

    def say(self, text: str) -> Iterator[Piece]:
        """Give the user's message and write the answer, piece by piece. To close the iterator ends the answer there."""
        self.messages.append(Message("user", text))
        return self._answer()

    def retry(self) -> Iterator[Piece]:
        """Write another answer to the last message."""
        if not self.messages or self.messages[-1].role != "assistant":
            raise UsageError("there is no answer to write again")
        self._settle()
        self.messages.pop()
        return self._answer()

    def undo(self) -> None:
        """Take back the last message and its answer."""
        if not any(message.role == "user" for message in self.messages):
            raise UsageError("there is nothing to take back")
        self._settle()
        while self.messages.pop().role != "user":
            pass

    def set_system(self, text: str) -> None:
        """Begin anew, with this instruction; the empty one is none."""
        self._settle()
        self._states.clear()
        self.messages = [Message("system", text)] if text else []

    def save(self, path: Path) -> None:
        """Write the state after the finished turns, with the messages. Raises StateError."""
        self._settle()
        state = self._states.get(len(self.messages)) or self.model.new_state()
        turns = [{"role": one.role, "content": one.content} for one in self.messages]
        state.save(path, notes={NOTE: json.dumps(turns)})

    def load(self, path: Path) -> None:
        """Go on with a saved chat, or from any state. Raises StateError."""
        self._settle()
        state = self.model.load_state(path)
        self.messages = _messages(path)
        self._states = {len(self.messages): state}

    def _answer(self) -> Iterator[Piece]:
        self._settle()
        done = self._known()
        prompt = render(self.template, self.messages, think=self.think)
        known = history(self.template, self.messages[:done]) if done else ""
        parser = AnswerParser(opened=prompt.opened, stops=self.template.stops)
        ids = self.model.encode(prompt.text.removeprefix(known))
        self.prompt_tokens, self.answer_tokens, self.finish_reason = len(ids), 0, ""
        content = ""
        try:
            for step in self.model.generate(
                ids, self._states.get(done), max_tokens=self.max_tokens, **self.options
            ):
                self.answer_tokens += 1
                pieces = parser.push(step.text)
                if step.finish_reason:
                    pieces += parser.finish()
                for piece in pieces:
                    content += "" if piece.thought else piece.text
                    yield piece
                self.finish_reason = "stop" if parser.stopped else step.finish_reason or ""
                if parser.stopped:
                    break
        finally:  # also where the answer is stopped half way: what is there counts
            self.messages.append(Message("assistant", content))
            self._reader = threading.Thread(target=self._read_turns, daemon=True)
            self._reader.start()

    def _known(self) -> int:
        """How many messages the latest usable state has read; those after it are the prompt."""
        return max((count for count in self._states if count < len(self.messages)), default=0)

    def _read_turns(self) -> None:
        """Read the turns that no state has read yet."""
        done, count = self._known(), len(self.messages)
        before = history(self.template, self.messages[:done]) if done else ""
        ids = self.model.encode(history(self.template, self.messages).removeprefix(before))
        self._states[count] = self.model.forward(ids, self._states.get(done))[1]
        for old in sorted(self._states)[:-KEPT_STATES]:
            del self._states[old]

    def _settle(self) -> None:
        """Wait for the turns to be read; states of turns that were taken back go."""
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        kept = [count for count in self._states if count <= len(self.messages)]
        self._states = {count: self._states[count] for count in kept}


def _messages(path: Path) -> list[Message]:
    note = read_notes(path).get(NOTE)
    if note is None:
        return []
    try:
        return [Message(str(one["role"]), str(one["content"])) for one in json.loads(note)]
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{path}: its messages are damaged") from None
