"""A chat with one model: its turns, the state after them, undo and retry.

The next prompt starts from the state after the finished turns. To get it, a thread reads the turns as text while the
user types. The state that generating the answer leaves is not used: it holds the thought, and its tokens may differ
from those that encoding the text gives.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_npu.cli.flags import as_flags
from rwkv_npu.errors import RwkvNpuError, StateError, UsageError
from rwkv_npu.formats.state import State, read_notes
from rwkv_npu.model import Model
from rwkv_npu.text.chat import THINKING, AnswerParser, Message, Piece, Template, history, render

KEPT_STATES = 16  # states kept, each after another turn; undoing to one of them reads no text again
NOTE = "messages"


class Conversation:
    """A chat. think: one of `chat.THINKING`. options: sampling options, by the names of `Model.generate`.

    prompt_tokens, answer_tokens and finish_reason describe the last answer.
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
            raise UsageError("this model has no vocabulary, but a chat needs one: give tokenizer=FILE")
        self.model, self.template, self.max_tokens = model, template, max_tokens
        self.options = {**template.sampling, **(options or {})}
        self.think = think
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.prompt_tokens = self.answer_tokens = 0
        self.finish_reason = ""
        self._states: dict[int, State] = {}  # by number of messages read
        self._reader: threading.Thread | None = None
        self._closed = False

    def close(self) -> None:
        """Stop reading turns. Call it before the model is closed."""
        self._closed = True
        if self._reader is not None:
            self._reader.join()

    @property
    def think(self) -> str:
        return self._think

    @think.setter
    def think(self, amount: str) -> None:
        if amount not in THINKING:
            raise UsageError(f"cannot think {amount[:20]!r}: use one of {', '.join(THINKING)}")
        if amount != "off" and not self.template.thinks:
            raise UsageError(f"models with the template {self.template.name} do not think")
        self._think = amount

    def ask(self, text: str) -> Iterator[Piece]:
        """Add a user message and generate the answer in pieces. Closing the iterator ends the answer early."""
        return self._answer([*self.messages, Message("user", text)])

    def retry(self) -> Iterator[Piece]:
        """Generate the last answer again."""
        if not self.messages or self.messages[-1].role != "assistant":
            raise UsageError("there is no answer to retry")
        return self._answer(self.messages[:-1])

    def undo(self) -> None:
        """Remove the last user message and its answer."""
        if not any(message.role == "user" for message in self.messages):
            raise UsageError("there is no message to undo")
        self._settle()
        while self.messages.pop().role != "user":
            pass

    def set_system(self, text: str) -> None:
        """Restart the chat with this instruction. An empty text means none."""
        self._settle()
        self._states.clear()
        self.messages = [Message("system", text)] if text else []

    def save(self, path: Path) -> None:
        """Write the state after the finished turns, together with the messages. Raises StateError."""
        self._settle()
        if self.messages and len(self.messages) not in self._states:
            self._read_turns()
        state = self._states.get(len(self.messages)) or self.model.new_state()
        turns = [{"role": message.role, "content": message.content} for message in self.messages]
        state.save(path, notes={NOTE: json.dumps(turns)})

    def load(self, path: Path) -> None:
        """Continue a saved chat, or start from any state. Raises StateError."""
        self._settle()
        state = self.model.load_state(path)
        self.messages = _messages(path)
        self._states = {len(self.messages): state}

    def _answer(self, messages: list[Message]) -> Iterator[Piece]:
        """Generate an answer to `messages`, which replace the chat's once they are encoded."""
        self._settle()
        prompt = render(self.template, messages, think=self.think)
        count, known = self._read_count(prompt.text, messages)
        parser = AnswerParser(opened=prompt.opened, stops=self.template.stops)
        ids = self.model.encode(prompt.text.removeprefix(known))
        self.messages = messages
        self._settle()  # drops the state after an answer that is replaced
        self.prompt_tokens, self.answer_tokens, self.finish_reason = len(ids), 0, ""
        content = ""
        try:
            for step in self.model.generate(
                ids, self._states.get(count), max_tokens=self.max_tokens, **self.options
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
        finally:  # an answer that was stopped early is kept too
            self.messages.append(Message("assistant", content))
            self._reader = threading.Thread(target=self._read_ahead, daemon=True)
            self._reader.start()

    def _read_count(self, text: str, messages: list[Message]) -> tuple[int, str]:
        """Find the latest state that `text` continues. Returns (number, text) of the messages that it has read."""
        for count in sorted(self._states, reverse=True):
            if count < len(messages):
                known = history(self.template, messages[:count]) if count else ""
                if text.startswith(known):
                    return count, known
        return 0, ""

    def _read_ahead(self) -> None:
        """Read the turns in a thread. An error is printed: the next prompt reads them again."""
        try:
            self._read_turns()
        except RwkvNpuError as error:
            print(f"the turns were not read ahead: {as_flags(str(error))}", file=sys.stderr)

    def _read_turns(self) -> None:
        """Read the turns that no state has read yet, and keep the state after them."""
        count, text = len(self.messages), history(self.template, self.messages)
        done, before = self._read_count(text, self.messages)
        ids = self.model.encode(text.removeprefix(before))

        def stop(_: int) -> None:
            if self._closed:
                raise _Closed

        try:
            self._states[count] = self.model.forward(ids, self._states.get(done), progress=stop)[1]
        except _Closed:
            return
        for old in sorted(self._states)[:-KEPT_STATES]:
            del self._states[old]

    def _settle(self) -> None:
        """Wait until the turns are read. Drop states of turns that were undone."""
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        kept = [count for count in self._states if count <= len(self.messages)]
        self._states = {count: self._states[count] for count in kept}


class _Closed(Exception):
    """Ends the reading of turns."""


def _messages(path: Path) -> list[Message]:
    note = read_notes(path).get(NOTE)
    if note is None:
        return []
    try:
        return [Message(str(turn["role"]), str(turn["content"])) for turn in json.loads(note)]
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{path}: its messages are damaged") from None
