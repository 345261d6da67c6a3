"""Chats as text: templates that turn messages into a prompt, and a parser for answers.

A template is data: role labels, hints that control thinking, and default sampling options. The templates follow the
texts that RWKV's authors train with and publish (RWKV-LM, `RWKV7-G1x-templates.txt`; ChatRWKV, `API_DEMO_CHAT.py`). Two
details decide the quality of answers. A prompt ends with `Assistant:` without a space. A thought opens with `<think`
without `>`, because the model writes the `>` itself.

This module knows no model and no backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rwkv_npu.errors import UsageError

# Amount of thinking, from none to long. With `off` the prompt holds an empty thought, and the model answers at once.
THINKING = ("off", "free", "low", "medium", "high")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a chat. tool_calls: the calls of an assistant, each `{"name": ..., "arguments": {...}}`."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Template:
    """The chat format of a family of models.

    names: the label of each role. begin: text before the first turn. hints: by amount of thinking, the text to append
    to the last user message; empty if the models do not think. sampling: default options, by the names of
    `Model.generate`. presets: other sampling options, by name.

    The last three fields are for a checkpoint's own template (`own_template`). ends: its stop strings. apply: renders
    (turns, tools, think, prompt) to text. tells_tools: True if the template describes the tools.
    """

    name: str
    names: Mapping[str, str]
    sampling: Mapping[str, float]
    begin: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    apply: Callable[[Sequence[Message], Sequence[Mapping[str, Any]], str, bool], str] | None = None
    tells_tools: bool = False

    @property
    def thinks(self) -> bool:
        return bool(self.hints)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer, except inside a thought or a code fence."""
        return self.ends or ("\n\n", f"\n{self.names['user']}:")


_WORLD = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "User"}
_G1_PRESETS = {
    "math": {"temperature": 0.3, "top_p": 0.3, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "creative": {
        "temperature": 0.6,
        "top_p": 0.7,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.2,
        "penalty_decay": 0.99,
    },
}
_CHAT = {
    "temperature": 1.0,
    "top_p": 0.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "penalty_decay": 0.996,
}

TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "raven",
            {"system": "System", "user": "Bob", "assistant": "Alice", "tool": "Bob"},
            {"temperature": 1.2, "top_p": 0.5, "presence_penalty": 0.4, "frequency_penalty": 0.4},
        ),
        Template("world", _WORLD, _CHAT),
        # Only later models know how to think briefly or at length.
        Template(
            "g1", _WORLD, _CHAT, hints={"free": "", "low": "", "medium": "", "high": ""}, presets=_G1_PRESETS
        ),
        Template(
            "g1-20250922",
            _WORLD,
            _CHAT,
            hints={
                "free": "",
                "low": " (think a bit)",
                "medium": " (think)",
                "high": " (think a lot)",
            },
            presets=_G1_PRESETS,
        ),
    )
}
HINTS_SINCE = 20250922  # G1 models whose file name has this date or a later one know the hints

_G1_NAME = re.compile(r"(?<![a-z])g[01][a-z]?\d*(?![a-z0-9])", re.IGNORECASE)
_DATE = re.compile(r"20\d{6}")


def choose_template(name: str, vocab_size: int) -> Template:
    """The template of a checkpoint, by its file name and the size of its vocabulary.

    The vocabulary identifies Pile models (RWKV-4 Raven). `g0` or `g1` in the name marks models that think, and the date
    in the name gives their age.
    """
    if vocab_size < 65536 and vocab_size > 50000:
        return TEMPLATES["raven"]
    if _G1_NAME.search(name):
        date = max((int(digits) for digits in _DATE.findall(name)), default=0)
        return TEMPLATES["g1-20250922" if date >= HINTS_SINCE else "g1"]
    return TEMPLATES["world"]


