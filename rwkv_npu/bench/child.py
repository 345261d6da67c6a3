"""One measurement in a process of its own: `python -m rwkv_npu.bench.child LABEL`, started by `Child`.

Alone in its process a backend has its threads and its memory to itself, may crash, and may be killed for lack of
memory. Both benchmarks use one protocol. Requests are lines of JSON on stdin; a request names a task of TASKS. The
answers are lines of JSON on the original stdout (libraries that print get stderr):

    {"stage": "decode"}                     the next part of the work
    {"fields": {...}}                       fields of a row
    {"failed": "one line", "fatal": bool}   the end of the request; fatal: larger products would fail too
    {"done": true}                          the end of the request
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

SILENCE_S = 900.0  # a child that sends nothing for so long is killed
_THREADS = "OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS BLIS_NUM_THREADS POCL_MAX_PTHREAD_COUNT"

# Task: the function that does it, which takes the request and `emit`.
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
    """A request that gave no result; `fatal` if larger ones need not be tried."""

    def __init__(self, reason: str, fatal: bool) -> None:
        super().__init__(reason)
        self.fatal = fatal


class Child:
    """The parent's end. `started` is the clock at the start of the process; `label` is what `ps` shows."""

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
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. May be called again."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                if stream:
                    stream.close()
            except OSError:  # a request that nobody read
                pass

    def messages(self, request: Message) -> Iterator[Message]:
        """The answers to a request, as they come. Raises Failed at its end."""
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
        """All fields of the answers. Raises Failed."""
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


# -- the child's end -------------------------------------------------------------------------------------


def answer(request: Message, emit: Emit) -> None:
    """Do one task; errors become a `failed` message."""
    try:
        module, function = TASKS[request["task"]].split(":")
        getattr(importlib.import_module(module), function)(request, emit)
    except MemoryError as error:
        emit({"failed": f"not enough memory: {first_line(error)}", "fatal": True})
    except ImportError as error:
        emit({"failed": f"not installed: {first_line(error)}", "fatal": True})
    except Exception as error:  # libraries raise what they like; the row gets the text, and the others go on
        text = first_line(error)
        starved = any(words in str(error) for words in OUT_OF_MEMORY)
        emit({"failed": f"not enough memory: {text}" if starved else text, "fatal": starved})
    else:
        emit({"done": True})


def _end_with_parent() -> None:
    """End when the other end of stdin closes, even in the middle of a long call."""
    poller = select.poll()
    poller.register(0, 0)  # no events: only a hang-up ends the wait
    poller.poll()
    os._exit(0)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the output of libraries

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
