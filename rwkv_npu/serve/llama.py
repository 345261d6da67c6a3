"""llama-server's own API: props, slots, tokenize, detokenize, apply-template, completion."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rwkv_npu.serve.answers import Options
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.request import messages_of, sampling, tools_of
from rwkv_npu.serve.service import Running, Service
from rwkv_npu.serve.web import body_of, until_disconnect
from rwkv_npu.text.chat import render


def routes() -> list[Route]:
    return [
        Route("/props", props),
        Route("/slots", slots),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/apply-template", apply_template, methods=["POST"]),
        Route("/completion", completion, methods=["POST"]),
    ]


async def props(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(
        {
            "model_path": service.name,
            "model_alias": service.name,
            "total_slots": service.scheduler.slots,
            "chat_template": service.template.name,
            "build_info": "rwkv_npu",
            "default_generation_settings": {
                "n_ctx": service.limits.prompt_tokens,
                "params": {**service.template.sampling, "n_predict": service.limits.default_tokens},
            },
            "backend": service.model.describe(),
            "precision": service.model.precision,
        }
    )


async def slots(request: Request) -> Response:
    service: Service = request.app.state.service
    scheduler = service.scheduler
    busy = scheduler.reading + scheduler.writing
    return JSONResponse(
        [
            {"id": i, "is_processing": i < busy, "n_ctx": service.limits.prompt_tokens}
            for i in range(scheduler.slots)
        ]
    )


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    ids = service.encode(fields.text("content", ""))
    if not fields.boolean("with_pieces", False):
        return JSONResponse({"tokens": ids})
    bytes_of = service.tokenizer.token_bytes
    pieces = [{"id": token, "piece": (bytes_of(token) or b"").decode("utf-8", "replace")} for token in ids]
    return JSONResponse({"tokens": pieces})


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    tokens = Fields.parse(await body_of(request)).get("tokens")
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 1 << 24 for token in tokens
    ):
        raise FieldError("tokens", "it must be a list of token ids")
    return JSONResponse({"content": service.tokenizer.decode(tokens)})


async def apply_template(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    return JSONResponse(
        {"prompt": render(service.template, messages_of(fields), tools=tools_of(fields)).text}
    )


async def completion(request: Request) -> Response:
    service: Service = request.app.state.service
    fields = Fields.parse(await body_of(request))
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        pass
    elif isinstance(prompt, str):
        prompt = fields.text("prompt")
    else:
        raise FieldError("prompt", "it must be text, or a list of token ids")
    max_tokens = fields.integer("n_predict", -1, -1, 1 << 31)
    assert max_tokens is not None
    limit = service.limits.max_tokens
    seed = fields.integer("seed", -1, -1, 2**63)
    options = Options(
        sampling(service, fields, service.name),
        seed=None if seed == -1 else seed,
        max_tokens=limit if max_tokens <= 0 else min(max_tokens, limit),
    )
    schema = fields.get("json_schema")
    grammar = request.app.state.vocabulary.grammar(schema) if isinstance(schema, dict) and schema else None
    generation = service.completion_request(prompt, options, stop=fields.stops("stop"), grammar=grammar)
    begin, running = time.monotonic(), await service.run(generation)
    if fields.boolean("stream", False):
        return StreamingResponse(_lines(service, running, begin), media_type="text/event-stream")
    (answer,) = await until_disconnect(request, service.collect(running))
    return JSONResponse({"content": answer.content, **_end(service, running, answer.reason, begin)})


async def _lines(service: Service, running: Running, begin: float) -> AsyncIterator[str]:
    async with aclosing(running.events) as events:  # type: ignore[type-var]
        async for event in events:
            if event.error is not None:
                yield f"data: {json.dumps({'error': {'message': str(event.error), 'code': 500}})}\n\n"
                return
            text = "".join(piece.text for piece in event.pieces)
            end = _end(service, running, event.reason, begin) if event.reason else {"stop": False}
            if text or event.reason:
                yield f"data: {json.dumps({'content': text, **end}, ensure_ascii=False)}\n\n"


def _end(service: Service, running: Running, reason: str, begin: float) -> dict[str, Any]:
    usage = running.usage
    return {
        "stop": True,
        "model": service.name,
        "stop_type": {"stop": "word", "length": "limit"}.get(reason, reason),
        "tokens_predicted": usage.written,
        "tokens_evaluated": usage.prompt,
        "tokens_cached": usage.cached,
        "truncated": False,
        "timings": {"predicted_n": usage.written, "total_ms": (time.monotonic() - begin) * 1e3},
    }
