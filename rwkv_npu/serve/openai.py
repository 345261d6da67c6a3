"""OpenAI's API: models, completions, chat completions.

Source of names and shapes: OpenAI's API reference and the types of its Python package.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rwkv_npu.formats.state import State
from rwkv_npu.serve.answers import Chosen, Event, Grammar, Options
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.service import Ask, Running, Service, Whole
from rwkv_npu.serve.structured import Vocabulary
from rwkv_npu.serve.web import NotFoundError, body_of, error_json, until_gone
from rwkv_npu.text.chat import Message
from rwkv_npu.text.sampling import SamplingOptions

EFFORTS = {"none": "off", "minimal": "off", "low": "low", "medium": "medium", "high": "high"}
MANY_TOOLS = 64
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def routes() -> list[Route]:
    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]


# -- models ----------------------------------------------------------------------------------------------


def presets(service: Service) -> dict[str, Mapping[str, float]]:
    """Names of the model with their own sampling: `NAME:think`, `NAME:math`, and so on."""
    template = service.template
    found = {service.name: template.sampling}
    if template.thinks:
        found[f"{service.name}:think"] = template.sampling
    return found | {f"{service.name}:{name}": values for name, values in template.presets.items()}


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "rwkv_npu"}


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in presets(service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(_model(service, known_model(service, request.path_params["name"])))


def known_model(service: Service, name: str) -> str:
    """The name, if it is one of ours; "" is the model that there is. Raises NotFoundError."""
    if name and name not in presets(service):
        raise NotFoundError("model", f"this server has the model {service.name!r}, not {name[:80]!r}")
    return name or service.name


async def embeddings(request: Request) -> Response:
    return error_json(501, "this server makes no embeddings: an RWKV language model was not trained for them")


# -- what is asked ---------------------------------------------------------------------------------------


def sampling(service: Service, fields: Fields, name: str) -> SamplingOptions:
    """How a request wants to be sampled, with the model's defaults where it is silent.

    Some clients send OpenAI's neutral values always, with which an RWKV model rambles: just these count as silence.
    """
    defaults = {**service.template.sampling, **presets(service)[name]}
    given = {key: fields.get(key) for key in NEUTRAL if fields.has(key)}
    if given == NEUTRAL and not service.neutral_sampling:
        fields = Fields({})
    built_in = SamplingOptions()

    def number(key: str, low: float, high: float) -> float:
        return fields.number(key, defaults.get(key, getattr(built_in, key)), low, high)

    return SamplingOptions(
        temperature=number("temperature", 0.0, 10.0),
        top_p=number("top_p", 0.0, 1.0),
        top_k=fields.integer("top_k", 0, 0, 1 << 20) or 0,
        min_p=number("min_p", 0.0, 1.0),
        presence_penalty=number("presence_penalty", -10.0, 10.0),
        frequency_penalty=number("frequency_penalty", -10.0, 10.0),
        penalty_decay=number("penalty_decay", 0.0, 1.0),
    )


def options(service: Service, fields: Fields, name: str, default_tokens: int) -> Options:
    limits = service.limits
    asked = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    most = fields.integer(asked, default_tokens, 1, 1 << 31)
    assert most is not None
    return Options(
        sampling(service, fields, name),
        seed=fields.integer("seed", None, 0, 2**63),
        max_tokens=min(most, limits.max_tokens),
        bias=fields.bias("logit_bias", service.model.spec.V),
        think_budget=fields.integer("reasoning_budget", None, 0, 1 << 31),
    )


def messages_of(fields: Fields) -> list[Message]:
    """OpenAI's messages. Raises FieldError for those that are not text."""
    found = []
    for one in fields.objects("messages"):
        role = one.choice("role", "", ("system", "developer", "user", "assistant", "tool", "function"))
        role = {"developer": "system", "function": "tool"}.get(role, role)
        calls = []
        for call in one.objects("tool_calls"):
            function = call.object("function")
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):  # OpenAI writes JSON in a string, Ollama an object
                arguments = Fields.parse(arguments.encode())._body
            calls.append({"name": function.text("name"), "arguments": arguments})
        found.append(Message(role, content_of(one), tuple(calls)))
    if not found:
        raise FieldError("messages", "it must be a list of at least one message")
    return found


