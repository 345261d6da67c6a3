"""One model on one backend, measured in a process of its own: `python -m rwkv_npu.bench.inference_child REQUEST`.

Alone in its process a backend has its threads and its memory to itself, and the time to load is that of a first load.
What is known so far goes to the original stdout, a line of JSON at a time, so that little is lost when it ends early:
    {"stage": "decode"}        what comes next
    {"fields": {...}}          fields of an `inference_record.Row`
    {"failed": "one line"}     and then nothing more
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rwkv_npu.backends import BACKENDS
from rwkv_npu.bench.inference_record import DECODE, PARTS, PREFILLS
from rwkv_npu.bench.machine import Watch
from rwkv_npu.board.hardware import cpu_model, soc
from rwkv_npu.errors import first_line
from rwkv_npu.formats.state import State
from rwkv_npu.model import Model, load
from rwkv_npu.models.spec import tensors
from rwkv_npu.quant.cpu import bits_of, packed_bytes
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.estimate import weights
from rwkv_npu.text.sampling import Sampler, SamplingOptions

FEWEST = 8  # tokens of a decode, however slow
TOO_LONG = 4.0  # a prompt that would take so many times the seconds of a stage is left out
SEED = 0

Emit = Callable[[dict[str, Any]], None]


class Meter:
    """Where the time of an engine goes: its own counters, and a clock around the sampling."""

    def __init__(self, engine: Engine) -> None:
        self._counters = engine.counters
        self.sampling_s = 0.0

    def read(self) -> dict[str, float]:
        """Seconds since the engine was made, by part."""
        runs = self._counters.run_s
        return {
            "projections": sum(seconds for role, seconds in runs.items() if role != "head"),
            "head": runs["head"],
            "recurrence": self._counters.recurrence_s,
            "dispatch": self._counters.dispatch_s,
            "sampling": self.sampling_s,
        }


class Case:
    """A loaded model and how to measure it. `emit` takes messages for the parent."""

    def __init__(self, model: Model, request: dict[str, Any], emit: Emit) -> None:
        self.model, self.request, self.emit = model, request, emit
        self.meter = Meter(model.engine)
        self.sampler = Sampler(SamplingOptions(), seed=SEED)
        self.ids = np.random.default_rng(SEED).integers(1, model.spec.V, max(PREFILLS)).tolist()

    def measure(self) -> None:
        for tokens in PREFILLS:
            self._prefill(tokens)
        self._decode()

    def timed(self, work: Callable[[], object]) -> tuple[float, dict[str, float]]:
        """Seconds of `work`, and of its parts; `rest` is what no clock saw."""
        before, begin = self.meter.read(), time.perf_counter()
        work()
        total, after = time.perf_counter() - begin, self.meter.read()
        parts = {name: after[name] - before[name] for name in before}
        return total, {**parts, "rest": max(0.0, total - sum(parts.values()))}

    def _sample(self, logits: np.ndarray) -> int:
        begin = time.perf_counter()
        token, _ = self.sampler.sample(logits)
        self.meter.sampling_s += time.perf_counter() - begin
        return token

    def _prefill(self, tokens: int) -> None:
        """`tokens` from a new state, and the choice of the first token after them."""
        name, ids = f"prefill_{tokens}", self.ids[:tokens]
        self.emit({"stage": name})
        warm = self.ids[: min(PREFILLS)]
        seconds, _ = self.timed(lambda: self.model.forward(warm))
        if seconds * tokens / len(warm) > TOO_LONG * self.request["seconds"]:
            return
        runs = []
        for _ in self._repeats(seconds * tokens / len(warm)):
            runs.append(self.timed(lambda: self._sample(self.model.forward(ids)[0])))
            reading = [total - parts["sampling"] for total, parts in runs]
            fields: dict[str, Any] = _speed(name, tokens, reading)
            fields[f"{name}_ms"] = _median_ms([parts for _, parts in runs], 1)
            if tokens == min(PREFILLS):
                fields["first_token_s"] = float(np.median([total for total, _ in runs]))
            self._tell(fields)

    def _decode(self) -> None:
        self.emit({"stage": "decode"})
        logits, state = self.model.forward(self.ids[: min(PREFILLS)])
        seconds, _ = self.timed(lambda: self.decode(logits, state.copy(), FEWEST // 2))
        a_token = seconds / (FEWEST // 2)
        tokens = int(np.clip(self.request["seconds"] / a_token, FEWEST, DECODE))
        engine, runs = self.model.engine, []
        for _ in self._repeats(a_token * tokens):
            calls, fresh = engine.counters.calls, state.copy()
            runs.append(self.timed(lambda fresh=fresh: self.decode(logits, fresh, tokens)))  # type: ignore[misc]
            self._tell(
                {
                    **_speed("decode", tokens, [total for total, _ in runs]),
                    "decode_tokens": tokens,
                    "decode_ms": _median_ms([parts for _, parts in runs], tokens),
                    "calls_per_token": (engine.counters.calls - calls) / tokens,
                }
            )
        if self.request["profile"]:
            from rwkv_npu.bench.inference_profile import profile

            self.emit({"stage": "profile"})
            held = facts(self.model, self.request["backend"])["weights"]
            found = profile(self.model, held, lambda count: self.decode(logits, state.copy(), count))
            self.emit({"fields": {"profile": found}})

    def decode(self, logits: np.ndarray, state: State, tokens: int) -> None:
        """Choose a token and read it, `tokens` times. `state` is changed."""
        for _ in range(tokens):
            token = self._sample(logits)
            logits, _ = self.model.forward([token], state, inplace=True)

    def _repeats(self, seconds: float) -> range:
        """As many as are asked for, as far as the seconds of a stage go, and one at least."""
        return range(max(1, min(self.request["repeats"], int(self.request["seconds"] / max(seconds, 1e-9)))))

    def _tell(self, fields: dict[str, Any]) -> None:
        self.emit({"fields": {**fields, **memory()}})


def _speed(name: str, tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens a second: median, and the slow and the fast end of the repeats."""
    low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9))
    speeds = {"tps": tokens / middle, "tps_p10": tokens / high, "tps_p90": tokens / low}
    return {**{f"{name}_{key}": value for key, value in speeds.items()}, f"{name}_repeats": len(seconds)}


