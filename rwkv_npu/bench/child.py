"""One backend in a process of its own: `python -m rwkv_npu.bench.child`, started by series.py.

Alone in its process a backend has its threads to itself, may crash, and may be killed for lack of memory.

Requests come as lines of JSON on stdin, each answered by a line on the original stdout; what libraries print goes to
stderr. The first request opens a backend, the others are products to time:
    {"backend", "device", "dtype", "threads", "effort": {...}}  ->  fields of a Row that hold for the series
    {"shape": [m, k, n]}                                        ->  the other fields of a Row
or, instead of all that,
    {"roofline": threads}                                       ->  what roofline.measure returns
An answer has "failed" where something went wrong, and "fatal" where larger products would fail too.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from typing import IO, Any

from rwkv_npu.bench import roofline
from rwkv_npu.bench.backends import (
    Backend,
    NumpyBackend,
    Operation,
    OrtBackend,
    TinygradBackend,
    TorchBackend,
)
from rwkv_npu.bench.machine import Watch
from rwkv_npu.bench.problem import make_problem, memory_needed
from rwkv_npu.bench.record import with_rates
from rwkv_npu.bench.rknn import RknnBackend, RknnMatmulBackend
from rwkv_npu.bench.timing import Effort, Timing, time_calls
from rwkv_npu.errors import first_line
from rwkv_npu.toolkit import available_memory

BACKENDS: dict[str, type] = {
    "numpy": NumpyBackend,
    "torch": TorchBackend,
    "tinygrad": TinygradBackend,
    "ort": OrtBackend,
    "rknn": RknnBackend,
    "rknn-matmul": RknnMatmulBackend,
}
EMPTY = (32, 32, 32)  # the product that costs little but its call; MatMulNBits takes no smaller block
TRIES, PATIENCE_S = 3, 10.0  # for a timing while others work
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad allocation",
    "bad_alloc",
    "out of memory",
    "Failed to allocate",
)


class Server:
    """An open backend that answers requests."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.backend: Backend = BACKENDS[request["backend"]](
            request["dtype"], request["threads"], request["device"]
        )
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
            raise MemoryError(f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        problem = make_problem(m, k, n)
        operation = self.backend.prepare(problem)
        try:
            timing, flags = self.undisturbed(operation)
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

    def undisturbed(self, operation: Operation) -> tuple[Timing, str]:
        """The timing and its flags. One that others disturbed is taken anew, unless that takes long."""
        taken: list[tuple[Timing, str]] = []
        begin = time.monotonic()
        while len(taken) < TRIES:
            self.watch.begin()
            taken.append((time_calls(operation.stages, operation.submit, self.effort), self.watch.flags()))
            if "busy" not in taken[-1][1]:
                return taken[-1]
            if time.monotonic() - begin > PATIENCE_S:
                break
        return min(taken, key=lambda one: one[0].median)


def answer(server: Server | None, request: dict[str, Any]) -> tuple[Server | None, dict[str, Any]]:
    """The server (opened by the first request) and the answer."""
    try:
        if "roofline" in request:
            return server, roofline.measure(request["roofline"])
        if server is None:
            server = Server(request)
            return server, server.describe()
        return server, server.time(tuple(request["shape"]))
    except MemoryError as error:
        return server, {"failed": f"not enough memory: {first_line(error)}", "fatal": True}
    except ImportError as error:
        return server, {"failed": f"not installed: {first_line(error)}", "fatal": True}
    except Exception as error:  # libraries raise what they like; the row says it, and the others go on
        text = first_line(error)
        starved = any(words in str(error) for words in OUT_OF_MEMORY)
        return server, {"failed": f"not enough memory: {text}" if starved else text, "fatal": starved}


def _end_with_parent() -> None:
    """End when the other end of stdin closes, even in the middle of a long product."""
    poller = select.poll()
    poller.register(0, 0)  # no events asked for: only a hang-up wakes it
    poller.poll()
    os._exit(0)


def main() -> None:
    replies: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    leash = threading.Thread(target=_end_with_parent, daemon=True)
    leash.start()
    server = None
    for line in sys.stdin:
        server, reply = answer(server, json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    leash.join()


if __name__ == "__main__":
    main()
