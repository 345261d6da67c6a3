"""The OpenAPI document of the server, at `/openapi.json`: the fields that it reads, and the answers that it gives.

Null counts as absent, because some clients send it for defaults. Fields that the document does not name are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import rwkv_npu
from rwkv_npu.serve.fields import LONG_STOP, MANY_STOPS
from rwkv_npu.serve.request import EFFORTS, MAX_TOOLS
from rwkv_npu.serve.service import Limits
from rwkv_npu.serve.states import NAME

Schema = dict[str, Any]
JSON, EVENTS, LINES, BYTES = (
    "application/json",
    "text/event-stream",
    "application/x-ndjson",
    "application/octet-stream",
)


def routes() -> list[Route]:
    return [Route("/openapi.json", openapi)]


async def openapi(request: Request) -> Response:
    return JSONResponse(document())


# -- schemas ---------------------------------------------------------------------------------------------


def _text(least: int = 0, **more: Any) -> Schema:
    return {"type": "string", "minLength": least, **more}


def _number(least: float, most: float, kind: str = "number") -> Schema:
    return {"type": kind, "minimum": least, "maximum": most}


def _integer(least: int, most: int = 1 << 31) -> Schema:
    return _number(least, most, "integer")


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(required: str = "", /, **properties: Schema) -> Schema:
    """An object. `required` names fields; all others may be null."""
    named = required.split()
    return {
        "type": "object",
        "required": named,
        "properties": {
            name: schema if name in named else _any(schema, {"type": "null"})
            for name, schema in properties.items()
        },
    }


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


BOOLEAN, OBJECT = {"type": "boolean"}, {"type": "object"}
STOP = _text(1, maxLength=LONG_STOP)
SAMPLING = {
    "temperature": _number(0, 10),
    "top_p": _number(0, 1),
    "top_k": _integer(0, 1 << 20),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-10, 10),
    "frequency_penalty": _number(-10, 10),
    "penalty_decay": _number(0, 1),
    "stop": _any(STOP, _list(STOP, maxItems=MANY_STOPS)),
}
COMMON = {
    "model": _text(),
    "stream": BOOLEAN,
    "seed": _integer(0, 2**63),
    **SAMPLING,
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "reasoning_budget": _integer(0),
}
OPENAI = {
    **COMMON,
    "max_tokens": _integer(1),
    "max_completion_tokens": _integer(1),
    "n": _integer(1, Limits.count),
    "stream_options": _object(include_usage=BOOLEAN),
    "response_format": _ref("Format"),
    "state": _text(),
}
OLLAMA = {
    "model": _text(),
    "stream": BOOLEAN,
    "options": _object(**SAMPLING, num_predict=_integer(-2), seed=_integer(0, 2**63)),
    "format": _any({"enum": ["", "json"]}, OBJECT),
    "think": _any(BOOLEAN, {"enum": ["low", "medium", "high"]}),
}
SCHEMAS = {
    "Error": _object("error", error=_any(_text(), _object("message", message=_text()))),
    "Message": _object(
        "role",
        role={"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        content=_any(_text(), _list(_object("type text", type={"enum": ["text"]}, text=_text()))),
        tool_calls=_list(_object("function", function=_object("name", name=_text(), arguments=OBJECT))),
    ),
    "Tool": _object(
        "function",
        type={"const": "function"},
        function=_object("name", name=_text(1, maxLength=64), description=_text(), parameters=OBJECT),
    ),
    "Format": _object(
        type={"enum": ["text", "json_object", "json_schema"]}, json_schema=_object("schema", schema=OBJECT)
    ),
    "Prompt": _any(_text(1), _list(_integer(0), minItems=1)),
    "Usage": _object(
        "prompt_tokens completion_tokens total_tokens",
        prompt_tokens=_integer(0),
        completion_tokens=_integer(0),
        total_tokens=_integer(0),
    ),
    "Completion": _object(
        "id object choices usage", id=_text(1), object=_text(1), choices=_list(OBJECT), usage=_ref("Usage")
    ),
    "State": _object(
        "id object tokens bytes", id=_text(1), object=_text(), tokens=_integer(0), bytes=_integer(0)
    ),
    "Models": _object("data", data=_list(_object("id", id=_text(1)), minItems=1)),
}


# -- operations ------------------------------------------------------------------------------------------

REASONS = {
    400: "A field is missing or wrong; the error names it",
    404: "There is no such model, state or response",
    413: "The request is too large, or arrives too slowly",
    503: "All slots are in use and the queue is full, or the server is shutting down",
}


def _operation(
    summary: str,
    *errors: int,
    body: Schema | None = None,
    answer: Schema = OBJECT,
    media: tuple[str, ...] = (JSON,),
    upload: str = JSON,
) -> Schema:
    """An operation. errors: its HTTP statuses for errors. media: media types of its answer, those of streams last."""
    content = {kind: {"schema": answer} if kind == JSON else {} for kind in media}
    failed = {JSON: {"schema": _ref("Error")}}
    responses = {"200": {"description": "OK", "content": content}}
    responses |= {str(code): {"description": REASONS[code], "content": failed} for code in errors}
    sent = {} if body is None else {"requestBody": {"required": True, "content": {upload: {"schema": body}}}}
    return {"summary": summary, **sent, "responses": responses}


def _named(operations: Mapping[str, Schema], name: str, **schema: Any) -> Schema:
    """The operations of a path with one parameter."""
    parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string", **schema}}
    return {"parameters": [parameter], **operations}


def document() -> Schema:
    """The OpenAPI 3.1 document."""
    work = (400, 404, 413, 503)
    answer, name = _ref("Completion"), {"pattern": f"^{NAME.pattern}$"}
    chat = _object(
        "messages",
        messages=_list(_ref("Message"), minItems=1),
        **OPENAI,
        logprobs=BOOLEAN,
        top_logprobs=_integer(0, 20),
        tools=_list(_ref("Tool"), maxItems=MAX_TOOLS),
        tool_choice=_any({"enum": ["none", "auto", "required"]}, OBJECT),
        reasoning_effort={"enum": list(EFFORTS)},
    )
    text = _object("prompt", prompt=_ref("Prompt"), **OPENAI, logprobs=_integer(0, 5), echo=BOOLEAN)
    respond = _object(
        "input",
        input=_any(_text(1), _list(_ref("Message"), minItems=1)),
        **COMMON,
        instructions=_text(),
        previous_response_id=_text(),
        max_output_tokens=_integer(1),
        store=BOOLEAN,
        reasoning=_object(effort={"enum": list(EFFORTS)}),
    )
    ollama_chat = _object(
        messages=_list(_ref("Message")), tools=_list(_ref("Tool"), maxItems=MAX_TOOLS), **OLLAMA
    )
    ollama_text = _object(prompt=_text(), system=_text(), raw=BOOLEAN, **OLLAMA)
    llama = _object(
        "prompt", prompt=_ref("Prompt"), n_predict=_integer(-1), seed=_integer(-1, 2**63), **SAMPLING
    )
    lines: dict[str, Any] = {"media": (JSON, LINES)}
    events: dict[str, Any] = {"media": (JSON, EVENTS)}
    messages = _object("messages", messages=_list(_ref("Message"), minItems=1))
    get, post, delete = "get", "post", "delete"
    paths = {
        "/health": {get: _operation("Does the server take requests?", 503)},
        "/metrics": {get: _operation("Counters for Prometheus", media=("text/plain",))},
        "/v1/models": {get: _operation("The model, once for each preset", answer=_ref("Models"))},
        "/v1/models/{name}": _named({get: _operation("One model", 404)}, "name", minLength=1),
        "/v1/chat/completions": {
            post: _operation("Answer a chat", *work, body=chat, answer=answer, **events)
        },
        "/v1/completions": {post: _operation("Continue a text", *work, body=text, answer=answer, **events)},
        "/v1/responses": {post: _operation("Answer, and remember the turns", *work, body=respond, **events)},
        "/v1/responses/{id}": _named(
            {get: _operation("A remembered response", 404), delete: _operation("Forget a response", 404)},
            "id",
        ),
        "/v1/states": {get: _operation("Named states", answer=_object("data", data=_list(_ref("State"))))},
        "/v1/states/{name}": _named(
            {
                get: _operation("Download a state", 404, media=(BYTES,)),
                "put": _operation("Upload a state", 400, 413, body={}, upload=BYTES, answer=_ref("State")),
                post: _operation(
                    "Read a text, and keep the state after it",
                    *work,
                    body=_object("text", text=_text(1), state=_text()),
                    answer=_ref("State"),
                ),
                delete: _operation("Delete a state", 404),
            },
            "name",
            **name,
        ),
        "/v1/states/{name}/fork": _named(
            {
                post: _operation(
                    "Copy a state",
                    400,
                    404,
                    413,
                    body=_object("name", name=_text(1, **name)),
                    answer=_ref("State"),
                )
            },
            "name",
            **name,
        ),
        "/api/version": {get: _operation("The version of Ollama's API")},
        "/api/tags": {get: _operation("The model, once for each preset")},
        "/api/ps": {get: _operation("The model in memory")},
        "/api/show": {
            post: _operation("Facts of the model", *work, body=_object(model=_text(), name=_text()))
        },
        "/api/chat": {post: _operation("Answer a chat", *work, body=ollama_chat, **lines)},
        "/api/generate": {post: _operation("Answer a prompt", *work, body=ollama_text, **lines)},
        "/props": {get: _operation("The model and its limits")},
        "/slots": {get: _operation("Slots in use", answer=_list(OBJECT))},
        "/tokenize": {
            post: _operation("Text to tokens", 400, 413, body=_object(content=_text(), with_pieces=BOOLEAN))
        },
        "/detokenize": {
            post: _operation(
                "Tokens to text", 400, 413, body=_object("tokens", tokens=_list(_integer(0, (1 << 24) - 1)))
            )
        },
        "/apply-template": {post: _operation("The prompt of a chat", 400, 413, body=messages)},
        "/completion": {post: _operation("Continue a text", *work, body=llama, **events)},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "rwkv_npu", "version": rwkv_npu.__version__},
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }
