"""The tasks of a child process (`child.py`): time products of a backend, a model, or the machine's memory."""

from __future__ import annotations

import cProfile
import importlib.metadata
import pstats
import time
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.backends import BACKENDS as MODEL_BACKENDS
from rwkv_npu.backends import NPU_BACKENDS
from rwkv_npu.bench.child import Emit
from rwkv_npu.bench.document import DECODE, MEASURED_PARTS, PREFILLS, with_rates
from rwkv_npu.bench.machine import Watch, roofline
from rwkv_npu.bench.products import Effort, Timing, make_problem, memory_needed, time_calls
from rwkv_npu.board.hardware import cpu_model, soc
from rwkv_npu.formats.state import State
from rwkv_npu.graphs.trace import trace_group
from rwkv_npu.model import Model, load
from rwkv_npu.models.spec import Tensor, state_shapes, tensors
from rwkv_npu.quant.cpu import PRECISIONS
from rwkv_npu.runtime.estimate import state_bytes, weights
from rwkv_npu.runtime.weights import BundleSource, ModelSource
from rwkv_npu.text.sampling import Sampler, SamplingOptions
from rwkv_npu.toolkit import available_memory

SEED = 0

# -- products --------------------------------------------------------------------------------------------

EMPTY = (32, 32, 32)  # a product that costs little more than its call; MatMulNBits accepts no smaller block
TRIES, PATIENCE_S = 3, 10.0  # of a timing while other processes are busy


