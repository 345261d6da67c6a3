"""OpenAI's API: models, completions, chat completions.

Names and shapes follow OpenAI's API reference and the types of its Python package.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rwkv_npu.serve.answers import Event, SampledToken
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.request import (
    EFFORTS,
    chosen_tools,
    known_model,
    messages_of,
    options,
    presets,
    response_grammar,
    state_of,
    tools_of,
)
from rwkv_npu.serve.service import Completion, GenerationRequest, Running, Service
from rwkv_npu.serve.web import body_of, error_json, until_disconnect


def routes() -> list[Route]:
    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]


# -- models ----------------------------------------------------------------------------------------------


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "rwkv_npu"}


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in presets(service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(_model(service, known_model(service, request.path_params["name"])))


async def embeddings(request: Request) -> Response:
    return error_json(501, "this server has no embeddings: an RWKV language model is not trained for them")


# -- chat ------------------------------------------------------------------------------------------------


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    name = known_model(service, fields.text("model", ""))
    settings = options(service, fields, name, service.limits.default_tokens)
    if fields.boolean("logprobs", False):
        settings = replace(settings, top_logprobs=fields.integer("top_logprobs", 0, 0, 20))
    tools, must_call = chosen_tools(fields, tools_of(fields))
    grammar = response_grammar(fields, request.app.state.vocabulary)
    if must_call:
        grammar = request.app.state.vocabulary.calls(tools)
    think = EFFORTS[fields.choice("reasoning_effort", "none", tuple(EFFORTS))]
    if name.endswith(":think") and not fields.has("reasoning_effort"):
        think = "free"
    generation = service.chat_request(
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
    return await respond(request, generation, answer, fields)


class ChatAnswer:
    """The JSON of a chat completion, whole or in chunks."""

    def __init__(self, service: Service, name: str, tools: bool, logprobs: bool):
        self._service, self._tools, self._logprobs = service, tools, logprobs
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": service.fingerprint,
        }
        self._buffers: dict[int, str] = {}  # by answer: text that may still become a tool call
        self._plain: set[int] = set()  # answers that are certainly no tool call

    def whole(self, answers: Sequence[Completion], usage: Mapping[str, Any]) -> dict[str, Any]:
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
                "logprobs": {"content": [self._logprob(token) for token in answer.tokens]}
                if self._logprobs
                else None,
            }
            choices.append(choice)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    def first(self, count: int) -> list[dict[str, Any]]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(count)]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks that an event adds to a stream."""
        deltas: list[dict[str, Any]] = []
        content = "".join(piece.text for piece in event.pieces if not piece.thought)
        thought = "".join(piece.text for piece in event.pieces if piece.thought)
        if thought:
            deltas.append({"reasoning_content": thought})
        content, calls = self._hold_back(event, content)
        if content or (self._logprobs and event.tokens):
            deltas.append({"content": content})
        if calls:
            deltas.append({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
        chunks = [self._chunk(event.index, delta) for delta in deltas]
        if chunks and self._logprobs:
            chunks[-1]["choices"][0]["logprobs"] = {
                "content": [self._logprob(token) for token in event.tokens]
            }
        if event.reason:
            chunks.append(self._chunk(event.index, {}, "tool_calls" if calls else event.reason))
        return chunks

    def _hold_back(self, event: Event, content: str) -> tuple[str, list[dict[str, Any]]]:
        """Hold back content that may become a tool call.

        Returns the content to send now, and the tool calls once the answer has ended.
        """
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

    def _logprob(self, chosen: SampledToken) -> dict[str, Any]:
        def shown(token: int, logprob: float, data: bytes) -> dict[str, Any]:
            text = data.decode("utf-8", "replace")
            return {"token": text, "logprob": logprob, "bytes": list(data)}

        bytes_of = self._service.tokenizer.token_bytes
        top = [shown(token, logprob, bytes_of(token) or b"") for token, logprob in chosen.top]
        return {**shown(chosen.token, chosen.logprob, chosen.bytes), "top_logprobs": top}


def parse_calls(content: str) -> list[dict[str, Any]]:
    """The tool calls in an answer: JSON objects with name and arguments, bare or in a code fence; else []."""
    text = content.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    decoder, calls, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            for call in value if isinstance(value, list) else [value]:
                if not (isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call):
                    return []
                # NaN is no JSON, and half of a surrogate pair no text: the response could not be sent.
                arguments = json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False)
                (call["name"] + arguments).encode()
                function = {"name": call["name"], "arguments": arguments}
                calls.append(
                    {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
                )
            at += len(text[at:]) - len(text[at:].lstrip(" \n\r\t,"))
    except (ValueError, RecursionError):
        return []
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
    if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
        raise FieldError("prompt", "several prompts in one request are not supported: send them one by one")
    if not isinstance(prompt, str | list) or not prompt:
        raise FieldError("prompt", "it must be text, or a list of token ids")
    if isinstance(prompt, str):
        prompt = fields.text("prompt") if isinstance(fields.get("prompt"), str) else prompt
    if fields.has("suffix") and fields.text("suffix"):
        raise FieldError("suffix", "this model reads from left to right and cannot fill in")
    generation = service.completion_request(
        prompt,
        settings,
        stop=fields.stops("stop"),
        grammar=response_grammar(fields, request.app.state.vocabulary),
        count=fields.integer("n", 1, 1, service.limits.count) or 1,
        state=state_of(request, fields),
    )
    echo = service.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
    echo = echo if fields.boolean("echo", False) else ""
    answer = TextAnswer(service, name, echo, settings.top_logprobs is not None)
    return await respond(request, generation, answer, fields)


class TextAnswer:
    """The JSON of a text completion, whole or in chunks."""

    def __init__(self, service: Service, name: str, echo: str, logprobs: bool):
        self._echo, self._with_logprobs = echo, logprobs
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": service.fingerprint,
        }
        self._tokenizer = service.tokenizer

    def whole(self, answers: Sequence[Completion], usage: Mapping[str, Any]) -> dict[str, Any]:
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

    def _logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None

        def text(token: int) -> str:
            return (self._tokenizer.token_bytes(token) or b"").decode("utf-8", "replace")

        return {
            "tokens": [text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text(other): logprob for other, logprob in token.top} for token in tokens],
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


async def respond(
    request: Request, generation: GenerationRequest, answer: ChatAnswer | TextAnswer, fields: Fields
) -> Response:
    """Run a request. The response is complete, or a stream if the request asks for one."""
    service: Service = request.app.state.service
    streamed = fields.boolean("stream", False)
    with_usage = fields.object("stream_options").boolean("include_usage", False)
    running = await service.run(generation)
    if not streamed:
        answers = await until_disconnect(request, service.collect(running))
        return JSONResponse(answer.whole(answers, usage_json(running)))
    lines = _lines(running, answer, generation.count, with_usage)
    return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _lines(
    running: Running, answer: ChatAnswer | TextAnswer, count: int, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. An error becomes an event too, because the HTTP status was sent before."""
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
