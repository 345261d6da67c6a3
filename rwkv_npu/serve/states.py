"""Named states: upload, download, copy, delete, and requests that begin with one.

A state holds all that a model remembers of a text, in some megabytes. A long instruction is read once, and every
request with `"state": NAME` continues after it. Files are safetensors, never pickles. They are checked against the
model.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rwkv_npu.errors import RwkvNpuError, StateError, UsageError
from rwkv_npu.formats.state import State, load_untrusted_state
from rwkv_npu.serve.cache import size_of
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.scheduler import Job
from rwkv_npu.serve.service import Service
from rwkv_npu.serve.web import NotFoundError, body_of
from rwkv_npu.text.sampling import Choice, Sampler, SamplingOptions

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MANY = 256


def routes() -> list[Route]:
    return [
        Route("/v1/states", listed),
        Route("/v1/states/{name}", download),
        Route("/v1/states/{name}", upload, methods=["PUT"]),
        Route("/v1/states/{name}", read, methods=["POST"]),
        Route("/v1/states/{name}", delete, methods=["DELETE"]),
        Route("/v1/states/{name}/fork", fork, methods=["POST"]),
    ]


class NamedStates:
    """States by the names that clients gave them."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, State] = OrderedDict()

    def find(self, name: str) -> State:
        """The state of this name. Raises NotFoundError."""
        if name not in self.kept:
            raise NotFoundError("state", f"no state is called {name[:64]!r}")
        return self.kept[name]

    def keep(self, name: str, state: State) -> None:
        """Keep a state. Raises FieldError for an invalid name, UsageError if there are too many states."""
        if not NAME.fullmatch(name):
            raise FieldError("state", "a name has 1 to 64 letters, digits, dots, dashes or underscores")
        if name not in self.kept and len(self.kept) >= MANY:
            raise UsageError(f"the server holds its maximum of {MANY} states: delete some first")
        self.kept[name] = state


def _entry(name: str, state: State) -> dict[str, Any]:
    return {"id": name, "object": "state", "tokens": state.tokens_seen, "bytes": size_of(state)}


async def listed(request: Request) -> Response:
    named: NamedStates = request.app.state.named
    return JSONResponse({"object": "list", "data": [_entry(*item) for item in named.kept.items()]})


async def download(request: Request) -> Response:
    state = request.app.state.named.find(request.path_params["name"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        state.save(path)
        return Response(path.read_bytes(), media_type="application/octet-stream")


async def upload(request: Request) -> Response:
    """Store an uploaded state file of this model."""
    service: Service = request.app.state.service
    data, name = await body_of(request), request.path_params["name"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(data)
        try:
            state = load_untrusted_state(path, service.model.spec, service.model.fingerprint)
        except StateError as error:
            raise FieldError("state", str(error).replace(str(path), "the upload")) from None
    request.app.state.named.keep(name, state)
    return JSONResponse(_entry(name, state))


async def read(request: Request) -> Response:
    """Read a text, from the empty state or from a named one, and keep the state after it under a name."""
    service: Service = request.app.state.service
    named: NamedStates = request.app.state.named
    fields, name = Fields.parse(await body_of(request)), request.path_params["name"]
    ids = service.encode(fields.text("text"))
    if not ids:
        raise fields.error("text", "it is empty")
    reader = Reader()
    before = named.find(fields.text("state")) if fields.has("state") else None
    service.scheduler.submit(Job(ids, [reader], before, finished=reader.finish))
    state = await reader.state
    named.keep(name, state)
    return JSONResponse(_entry(name, state))


class Reader:
    """Waits for the state after a prompt, and generates nothing (a `scheduler.Writer`)."""

    def __init__(self) -> None:
        self.sampler, self.top = Sampler(SamplingOptions(temperature=0)), 0
        self._loop = asyncio.get_running_loop()
        self.state: asyncio.Future[State] = self._loop.create_future()

    def finish(self, state: State) -> None:
        self._settle(self.state.set_result, state.copy())

    def allowed(self) -> None:
        return None

    def take(self, choice: Choice) -> None:
        return None

    def fail(self, error: RwkvNpuError) -> None:
        self._settle(self.state.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], value: Any) -> None:
        def now() -> None:
            if not self.state.done():  # done: already settled, or cancelled because the client has gone
                settle(value)

        self._loop.call_soon_threadsafe(now)


async def fork(request: Request) -> Response:
    named: NamedStates = request.app.state.named
    state = named.find(request.path_params["name"])
    name = Fields.parse(await body_of(request)).text("name")
    named.keep(name, state.copy())
    return JSONResponse(_entry(name, state))


async def delete(request: Request) -> Response:
    named: NamedStates = request.app.state.named
    name = request.path_params["name"]
    named.find(name)
    del named.kept[name]
    return JSONResponse({"id": name, "object": "state.deleted", "deleted": True})
