"""Answer requests from a file, through the ASGI application that serves HTTP clients, without a network."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_npu.errors import UsageError
from rwkv_npu.progress import progress
from rwkv_npu.serve.app import application
from rwkv_npu.serve.service import Service

ANSWER = b'{"id": "batch_req_'  # begins every line that this module writes
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
Request = dict[str, Any]


def read_requests(path: Path, out: Path) -> list[Request]:
    """Read the requests of a file that have no answer in `out` yet.

    Raises UsageError for an invalid line, or if `out` does not hold answers. A last line of `out` that was cut off by a
    kill or a full disk is removed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', 'it is not UTF-8')}") from None
    requests = [_request(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    names = [request["custom_id"] for request in requests]
    duplicate = (
        next((name for i, name in enumerate(names) if name in names[:i]), None)
        if len(set(names)) < len(names)
        else None
    )
    if duplicate is not None:
        raise UsageError(f"{path}: the custom_id {duplicate!r:.80} is used twice")
    done = _answered(out)
    return [request for request in requests if request["custom_id"] not in done]


def _request(line: str, where: str) -> Request:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
        raise UsageError(f"{where}: a request is an object with a custom_id")
    if request.get("url") not in URLS:
        raise UsageError(f"{where}: its url must be one of {', '.join(URLS)}")
    if not isinstance(request.get("body"), dict):
        raise UsageError(f"{where}: its body is missing or not an object")
    return {**request, "body": {**request["body"], "stream": False}}


def _answered(out: Path) -> set[str]:
    """The custom_ids that a file of answers holds. Removes a line of ours that was cut off, and nothing else."""
    try:
        data = out.read_bytes()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UsageError(f"cannot read {out}: {error.strerror}") from None
    whole = data[: data.rfind(b"\n") + 1]
    rest = data[len(whole) :]
    try:
        done = {json.loads(line)["custom_id"] for line in whole.splitlines() if line.strip()}
        if not ANSWER.startswith(rest[: len(ANSWER)]):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{out} is not a file of answers: give another out=") from None
    if rest:
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return done


def answer_all(service: Service, requests: Sequence[Request], out: Path) -> int:
    """Answer the requests, and append each answer to `out`. Returns the number of requests that failed.

    The line of a failed request holds its error. The service gets twice as many requests at a time as it has slots.
    """
    return asyncio.run(_answer_all(service, requests, out))


async def _answer_all(service: Service, requests: Sequence[Request], out: Path) -> int:
    app, limit = application(service, hosts=None), asyncio.Semaphore(2 * service.scheduler.slots)
    failed = 0
    try:
        # A lone surrogate in a custom_id is written as \udXXX, which is JSON's escape for it.
        file = out.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from None
    with file, progress("requests", "request", total=len(requests)) as bar:

        async def answer(request: Request) -> None:
            nonlocal failed
            async with limit:
                status, body = await _post(app, request["url"], request["body"])
            failed += status != 200
            response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
            line = {
                "id": f"batch_req_{uuid.uuid4().hex}",
                "custom_id": request["custom_id"],
                "response": response,
            }
            file.write(json.dumps({**line, "error": None}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        await asyncio.gather(*map(answer, requests))
    return failed


async def _post(app: Any, url: str, body: Any) -> tuple[int, Any]:
    """Send a request to an ASGI application. Returns (status, body)."""
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])
    status, data = 500, bytearray()

    async def receive() -> MutableMapping[str, Any]:
        message = next(messages, None)
        return message if message is not None else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        data.extend(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("batch", 0),
        "client": ("batch", 0),
    }
    await app(scope, receive, send)
    return status, json.loads(data)
