"""OpenAI's responses API: conversations that the server remembers.

`previous_response_id` names the response to continue from. The state after its turns is usually in the cache, so that
only the new turn is read. The server remembers the text too: if the cache has dropped the state, it reads all turns.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.request import EFFORTS, content_of, known_model, options
from rwkv_npu.serve.service import Running, Service
from rwkv_npu.serve.web import NotFoundError, body_of, until_disconnect
from rwkv_npu.text.chat import Message

KEPT = 4096  # responses that are remembered


def routes() -> list[Route]:
    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/{id}", retrieve),
        Route("/v1/responses/{id}", delete, methods=["DELETE"]),
    ]


class Memory:
    """Turns of conversations, by the id of the response that ended them. The oldest are dropped first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[tuple[Message, ...], dict[str, Any]]] = OrderedDict()

    def keep(self, turns: Sequence[Message], response: dict[str, Any]) -> None:
        self._kept[response["id"]] = tuple(turns), response
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, name: str) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Raises NotFoundError."""
        if name not in self._kept:
            raise NotFoundError("previous_response_id", f"no response has the id {name[:80]!r}")
        return self._kept[name]

    def drop(self, name: str) -> None:
        self.find(name)
        del self._kept[name]


async def create(request: Request) -> Response:
    service: Service = request.app.state.service
    memory: Memory = request.app.state.memory
    fields = Fields.parse(await body_of(request))
    name = known_model(service, fields.text("model", ""))
    settings = options(service, fields, name, service.limits.default_tokens)
    max_tokens = fields.integer("max_output_tokens", settings.max_tokens, 1, 1 << 31)
    assert max_tokens is not None
    settings = replace(settings, max_tokens=min(max_tokens, service.limits.max_tokens))
    previous = fields.text("previous_response_id", "")
    turns = [turn for turn in memory.find(previous)[0] if turn.role != "system"] if previous else []
    instructions = fields.text("instructions", "")
    messages = [Message("system", instructions)] * bool(instructions) + [*turns, *_input(fields)]
    effort = fields.object("reasoning").choice("effort", "none", tuple(EFFORTS))
    think = "free" if name.endswith(":think") and effort == "none" else EFFORTS[effort]
    running = await service.run(service.chat_request(messages, settings, think=think))
    answer = ResponseBody(name, previous or None, messages, memory, fields.boolean("store", True))
    if not fields.boolean("stream", False):
        (completion,) = await until_disconnect(request, service.collect(running))
        return JSONResponse(answer.done(completion.content, completion.reason, running))
    return StreamingResponse(_lines(running, answer), media_type="text/event-stream")


def _input(fields: Fields) -> list[Message]:
    """The messages of the field `input`. Raises FieldError if it is not text."""
    given = fields.get("input")
    if isinstance(given, str) and given:
        return [Message("user", fields.text("input"))]
    items = fields.objects("input")
    if not items:
        raise FieldError("input", "it must be text, or a list of messages")
    messages = []
    for item in items:
        if item.text("type", "message") != "message":
            raise item.error("type", "only messages are supported")
        role = item.choice("role", "user", ("system", "developer", "user", "assistant"))
        messages.append(Message("system" if role == "developer" else role, content_of(item)))
    return messages


class ResponseBody:
    """The JSON of one response. messages: all turns before the answer."""

    def __init__(
        self, model: str, previous: str | None, messages: Sequence[Message], memory: Memory, store: bool
    ):
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._messages, self._memory, self._store = messages, memory, store
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "previous_response_id": previous,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
        }

    def begun(self) -> dict[str, Any]:
        return {**self._head, "status": "in_progress", "output": []}

    def message(self, text: str, status: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def done(self, text: str, reason: str, running: Running) -> dict[str, Any]:
        """The complete response. It is remembered if the request asked to store it."""
        status = "incomplete" if reason == "length" else "completed"
        usage = running.usage
        response = {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "output": [self.message(text, status)],
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.written,
                "output_tokens_details": {"reasoning_tokens": usage.thought},
                "total_tokens": usage.prompt + usage.written,
            },
        }
        if self._store:
            self._memory.keep([*self._messages, Message("assistant", text)], response)
        return response


async def _lines(running: Running, answer: ResponseBody) -> AsyncIterator[str]:
    count = 0

    def line(kind: str, **values: Any) -> str:
        nonlocal count
        count += 1
        event = {"type": kind, "sequence_number": count - 1, **values}
        return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"

    location: Mapping[str, Any] = {"item_id": answer.item, "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}
    text, reason = "", "stop"
    yield line("response.created", response=answer.begun())
    yield line("response.in_progress", response=answer.begun())
    opened = {**answer.message("", "in_progress"), "content": []}
    yield line("response.output_item.added", output_index=0, item=opened)
    yield line("response.content_part.added", **location, part=part)
    async with aclosing(running.events) as events:  # type: ignore[type-var]
        async for event in events:
            if event.error is not None:
                yield line("error", code="server_error", message=str(event.error), param=None)
                return
            reason = event.reason or reason
            delta = "".join(piece.text for piece in event.pieces if not piece.thought)
            text += delta
            if delta:
                yield line("response.output_text.delta", **location, delta=delta, logprobs=[])
    response = answer.done(text, reason, running)
    yield line("response.output_text.done", **location, text=text, logprobs=[])
    yield line("response.content_part.done", **location, part={**part, "text": text})
    yield line("response.output_item.done", output_index=0, item=response["output"][0])
    yield line(f"response.{response['status']}", response=response)


async def retrieve(request: Request) -> Response:
    return JSONResponse(request.app.state.memory.find(request.path_params["id"])[1])


async def delete(request: Request) -> Response:
    name = request.path_params["id"]
    request.app.state.memory.drop(name)
    return JSONResponse({"id": name, "object": "response.deleted", "deleted": True})
