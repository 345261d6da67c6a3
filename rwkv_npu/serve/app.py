"""The ASGI application of a service: all routes, behind the gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from rwkv_npu.errors import RwkvNpuError
from rwkv_npu.serve import llama, ollama, openai, openapi, page, responses, states
from rwkv_npu.serve.service import Service
from rwkv_npu.serve.structured import Vocabulary
from rwkv_npu.serve.web import LOOPBACK, Gate, error_json, error_response, health, metrics


def application(service: Service, *, key: str | None = None, hosts: Sequence[str] | None = LOOPBACK) -> Gate:
    """The ASGI application of a service."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        # uvicorn has waited for open answers before it runs this.
        await asyncio.to_thread(service.close)

    routes: list[Route | Mount] = [
        Route("/health", health),
        Route("/v1/health", health),
        Route("/metrics", metrics),
        *openai.routes(),
        *responses.routes(),
        *states.routes(),
        *ollama.routes(),
        *llama.routes(),
        *openapi.routes(),
        *page.routes(),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_exception_handler(404, _no_such_path)
    app.add_exception_handler(405, _wrong_method)
    app.add_exception_handler(RwkvNpuError, _error)
    app.state.service = service
    app.state.memory, app.state.named = responses.Memory(), states.NamedStates()
    app.state.vocabulary = Vocabulary(service.tokenizer, service.model.spec.V)
    return Gate(app, key=key, hosts=hosts)


async def _no_such_path(request: Request, error: Exception) -> Response:
    return error_json(404, f"no such path: {request.url.path[:100]}", "path")


async def _wrong_method(request: Request, error: Exception) -> Response:
    return error_json(405, f"{request.method} is not supported at {request.url.path[:100]}")


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RwkvNpuError)
    return error_response(error)
