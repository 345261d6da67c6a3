"""Measure the server against the engine alone: `python -m bench.serve BUNDLE [--save STEM]`.

A server process uses the bundle's int4 (or default) weights; the clients run in this process, and so does the engine
alone. Measurements alternate, and figures are ratios of medians. Clients share the cores with the server, so its
figures are lower bounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from bench.saving import bundle_study
from rwkv_npu.formats.bundle import open_bundle

TOKENS, ROUNDS = 48, 5
TURN = 900  # numbers in the first message, about 2,000 tokens
LONG = 4000  # tokens of the prompt that is read during a stream
IDLE_S = 5
# A model with random weights may end an answer at any time. Banning id 0 makes all answers equally long.
ENDLESS = {"logit_bias": {"0": -100}, "temperature": 0}
SCHEMA = {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 40, "maxItems": 40}
TICKS = 100  # of CPU time a second, in /proc


class Server:
    def __init__(self, bundle: Path, *flags: str):
        command = [sys.executable, "-m", "rwkv_npu", "serve", "-m", str(bundle), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        return urllib.request.urlopen(request, timeout=600)

    def stream(self, body: Any) -> Iterator[float]:
        """The time of each event of a streamed completion."""
        with self.post("/v1/completions", {**ENDLESS, **body, "stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield time.perf_counter()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def study(bundle: Path) -> dict[str, Any]:
    precision = "int4" if "int4" in open_bundle(bundle).manifest.packed else None
    flags = ["--precision", precision] if precision else []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(bundle, *flags, "--cache-dir", folder)
        with rwkv_npu.load(bundle, precision=precision) as model:
            list(server.stream({"prompt": [5], "max_tokens": 4}))
            _alone(model)
            rounds = [_round(server, model, number) for number in range(ROUNDS)]
        begin = server.cpu_seconds()
        time.sleep(IDLE_S)
        idle = (server.cpu_seconds() - begin) / IDLE_S
        beside = [_beside(server, number) for number in range(2)]
        shaped = [_shaped(server) for _ in range(ROUNDS)]
        turns = [_turns(server, number) for number in range(3)]
        server.close()
        server = Server(bundle, *flags, "--cache-dir", folder)
        list(server.stream({"prompt": [5], "max_tokens": 4}))
        again = [_first_token(server, chat)[0] for _, _, chat in turns]
        server.close()
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {
        "model": bundle.name,
        "precision": precision,
        "rounds": rounds,
        "tokens_per_s": {name: middle[name] for name in ("one", "eight", "alone")},
        "eight_over_one": statistics.median(one["eight"] / one["one"] for one in rounds),
        "one_over_engine": statistics.median(one["one"] / one["alone"] for one in rounds),
        "cpu_over_engine": statistics.median(one["one_cpu"] / one["alone_cpu"] for one in rounds),
        "first_turn_s": statistics.median(first for first, _, _ in turns),
        "second_turn_over_first": statistics.median(second / first for first, second, _ in turns),
        "after_restart_over_first": statistics.median(
            one / first for one, (first, _, _) in zip(again, turns, strict=True)
        ),
        "between_tokens_beside_a_prompt": statistics.median(beside),
        "schema_over_free": statistics.median(shaped),
        "idle_cpu": idle,
    }


def _round(server: Server, model: rwkv_npu.Model, number: int) -> dict[str, float]:
    """Tokens a second of 1 client, 8 clients and the engine alone; CPU seconds a token of 1 client and the engine."""

    def tokens_per_s(clients: int) -> float:
        times: list[list[float]] = [[] for _ in range(clients)]

        def client(i: int) -> None:
            times[i].extend(server.stream({"prompt": [7 + number, 9 + i], "max_tokens": TOKENS}))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begin, end = max(one[0] for one in times), min(one[-1] for one in times)
        inside = sum(begin < moment <= end for one in times for moment in one)
        return inside / (end - begin)

    begin = server.cpu_seconds()
    one = [tokens_per_s(1) for _ in range(3)]
    one_cpu = (server.cpu_seconds() - begin) / (3 * TOKENS)
    alone, alone_cpu = _alone(model)
    return {
        "one": statistics.median(one),
        "one_cpu": one_cpu,
        "alone": alone,
        "alone_cpu": alone_cpu,
        "eight": tokens_per_s(8),
    }


def _alone(model: rwkv_npu.Model) -> tuple[float, float]:
    """Tokens a second, and CPU seconds a token, of `Model.generate`."""
    speeds, count, begin = [], 0, time.process_time()
    for _ in range(3):
        moments = [time.perf_counter() for _ in model.generate([7, 9], max_tokens=TOKENS, temperature=0)]
        count += len(moments)
        speeds.append((len(moments) - 1) / (moments[-1] - moments[0]))
    return statistics.median(speeds), (time.process_time() - begin) / count


def _turns(server: Server, number: int) -> tuple[float, float, list[dict[str, str]]]:
    """Seconds to the first token of a chat's first turn, and of its second; and the messages of a third."""
    rng = np.random.default_rng(number)
    words = " ".join(str(n) for n in rng.integers(0, 10_000, TURN))
    chat: list[dict[str, str]] = [{"role": "user", "content": words}]
    seconds = []
    for _ in range(2):
        first, text = _first_token(server, chat)
        seconds.append(first)
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
        time.sleep(3)  # time for the server to read the answer as part of the next prompt
    return seconds[0], seconds[1], chat