def _median_ms(runs: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Milliseconds by part over `tokens`, of the median run: parts of one run add up to its time."""
    middle = sorted(runs, key=lambda parts: sum(parts.values()))[(len(runs) - 1) // 2]
    return {name: middle[name] * 1e3 / tokens for name in PARTS}


def memory() -> dict[str, int]:
    """Bytes: the most that were resident, and what is this process's own now, mapped files left out."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {
        f"{name}_bytes": int(lines[key].split()[0]) * 1024
        for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))
    }


def facts(model: Model, backend: str) -> dict[str, Any]:
    """What does not depend on time."""
    source, spec = model.source, model.spec
    dtype = source.tensor("head.weight").dtype
    stored, size = _short(dtype), sum(weights(spec).values()) * dtype.itemsize
    held = stored
    if backend in ("ort", "numba") and source.packed("head.weight"):
        stored = held = source.cpu_precision
        size = sum(
            packed_bytes(tensor, bits_of(held, tensor))
            for tensor in tensors(spec)
            if tensor.kind.is_projection and not tensor.optional
        )
    elif backend in ("ort", "torch"):  # they widen when they open; NumPy does a block at a time
        held, size = "fp32", size * 4 // dtype.itemsize
    state_bytes = sum(part.nbytes for part in model.new_state().parts.values())
    packages = dict.fromkeys((BACKENDS[backend][2], "numpy"))
    return {
        "device": f"{(soc() or '').upper()} NPU" if backend.startswith("rknn") else f"CPU ({cpu_model()})",
        "weights": held,
        "stored": stored,
        "fusion": model.engine.program.fusion,
        "bytes_per_token": size + 2 * state_bytes,
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    }


def _short(dtype: np.dtype) -> str:
    """fp32, fp16, bf16."""
    return dtype.name.replace("bfloat", "bf").replace("float", "fp")


def measure(request: dict[str, Any], emit: Emit) -> None:
    """Load the model and measure it."""
    emit({"stage": "load"})
    names = ("backend", "precision", "fusion", "threads")
    with load(request["model"], **{name: request[name] for name in names}) as model:
        model.forward([1])  # opens every group, and reads every weight
        load_s = time.perf_counter() - request["started"]
        emit({"fields": {"load_s": load_s, **facts(model, request["backend"]), **memory()}})
        watch = Watch()
        watch.begin()
        Case(model, request, emit).measure()
        emit({"fields": {"flags": watch.flags()}})


def end_with_parent() -> None:
    """End when the other end of stdin closes, even in the middle of a long call."""

    def wait() -> None:
        poller = select.poll()
        poller.register(0, 0)  # no events asked for: only a hang-up wakes it
        poller.poll()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print

    def emit(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    end_with_parent()
    try:
        measure(json.loads(sys.argv[1]), emit)
    except MemoryError as error:
        emit({"failed": f"not enough memory: {first_line(error)}"})
    except Exception as error:  # libraries raise what they like; the row says it, and the others go on
        emit({"failed": first_line(error)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
