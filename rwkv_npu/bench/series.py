"""The rows of one series, a backend with a dtype: measured in a child process, or estimated by the compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rwkv_npu.bench.backends import moved
from rwkv_npu.bench.problem import make_problem
from rwkv_npu.bench.record import Row, series_name, with_rates
from rwkv_npu.bench.rknn import BYTES, Estimate
from rwkv_npu.bench.shapes import Shape
from rwkv_npu.bench.timing import Effort
from rwkv_npu.errors import BackendError, RwkvNpuError, first_line
from rwkv_npu.toolkit import require

ROW_LIMIT_S = 600.0  # a child that is silent for so long is ended


@dataclass(frozen=True)
class Series:
    """What is asked for. `device` tells apart what tinygrad can run on: cpu, opencl."""

    backend: str
    dtype: str
    device: str = "cpu"
    estimated: bool = False

    @property
    def name(self) -> str:
        return series_name(self.backend, self.dtype, self.device == "opencl", self.estimated)


class Failed(Exception):
    """A product that gave no time; `fatal` if larger ones need not be tried."""

    def __init__(self, reason: str, fatal: bool) -> None:
        super().__init__(reason)
        self.fatal = fatal


class Child:
    """A process of child.py and the conversation with it."""

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
        settings = {name: str(threads) for name in (*variables, "POCL_MAX_PTHREAD_COUNT")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rwkv_npu.bench.child"],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

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

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises Failed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        limit = threading.Timer(ROW_LIMIT_S, self._process.kill)
        limit.start()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        finally:
            late = not limit.is_alive()
            limit.cancel()
        if not line:
            raise Failed(f"no result after {ROW_LIMIT_S:.0f} s" if late else self._why_it_ended(), fatal=True)
        reply: dict[str, Any] = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"], bool(reply.get("fatal")))
        return reply

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, most likely for lack of memory"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
        return f"its process {how}" + (f": {said[-1].strip()}" if said else "")


class Measured:
    """A series timed in a child process. Raises BackendError if the backend cannot be opened."""

    def __init__(self, series: Series, threads: int, effort: Effort) -> None:
        self._child = Child(threads)
        request = {**asdict(series), "threads": threads, "effort": asdict(effort)}
        try:
            fields = self._child.ask(request)
        except Failed as error:
            self.close()
            raise BackendError(str(error)) from None
        except BaseException:
            self.close()
            raise
        self._fields = {"backend": series.backend, "threads": threads, **fields}

    def row(self, shape: Shape) -> Row:
        """Raises Failed."""
        return Row(**{**self._fields, **self._child.ask({"shape": list(shape)})})

    def blank(self, shape: Shape, reason: str) -> Row:
        """A row that says why it has no time."""
        m, k, n = shape
        return Row(**self._fields, m=m, k=k, n=n, failed=reason)

    def close(self) -> None:
        self._child.close()


def roofline(threads: int) -> dict[str, float]:
    """What `roofline.measure` finds in a process of its own. Raises Failed."""
    child = Child(threads)
    try:
        return child.ask({"roofline": threads})
    finally:
        child.close()


class Estimated:
    """The `rknn` series on a PC. Raises ToolkitError without the compiler."""

    def __init__(self, series: Series) -> None:
        self._estimate = Estimate(series.dtype, require())

    def row(self, shape: Shape) -> Row:
        """Raises Failed."""
        problem = make_problem(*shape)
        try:
            fields = self._estimate.row(problem)
        except RwkvNpuError as error:
            raise Failed(str(error), fatal=False) from None
        except MemoryError as error:
            raise Failed(f"not enough memory: {first_line(error)}", fatal=True) from None
        size = BYTES[self._estimate.dtype]
        m, k, n = shape
        known = {**self._common(), "m": m, "k": k, "n": n, **fields}
        return Row(**with_rates(known, moved(problem, size, size, size)))

    def blank(self, shape: Shape, reason: str) -> Row:
        m, k, n = shape
        return Row(**self._common(), m=m, k=k, n=n, failed=reason)

    def close(self) -> None:
        pass

    def _common(self) -> dict[str, Any]:
        names = ("device", "dtype", "accumulate", "versions")
        return {
            "backend": "rknn",
            "estimated": True,
            **{name: getattr(self._estimate, name) for name in names},
        }


Opened = Measured | Estimated
Open = Callable[[Series, int, Effort], Opened]


def open_series(series: Series, threads: int, effort: Effort) -> Opened:
    """Raises BackendError or ToolkitError, in one line, where the backend is missing."""
    return Estimated(series) if series.estimated else Measured(series, threads, effort)
