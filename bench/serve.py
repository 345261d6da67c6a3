"""Measure the server against the engine alone: `python -m bench.serve BUNDLE [--save STEM]`.

One server process uses the bundle's int4 (or default) weights; the clients run in this process. Measurements alternate,
and figures are ratios of medians: tokens a second of 1 and 8 clients; one stream against the engine alone; the first
token of a second turn against the first turn's; the time between tokens while a long prompt is read; structured answers
against free ones. Clients share the cores with the server, so the server's figures are lower bounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from bench.saving import bundle_study

TOKENS, ROUNDS = 48, 5
LONG = 4000  # tokens of the prompt that is read during a stream
# A model with random weights may end an answer at any time. Banning id 0 makes all answers equally long.
ENDLESS = {"logit_bias": {"0": -100}, "temperature": 0}


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
        return (int(fields[11]) + int(fields[12])) / 100

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def study(bundle: Path) -> dict[str, Any]:
    precision = (
        "int4" if "int4" in rwkv_npu.load(bundle, backend="numpy").source.bundle.manifest.packed else None
    )  # type: ignore[attr-defined]
    flags = ["--precision", precision] if precision else []
    server = Server(bundle, *flags)
    try:
        list(server.stream({"prompt": [5], "max_tokens": 4}))
        rounds = [_round(server, number) for number in range(ROUNDS)]
        turns = [_turns(server, number) for number in range(3)]
        beside = _beside(server)
        shaped = _shaped(server)
    finally:
        server.close()
    alone = _alone(bundle, precision)
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {
        "model": bundle.name,
        "precision": precision,
        "one_client": middle["one"],
        "eight_clients": middle["eight"],
        "eight_over_one": statistics.median(one["eight"] / one["one"] for one in rounds),
        "one_over_engine": middle["one"] / alone,
        "second_turn_over_first": statistics.median(second / first for first, second in turns),
        "first_turn_s": statistics.median(first for first, _ in turns),
        "between_tokens_beside_a_prompt": beside,
        "schema_over_free": shaped,
    }


def _round(server: Server, number: int) -> dict[str, float]:
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

    return {"one": tokens_per_s(1), "eight": tokens_per_s(8)}


def _turns(server: Server, number: int) -> tuple[float, float]:
    """Seconds to the first token of a chat's first turn, of 2,000 tokens, and of its second turn."""
    rng = np.random.default_rng(number)
    words = " ".join(str(n) for n in rng.integers(0, 10_000, 900))
    chat: list[dict[str, str]] = [{"role": "user", "content": words}]
    seconds = []
    for _ in range(2):
        begin, text = time.perf_counter(), ""
        with server.post(
            "/v1/chat/completions", {**ENDLESS, "messages": chat, "max_tokens": 16, "stream": True}
        ) as answer:
            first = 0.0
            for line in answer:
                if line.startswith(b"data: {") and (
                    piece := json.loads(line[6:])["choices"][0]["delta"].get("content")
                ):
                    first = first or time.perf_counter() - begin
                    text += piece
        seconds.append(first or time.perf_counter() - begin)
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
        time.sleep(3)  # time for the server to read the answer as part of the next prompt
    return seconds[0], seconds[1]


def _beside(server: Server) -> float:
    """95th percentile of the time between tokens while a long prompt is read, over the median without the prompt."""
    quiet = list(server.stream({"prompt": [3], "max_tokens": 96}))
    undisturbed = float(np.median(np.diff(quiet)))
    rng = np.random.default_rng(1)
    prompt = {"prompt": rng.integers(10, 60_000, LONG).tolist(), "max_tokens": 1}
    reader = threading.Thread(target=lambda: list(server.stream(prompt)))
    moments: list[float] = []
    for moment in server.stream({"prompt": [4], "max_tokens": 400}):
        moments.append(moment)
        if len(moments) == 20:
            reader.start()
    reader.join()
    return float(np.percentile(np.diff(moments[20:]), 95)) / undisturbed


def _shaped(server: Server) -> float:
    """Seconds a token of an answer with a JSON schema, over those of a free answer."""
    schema = {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 40, "maxItems": 40}
    format_ = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    ratios = []
    for _ in range(3):
        seconds = []
        for more in ({}, format_):
            times = list(
                server.stream({"prompt": [11], "max_tokens": TOKENS, "temperature": 1, "seed": 1, **more})
            )
            seconds.append((times[-1] - times[0]) / (len(times) - 1))
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def _alone(bundle: Path, precision: str | None) -> float:
    """Tokens a second of `Model.generate`, without a server."""
    with rwkv_npu.load(bundle, precision=precision) as model:
        speeds = []
        for _ in range(ROUNDS):
            moments = [time.perf_counter() for _ in model.generate([7, 9], max_tokens=TOKENS, temperature=0)]
            speeds.append((len(moments) - 1) / (moments[-1] - moments[0]))
    return statistics.median(speeds)


def table(results: dict[str, Any]) -> str:
    rows = [
        ("8 clients against 1, tokens a second", results["eight_over_one"], "higher"),
        ("1 client against the engine alone, tokens a second", results["one_over_engine"], "higher"),
        (
            "first token, second turn against the first, of 2,000 tokens",
            results["second_turn_over_first"],
            "lower",
        ),
        (
            "between tokens beside a prompt of 4,000, 95th percentile",
            results["between_tokens_beside_a_prompt"],
            "lower",
        ),
        ("an answer to a schema against a free one, seconds a token", results["schema_over_free"], "lower"),
    ]
    lines = [
        f"| {results['model']}, {results['precision'] or 'default'} | ratio | better is |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value:.2f} | {better} |" for name, value, better in rows]
    lines += [
        "",
        f"1 client {results['one_client']:.1f} tokens/s, 8 clients {results['eight_clients']:.1f} together.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(bundle_study("bench.serve", __doc__, study, table))
