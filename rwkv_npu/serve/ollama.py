"""Ollama's API: version, tags, ps, show, chat, generate. Answers are NDJSON, streamed by default.

Names and shapes follow Ollama's API documentation and its Python package.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rwkv_npu.serve.answers import Grammar, Options
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.openai import parse_calls
from rwkv_npu.serve.request import known_model, messages_of, presets, sampling, tools_of
from rwkv_npu.serve.service import GenerationRequest, Running, Service
from rwkv_npu.serve.web import body_of, error_json, until_disconnect
from rwkv_npu.text.chat import Message

VERSION = "0.12.0"  # of the API implemented here; clients compare it
EFFORTS = {"low": "low", "medium": "medium", "high": "high"}


def routes() -> list[Route]:
    return [
        Route("/api/version", version),
        Route("/api/tags", tags),
        Route("/api/ps", ps),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/embed", embed, methods=["POST"]),
        Route("/api/embeddings", embed, methods=["POST"]),
    ]


async def version(request: Request) -> Response:
    return JSONResponse({"version": VERSION})


async def embed(request: Request) -> Response:
    return error_json(501, "this server has no embeddings: an RWKV language model is not trained for them")


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _details(service: Service) -> dict[str, Any]:
    spec = service.model.spec
    return {
        "parent_model": "",
        "format": "rwkv_npu",
        "family": f"rwkv{spec.generation}",
        "families": [f"rwkv{spec.generation}"],
        "parameter_size": f"{spec.parameters / 1e6:.1f}M",
        "quantization_level": service.model.precision,
    }


def _listed(service: Service, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": _timestamp(service.started),
        "size": service.model.spec.parameters,
        "digest": service.identity,
        "details": _details(service),
    }


async def tags(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse({"models": [_listed(service, name) for name in presets(service)]})


async def ps(request: Request) -> Response:
    service: Service = request.app.state.service
    running = {**_listed(service, service.name), "expires_at": _timestamp(time.time() + 1e8), "size_vram": 0}
    return JSONResponse({"models": [running]})


async def show(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    _name(service, fields)
    spec = service.model.spec
    can = ["completion", "tools", *(["thinking"] if service.template.thinks else [])]
    return JSONResponse(
        {
            "modelfile": "",
            "parameters": "\n".join(f"{key} {value:g}" for key, value in service.template.sampling.items()),
            "template": service.template.name,
            "details": _details(service),
            "model_info": {
                "general.architecture": f"rwkv{spec.generation}",
                "general.parameter_count": spec.parameters,
                f"rwkv{spec.generation}.context_length": service.limits.prompt_tokens,
                f"rwkv{spec.generation}.embedding_length": spec.D,
                f"rwkv{spec.generation}.block_count": spec.L,
            },
            "capabilities": can,
            "modified_at": _timestamp(service.started),
        }
    )


def _name(service: Service, fields: Fields) -> str:
    """The model that a request names. Some clients write `name`; Ollama's default tag is `:latest`."""
    name = fields.text("model", fields.text("name", ""))
    return known_model(service, name.removesuffix(":latest"))


def _options(service: Service, fields: Fields, name: str) -> tuple[Options, tuple[str, ...]]:
    """Options and stop strings of a request. Ollama has them in an object of their own."""
    given = fields.object("options")
    max_tokens = given.integer("num_predict", service.limits.default_tokens, -2, 1 << 31) or 0
    limit = service.limits.max_tokens
    return (
        Options(
            sampling(service, given, name),
            seed=given.integer("seed", None, 0, 2**63),
            max_tokens=limit if max_tokens <= 0 else min(max_tokens, limit),
        ),
        given.stops("stop"),
    )


def _grammar(request: Request, fields: Fields) -> Callable[[], Grammar] | None:
    """A factory of grammars for the field `format`. None for plain text, for which some clients send ""."""
    wanted = fields.get("format")
    if wanted in (None, ""):
        return None
    if wanted == "json":
        return request.app.state.vocabulary.grammar(None)
    if isinstance(wanted, Mapping):
        return request.app.state.vocabulary.grammar(wanted)
    raise FieldError("format", "it must be json or a JSON schema")