class ProductServer:
    """Times products on an open backend."""

    def __init__(self, request: dict[str, Any]) -> None:
        from rwkv_npu.bench import backends

        make = backends.BACKENDS[request["backend"]]
        self.backend: backends.Backend = make(request["dtype"], request["threads"], request["device"])
        self.effort = Effort(**request["effort"])
        self.watch = Watch()
        self.overhead = self.time(EMPTY)["time_s"]

    def describe(self) -> dict[str, Any]:
        names = ("device", "dtype", "accumulate", "versions")
        return {**{name: getattr(self.backend, name) for name in names}, "overhead_s": self.overhead}

    def time(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        m, k, n = shape
        needed, free = memory_needed(m, k, n), available_memory()
        if needed > free:
            raise MemoryError(f"about {needed / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free")
        problem = make_problem(m, k, n)
        operation = self.backend.prepare(problem)
        try:
            timing, flags = self.undisturbed(operation.stages, operation.submit)
            error = problem.error(operation.result())
        finally:
            operation.close()
        row: dict[str, Any] = {
            **{"m": m, "k": k, "n": n},
            "time_s": timing.median,
            "time_p10_s": timing.p10,
            "time_p90_s": timing.p90,
            "time_error_s": timing.error,
            "repeats": timing.repeats,
            "submit_s": timing.submit,
            "max_rel_error": error,
            "npu_ops": operation.npu_ops,
            "flags": " ".join(filter(None, [flags, "" if timing.repeats > 1 else "cold"])),
        }
        return with_rates(row, operation.moved_bytes)

    def undisturbed(self, stages: Any, submit: int | None) -> tuple[Timing, str]:
        """The timing and its flags. A timing disturbed by other processes is repeated, unless that takes long."""
        attempts: list[tuple[Timing, str]] = []
        begin = time.monotonic()
        while len(attempts) < TRIES:
            self.watch.begin()
            attempts.append((time_calls(stages, submit, self.effort), self.watch.flags()))
            if "busy" not in attempts[-1][1]:
                return attempts[-1]
            if time.monotonic() - begin > PATIENCE_S:
                break
        return min(attempts, key=lambda attempt: attempt[0].median)


_open: list[ProductServer] = []


def open_backend(request: dict[str, Any], emit: Emit) -> None:
    """Open a backend. Answers with the fields of ProductRow that are common to the series."""
    _open[:] = [ProductServer(request)]
    emit({"fields": _open[0].describe()})


def time_product(request: dict[str, Any], emit: Emit) -> None:
    """Time a product on the open backend. Answers with the other fields of ProductRow."""
    emit({"fields": _open[0].time(tuple(request["shape"]))})


def time_roofline(request: dict[str, Any], emit: Emit) -> None:
    emit({"fields": roofline(request["threads"])})


# -- models ----------------------------------------------------------------------------------------------

FEWEST = 8  # tokens of a decode, even on a slow backend
TOO_LONG = 4.0  # a prompt that would take this many times the seconds of a stage is skipped


def time_model(request: dict[str, Any], emit: Emit) -> None:
    """Load a model, then time prompts and decoding. Answers with fields of ModelRow as they become known."""
    emit({"stage": "load"})
    names = ("backend", "precision", "fusion", "threads")
    with load(request["model"], **{name: request[name] for name in names}) as model:
        model.forward([1])  # opens every group and reads every weight
        load_s = time.perf_counter() - request["started"]
        emit({"fields": {"load_s": load_s, **facts(model, request["backend"]), **memory()}})
        watch = Watch()
        watch.begin()
        Case(model, request, emit).measure()
        emit({"fields": {"flags": watch.flags()}})


class Case:
    """Times the prompts and the decoding of a loaded model."""

    def __init__(self, model: Model, request: dict[str, Any], emit: Emit) -> None:
        self.model, self.request, self.emit = model, request, emit
        self.sampler = Sampler(SamplingOptions(), seed=SEED)
        self.sampling_s = 0.0
        self.ids = np.random.default_rng(SEED).integers(1, model.spec.V, max(PREFILLS)).tolist()

    def measure(self) -> None:
        for tokens in PREFILLS:
            self._prefill(tokens)
        self._decode()

    def parts(self) -> dict[str, float]:
        """Seconds since the model was loaded, by part: from the engine's counters and a clock around the sampler."""
        counters = self.model.engine.counters
        runs = counters.run_s
        return {
            "projections": sum(seconds for role, seconds in runs.items() if role != "head"),
            "head": runs["head"],
            "recurrence": counters.recurrence_s,
            "dispatch": counters.dispatch_s,
            "sampling": self.sampling_s,
        }

    def timed(self, work: Callable[[], object]) -> tuple[float, dict[str, float]]:
        """Seconds of `work` and of its parts. `rest` is the time that no counter covers."""
        before, begin = self.parts(), time.perf_counter()
        work()
        total, after = time.perf_counter() - begin, self.parts()
        parts = {name: after[name] - before[name] for name in before}
        return total, {**parts, "rest": max(0.0, total - sum(parts.values()))}

    def _sample(self, logits: np.ndarray) -> int:
        begin = time.perf_counter()
        token, _ = self.sampler.sample(logits)
        self.sampling_s += time.perf_counter() - begin
        return token

    def _prefill(self, tokens: int) -> None:
        """Time reading `tokens` from a new state and sampling the first token after them."""
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
            self._send(fields)

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
            self._send(
                {
                    **_speed("decode", tokens, [total for total, _ in runs]),
                    "decode_tokens": tokens,
                    "decode_ms": _median_ms([parts for _, parts in runs], tokens),
                    "calls_per_token": (engine.counters.calls - calls) / tokens,
                }
            )
        if self.request["profile"]:
            self.emit({"stage": "profile"})
            held = facts(self.model, self.request["backend"])["weights"]
            result = profile(self.model, held, lambda count: self.decode(logits, state.copy(), count))
            self.emit({"fields": {"profile": result}})

    def decode(self, logits: np.ndarray, state: State, tokens: int) -> None:
        """Sample a token and read it, `tokens` times. Changes `state`."""
        for _ in range(tokens):
            token = self._sample(logits)
            logits, _ = self.model.forward([token], state, inplace=True)

    def _repeats(self, seconds: float) -> range:
        """The requested repeats, limited by the seconds of a stage; at least one."""
        return range(max(1, min(self.request["repeats"], int(self.request["seconds"] / max(seconds, 1e-9)))))

    def _send(self, fields: dict[str, Any]) -> None:
        self.emit({"fields": {**fields, **memory()}})


def _speed(name: str, tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens a second: the median, and the slow and fast end of the repeats."""
    low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9))
    speeds = {"tps": tokens / middle, "tps_p10": tokens / high, "tps_p90": tokens / low}
    return {**{f"{name}_{key}": value for key, value in speeds.items()}, f"{name}_repeats": len(seconds)}


def _median_ms(runs: list[dict[str, float]], tokens: int) -> dict[str, float]:
    """Milliseconds by part for each of `tokens`, from the median run: the parts of one run add up to its time."""
    middle = sorted(runs, key=lambda parts: sum(parts.values()))[(len(runs) - 1) // 2]
    return {name: middle[name] * 1e3 / tokens for name in MEASURED_PARTS}


def memory() -> dict[str, int]:
    """Resident memory of this process in bytes: its peak, and the present size without mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {
        f"{name}_bytes": int(lines[key].split()[0]) * 1024
        for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))
    }


