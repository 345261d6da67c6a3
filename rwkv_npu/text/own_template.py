"""A checkpoint's own chat template: Jinja, in the form that Hugging Face's files have.

The template comes with a download, so it runs in Jinja's sandbox, without access to files or to Python's objects. A
short chat is rendered once, to find the labels of user and assistant and the text that ends a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rwkv_npu.errors import UsageError
from rwkv_npu.text.chat import Message, Template

LARGEST = 64 << 10  # characters
_QUESTION, _ANSWER = "Question1", "Answer1"
# Some templates write token 0 at the beginning. It is removed: RWKV's reference programs begin without it.
_BEGIN = ("<|rwkv_tokenizer_end_of_text|>", "<|endoftext|>")


def own_template(source: str, where: Path, family: Template) -> Template:
    """Compile Jinja source to a template.

    where: the file that errors name. family: a built-in template, for sampling options and labels. Raises
    UsageError if the source is no template for a chat, or Jinja is not installed.
    """
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UsageError(
            f"{where} has a chat template of its own, which needs jinja2: install it, or choose another template="
        ) from None
    if len(source) > LARGEST:
        raise UsageError(f"the chat template of {where} has more than {LARGEST} characters")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UsageError(
            f"the chat template of {where} does not compile ({_line(error)}): choose another template="
        ) from None

    def apply(turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], think: str, prompt: bool) -> str:
        try:
            text = compiled.render(
                messages=[_message(turn) for turn in turns],
                tools=[{"type": "function", "function": tool} for tool in tools] or None,
                add_generation_prompt=prompt,
                enable_thinking=think != "off",
                bos_token="",
                eos_token="\n\n",
            )
        except Exception as error:  # a template can fail in any way
            raise UsageError(f"the model's chat template refuses these messages: {_line(error)}") from None
        for begin in _BEGIN:
            text = text.removeprefix(begin)
        return text

    try:
        chat = apply([Message("user", _QUESTION), Message("assistant", _ANSWER)], (), "off", False)
        before, between = chat.split(_ANSWER)[0].split(_QUESTION)
        end = chat.split(_ANSWER)[1]
    except (UsageError, ValueError, IndexError):
        raise UsageError(
            f"the chat template of {where} cannot render a chat of two turns: choose another template="
        ) from None
    label = before.strip().rpartition("\n")[2]
    assistant = between.strip().rpartition("\n")[2]
    return replace(
        family,
        name="own",
        names={**family.names, "assistant": assistant.removesuffix(":") or family.names["assistant"]},
        hints=family.hints if "think" in source else {},
        ends=tuple(dict.fromkeys(mark for mark in (_end(end), f"\n{label}" if label else "") if mark)),
        apply=apply,
        tells_tools="tools" in source,
    )


def _end(text: str) -> str:
    """The stop string in the text after an answer, or "". A single line break is none: answers contain them."""
    return text.strip() or ("\n\n" if text.startswith("\n\n") else "")


def _message(turn: Message) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in turn.tool_calls]
    return message


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
