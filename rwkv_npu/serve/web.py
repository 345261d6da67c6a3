"""The HTTP application: access control, limits of a request, error responses, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rwkv_npu.errors import RwkvNpuError, UsageError
from rwkv_npu.serve.fields import FieldError
from rwkv_npu.serve.scheduler import BusyError
from rwkv_npu.serve.service import Service

LARGEST_BODY = 16_000_000  # bytes
SLOWEST_BODY_S = 60  # seconds to send a body; a slower client is refused
PATIENCE_S = 30  # seconds for running answers after a signal to stop
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/health", "/", "/page")  # served without a key

log = logging.getLogger("rwkv_npu.serve")

ASGI = Callable[..., Awaitable[None]]
T = TypeVar("T")


class NotFoundError(UsageError):
    """A model, state, response or path that this server does not have."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class TooLargeError(UsageError):
    """A body that is too large, or arrives too slowly."""


def error_json(
    status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """An error response in OpenAI's shape. Ollama's clients read its `message` too."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {404: "model_not_found", 401: "invalid_api_key"}.get(status)
    body = {"error": {"message": message, "type": kind, "param": field, "code": code}}
    return JSONResponse(body, status, headers)


async def body_of(request: Request) -> bytes:
    """Read the body of a request. Raises TooLargeError beyond the limits of size and time."""

    async def read() -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > LARGEST_BODY:
                raise TooLargeError(f"the request is larger than {LARGEST_BODY / 1e6:.0f} MB")
        return bytes(data)

    try:
        return await asyncio.wait_for(read(), SLOWEST_BODY_S)
    except asyncio.TimeoutError:
        raise TooLargeError(f"the request did not arrive within {SLOWEST_BODY_S} s") from None


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Cancel it if the client closes its connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()


class Gate:
    """ASGI middleware: logs each request, checks its Host header and key, and turns errors into responses.

    hosts: accepted names in the Host header, None for any. On loopback the check prevents DNS rebinding: a foreign web
    page in the user's browser could otherwise call the server through a name of its own.
    """

    def __init__(self, app: ASGI, *, key: str | None, hosts: Sequence[str] | None):
        self._app, self._key, self._hosts = app, key, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        name, begin = secrets.token_hex(6), time.monotonic()
        sent: dict[str, int] = {}

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                extra = [(b"x-request-id", name.encode())]
                if session := headers.get("x-session-id"):
                    extra.append((b"x-session-id", session[:200].encode("latin-1", "replace")))
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        refused = self._refusal(scope["path"], headers)
        try:
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except ClientDisconnect:
            sent["status"] = 499
        except RwkvNpuError as error:
            if "status" not in sent:
                await error_response(error)(scope, receive, answer)
        finally:
            seconds = time.monotonic() - begin
            log.info(
                "%s %s %s %s %.3f s", name, scope["method"], scope["path"], sent.get("status", "-"), seconds
            )

    def _refusal(self, path: str, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        bare = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        # Only a proxy's health check has no Host; a browser always sends one.
        if self._hosts is not None and host and bare.lower() not in self._hosts:
            return error_json(
                403,
                f"this server does not answer to the name {bare[:80]!r}: `rwkv-npu serve --host ADDRESS` serves others",
            )
        if self._key is None or path in OPEN_PATHS or path.startswith("/page/"):
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").strip() or headers.get(
            "x-api-key", ""
        )
        if not hmac.compare_digest(given.encode("latin-1", "replace"), self._key.encode()):
            return error_json(401, "this server needs its key: send it as Authorization: Bearer KEY")
        return None


def error_response(error: RwkvNpuError) -> Response:
    """The HTTP response to an error."""
    field = getattr(error, "field", None)
    if isinstance(error, BusyError):
        return error_json(503, str(error), headers={"Retry-After": "2"})
    if isinstance(error, NotFoundError):
        return error_json(404, str(error), field)
    if isinstance(error, TooLargeError):
        return error_json(413, str(error))
    if isinstance(error, UsageError | FieldError):
        return error_json(400, str(error), field)
    return error_json(500, str(error))


async def health(request: Request) -> Response:
    """200 while the server takes requests; 503 while it shuts down or its model is stuck in one step."""
    service: Service = request.app.state.service
    began = service.scheduler.step_began
    stuck = began is not None and time.monotonic() - began > 60
    if service.scheduler.draining or stuck:
        return error_json(503, "the model is stuck in a step" if stuck else "the server is shutting down")
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Counters for Prometheus, under llama-server's names where they exist."""
    service: Service = request.app.state.service
    counters, scheduler, cache = service.scheduler.counters, service.scheduler, service.cache
    values = {
        "llamacpp:prompt_tokens_total": counters.prompt_tokens,
        "llamacpp:prompt_seconds_total": counters.prompt_seconds,
        "llamacpp:tokens_predicted_total": counters.written_tokens,
        "llamacpp:tokens_predicted_seconds_total": counters.write_seconds,
        "llamacpp:requests_processing": scheduler.reading + scheduler.writing,
        "llamacpp:requests_deferred": scheduler.waiting,
        "rwkv_npu:cached_tokens_total": counters.cached_tokens,
        "rwkv_npu:answers_total": counters.answers,
        "rwkv_npu:cancelled_total": counters.cancelled,
        "rwkv_npu:failed_total": counters.failed,
        "rwkv_npu:refused_total": counters.refused,
        "rwkv_npu:cache_hits_total": cache.hits,
        "rwkv_npu:cache_misses_total": cache.misses,
        "rwkv_npu:cache_bytes": cache.bytes,
        "rwkv_npu:cache_states": len(cache),
    }
    lines = []
    for name, value in values.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE {name} {kind}", f"{name} {value:g}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
