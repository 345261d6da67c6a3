"""The server as its clients meet it: the packages `openai` and `ollama` against a live one, and plain HTTP."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import rwkv_npu
from rwkv_npu.serve.answers import Options
from rwkv_npu.serve.service import Service
from rwkv_npu.text.chat import TEMPLATES
from tests.live import LiveServer, live_server
from tests.tiny import continuation

openai = pytest.importorskip("openai")
ollama = pytest.importorskip("ollama")

# httpx and the clients over it leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

HELLO = [{"role": "user", "content": "Return the file"}]
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
    "required": ["word", "sure"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 10}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with live_server("--backend", "numpy", "-v", log=log) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def old_llama(server: LiveServer) -> Iterator[Any]:
    made = ollama.Client(host=server.url)
    yield made
    made._client.close()


def post(server: LiveServer, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **options)


# -- OpenAI


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="this server has the model 'demo', not 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_chat_whole_and_streamed_are_the_same(client: Any) -> None:
    options = {"model": "demo", "messages": HELLO, "seed": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == content and content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices == []
    assert (
        chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.system_fingerprint.endswith("_rows")  # NumPy adds up in another order among others


def test_a_seed_gives_the_same_answer_and_n_different_ones(client: Any) -> None:
    options = {
        "model": "demo",
        "messages": HELLO,
        "seed": 5,
        "max_tokens": 12,
        "temperature": 1.2,
        "top_p": 0.95,
    }
    one = client.chat.completions.create(**options)
    three = client.chat.completions.create(**options, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == one.choices[0].message.content and len(set(texts)) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens  # read once


def test_the_second_turn_is_not_read_again(client: Any) -> None:
    story = [{"role": "user", "content": "Tell me of sockets. " * 30}]
    first = client.chat.completions.create(model="demo", messages=story, max_tokens=8)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    for _ in range(50):  # the answer is read as a prompt once nothing else is to be done
        turns = [*story, answer, {"role": "user", "content": "And files?"}]
        second = client.chat.completions.create(model="demo", messages=turns, max_tokens=2)
        cached = second.usage.prompt_tokens_details.cached_tokens
        if second.usage.prompt_tokens - cached < 32:
            return
        time.sleep(0.1)
    raise AssertionError(f"{cached} of {second.usage.prompt_tokens} tokens were cached")


def test_logprobs_have_bytes(client: Any) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for one in tokens:
        assert one.logprob <= 0 and len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob)  # greedy takes the first
        assert bytes(one.bytes).decode("utf-8", "replace") == one.token


def test_bias_and_stop(client: Any) -> None:
    options = {"model": "demo", "prompt": "Return the ", "temperature": 0}
    text = client.completions.create(**options, max_tokens=8).choices[0].text
    stopped = client.completions.create(**options, max_tokens=8, stop=text[4:7]).choices[0]
    assert stopped.text == text[: text.index(text[4:7])] and stopped.finish_reason == "stop"
    first = client.completions.create(**options, max_tokens=1, logprobs=1).choices[0]
    ids = httpx.post(str(client.base_url) + "../tokenize", json={"content": first.text}).json()["tokens"]
    other = client.completions.create(**options, max_tokens=1, logit_bias={str(ids[0]): -100}).choices[0]
    assert other.text != first.text


def test_json_schema(client: Any) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        max_tokens=200,
        temperature=1,
        seed=2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    ).choices[0]
    value = json.loads(answer.message.content)
    assert answer.finish_reason == "stop" and isinstance(value["sure"], bool) and len(value["word"]) <= 12


def test_a_tool_that_must_be_called(client: Any) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    options = {
        "model": "demo",
        "messages": HELLO,
        "tools": tools,
        "tool_choice": "required",
        "max_tokens": 200,
    }
    answer = client.chat.completions.create(**options, seed=1).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    chunks = list(client.chat.completions.create(**options, seed=1, stream=True))
    calls = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert calls[0][0].function == call.function or calls[0][0].function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_errors_name_the_field(client: Any) -> None:
    for field, value in [("temperature", 99), ("n", 0), ("stop", [""]), ("messages", []), ("max_tokens", 0)]:
        with pytest.raises(openai.BadRequestError, match=field) as found:
            client.chat.completions.create(**{"model": "demo", "messages": HELLO, field: value})
        assert found.value.param == field
    with pytest.raises(openai.APIStatusError, match="has no embeddings") as refused:
        client.embeddings.create(model="demo", input="x")
    assert refused.value.status_code == 501


def test_neutral_sampling_is_taken_as_silence(server: LiveServer) -> None:
    """As LibreChat sends it always."""
    neutral = {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
    body = {"messages": HELLO, "seed": 9, "max_tokens": 12}
    answers = [post(server, "/v1/chat/completions", {**body, **more}).json() for more in ({}, neutral)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]


def test_responses_remember_the_conversation(client: Any) -> None:
    first = client.responses.create(
        model="demo", input="Return the file", max_output_tokens=8, instructions="Be brief."
    )
    assert first.output_text and first.usage.output_tokens <= 8
    second = client.responses.create(
        model="demo", input="And sockets?", previous_response_id=first.id, max_output_tokens=5, stream=True
    )
    events = list(second)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert last.output_text == text and last.previous_response_id == first.id
    assert last.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="no response"):
        client.responses.create(model="demo", input="x", previous_response_id=first.id)


# -- named states


def test_states_are_read_forked_and_used(server: LiveServer, tmp_path: Path) -> None:
    text, rest = "The file system is read once.\n\n", "Then the "
    made = post(server, "/v1/states/base", {"text": text}).json()
    assert made["tokens"] > 3
    assert post(server, "/v1/states/base/fork", {"name": "copy"}).status_code == 200
    body = {"max_tokens": 6, "temperature": 0}
    whole = post(server, "/v1/completions", {**body, "prompt": text + rest}).json()["choices"][0]["text"]
    for name in ("base", "copy"):
        part = post(server, "/v1/completions", {**body, "prompt": rest, "state": name}).json()
        assert part["choices"][0]["text"] == whole
    data = httpx.get(server.url + "/v1/states/base").content
    assert httpx.put(server.url + "/v1/states/again", content=data).json()["tokens"] == made["tokens"]
    names = {one["id"] for one in httpx.get(server.url + "/v1/states").json()["data"]}
    assert {"base", "copy", "again"} <= names
    assert httpx.delete(server.url + "/v1/states/copy").status_code == 200
    assert post(server, "/v1/completions", {**body, "prompt": "x", "state": "copy"}).status_code == 404
    for name, bad in [("x", data[:100]), ("x", b"PK" + data), ("..%2fx", data), ("a b", data)]:
        assert httpx.put(f"{server.url}/v1/states/{name}", content=bad).status_code in (400, 404)


# -- Ollama


def test_ollama_lists_and_shows(old_llama: Any, server: LiveServer) -> None:
    assert [model.model for model in old_llama.list().models] == ["demo"]
    shown = old_llama.show("demo")
    assert "completion" in shown.capabilities and shown.modelinfo["general.architecture"] == "rwkv7"
    assert post(server, "/api/show", {"name": "demo:latest"}).status_code == 200  # as Continue asks
    assert httpx.get(server.url + "/").text == "Ollama is running"
    assert [model.model for model in old_llama.ps().models] == ["demo"]
    assert httpx.get(server.url + "/api/version").json()["version"].count(".") == 2


def test_ollama_chat_streams(old_llama: Any) -> None:
    options = {"seed": 3, "num_predict": 12}
    whole = old_llama.chat("demo", HELLO, options=options)
    parts = list(old_llama.chat("demo", HELLO, options=options, stream=True, keep_alive=-1.0))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert parts[-1].done and parts[-1].done_reason in ("stop", "length") and parts[-1].eval_count <= 12


def test_ollama_generate_and_formats(old_llama: Any, server: LiveServer) -> None:
    assert old_llama.generate("demo", "").done_reason == "load"
    raw = old_llama.generate("demo", "Return the ", raw=True, options={"temperature": 0, "num_predict": 5})
    assert raw.response and raw.eval_count == 5
    assert post(server, "/api/generate", {"prompt": "x", "format": "", "stream": False}).status_code == 200
    shaped = old_llama.chat(
        "demo", HELLO, format=SCHEMA, options={"num_predict": 200, "seed": 1, "temperature": 1}
    )
    assert set(json.loads(shaped.message.content)) == {"word", "sure"}
    with pytest.raises(ollama.ResponseError, match="has no embeddings"):
        old_llama.embed("demo", "x")


# -- llama-server


def test_llama_server_paths(server: LiveServer) -> None:
    assert httpx.get(server.url + "/props").json()["chat_template"] == "world"
    assert len(httpx.get(server.url + "/slots").json()) == 8
    ids = post(server, "/tokenize", {"content": "Return the "}).json()["tokens"]
    assert post(server, "/detokenize", {"tokens": ids}).json()["content"] == "Return the "
    assert post(server, "/apply-template", {"messages": HELLO}).json()["prompt"].endswith("Assistant:")
    body = {"prompt": "Return the ", "n_predict": 5, "temperature": 0}
    whole = post(server, "/completion", body).json()
    lines = post(server, "/completion", {**body, "stream": True}).text.strip().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["content"] for event in events) == whole["content"] and events[-1]["stop"]
    assert whole["tokens_predicted"] == 5 and whole["stop_type"] == "limit"
    metrics = httpx.get(server.url + "/metrics").text
    assert "# TYPE llamacpp:tokens_predicted_total counter" in metrics


# -- who may ask


def test_another_host_name_is_refused_on_loopback(server: LiveServer) -> None:
    """A page of somebody else calls the server through a name that leads here."""
    answer = httpx.get(server.url + "/v1/models", headers={"Host": "evil.example:80"})
    assert answer.status_code == 403 and "evil.example" in answer.text
    assert "access-control-allow-origin" not in httpx.get(server.url + "/v1/models").headers


def test_bad_requests(server: LiveServer) -> None:
    for data in (b"", b"{", b"[]", b"[" * 50_000, b'{"messages": "x"}', b'{"messages": [{"role": "alien"}]}'):
        answer = httpx.post(server.url + "/v1/chat/completions", content=data)
        assert answer.status_code == 400, data[:20]
        assert "\n" not in answer.json()["error"]["message"]
    large = httpx.post(server.url + "/v1/chat/completions", content=b" " * (17 << 20))
    assert large.status_code == 413
    assert httpx.get(server.url + "/nothing").status_code == 404
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405


def test_a_schema_that_cannot_be_served(server: LiveServer) -> None:
    for schema in ({"type": "nonsense"}, {"type": "string", "pattern": "(?=x)"}, {"enum": ["x" * 70_000]}):
        format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
        answer = post(server, "/v1/chat/completions", {"messages": HELLO, "response_format": format_})
        assert answer.status_code == 400 and "schema" in answer.json()["error"]["message"]


def test_a_client_that_goes_frees_its_slot(server: LiveServer) -> None:
    body = {"messages": HELLO, "max_tokens": 20_000, "temperature": 5, "top_p": 1, "logit_bias": {"0": -100}}
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={**body, "prompt": "x", "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert "requests_processing 1" in httpx.get(server.url + "/metrics").text
    for _ in range(100):
        if "requests_processing 0" in httpx.get(server.url + "/metrics").text:
            return
        time.sleep(0.05)
    raise AssertionError("the slot stays taken")


def test_a_request_whose_answer_nobody_reads_is_cancelled() -> None:
    """As when a client goes before its response begins."""
    with rwkv_npu.load(backend="numpy") as model:
        service = Service(model, "demo", TEMPLATES["world"])

        async def run() -> None:
            options = Options(max_tokens=10_000, bias={0: -100.0})
            running = await service.run(service.completion_request("x", options))
            assert not running.job.cancelled
            job = running.job
            del running
            gc.collect()
            assert job.cancelled

        try:
            asyncio.run(run())
        finally:
            service.close()


def test_a_key_is_needed_where_there_is_one(tmp_path: Path) -> None:
    with live_server("--backend", "numpy", "--api-key", "sesame", log=tmp_path / "log") as live:
        assert httpx.get(live.url + "/v1/models").status_code == 401
        assert (
            httpx.get(live.url + "/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        )
        assert (
            httpx.get(live.url + "/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        )
        assert httpx.get(live.url + "/health").status_code == 200


def test_it_drains_on_sigterm(tmp_path: Path) -> None:
    """An answer that is being written ends well, and then the server does."""
    with live_server("--backend", "numpy", log=tmp_path / "log") as live:
        body = {"prompt": "Return the ", "max_tokens": 60, "stream": True, "logit_bias": {"0": -100}}
        with httpx.stream("POST", live.url + "/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            live.process.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert live.process.wait(timeout=30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_that_was_killed_goes_on_with_old_conversations(tmp_path: Path) -> None:
    """Killed while states are written. The next server has the same words, and reads only the end of the prompt."""
    story = "Return the file.\n\n" + "The socket is closed by the caller. " * 40 + "\n\n"
    body = {"temperature": 0, "max_tokens": 12, "logit_bias": {"0": -100}}
    flags = ("--backend", "numpy", "--cache-dir", tmp_path / "states")
    with live_server(*flags, log=tmp_path / "log") as live:
        first = post(live, "/v1/completions", {**body, "prompt": story}).json()["choices"][0]["text"]
        deadline = time.monotonic() + 20
        while not list((tmp_path / "states").glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        live.process.kill()
        live.process.wait()
    prompt = story + first + "\n\nThen "
    with live_server(*flags, log=tmp_path / "log") as live:
        again = post(live, "/v1/completions", {**body, "prompt": prompt}).json()
    with rwkv_npu.load(backend="numpy") as model:
        read = len(model.encode(prompt))
        assert again["choices"][0]["text"] == continuation(model, prompt)
    assert again["usage"]["prompt_tokens"] == read
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > read - 60
    assert "unusable" not in (tmp_path / "log").read_text()


def test_a_port_that_is_taken(run: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, said = run("serve", "--port", taken.getsockname()[1])
    assert status == 1 and said.count("\n") == 1 and "in use" in said
    status, _, said = run("serve", "--host", "0.0.0.0")
    assert status == 1 and "--api-key" in said
