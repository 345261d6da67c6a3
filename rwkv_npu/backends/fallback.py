"""An NPU backend with the CPU as its fallback: the caller never gets a wrong result of the NPU.

Each context is tested on golden vectors when it is opened. A call that fails is repeated once. If it fails again, the
CPU runs this call and all later calls of its group. Calls to the NPU run in the thread of their queue. So the
caller can work meanwhile, and a call that never returns can be abandoned. The inputs of a call are kept until its
outputs are accepted. The CPU's backend is used by the caller's thread alone.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rwkv_npu.backends.base import (
    Backend,
    Faults,
    GoldenVectors,
    NpuBackend,
    Runner,
    allocate_inputs,
    copy_rows,
    fill,
    relative_error,
)
from rwkv_npu.errors import BackendError
from rwkv_npu.models.maths import largest_magnitude
from rwkv_npu.models.spec import Group

# Time limit of a call. The slowest calls take 0.1 s, and the driver's own limit is some seconds.
CALL_SECONDS = 10.0
OPEN_SECONDS = 120.0  # time limit of opening a large artifact on a slow card

# The self-test fails if the relative rms error of any output exceeds this bound. Rounding stays below it: the largest
# error seen in fp16 was a tenth of the bound. Faults exceed it by far.
FP16_BOUND, INT8_BOUND = 0.05, 0.25

UNUSED = "the NPU is no longer used"


class Hang(BackendError):
    """A call that did not return."""


class Task:
    """Work for a thread, and its result or error. `done`: called at the end."""

    def __init__(self, work: Callable[[], Any], done: Callable[[], object]):
        self.work, self.done = work, done
        self.began = self.ended = self.cancelled = False
        self.seconds = 0.0
        self.result: Any = None
        self.error: BaseException | None = None


class Worker:
    """A thread that runs calls one after the other. It must not be used again after a `Hang`."""

    def __init__(self, name: str):
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._began: float | None = None  # the start of the call that runs
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None:
            if not call.cancelled:
                call.began, begin = True, time.perf_counter()
                self.extend()
                try:
                    call.result = call.work()
                except BaseException as error:  # `call` raises it in the caller's thread
                    call.error = error
                self._began = None
                call.seconds = time.perf_counter() - begin
            call.ended = True
            call.done()

    def submit(self, work: Callable[[], Any], done: Callable[[], object]) -> Task:
        """Run `work` in the thread, after earlier calls. `done` is called at its end, in the thread."""
        call = Task(work, done)
        self._queue.put(call)
        return call

    def call(self, work: Callable[[], Any], seconds: float) -> Any:
        """Run `work` in the thread and return its result. Raises its exception, or Hang after `seconds`."""
        done = threading.Lock()
        done.acquire()
        call = self.submit(work, done.release)
        if not done.acquire(timeout=seconds):
            raise Hang(_no_answer(seconds))
        if call.error is not None:
            raise call.error
        return call.result

    def extend(self) -> None:
        """Restart the time limit of the call that runs. Its `work` calls this."""
        self._began = time.monotonic()

    def deadline(self, seconds: float) -> float:
        """The time (`time.monotonic`) at which the running call, or else a call that begins now, times out."""
        return (self._began or time.monotonic()) + seconds

    def stop(self) -> None:
        self._queue.put(None)


def _no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s"


class FallbackRunner:
    """A `QueuedRunner` that runs a group on the NPU until that fails, and then on the CPU. npu: None for CPU only."""

    def __init__(self, fallback: Fallback, group: Group, rows: int, npu: Runner | None):
        self._fallback, self._group, self._rows, self._npu = fallback, group, rows, npu
        self._cpu: Runner | None = None
        self._call: Task | None = None  # the run in progress, if the NPU runs it
        self._faults: list[tuple[str, str]] = []  # (fault, advice), of the run in progress
        self.inputs = npu.inputs if npu else allocate_inputs(group, rows)
        self.npu_seconds = 0.0  # the NPU's own time in the last run; 0 if the CPU ran, or if none is reported

    def load(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy inputs for the next run. The NPU's runner may convert them."""
        if self._npu is None:
            copy_rows(inputs, self.inputs)
        else:
            fill(self._npu, inputs)

    def run(self) -> Mapping[str, np.ndarray]:
        """Run and wait for the end."""
        done = threading.Event()
        self.start(done.set)
        # The deadline moves when the NPU begins this call, and again when it repeats it.
        while not done.wait(self.deadline() - time.monotonic()) and time.monotonic() < self.deadline():
            pass
        return self.finish()[0]

    def start(self, done: Callable[[], object]) -> None:
        worker = self._fallback.worker(self._group)
        self._call, self._faults = None, []
        if self._npu is None or worker is None or self._group.name in self._fallback.faults.groups:
            done()  # `finish` runs it on the CPU
        else:
            self._call = worker.submit(lambda: self._attempt(worker), done)

    def deadline(self) -> float:
        worker = self._fallback.worker(self._group)
        return worker.deadline(CALL_SECONDS) if self._call and worker else 0.0

    def cancel(self) -> None:
        if self._call:
            self._call.cancelled = True

    def finish(self) -> tuple[Mapping[str, np.ndarray], float]:
        call, self._call = self._call, None
        if call and call.ended and call.error:
            raise call.error
        reason = UNUSED, ""
        if call and not call.ended:  # it hangs, or waits behind a call that hangs
            self._fallback.abandon(self._group)
            reason = _no_answer(CALL_SECONDS), ""
            if call.began:
                self._faults.append(reason)
        self._fallback.faults.calls += len(self._faults)
        if call and call.result is not None:
            self.npu_seconds = getattr(self._npu, "npu_seconds", 0.0)
            return call.result, call.seconds
        self.npu_seconds = 0.0
        if self._group.name not in self._fallback.faults.groups:
            self._fallback.leave_to_cpu(self._group, *(self._faults or [reason])[-1])
        begin = time.perf_counter()
        self._cpu = self._cpu or self._fallback.open_cpu(self._group, self._rows)
        kept = getattr(self._npu, "kept", self.inputs)
        copy_rows({name: kept[name] for name in self._cpu.inputs}, self._cpu.inputs)
        # Copied, because the CPU's runners share their output memory.
        outputs = {name: array.copy() for name, array in self._cpu.run().items()}
        return outputs, time.perf_counter() - begin

    def _attempt(self, worker: Worker) -> Mapping[str, np.ndarray] | None:
        """Run on the NPU, and once more after a fault. Returns None after two faults."""
        assert self._npu is not None
        for _ in range(2):
            worker.extend()
            try:
                outputs = self._npu.run()
                if not (flaw := self._fallback.flaw(self._group, self._rows, outputs)):
                    return outputs
                self._faults.append((flaw, self._fallback.advice))
            except BackendError as error:
                self._faults.append((str(error), ""))
        return None