def _first_token(server: Server, chat: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first token of an answer, and its text."""
    begin, first, text = time.perf_counter(), 0.0, ""
    body = {**ENDLESS, "messages": chat, "max_tokens": 16, "stream": True, "logprobs": True}
    with server.post("/v1/chat/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["logprobs"]:
                    first = first or time.perf_counter() - begin
                    text += choice["delta"].get("content") or ""
    return first, text


def _beside(server: Server, number: int) -> float:
    """95th percentile of the time between tokens while a long prompt is read, over that without the prompt."""
    quiet = list(server.stream({"prompt": [3], "max_tokens": 128}))
    undisturbed = float(np.percentile(np.diff(quiet), 95))
    rng = np.random.default_rng(number)
    prompt = {"prompt": rng.integers(10, 60_000, LONG).tolist(), "max_tokens": 1}
    done = threading.Event()

    def read() -> None:
        list(server.stream(prompt))
        done.set()

    moments: list[float] = []
    stream = server.stream({"prompt": [4], "max_tokens": 4000})
    for moment in stream:
        moments.append(moment)
        if len(moments) == 20:
            threading.Thread(target=read).start()
        if done.is_set():
            break
    stream.close()  # type: ignore[attr-defined]
    return float(np.percentile(np.diff(moments[20:]), 95)) / undisturbed


def _shaped(server: Server) -> float:
    """Seconds a token of an answer with a JSON schema, over those of a free answer."""
    shape = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    seconds = []
    for more in ({}, shape):
        body = {"prompt": [11], "max_tokens": TOKENS, "temperature": 1, "seed": 1, **more}
        times = list(server.stream(body))
        seconds.append((times[-1] - times[0]) / (len(times) - 1))
    return seconds[1] / seconds[0]


def table(results: dict[str, Any]) -> str:
    rows = [
        ("8 clients against 1: tokens a second", "eight_over_one", "at least 4.5 (VNNI), 3.5 (AVX2)"),
        ("1 client against the engine alone: tokens a second", "one_over_engine", "at least 0.95"),
        ("1 client against the engine alone: CPU time of a token", "cpu_over_engine", "at most 1.03"),
        (
            "first token: second turn against the first, 2,000 tokens",
            "second_turn_over_first",
            "at most 0.05",
        ),
        (
            "first token: third turn after a restart against the first",
            "after_restart_over_first",
            "at most 0.05",
        ),
        (
            "between tokens beside a prompt of 4,000: p95 against p95",
            "between_tokens_beside_a_prompt",
            "at most 2",
        ),
        ("an answer to a schema against a free one: time of a token", "schema_over_free", "at most 1.05"),
        ("CPU time of an idle server, of one core", "idle_cpu", "0"),
    ]
    speeds, machine = results["tokens_per_s"], results["machine"]
    on = f"{machine['cpu']}, {machine['instruction_set']}, {machine['cores']} cores"
    lines = [
        f"# The server: {results['model']}, {results['precision'] or 'default precision'}",
        "",
        f"{on}; `{results['command']}`. Medians of {ROUNDS} rounds; the clients ran on the same cores.",
        "",
        f"Load average at the start: {machine['load_average']:.1f}. Where it is above 1, other work ran on these cores "
        "too, and only the ratios mean something.",
        "",
        "| | ratio | goal |",
        "|---|---|---|",
        *(f"| {name} | {results[key]:.3g} | {goal} |" for name, key, goal in rows),
        "",
        f"Tokens a second: 1 client {speeds['one']:.1f}, 8 clients {speeds['eight']:.1f} together, engine alone "
        f"{speeds['alone']:.1f}. First token of the first turn: {results['first_turn_s']:.2f} s.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(bundle_study("bench.serve", __doc__, study, table))
