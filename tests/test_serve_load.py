"""A server under load: 64 clients at once, of which a tenth close their connections early.

20 seconds in `make test`, two minutes in `make campaign` (RWKV_LOAD_SECONDS).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path

import httpx
import pytest

from tests.live import LiveServer, live_server

SECONDS = float(os.environ.get("RWKV_LOAD_SECONDS", "20"))
CLIENTS = 64
WORDS = "the file socket returns raises when closed object a list of bytes and".split()

pytestmark = [
    pytest.mark.load,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Client:
    """Sends streamed chats in turn, and counts their ends."""

    def __init__(self, number: int, http: httpx.AsyncClient):
        self._random, self._http = random.Random(number), http
        self.complete = self.closed = 0

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            words = self._random.choices(WORDS, k=self._random.choice([5, 20, 80, 300]))
            messages = [
                {"role": "system", "content": "You explain Python's library. " * 6},
                {"role": "user", "content": " ".join(words)},
            ]
            body = {"messages": messages, "max_tokens": self._random.randint(4, 48), "stream": True}
            early = self._random.randint(0, 10) if self._random.random() < 0.1 else None
            await self._stream(body, early)

    async def _stream(self, body: object, early: int | None) -> None:
        """Read an answer; close the connection after `early` events."""
        count, done = 0, False
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            if early == 0:
                self.closed += 1
                return
            async for line in answer.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                assert '"error"' not in line, line
                count += 1
                if count == early:
                    self.closed += 1
                    return
            assert done
            self.complete += 1


def memory(live: LiveServer) -> int:
    """Resident memory of the server in kB."""
    status = Path(f"/proc/{live.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def load(live: LiveServer) -> tuple[list[Client], list[int]]:
    sizes: list[int] = []
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits) as http:
        clients = [Client(number, http) for number in range(CLIENTS)]
        end = time.monotonic() + SECONDS

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(SECONDS / 20)
                sizes.append(memory(live))

        await asyncio.gather(watch(), *(client.run(end) for client in clients))
    return clients, sizes


def test_sixty_four_clients(tmp_path: Path) -> None:
    with live_server("--cache", "0.02", log=tmp_path / "log") as live:
        clients, sizes = asyncio.run(load(live))
        deadline = time.monotonic() + 20
        while "requests_processing 0" not in (metrics := httpx.get(live.url + "/metrics").text):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.05)
        after = httpx.post(
            live.url + "/v1/completions", json={"prompt": "Return", "max_tokens": 3}, timeout=60
        )
    values = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line[0] != "#"}
    complete, closed = sum(one.complete for one in clients), sum(one.closed for one in clients)
    print(f"{complete} answers, {closed} closed early; memory in kB: {sizes}")
    assert after.status_code == 200
    assert min(one.complete for one in clients) >= 1 and closed > 0
    assert values["rwkv_npu:failed_total"] == values["rwkv_npu:refused_total"] == 0
    assert values["llamacpp:requests_deferred"] == 0
    assert values["rwkv_npu:answers_total"] + values["rwkv_npu:cancelled_total"] == complete + closed
    half = len(sizes) // 2
    assert max(sizes[half:]) < 1.05 * max(sizes[half // 2 : half])
    assert "Traceback" not in (tmp_path / "log").read_text()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["file", "socket", "list"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        "closed": {"type": "boolean"},
    },
    "required": ["name", "kind", "size", "tags", "closed"],
    "additionalProperties": False,
}


def test_a_hundred_answers_fit_their_schema(tmp_path: Path) -> None:
    """At temperature 1, from a model that knows nothing of JSON."""
    jsonschema = pytest.importorskip("jsonschema")

    async def ask(url: str) -> list[str]:
        shape = {"type": "json_schema", "json_schema": {"name": "entry", "schema": SCHEMA}}
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            requests = [
                {
                    "messages": [{"role": "user", "content": f"Entry {seed}"}],
                    "response_format": shape,
                    **{"temperature": 1, "top_p": 1, "top_k": 0, "presence_penalty": 0.01, "seed": seed},
                    **{"n": 5, "max_tokens": 400},
                }
                for seed in range(0, 200, 10)
            ]
            answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=one) for one in requests))
        choices = [choice for answer in answers for choice in answer.json()["choices"]]
        assert {choice["finish_reason"] for choice in choices} == {"stop"}
        return [choice["message"]["content"] for choice in choices]

    with live_server(log=tmp_path / "log") as live:
        texts = asyncio.run(ask(live.url))
    assert len(texts) == 100 and len(set(texts)) > 90
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