def content_of(message: Fields) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return message.text("content")
    parts = []
    for part in message.objects("content"):
        if part.text("type", "") not in ("text", "input_text", "output_text"):
            raise part.error("type", "this model reads text only")
        parts.append(part.text("text"))
    return "\n".join(parts)


def state_of(request: Request, fields: Fields) -> State | None:
    """The named state that a request begins with, by its field `state`."""
    return request.app.state.named.find(fields.text("state")) if fields.has("state") else None


def tools_of(fields: Fields) -> list[Mapping[str, Any]]:
    """The functions that a request offers."""
    found: list[Mapping[str, Any]] = []
    for tool in fields.objects("tools"):
        if tool.text("type", "function") != "function":
            raise tool.error("type", "only functions are served")
        function = tool.object("function")
        name = function.text("name", "")
        if not name or len(name) > 64:
            raise function.error("name", "it must have 1 to 64 letters")
        parameters = function.object("parameters")._body
        found.append(
            {"name": name, "description": function.text("description", ""), "parameters": dict(parameters)}
        )
    if len(found) > MANY_TOOLS:
        raise FieldError("tools", f"{MANY_TOOLS} are the most")
    return found


def _chosen_tools(fields: Fields, tools: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
    """(tools that the model is told of, whether it must call one), by `tool_choice`."""
    choice = fields.get("tool_choice")
    if choice in (None, "auto"):
        return list(tools), False
    if choice == "none":
        return [], False
    if choice == "required":
        wanted = list(tools)
    elif isinstance(choice, Mapping):
        name = fields.object("tool_choice").object("function").text("name", "")
        wanted = [tool for tool in tools if tool["name"] == name]
    else:
        raise FieldError("tool_choice", "it must be none, auto, required, or name a function")
    if not wanted:
        raise FieldError("tool_choice", "it names no function of `tools`")
    return wanted, True


def _response_grammar(fields: Fields, vocabulary: Vocabulary) -> Callable[[], Grammar] | None:
    wanted = fields.object("response_format")
    kind = wanted.choice("type", "text", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return vocabulary.grammar(None)
    schema = wanted.object("json_schema").get("schema")
    if not isinstance(schema, Mapping):
        raise FieldError("response_format.json_schema.schema", "it must be a JSON schema")
    return vocabulary.grammar(schema)


# -- chat ------------------------------------------------------------------------------------------------


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    name = known_model(service, fields.text("model", ""))
    settings = options(service, fields, name, service.limits.default_tokens)
    if fields.boolean("logprobs", False):
        settings = replace(settings, top_logprobs=fields.integer("top_logprobs", 0, 0, 20))
    tools, must_call = _chosen_tools(fields, tools_of(fields))
    grammar = _response_grammar(fields, request.app.state.vocabulary)
    if must_call:
        grammar = request.app.state.vocabulary.calls(tools)
    think = EFFORTS[fields.choice("reasoning_effort", "none", tuple(EFFORTS))]
    if name.endswith(":think") and not fields.has("reasoning_effort"):
        think = "free"
    ask = service.ask_chat(
        messages_of(fields),
        settings,
        think=think,
        tools=tools,
        call=must_call,
        stop=fields.stops("stop"),
        grammar=grammar,
        count=fields.integer("n", 1, 1, service.limits.count) or 1,
        state=state_of(request, fields),
    )
    answer = ChatAnswer(service, name, bool(tools), settings.top_logprobs is not None)
    return await respond(request, ask, answer, fields)


class ChatAnswer:
    """The shapes of one chat completion."""

    def __init__(self, service: Service, name: str, tools: bool, logprobs: bool):
        self._service, self._tools, self._logprobs = service, tools, logprobs
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": service.fingerprint,
        }
        self._buffers: dict[int, str] = {}  # content of each answer that may be a call of a tool
        self._plain: set[int] = set()  # answers that are none

    def whole(self, answers: Sequence[Whole], usage: Mapping[str, Any]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            calls = parse_calls(answer.content) if self._tools else []
            message: dict[str, Any] = {"role": "assistant", "content": None if calls else answer.content}
            if answer.thought:
                message["reasoning_content"] = answer.thought.strip()
            if calls:
                message["tool_calls"] = calls
            choice = {
                "index": index,
                "message": message,
                "finish_reason": "tool_calls" if calls else answer.reason,
                "logprobs": {"content": [self._logprob(one) for one in answer.tokens]}
                if self._logprobs
                else None,
            }
            choices.append(choice)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    def first(self, count: int) -> list[dict[str, Any]]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(count)]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """What an event adds to a stream."""
        found: list[dict[str, Any]] = []
        content = "".join(piece.text for piece in event.pieces if not piece.thought)
        thought = "".join(piece.text for piece in event.pieces if piece.thought)
        if thought:
            found.append({"reasoning_content": thought})
        content, calls = self._held(event, content)
        if content or (self._logprobs and event.tokens):
            found.append({"content": content})
        if calls:
            found.append({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
        chunks = [self._chunk(event.index, delta) for delta in found]
        if chunks and self._logprobs:
            chunks[-1]["choices"][0]["logprobs"] = {"content": [self._logprob(one) for one in event.tokens]}
        if event.reason:
            chunks.append(self._chunk(event.index, {}, "tool_calls" if calls else event.reason))
        return chunks

    def _held(self, event: Event, content: str) -> tuple[str, list[dict[str, Any]]]:
        """Content that is certainly no call of a tool; at the end, the calls."""
        index = event.index
        if not self._tools or index in self._plain:
            return content, []
        held = self._buffers[index] = self._buffers.get(index, "") + content
        if event.reason:
            calls = parse_calls(held)
            return ("" if calls else held), calls
        if held.strip() and not held.lstrip().startswith(("`", "{")):
            self._plain.add(index)
            return held, []
        return "", []

    def _chunk(self, index: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "finish_reason": reason, "logprobs": None}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprob(self, chosen: Chosen) -> dict[str, Any]:
        def shown(token: int, logprob: float, data: bytes) -> dict[str, Any]:
            text = data.decode("utf-8", "replace")
            return {"token": text, "logprob": logprob, "bytes": list(data)}

        bytes_of = self._service.tokenizer.token_bytes
        top = [shown(token, logprob, bytes_of(token) or b"") for token, logprob in chosen.top]
        return {**shown(chosen.token, chosen.logprob, chosen.bytes), "top_logprobs": top}


def parse_calls(content: str) -> list[dict[str, Any]]:
    """Calls of tools in an answer: JSON objects with name and arguments, alone or in a fence; [] where it is none."""
    text = content.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    decoder, calls, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return []
        for one in value if isinstance(value, list) else [value]:
            if not (isinstance(one, dict) and isinstance(one.get("name"), str) and "arguments" in one):
                return []
            arguments = json.dumps(one["arguments"], ensure_ascii=False)
            function = {"name": one["name"], "arguments": arguments}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        at += len(text[at:]) - len(text[at:].lstrip(" \n\r\t,"))
    return calls


# -- completions -----------------------------------------------------------------------------------------


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    name = known_model(service, fields.text("model", ""))
    settings = options(service, fields, name, 16)
    if fields.has("logprobs"):
        settings = replace(settings, top_logprobs=fields.integer("logprobs", 0, 0, 5))
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and not all(type(one) is int for one in prompt):
        raise FieldError("prompt", "several prompts in one request are not served: send them one by one")
    if not isinstance(prompt, str | list) or not prompt:
        raise FieldError("prompt", "it must be text, or a list of token ids")
    if isinstance(prompt, str):
        prompt = fields.text("prompt") if isinstance(fields.get("prompt"), str) else prompt
    if fields.has("suffix") and fields.text("suffix"):
        raise FieldError("suffix", "this model cannot fill in: it reads from left to right")
    ask = service.ask_text(
        prompt,
        settings,
        stop=fields.stops("stop"),
        grammar=_response_grammar(fields, request.app.state.vocabulary),
        count=fields.integer("n", 1, 1, service.limits.count) or 1,
        state=state_of(request, fields),
    )
    echo = service.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
    answer = TextAnswer(service, name, echo if fields.boolean("echo", False) else "")
    return await respond(request, ask, answer, fields)


class TextAnswer:
    """The shapes of one text completion."""

    def __init__(self, service: Service, name: str, echo: str):
        self._echo = echo
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": service.fingerprint,
        }
        self._text_of = service.tokenizer

    def whole(self, answers: Sequence[Whole], usage: Mapping[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._echo + answer.content,
                "finish_reason": answer.reason,
                "logprobs": self._logprobs(answer.tokens),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self.head, "choices": choices, "usage": usage}

    def first(self, count: int) -> list[dict[str, Any]]:
        return [self._chunk(i, self._echo, None) for i in range(count)] if self._echo else []

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        text = "".join(piece.text for piece in event.pieces)
        return [self._chunk(event.index, text, event.reason)] if text or event.reason else []

    def _chunk(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        return {**self.head, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if not tokens or not tokens[0].top:
            return None

        def text(token: int) -> str:
            return (self._text_of.token_bytes(token) or b"").decode("utf-8", "replace")

        return {
            "tokens": [text(one.token) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{text(token): logprob for token, logprob in one.top} for one in tokens],
        }


# -- answers ---------------------------------------------------------------------------------------------


def usage_json(running: Running) -> dict[str, Any]:
    usage = running.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.written,
        "total_tokens": usage.prompt + usage.written,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.thought},
    }


async def respond(request: Request, ask: Ask, answer: ChatAnswer | TextAnswer, fields: Fields) -> Response:
    """The answer to a request, whole or as a stream of events."""
    service: Service = request.app.state.service
    streamed = fields.boolean("stream", False)
    with_usage = fields.object("stream_options").boolean("include_usage", False)
    running = service.run(ask)
    if not streamed:
        answers = await until_gone(request, service.whole(running))
        return JSONResponse(answer.whole(answers, usage_json(running)))
    lines = _lines(running, answer, ask.count, with_usage)
    return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _lines(
    running: Running, answer: ChatAnswer | TextAnswer, count: int, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. An error in the middle is an event too, since the status has gone out."""
    empty = {"usage": None} if with_usage else {}

    def line(chunk: Mapping[str, Any]) -> str:
        return f"data: {json.dumps({**chunk, **empty}, ensure_ascii=False)}\n\n"

    async with aclosing(running.events) as events:  # type: ignore[type-var]
        for chunk in answer.first(count):
            yield line(chunk)
        async for event in events:
            if event.error is not None:
                error = {"error": {"message": str(event.error), "type": "server_error", "code": None}}
                yield f"data: {json.dumps(error)}\n\n"
                return
            for chunk in answer.chunks(event):
                yield line(chunk)
    if with_usage:
        head = {key: value for key, value in answer.head.items() if key != "object"}
        kind = "chat.completion.chunk" if isinstance(answer, ChatAnswer) else "text_completion"
        last = {**head, "object": kind, "choices": [], "usage": usage_json(running)}
        yield f"data: {json.dumps(last)}\n\n"
    yield "data: [DONE]\n\n"
