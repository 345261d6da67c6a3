"""Compile many graphs in parallel, within a memory limit.

A build takes about 6 times the bytes of its weights as fp32 (`estimated_rss`): 3.4 GB for a head of 65536 tokens at
D = 2048. Memory, not the number of cores, limits how many run at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwkv_npu.board.hardware import usable_cores
from rwkv_npu.errors import ToolkitError, UsageError
from rwkv_npu.toolkit.compiler import CompileOptions, CompileResult, compile_graph
from rwkv_npu.toolkit.environment import Environment
from rwkv_npu.toolkit.worker import Worker

# Measured with 2.5.0: 0.30 GB for 19 MB of weights as fp32, 1.36 GB for 206 MB, 3.38 GB for 537 MB.
RSS_BASE, RSS_PER_BYTE = 250_000_000, 6.0
INT8_RSS_PER_BYTE = 8.0  # int8 products are built in two steps: 1.77 GB for 201 MB
HELD_PER_BYTE = 3.2  # memory that a simulator keeps after its build: 0.73 GB for 206 MB
SMALL = 64_000_000  # bytes of weights as fp32: up to this size, the next build reuses the process
SHARE = 0.8  # of the limit, for builds that run together: estimates may be too low


@dataclass(frozen=True, eq=False)
class Job:
    """One graph to compile, with the arguments of `compile_graph`.

    `weight_bytes` is the size of the weights as fp32. `write_graph`, if given, creates the file at `onnx_path` right
    before the build; the file is deleted afterwards.
    """

    onnx_path: Path
    out_path: Path
    weight_bytes: int
    options: CompileOptions = field(default_factory=CompileOptions)
    verify_inputs: Mapping[str, np.ndarray] | None = None
    write_graph: Callable[[], object] | None = None

    @property
    def estimated_rss(self) -> int:
        """Expected peak memory of the build, in bytes."""
        return RSS_BASE + round(self.rss_per_byte * self.weight_bytes)

    @property
    def rss_per_byte(self) -> float:
        return INT8_RSS_PER_BYTE if self.options.int8 else RSS_PER_BYTE

    @property
    def simulator_rss(self) -> int:
        """Expected memory of a `Simulator` of this graph after its build, in bytes."""
        return RSS_BASE + round(HELD_PER_BYTE * self.weight_bytes)


def available_memory() -> int:
    """Bytes that can be used without swapping: the machine's, or less if a cgroup limits this process."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if most == "max" else min(free, max(0, int(most) - used))


def compile_many(
    environment: Environment,
    jobs: Sequence[Job],
    *,
    parallel: int | None = None,
    memory_limit_bytes: int | None = None,
) -> Iterator[tuple[Job, CompileResult]]:
    """Compile `jobs` and yield (job, result) as each one ends, in any order.

    At most `parallel` processes (default: one a core) run at once. The sum of their estimates stays within four fifths
    of `memory_limit_bytes` (default: the available memory); a larger job runs alone. A job above the whole limit
    raises ToolkitError before any build starts. The first failure, Ctrl-C, or closing the iterator stops all
    processes. Finished artifacts stay.
    """
    limit = available_memory() if memory_limit_bytes is None else memory_limit_bytes
    parallel = len(usable_cores()) if parallel is None else parallel
    if parallel < 1:
        raise UsageError(f"parallel is {parallel}; at least 1 is needed")
    waiting = sorted(jobs, key=lambda job: -job.estimated_rss)
    if waiting and waiting[0].estimated_rss > limit:
        raise ToolkitError(_refusal(waiting[0], limit))
    return _run(environment, waiting, parallel, limit)


def _run(
    environment: Environment, waiting: list[Job], parallel: int, limit: int
) -> Iterator[tuple[Job, CompileResult]]:
    running: dict[Future[CompileResult], Job] = {}
    workers = _Workers()
    pool = ThreadPoolExecutor(parallel)
    try:
        while waiting or running:
            while job := _next(waiting, list(running.values()), parallel, limit):
                running[pool.submit(_compile, environment, job, workers)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            results = [(running.pop(future), future) for future in ended]
            # Start the next builds before the caller works on the results.
            while job := _next(waiting, list(running.values()), parallel, limit):
                running[pool.submit(_compile, environment, job, workers)] = job
            # Yield the artifacts that succeeded before a failure is raised.
            for job, future in sorted(results, key=lambda pair: pair[1].exception() is not None):
                yield job, future.result()
    finally:
        workers.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        workers.close()


def _compile(environment: Environment, job: Job, workers: _Workers) -> CompileResult:
    try:
        if job.write_graph:
            job.write_graph()
        with workers.borrow(environment, job) as worker:
            return compile_graph(
                environment, job.onnx_path, job.out_path, job.options, job.verify_inputs, worker=worker
            )
    finally:
        if job.write_graph:
            job.onnx_path.unlink(missing_ok=True)


def _next(waiting: list[Job], running: list[Job], parallel: int, limit: int) -> Job | None:
    """Remove and return the largest job in `waiting` that fits the limits now, or None."""
    if len(running) >= parallel:
        return None
    used = sum(job.estimated_rss for job in running)
    for index, job in enumerate(waiting):
        if not running or used + job.estimated_rss <= SHARE * limit:
            return waiting.pop(index)
    return None


def _refusal(job: Job, limit: int) -> str:
    arithmetic = (
        f"{RSS_BASE / 1e9} GB + {job.rss_per_byte:.0f} x {job.weight_bytes / 1e9:.2f} GB of weights as fp32"
    )
    return (
        f"compiling {job.out_path.name} needs about {job.estimated_rss / 1e9:.1f} GB of memory ({arithmetic}), "
        f"but {limit / 1e9:.1f} GB are available"
    )


class _Workers:
    """The processes of `compile_many`. Small builds share them. After `kill`, a new process is killed at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Worker] = []
        self._idle: dict[Path, list[Worker]] = {}
        self._stopped = False

    @contextlib.contextmanager
    def borrow(self, environment: Environment, job: Job) -> Iterator[Worker]:
        """A process for one build, idle or new. After a small build that succeeded it becomes idle again."""
        folder, small = job.out_path.absolute().parent, job.weight_bytes <= SMALL
        worker = self._take(folder) if small else None
        if worker is None:
            worker = Worker(environment, folder)
            self._add(worker)
        done = False
        try:
            yield worker
            done = True
        finally:
            if done and small:
                with self._lock:
                    self._idle.setdefault(folder, []).append(worker)
            else:
                worker.close()

    def kill(self) -> None:
        """End all processes at once, including those that compile."""
        with self._lock:
            self._stopped = True
            for worker in self._all:
                worker.kill()

    def close(self) -> None:
        """Delete the files of idle processes. Call it after `kill`, when no build runs."""
        for workers in self._idle.values():
            for worker in workers:
                worker.close()

    def _take(self, folder: Path) -> Worker | None:
        with self._lock:
            idle = self._idle.get(folder)
            return idle.pop() if idle else None

    def _add(self, worker: Worker) -> None:
        with self._lock:
            self._all.append(worker)
            if self._stopped:
                worker.kill()
