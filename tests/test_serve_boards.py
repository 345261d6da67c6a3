"""Several servers: one continues the conversations of another, and proxies keep a conversation on one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

import rwkv_npu
from tests.live import LiveServer, live_server
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


def wait_for_states(server: LiveServer, folder: Path) -> None:
    """Wait until the server has read its answer as the next prompt has it, and has written its states."""
    last, deadline = -1, time.monotonic() + 30
    while (count := len(list(folder.glob("*.safetensors")))) != last or count < 2:
        last = count
        assert time.monotonic() < deadline
        time.sleep(0.5)