def _think(fields: Fields, name: str) -> str:
    wanted = fields.get("think")
    if wanted is None:
        return "free" if name.endswith(":think") else "off"
    if isinstance(wanted, bool):
        return "free" if wanted else "off"
    return EFFORTS[fields.choice("think", "", tuple(EFFORTS))]


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    name = _name(service, fields)
    if not fields.get("messages"):
        return _loaded(name, {"message": {"role": "assistant", "content": ""}})
    options, stop = _options(service, fields, name)
    tools = tools_of(fields)
    grammar = _grammar(request, fields)
    think = _think(fields, name)
    generation = service.chat_request(
        messages_of(fields), options, think=think, tools=tools, stop=stop, grammar=grammar
    )

    def shape(content: str, thought: str, last: bool) -> dict[str, Any]:
        calls = parse_calls(content) if tools and last else []
        message: dict[str, Any] = {"role": "assistant", "content": "" if calls else content}
        if thought:
            message["thinking"] = thought
        if calls:
            functions = [call["function"] for call in calls]
            message["tool_calls"] = [
                {"function": {"name": function["name"], "arguments": json.loads(function["arguments"])}}
                for function in functions
            ]
        return {"message": message}

    return await _respond(request, fields, name, generation, shape, hold=bool(tools))


async def generate(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    name = _name(service, fields)
    prompt = fields.text("prompt", "")
    if not prompt:
        return _loaded(name, {"response": ""})
    options, stop = _options(service, fields, name)
    grammar = _grammar(request, fields)
    if fields.boolean("raw", False):
        generation = service.completion_request(prompt, options, stop=stop, grammar=grammar)
    else:
        system = fields.text("system", "")
        messages = [Message("system", system)] * bool(system) + [Message("user", prompt)]
        think = _think(fields, name)
        generation = service.chat_request(messages, options, think=think, stop=stop, grammar=grammar)

    def shape(content: str, thought: str, last: bool) -> dict[str, Any]:
        return {"response": content, **({"thinking": thought} if thought else {})}

    return await _respond(request, fields, name, generation, shape, hold=False)


Shape = Callable[[str, str, bool], dict[str, Any]]


def _loaded(name: str, shape: Mapping[str, Any]) -> Response:
    """The response to a request without a prompt. Clients send such a request to load the model."""
    return JSONResponse(
        {"model": name, "created_at": _timestamp(time.time()), **shape, "done": True, "done_reason": "load"}
    )


async def _respond(
    request: Request, fields: Fields, name: str, generation: GenerationRequest, shape: Shape, *, hold: bool
) -> Response:
    """One answer, streamed unless `stream` is false. hold: send the content at the end, as it may be a tool call."""
    service: Service = request.app.state.service
    streamed = fields.boolean("stream", True)
    begin, running = time.monotonic(), await service.run(generation)
    head = {"model": name}
    if not streamed:
        (answer,) = await until_disconnect(request, service.collect(running))
        body = shape(answer.content, answer.thought.strip(), True)
        return JSONResponse({**head, **_now(), **body, **_done(running, answer.reason, begin, begin)})
    return StreamingResponse(_lines(running, head, shape, begin, hold), media_type="application/x-ndjson")


async def _lines(
    running: Running, head: Mapping[str, Any], shape: Shape, begin: float, hold: bool
) -> AsyncIterator[str]:
    held, first = "", begin
    async with aclosing(running.events) as events:  # type: ignore[type-var]
        async for event in events:
            if event.error is not None:
                yield json.dumps({"error": str(event.error)}) + "\n"
                return
            first = time.monotonic() if first == begin else first
            content = "".join(piece.text for piece in event.pieces if not piece.thought)
            thought = "".join(piece.text for piece in event.pieces if piece.thought)
            if hold:
                held, content = held + content, ""
            last = event.reason is not None
            if content or thought or last:
                body = shape(held if hold and last else content, thought, last)
                end = _done(running, event.reason, begin, first) if event.reason else {"done": False}
                yield json.dumps({**head, **_now(), **body, **end}, ensure_ascii=False) + "\n"


def _now() -> dict[str, str]:
    return {"created_at": _timestamp(time.time())}


def _done(running: Running, reason: str, begin: float, first: float) -> dict[str, Any]:
    """Fields of the last line: reason, token counts, and times in nanoseconds."""
    now, usage = time.monotonic(), running.usage
    return {
        "done": True,
        "done_reason": reason,
        "total_duration": int((now - begin) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt,
        "prompt_eval_duration": int((first - begin) * 1e9),
        "eval_count": usage.written,
        "eval_duration": int((now - first) * 1e9),
    }