def template_named(name: str) -> Template:
    """The template of this name. Raises UsageError with the known names."""
    if name not in TEMPLATES:
        raise UsageError(f"no chat template {name[:40]!r}: use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# -- prompts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A rendered chat. `opened` is the beginning of the answer that the prompt already holds, such as `<think`."""

    text: str
    opened: str = ""


def clean(text: str) -> str:
    """Remove blank lines, which would end the turn, and white space at both ends. Indentation stays.

    Source: `RWKV7-G1x-templates.txt`.
    """
    return re.sub(r"\n(?:[ \t]*\n)+", "\n", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def without_thought(text: str) -> str:
    """Remove the thought from a past answer: models do not see their past thoughts."""
    before, mark, after = text.rpartition("</think>")
    return after.strip() if mark else text


def render(
    template: Template,
    messages: Sequence[Message],
    *,
    think: str = "off",
    tools: Sequence[Mapping[str, Any]] = (),
    call: bool = False,
) -> Prompt:
    """Render the prompt for the assistant's next answer.

    think: one of THINKING. tools: JSON functions (`name`, `parameters`). call: open the fence of a tool call, so that
    the answer must be one. If the last message is the assistant's, the answer continues it. Raises UsageError for an
    unknown role.
    """
    turns = list(messages)
    continued = turns.pop().content if turns and turns[-1].role == "assistant" else None
    opened = ""
    if template.apply is None:
        text = history(template, turns, tools=tools, hint=template.hints.get(think, ""))
        text += f"{template.names['assistant']}:"
    else:
        text = _apply(template, turns, tools, think, prompt=True)
        # The template may open a thought after the label of the assistant.
        thought = re.search(r"<think>?(?:\s*</think>?)?\s*$", text)
        opened = thought[0] if thought else ""
    if continued is not None:
        opened = f" {continued.strip()}" if continued.strip() else ""
    elif call:
        opened = " ```json\n"
    elif template.apply is not None:
        return Prompt(text, opened)
    elif template.thinks:
        opened = " <think>\n</think" if think == "off" else " <think"
    return Prompt(text + opened, opened)


def history(
    template: Template, turns: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), hint: str = ""
) -> str:
    """Render finished turns. The text ends with a blank line. hint: appended to the last user message.

    Every later prompt of the same chat begins with this text, unless the checkpoint's own template changes past turns.
    """
    if template.apply is not None:
        return _apply(template, turns, tools, "off", prompt=False)
    turns = _with_tools(list(turns), tools) if tools else turns
    last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    text = template.begin
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise UsageError(
                f"a message has the role {turn.role[:40]!r}: it must be one of {', '.join(ROLES)}"
            )
        text += f"{template.names[turn.role]}: {_content(turn)}{hint if i == last_user else ''}\n\n"
    return text


def _apply(
    template: Template,
    turns: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    think: str,
    *,
    prompt: bool,
) -> str:
    """Render with the checkpoint's own template. Blank lines inside turns are removed: they would end the turn."""
    assert template.apply is not None
    if tools and not template.tells_tools:
        turns, tools = _with_tools(list(turns), tools), ()
    cleaned = [
        replace(
            turn, content=clean(without_thought(turn.content) if turn.role == "assistant" else turn.content)
        )
        for turn in turns
    ]
    return template.apply(cleaned, tools, think, prompt)


def _content(turn: Message) -> str:
    if turn.tool_calls:
        calls = "\n".join(_call(call) for call in turn.tool_calls)
        return f"```json\n{calls}\n```"
    if turn.role == "tool":
        return f"Function output:\n{clean(turn.content)}"
    return clean(without_thought(turn.content) if turn.role == "assistant" else turn.content)


def _call(call: Mapping[str, Any]) -> str:
    import json

    return json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)


