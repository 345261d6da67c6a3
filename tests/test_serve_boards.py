"""Several servers: one continues the conversations of another, and proxies keep a conversation on one of them."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

import rwkv_npu
from tests.live import LiveServer, debian_program, live_server
from tests.tiny import continuation

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

STORY = [{"role": "user", "content": "Tell me of sockets and of files that are closed. " * 20}]
GREEDY = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}
OPTIONS = {**GREEDY, "max_tokens": 16, "logit_bias": {"0": -100}}


def ask(url: str, messages: Sequence[Any], **options: Any) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/chat/completions", json={"messages": messages, **OPTIONS}, timeout=60, **options
    )


def test_a_conversation_goes_on_at_another_server(tmp_path: Path) -> None:
    """The first server is killed after the first turn. The second reads what is new, and has the same text."""
    flags = ("--backend", "numpy", "--state-store", tmp_path / "shared")
    with live_server(*flags, log=tmp_path / "one") as one, live_server(*flags, log=tmp_path / "two") as two:
        answer = ask(one.url, STORY).json()["choices"][0]["message"]
        wait_for_states(one, tmp_path / "shared")
        one.process.kill()
        one.process.wait()
        turns = [*STORY, answer, {"role": "user", "content": "And pipes?"}]
        second = ask(two.url, turns).json()
        prompt = httpx.post(f"{two.url}/apply-template", json={"messages": turns}).json()["prompt"]
    usage = second["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 24
    with rwkv_npu.load(backend="numpy") as model:
        written = continuation(model, prompt, max_tokens=16)
    assert written.lstrip().startswith(second["choices"][0]["message"]["content"])


# -- behind a proxy

SESSIONS = 6
HAPROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 1m
    timeout server 1m
    retries 3
    option redispatch
frontend clients
    bind 127.0.0.1:{port}
    default_backend boards
backend boards
    balance hdr(X-Session-ID)
    hash-type consistent
    option httpchk GET /health
    http-request set-header Host localhost
    server one {one} check inter 200ms fall 2
    server two {two} check inter 200ms fall 2
"""


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LiveServer]]:
    folder = tmp_path_factory.mktemp("pair")
    flags = ("--backend", "numpy", "--state-store", folder / "shared")
    with live_server(*flags, log=folder / "1") as one, live_server(*flags, log=folder / "2") as other:
        yield [one, other]


@pytest.fixture
def haproxy(pair: list[LiveServer], tmp_path: Path) -> Iterator[str]:
    """Debian's haproxy before both servers."""
    program, port = debian_program("haproxy"), free_port()
    one, other = (server.url.removeprefix("http://") for server in pair)
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(port=port, one=one, two=other))
    process = subprocess.Popen([program, "-db", "-q", "-f", tmp_path / "haproxy.cfg"])
    yield from proxy(process, port)


def proxy(process: subprocess.Popen[bytes], port: int) -> Iterator[str]:
    """The URL of a proxy, once it answers; it is stopped at the end."""
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def answered(servers: Sequence[LiveServer]) -> list[int]:
    """Answers of each server so far."""
    counts = []
    for server in servers:
        metrics = httpx.get(f"{server.url}/metrics").text
        counts.append(int(re.search(r"rwkv_npu:answers_total (\d+)", metrics)[1]))  # type: ignore[index]
    return counts


@pytest.mark.debian
def test_haproxy_keeps_sessions_and_moves_them_when_a_server_leaves(
    haproxy: str, pair: list[LiveServer]
) -> None:
    sessions_stay_and_move(haproxy, pair)


@pytest.fixture
def router(pair: list[LiveServer], tmp_path: Path) -> Iterator[str]:
    """vllm-router before both servers. It needs no vLLM."""
    pytest.importorskip("vllm_router", reason="vllm-router is not installed: pip install vllm-router")
    port, metrics = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "vllm_router.launch_router",
        "--port",
        port,
        "--prometheus-port",
        metrics,
    ]
    command += ["--policy", "consistent_hash", "--health-check-interval-secs", 1]
    command += ["--worker-urls", *(server.url for server in pair)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        yield from proxy(process, port)


@pytest.mark.debian
def test_vllm_router_keeps_sessions_and_moves_them_when_a_server_leaves(
    router: str, pair: list[LiveServer]
) -> None:
    sessions_stay_and_move(router, pair)


def sessions_stay_and_move(url: str, servers: list[LiveServer]) -> None:
    """Each session has one server. When that one shuts down, the other goes on with the conversation."""
    chats: list[list[Any]] = []
    for number in range(SESSIONS):
        session = {"X-Session-ID": f"session-{number}-{'abcdefgh'[number] * 8}"}
        before = answered(servers)
        chat: list[Any] = [{"role": "user", "content": f"Tell me of file {number}. " * 12}]
        for _ in range(2):
            response = ask(url, chat, headers=session)
            assert response.headers["x-session-id"] == session["X-Session-ID"]
            chat += [response.json()["choices"][0]["message"], {"role": "user", "content": "And?"}]
        grown = [after - count for after, count in zip(answered(servers), before, strict=True)]
        assert sorted(grown) == [0, 2]
        chats.append(chat)
    used = [count > 0 for count in answered(servers)]
    body = {"prompt": "Return", "stream": True, "max_tokens": 5}
    events = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert events.text.endswith("data: [DONE]\n\n")
    assert all(used), "all sessions were on one server"
    servers[0].stop()
    deadline = time.monotonic() + 30
    for number, chat in enumerate(chats):
        session = {"X-Session-ID": f"session-{number}-{'abcdefgh'[number] * 8}"}
        # Clients repeat a request after a 5xx. The router answers with one until its health check has failed.
        while (response := ask(url, chat, headers=session)).status_code >= 500:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert response.status_code == 200
        usage = response.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 60


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for_states(server: LiveServer, folder: Path) -> None:
    """Wait until the server has read its answer as the next prompt has it, and has written its states."""
    last, deadline = -1, time.monotonic() + 30
    while (count := len(list(folder.glob("*.safetensors")))) != last or count < 2:
        last = count
        assert time.monotonic() < deadline
        time.sleep(0.5)
