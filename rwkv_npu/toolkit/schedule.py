"""Compile many graphs, several at a time, within a bound on memory.

One build takes about `estimated_rss` bytes, 6 times the weights as fp32; a head of 65536 words at D = 2048 takes
3.4 GB. So the number of processes is not the limit, memory is.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwkv_npu.errors import ToolkitError, UsageError
from rwkv_npu.toolkit.compiler import CompileOptions, CompileResult, compile_graph
from rwkv_npu.toolkit.environment import Environment
from rwkv_npu.toolkit.worker import Worker

# Measured with 2.5.0: 0.30 GB for 19 MB of weights as fp32, 1.36 for 206, 3.38 for 537.
RSS_BASE, RSS_PER_BYTE = 250_000_000, 6.0
INT8_RSS_PER_BYTE = 8.0  # products in int8 are built in two steps: 1.77 GB for 201
HELD_PER_BYTE = 3.2  # what a simulator keeps once it is built: 0.73 GB for 206 MB
SMALL = 64_000_000  # bytes of weights as fp32, up to which a build leaves its process to the next one
SHARE = 0.8  # of the limit, for builds that run together: an estimate may be short


@dataclass(frozen=True, eq=False)
class Job:
    """One graph to compile, with `compile_graph`'s arguments.

    `weight_bytes` is the size of its weights as fp32. `write_graph`, if given, makes the file at `onnx_path` when the
    job's turn comes; it is then deleted afterwards.
    """

    onnx_path: Path
    out_path: Path
    weight_bytes: int
    options: CompileOptions = field(default_factory=CompileOptions)
    verify_inputs: Mapping[str, np.ndarray] | None = None
    write_graph: Callable[[], object] | None = None

    @property
    def estimated_rss(self) -> int:
        """Bytes of memory that building this is expected to take."""
        return RSS_BASE + round(self.rss_per_byte * self.weight_bytes)

    @property
    def rss_per_byte(self) -> float:
        return INT8_RSS_PER_BYTE if self.options.int8 else RSS_PER_BYTE

    @property
    def simulator_rss(self) -> int:
        """Bytes of memory that a `Simulator` of this graph is expected to keep once it is built."""
        return RSS_BASE + round(HELD_PER_BYTE * self.weight_bytes)


def available_memory() -> int:
    """Bytes that can be used without swapping: the machine's, or less if this process's cgroup is bounded."""
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
    """Compile `jobs` and yield (job, result) as each ends, not in their order.

    At most `parallel` processes (default: one a core) run at once, and their estimates stay within four
    fifths of `memory_limit_bytes` (default: what is available); a job above that runs alone. A job above the
    limit is refused
    with ToolkitError before anything is built. The first failure, Ctrl-C, or closing the iterator stops all
    processes; artifacts that were finished stay.
    """
    limit = available_memory() if memory_limit_bytes is None else memory_limit_bytes
    parallel = len(os.sched_getaffinity(0)) if parallel is None else parallel
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
            while job := _next(waiting, list(running.values()), parallel, limit):
                running[pool.submit(_compile, environment, job, workers)] = job
            # A failure is raised last: what ended with it is finished, and stays.
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
    """Take the largest job that may start now out of `waiting`, if any."""
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
        f"building {job.out_path.name} needs about {job.estimated_rss / 1e9:.1f} GB of memory ({arithmetic}); "
        f"{limit / 1e9:.1f} GB are available"
    )


class _Workers:
    """The processes of `compile_many`. Small builds share them; one that starts after `kill` ends at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Worker] = []
        self._idle: dict[Path, list[Worker]] = {}
        self._stopped = False

    @contextlib.contextmanager
    def borrow(self, environment: Environment, job: Job) -> Iterator[Worker]:
        """A process for one build: an idle one, or a new one. It is idle again after a small build that succeeded."""
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
        """End all processes, and what they are doing."""
        with self._lock:
            self._stopped = True
            for worker in self._all:
                worker.kill()

    def close(self) -> None:
        """After `kill`, when no build is under way: delete the files of idle processes."""
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