def _with_tools(turns: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Describe the tools in the system message, in the form that the models were trained with."""
    lines = "\n".join(f"- {_signature(tool)}" for tool in tools)
    text = f"Tools:\n{lines}\nReturn only a JSON function call."
    if turns and turns[0].role == "system":
        return [replace(turns[0], content=f"{turns[0].content}\n{text}"), *turns[1:]]
    return [Message("system", text), *turns]


def _signature(tool: Mapping[str, Any]) -> str:
    """A function as text: `get_weather(location: string, unit?: "celsius" | "fahrenheit"): description`."""
    schema = tool.get("parameters") or {}
    required = set(schema.get("required") or ())
    parameters = []
    for name, kind in (schema.get("properties") or {}).items():
        shown = (
            " | ".join(f'"{value}"' for value in kind["enum"])
            if kind.get("enum")
            else kind.get("type", "any")
        )
        parameters.append(f"{name}{'' if name in required else '?'}: {shown}")
    described = clean(str(tool.get("description") or ""))
    return f"{tool['name']}({', '.join(parameters)})" + (f": {described}" if described else "")


# -- answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text. thought: True for text inside a thought."""

    text: str
    thought: bool = False


_THINK, _END_THINK, _FENCE = "<think>", "</think>", "```"


class AnswerParser:
    """Splits a stream of text into thought and content, and finds the end of the answer.

    A blank line or a user label ends an answer, except inside a thought or a code fence, or before the first visible
    character. Text that may be part of a mark or a stop string is held back.

    opened: the beginning of the answer that the prompt holds. stops: the template's stop strings, ignored inside code
    fences. always: the caller's stop strings, which end the answer inside code fences too. raw: only `always` ends
    the answer (structured output). plain: the text is no chat answer. It has no thoughts, and white space at its
    beginning is kept.
    """

    def __init__(
        self,
        *,
        opened: str = "",
        stops: Sequence[str] = (),
        always: Sequence[str] = (),
        raw: bool = False,
        plain: bool = False,
    ):
        self.stopped = False
        self._stops, self._always, self._raw = tuple(stops), tuple(always), raw
        self._buffer = ""
        self.thinking = self._begun = self._fenced = False
        self._line_start = True
        if opened.lstrip().startswith("<think"):
            self._buffer, self.thinking = opened.lstrip(), True
            self._buffer = self._buffer[len("<think") :]
            self._skip_mark = True  # the model writes the `>` itself
        else:
            self._skip_mark = False
            self._fenced = opened.lstrip().startswith(_FENCE)
            self._begun = plain or bool(opened.strip())

    def push(self, text: str) -> list[Piece]:
        """Add text. Returns the pieces that are final by now. Sets `stopped` at the end of the answer."""
        if self.stopped:
            return []
        self._buffer += text
        return self._pieces(final=False)

    def finish(self) -> list[Piece]:
        """End of the stream: return the text that was held back."""
        return [] if self.stopped else self._pieces(final=True)

    def _pieces(self, final: bool) -> list[Piece]:
        out: list[Piece] = []
        while not self.stopped:
            before = (self._buffer, self.thinking, self._begun, self._fenced)
            if self.thinking:
                self._think(out, final)
            else:
                self._answer(out, final)
            if (self._buffer, self.thinking, self._begun, self._fenced) == before:
                break
        return [piece for piece in out if piece.text]

    def _think(self, out: list[Piece], final: bool) -> None:
        if self._skip_mark:
            if not self._buffer:
                return
            self._buffer, self._skip_mark = self._buffer.removeprefix(">"), False
        content, mark, rest = self._buffer.partition(_END_THINK)
        if mark:
            out.append(Piece(content, True))
            self._buffer, self.thinking = rest, False
            return
        keep = 0 if final else overlap(self._buffer, (_END_THINK,))
        cut = len(self._buffer) - keep
        out.append(Piece(self._buffer[:cut], True))
        self._buffer = self._buffer[cut:]

    def _answer(self, out: list[Piece], final: bool) -> None:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return
            if self._buffer.startswith(_THINK):
                self._buffer, self.thinking = self._buffer[len(_THINK) :], True
                return
            if _THINK.startswith(self._buffer) and not final:
                return
            self._begun = True
        stops = self._always if self._fenced or self._raw else (*self._stops, *self._always)
        stop = min((at for mark in stops if (at := self._buffer.find(mark)) >= 0), default=None)
        fence = None if self._raw else self._find_fence()
        if fence is not None and (stop is None or fence < stop):
            end = fence + len(_FENCE)
            self._emit(out, end)
            self._fenced = not self._fenced
            self._line_start = False
            return
        if stop is not None:
            self._emit(out, stop)
            self._buffer, self.stopped = "", True
            return
        keep = 0
        if not final:
            keep = overlap(self._buffer, stops)
            if not self._raw:
                keep = max(keep, self._fence_overlap())
        self._emit(out, len(self._buffer) - keep)

    def _emit(self, out: list[Piece], end: int) -> None:
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if text:
            out.append(Piece(text))
            line = text.rpartition("\n")
            self._line_start = not line[2].strip() if line[1] else self._line_start and not text.strip()

    def _find_fence(self) -> int | None:
        """Index of a code fence at the start of a line in the buffer, or None."""
        pattern = r"(?:^|\n)[ \t]*```" if self._line_start else r"\n[ \t]*```"
        match = re.search(pattern, self._buffer)
        return match.end() - len(_FENCE) if match else None

    def _fence_overlap(self) -> int:
        """Number of characters at the end of the buffer that may begin a code fence."""
        line = self._buffer.rpartition("\n")
        at_start = bool(line[1]) or self._line_start
        tail = line[2].lstrip(" \t")
        return len(tail) if at_start and tail in ("`", "``") else 0


def overlap(text: str, marks: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `marks`."""
    longest = 0
    for mark in marks:
        for size in range(min(len(text), len(mark) - 1), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    return longest