def facts(model: Model, backend: str) -> dict[str, Any]:
    """The fields of a row that do not depend on time."""
    held, stored, size = _held(model.source, backend)
    packages = dict.fromkeys((MODEL_BACKENDS[backend][2], "numpy"))
    return {
        "device": f"{(soc() or '').upper()} NPU" if backend.startswith("rknn") else f"CPU ({cpu_model()})",
        "weights": held,
        "stored": stored,
        "fusion": model.engine.program.fusion,
        "bytes_per_token": size + state_bytes(model.spec),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    }


def _held(source: ModelSource, backend: str) -> tuple[str, str, int]:
    """(precision in memory, precision as stored, bytes in memory) of the projections."""
    projections = [t for t in tensors(source.spec) if t.kind.is_projection and not t.optional]
    if backend in NPU_BACKENDS:
        # The bundle's own weights are not asked: an exported bundle may have none in fp16.
        precision = source.precision_on(backend) or "fp16"
        chosen = source.bundle.manifest.int8.get(precision) if isinstance(source, BundleSource) else None
        int8 = chosen.projections if chosen else ()
        return precision, precision, sum(prod(t.shape) * (1 if t.name in int8 else 2) for t in projections)
    if backend in ("ort", "numba") and source.packed("head.weight"):
        size = sum(_packed_bytes(source, tensor) for tensor in projections)
        return source.cpu_precision, source.cpu_precision, size
    dtype = source.weight("head.weight").dtype
    stored = dtype.name.replace("bfloat", "bf").replace("float", "fp")  # fp32, fp16 or bf16
    if backend in ("ort", "torch"):  # these convert all weights to fp32 in advance, NumPy a block at a time
        return "fp32", stored, 4 * sum(weights(source.spec).values())
    return stored, stored, dtype.itemsize * sum(weights(source.spec).values())


# -- profile ---------------------------------------------------------------------------------------------

PROFILED = 32  # tokens
FUNCTIONS = 14  # the most expensive ones are listed


def profile(model: Model, held: str, decode: Callable[[int], None]) -> dict[str, Any]:
    """A token's time by role of group and by Python function. `decode(n)` samples and reads n tokens.

    held: precision of the weights in the backend. roles: [role, groups, ms of a group, weights of a group, bytes of
    these weights]; the recurrence comes last, with the bytes of state that it reads and writes. functions: [name, calls
    a token, ms a token in the function itself]. Python's profiler slows small functions down.
    """
    counters, spec = model.engine.counters, model.spec
    before, recurrence_s = dict(counters.run_s), counters.recurrence_s
    decode(PROFILED)
    seconds = {role: spent - before.get(role, 0.0) for role, spent in counters.run_s.items()}
    counts = Counter(group.role for group in model.engine.program.groups)
    elements, bytes_ = _weights(model, held)
    roles = [
        [role, count, seconds[role] / PROFILED / count * 1e3, elements[role] // count, bytes_[role] // count]
        for role, count in counts.items()
    ]
    state = sum(prod(shape) for name, shape in state_shapes(spec).items() if "shift" not in name)
    a_layer = (counters.recurrence_s - recurrence_s) / PROFILED / spec.L * 1e3
    roles.append(["recurrence", spec.L, a_layer, 0, 2 * 4 * state])
    return {"tokens": PROFILED, "roles": roles, "functions": _functions(decode)}


def _weights(model: Model, held: str) -> tuple[Counter[str], Counter[str]]:
    """Number of weights and their bytes, summed over all groups of a role."""
    program = model.engine.program
    known = {tensor.name: tensor for tensor in tensors(program.spec)}
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for group in program.groups:
        for constant in trace_group(program, group).projections.values():
            tensor = known[constant.name]
            parts = 1 if constant.index is None else tensor.used_shape[0]
            elements[group.role] += prod(tensor.used_shape) // parts
            sizes[group.role] += _bytes(model.source, tensor, held) // parts
    return elements, sizes


def _packed_bytes(source: ModelSource, tensor: Tensor) -> int:
    indices = range(tensor.used_shape[0]) if len(tensor.used_shape) == 3 else [None]
    return sum(packed.nbytes for index in indices if (packed := source.packed(tensor.name, index)))


def _bytes(source: ModelSource, tensor: Tensor, held: str) -> int:
    if held in PRECISIONS:
        return _packed_bytes(source, tensor)
    return prod(tensor.shape) * (4 if held == "fp32" else 2)


def _functions(decode: Callable[[int], None]) -> list[list[Any]]:
    profiler = cProfile.Profile()
    profiler.runcall(decode, PROFILED)
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:FUNCTIONS]
    return [
        [_function(key), calls / PROFILED, own / PROFILED * 1e3] for key, (_, calls, own, _, _) in longest
    ]


def _function(key: tuple[str, int, str]) -> str:
    file, line, function = key
    return function if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{line} {function}"
