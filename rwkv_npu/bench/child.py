"""A process for one measurement: `python -m rwkv_npu.bench.child LABEL`, started by `Child`.

In its own process a backend has all threads and its own memory. It may crash, or be killed for lack of memory, without
ending the benchmark. Both benchmarks use one protocol. A request is a line of JSON on stdin that names a task of TASKS.
Answers are lines of JSON on the original stdout; output of libraries is redirected to stderr:

    {"stage": "decode"}                     the next part of the work begins
    {"fields": {...}}                       fields of a row
    {"failed": "one line", "fatal": bool}   end of the request; fatal: larger products would fail too
    {"done": true}                          end of the request
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rwkv_npu.errors import first_line

SILENCE_S = 900.0  # a child that sends nothing for this long is killed
_THREADS = "OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS BLIS_NUM_THREADS POCL_MAX_PTHREAD_COUNT"

# Task -> the function that runs it, with the arguments request and `emit`.
TASKS = {
    "open": "rwkv_npu.bench.measure:open_backend",
    "product": "rwkv_npu.bench.measure:time_product",
    "model": "rwkv_npu.bench.measure:time_model",
    "roofline": "rwkv_npu.bench.measure:time_roofline",
}
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad allocation",
    "bad_alloc",
    "out of memory",
    "Failed to allocate",
)

Message = dict[str, Any]
Emit = Callable[[Message], None]


class Failed(Exception):
    """A request failed. `fatal`: larger requests would fail too."""

    def __init__(self, reason: str, fatal: bool) -> None:
        super().__init__(reason)
        self.fatal = fatal


class Child:
    """The parent's side of the process. `started`: the clock at its start. `label`: shown by `ps`."""

    def __init__(self, threads: int | None, label: str = "") -> None:
        self._errors = tempfile.TemporaryFile()
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rwkv_npu.bench.child", label],
            env={**os.environ, **({name: str(threads) for name in _THREADS.split()} if threads else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent only
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. A second call does nothing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                if stream:
                    stream.close()
            except OSError:  # an unsent request
                pass

    def messages(self, request: Message) -> Iterator[Message]:
        """Send a request and yield its answers as they arrive. Raises Failed at the end if the request failed."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except OSError:
            raise Failed(self._exit_reason(), fatal=True) from None
        while True:
            message = self._next()
            if "failed" in message:
                raise Failed(message["failed"], bool(message.get("fatal")))
            if "done" in message:
                return
            yield message

    def ask(self, request: Message) -> Message:
        """Send a request and return the fields of all answers. Raises Failed."""
        fields: Message = {}
        for message in self.messages(request):
            fields |= message.get("fields", {})
        return fields

    def _next(self) -> Message:
        stdout = self._process.stdout
        assert stdout is not None
        limit = threading.Timer(SILENCE_S, self._process.kill)
        limit.daemon = True
        limit.start()
        try:
            line = stdout.readline()
        finally:
            late = not limit.is_alive()
            limit.cancel()
        if not line:
            raise Failed(f"no result after {SILENCE_S:.0f} s" if late else self._exit_reason(), fatal=True)
        message: Message = json.loads(line)
        return message

    def _exit_reason(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, most likely for lack of memory"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
        return f"its process {how}" + (f": {lines[-1].strip()}" if lines else "")


# -- the child's side ------------------------------------------------------------------------------------


def answer(request: Message, emit: Emit) -> None:
    """Run one task. Errors become a `failed` message."""
    try:
        module, function = TASKS[request["task"]].split(":")
        getattr(importlib.import_module(module), function)(request, emit)
    except MemoryError as error:
        emit({"failed": f"not enough memory: {first_line(error)}", "fatal": True})
    except ImportError as error:
        emit({"failed": f"not installed: {first_line(error)}", "fatal": True})
    except Exception as error:  # any library error: the row gets its text, and other rows continue
        text = first_line(error)
        out_of_memory = any(phrase in str(error) for phrase in OUT_OF_MEMORY)
        emit({"failed": f"not enough memory: {text}" if out_of_memory else text, "fatal": out_of_memory})
    else:
        emit({"done": True})


def _end_with_parent() -> None:
    """Exit when the parent closes stdin, even during a long call."""
    poller = select.poll()
    poller.register(0, 0)  # wakes on hang-up only
    poller.poll()
    os._exit(0)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to stderr

    def emit(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    leash = threading.Thread(target=_end_with_parent, daemon=True)
    leash.start()
    for line in sys.stdin:
        answer(json.loads(line), emit)
    leash.join()


if __name__ == "__main__":
    main()
