"""The web page at `/`: static files."""

from __future__ import annotations

import importlib.resources

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

# Load nothing but files of this server, and never run a model's output as a script.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src 'self' data:"
)
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def routes() -> list[Route]:
    return [Route("/", home), Route("/page/{name}", file)]


async def home(request: Request) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running")  # Ollama's clients recognise a server by this text
    return _file("index.html")


async def file(request: Request) -> Response:
    return _file(request.path_params["name"])


def _file(name: str) -> Response:
    folder = importlib.resources.files("rwkv_npu") / "data" / "page"
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if name not in names:
        return PlainTextResponse("no such file", 404)
    kind = TYPES.get(name.rpartition(".")[2], "text/plain")
    headers = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Response((folder / name).read_bytes(), media_type=kind, headers=headers)