class Fallback:
    """A backend that runs groups on an NPU backend, and on the CPU where the NPU fails.

    golden: returns the golden vectors of the self-test, by group. cpu: opens the CPU's backend, at its first use.
    faults: counts the faults; several fallbacks may share it. bound: largest error that passes the self-test.
    advice: appended to messages about wrong results.
    """

    def __init__(
        self,
        npu: NpuBackend,
        golden: Callable[[], Mapping[str, GoldenVectors]],
        cpu: Callable[[], Backend],
        faults: Faults,
        *,
        bound: float = FP16_BOUND,
        advice: str = "",
    ):
        self.name, self.faults, self.advice = npu.name, faults, advice
        self._npu, self._golden, self._make_cpu, self._bound = npu, golden, cpu, bound
        self._cpu: Backend | None = None
        self._workers: dict[int, Worker | None] = {}  # by queue; None: abandoned after a hang
        self._warned = False
        self._tested: dict[str, str] = {}  # by context: the fault that its self-test found, "" for none

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        return self._npu.row_counts(group)

    def queue(self, group: Group) -> int:
        return self._npu.queue(group)

    def worker(self, group: Group) -> Worker | None:
        """The thread that runs a group; None if it was abandoned."""
        number = self.queue(group)
        if number not in self._workers:
            self._workers[number] = Worker(f"{self.name} queue {number}")
        return self._workers[number]

    def abandon(self, group: Group) -> None:
        """Never use the thread of a group again: a call in it does not return."""
        self._workers[self.queue(group)] = None

    def open(self, group: Group, rows: int) -> FallbackRunner:
        worker = self.worker(group)
        if group.name in self.faults.groups or worker is None:
            return FallbackRunner(self, group, rows, None)
        context = f"{group.name} at {rows} rows"
        try:
            runner = worker.call(lambda: self._npu.open(group, rows), OPEN_SECONDS)
            fault = self._test(worker, group, rows, runner)
            if fault:  # repeat the test once, as a failed call is repeated
                fault = self._test(worker, group, rows, runner)
        except Hang as hang:
            self.abandon(group)
            raise BackendError(f"{self.name} cannot open {context}: {hang}") from hang
        self._tested[context] = fault
        if fault:
            self.faults.groups[group.name] = f"self-test: {fault}"
        return FallbackRunner(self, group, rows, None if fault else runner)

    def check_self_tests(self) -> None:
        """Call it when all groups are open. Warns of failed self-tests; raises BackendError if all of them failed."""
        failed = {context: fault for context, fault in self._tested.items() if fault}
        if not failed:
            return
        context, fault = next(iter(failed.items()))
        counted = f"{len(failed)} of {len(self._tested)} contexts fail their self-test ({context}: {fault})"
        if len(failed) == len(self._tested):
            raise BackendError(f"{self.name}: {counted}{self.advice}")
        warnings.warn(f"{self.name}: {counted}; their groups run on the CPU{self.advice}", stacklevel=4)

    def leave_to_cpu(self, group: Group, fault: str, advice: str) -> None:
        """Have the CPU run a group from now on. Warns at the first group."""
        self.faults.groups[group.name] = fault
        if self._warned:
            return
        self._warned = True
        left = "it"
        if self.worker(group) is None:
            left = "all groups of its thread" if any(self._workers.values()) else "everything"
        warnings.warn(
            f"{self.name} failed at {group.name} ({fault}): the CPU runs {left} from now on; further faults are "
            f"counted, not reported{advice}",
            stacklevel=2,
        )

    def open_cpu(self, group: Group, rows: int) -> Runner:
        if self._cpu is None:
            self._cpu = self._make_cpu()
        return self._cpu.open(group, rows)

    def close(self) -> None:
        """Close both backends. After a hang the NPU's stays open, because closing it would hang too."""
        workers = [worker for worker in self._workers.values() if worker]
        hung, self._workers = len(workers) < len(self._workers), dict.fromkeys(self._workers)
        try:
            for worker in workers:  # wait for calls that an interruption left behind
                worker.call(lambda: None, OPEN_SECONDS)
            if workers and not hung:
                workers[0].call(self._npu.close, OPEN_SECONDS)
        except Hang:
            return
        for worker in workers:
            worker.stop()
        if self._cpu is not None:
            self._cpu.close()

    def _test(self, worker: Worker, group: Group, rows: int, runner: Runner) -> str:
        """Test a context on golden vectors, on as many rows as it has. Returns the fault, "" for none."""
        golden = self._golden()[group.name]
        fill(runner, {name: array[:rows] for name, array in golden.inputs.items()})
        try:
            outputs = worker.call(runner.run, CALL_SECONDS)
        except Hang:
            raise
        except BackendError as refused:
            return str(refused)
        if flaw := self.flaw(group, rows, outputs):
            return flaw
        expected = {name: array[:rows] for name, array in golden.outputs.items()}
        error = relative_error(
            {name: outputs[name][: len(array)] for name, array in expected.items()}, expected
        )
        return "" if error <= self._bound else f"its relative error is {error:.2g}"

    def flaw(self, group: Group, rows: int, outputs: Mapping[str, np.ndarray]) -> str:
        """Describe outputs that cannot be right: wrong shape, not finite, or all zero. Returns "" for no flaw."""
        largest: dict[str, float] = {}
        for port in group.outputs:
            array = outputs.get(port.name)
            if array is None or array.shape != (rows, port.width):
                shape = None if array is None else array.shape
                return f"{port.name} has the shape {shape} instead of {(rows, port.width)}"
            largest[port.name] = largest_magnitude(array)
            if not np.isfinite(largest[port.name]):
                return f"{port.name} is not finite"
        if not any(largest.values()) and any(
            array.any() for array in self._golden()[group.name].outputs.values()
        ):
            return "all outputs are zero"
        return ""
