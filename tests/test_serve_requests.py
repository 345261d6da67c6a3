"""Fields of requests and the shape of answers, without a socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.testclient import TestClient

import rwkv_npu
from rwkv_npu.serve.answers import Answer, Event, Options
from rwkv_npu.serve.app import application
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.openai import parse_calls
from rwkv_npu.serve.service import Service
from rwkv_npu.text.chat import TEMPLATES, AnswerParser, Message, Piece
from rwkv_npu.text.sampling import Choice
from rwkv_npu.text.tokenizer import builtin

WORLD = builtin("world")


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    with rwkv_npu.load(checkpoint, backend="numpy") as model:
        made = Service(model, "tiny", TEMPLATES["g1"])
        yield made
        made.close()


def test_an_error_names_the_whole_path_of_a_field() -> None:
    options = Fields({"options": {"stop": ["\ud83d"]}}).object("options")
    with pytest.raises(FieldError, match=r"^options\.stop: .*surrogate"):
        options.stops("stop")


@pytest.mark.parametrize("name", [r'"f"', r'"\ud83d\ude00"'])
def test_a_tool_call_is_found(name: str) -> None:
    (call,) = parse_calls('{"name": ' + name + r', "arguments": {"a": "\u00e9"}}')
    assert call["function"]["arguments"] == '{"a": "é"}' and call["function"]["name"].encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": ' + "[" * 200_000,
        '{"name": "f", "arguments": ' + "[" * 200_000 + "]" * 200_000 + "}",
        r'{"name": "f", "arguments": {"a": "\ud83d"}}',
        r'{"name": "\ud83d", "arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
    ],
    ids=["open", "deep", "half a pair", "name", "NaN", "infinite"],
)
def test_json_that_cannot_be_sent_is_no_tool_call(text: str) -> None:
    assert parse_calls(text) == []


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_ends_once_at_its_budget(budget: int) -> None:
    events: list[Event] = []
    options = Options(think_budget=budget, max_tokens=20)
    parser = AnswerParser(opened=" <think", stops=("\n\n",))
    answer = Answer(0, WORLD, WORLD.has_text(65536), options, parser, events.append)
    (token,) = WORLD.encode("a")
    while answer.take(Choice(token, 0.0, [])) is not None:
        pass
    pieces = [piece for event in events for piece in event.pieces]
    thought = "".join(piece.text for piece in pieces if piece.thought)
    content = "".join(piece.text for piece in pieces if not piece.thought)
    assert thought == "a" * max(budget, 1) + "\n"
    assert content == "a" * len(content) != ""


@pytest.mark.parametrize("effort", ["off", "free", "high"])
@pytest.mark.parametrize("begun", ["", "<think", "<think>", "<think>\nWell", "<think>\n</think"])
def test_a_structured_answer_has_no_thought(effort: str, begun: str, service: Service) -> None:
    """The prompt may hold the beginning of a thought: the template's, or the chat's."""
    chat = [Message("user", "Hi"), *([Message("assistant", begun)] if begun else [])]
    request = service.chat_request(chat, Options(), think=effort, grammar=Mock())
    assert str(request.prompt).endswith("\n</think>\n") and str(request.prompt).count("<think>") == 1
    assert request.parser().push('{"a": 1}') == [Piece('{"a": 1}')]


@pytest.mark.parametrize("count", [0, 2])
def test_text_completions_have_log_probabilities(count: int, service: Service) -> None:
    client = TestClient(application(service, hosts=None))
    body: dict[str, Any] = {"prompt": "Hi", "max_tokens": 3, "temperature": 0}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"] is None
    answer = client.post("/v1/completions", json={**body, "logprobs": count}).json()
    shown = answer["choices"][0]["logprobs"]
    written = answer["usage"]["completion_tokens"]
    assert len(shown["tokens"]) == len(shown["token_logprobs"]) == len(shown["top_logprobs"]) == written
    assert all(logprob < 0 for logprob in shown["token_logprobs"])
    assert all(len(top) <= count for top in shown["top_logprobs"])
