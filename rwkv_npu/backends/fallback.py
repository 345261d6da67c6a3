"""An NPU backend with the CPU as its fallback: the caller never gets a wrong result of the NPU.

Each context is tested on golden vectors when it is opened. A call that fails is repeated once. If it fails again, the
CPU runs this call and all later calls of its group. Calls to the NPU run in a thread of their own, so that a call that
never returns can be abandoned. The inputs of a call are kept until its outputs are accepted.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, GoldenVectors, Runner, relative_error
from rwkv_npu.errors import BackendError
from rwkv_npu.models.spec import Group

# Time limit of a call. The slowest calls take 0.1 s, and the driver's own limit is some seconds.
CALL_SECONDS = 10.0
OPEN_SECONDS = 120.0  # time limit of opening a large artifact on a slow card

# Largest relative error (rms) of a context's worst output that passes the self-test. Rounding stays below it: fp16 was
# seen to reach a tenth of its bound on the most delicate outputs. Faults exceed it by far.
FP16_BOUND, INT8_BOUND = 0.05, 0.25


class Hang(BackendError):
    """A call that did not return."""


class _Call:
    """Work for the thread, and its result or error."""

    def __init__(self, work: Callable[[], Any]):
        self.work, self.done = work, threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None


class Worker:
    """A thread that runs calls one after the other. It must not be used again after a `Hang`."""

    def __init__(self, name: str):
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call.result = call.work()
            except BaseException as error:  # `call` raises it in the caller's thread
                call.error = error
            call.done.release()

    def call(self, work: Callable[[], Any], seconds: float) -> Any:
        """Run `work` in the thread and return its result. Raises its exception, or Hang after `seconds`."""
        call = _Call(work)
        self._queue.put(call)
        if not call.done.acquire(timeout=seconds):
            raise Hang(f"no answer within {seconds:g} s")
        if call.error is not None:
            raise call.error
        return call.result

    def stop(self) -> None:
        self._queue.put(None)


class FallbackRunner:
    """A runner on the NPU, or on the CPU once its group is left to the CPU. `npu`: None starts on the CPU."""

    def __init__(self, fallback: Fallback, group: Group, rows: int, npu: Runner | None):
        self._fallback, self._group, self._rows = fallback, group, rows
        self._npu, self._cpu = npu, None if npu else fallback.open_cpu(group, rows)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        if self._cpu is None and self._group.name in self._fallback.faults.groups:
            self._cpu = self._fallback.open_cpu(self._group, self._rows)
        runner = self._cpu or self._npu
        assert runner is not None
        return runner.inputs

    def run(self) -> Mapping[str, np.ndarray]:
        if self._cpu is None:
            assert self._npu is not None
            outputs = self._fallback.run(self._group, self._rows, self._npu)
            if outputs is not None:
                return outputs
            for name, array in self.inputs.items():  # now the CPU's
                array[...] = self._npu.inputs[name]
        assert self._cpu is not None
        return self._cpu.run()


class Fallback:
    """A backend that runs groups on an NPU backend, and on the CPU where the NPU fails.

    golden: returns the golden vectors of the self-test, by group. cpu: opens the CPU's backend, at its first use.
    faults: counts the faults; several fallbacks may share it. bound: largest error that passes the self-test.
    advice: appended to messages about wrong results.
    """

    def __init__(
        self,
        npu: Backend,
        golden: Callable[[], Mapping[str, GoldenVectors]],
        cpu: Callable[[], Backend],
        faults: Faults,
        *,
        bound: float = FP16_BOUND,
        advice: str = "",
    ):
        self.name, self.faults, self._advice = npu.name, faults, advice
        self._npu, self._golden, self._make_cpu, self._bound = npu, golden, cpu, bound
        self._cpu: Backend | None = None
        self._worker: Worker | None = Worker(f"{npu.name} calls")
        self._warned = False
        self._tested: dict[str, str] = {}  # by context: the fault that its self-test found, "" for none

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        return self._npu.row_counts(group)

    def open(self, group: Group, rows: int) -> FallbackRunner:
        if group.name in self.faults.groups or self._worker is None:
            return FallbackRunner(self, group, rows, None)
        context = f"{group.name} at {rows} rows"
        try:
            runner = self._call(lambda: self._npu.open(group, rows), OPEN_SECONDS)
            fault = self._test(group, rows, runner) and self._test(
                group, rows, runner
            )  # repeated once, as a call
        except Hang as hang:
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
            raise BackendError(f"{self.name}: {counted}{self._advice}")
        warnings.warn(f"{self.name}: {counted}; their groups run on the CPU{self._advice}", stacklevel=4)

    def run(self, group: Group, rows: int, runner: Runner) -> Mapping[str, np.ndarray] | None:
        """Run `runner`, and once more if it fails. Returns None if the CPU has to run the group."""
        fault, advice = "the NPU is no longer used", ""
        for _ in range(2):
            if self._worker is None:
                break
            try:
                outputs: Mapping[str, np.ndarray] = self._call(runner.run, CALL_SECONDS)
                if not (flaw := self._flaw(group, rows, outputs)):
                    return outputs
                fault, advice = flaw, self._advice
            except BackendError as error:
                fault, advice = str(error), ""
            self.faults.calls += 1
        self.faults.groups[group.name] = fault
        if not self._warned:
            self._warned = True
            left_to_cpu = "it" if self._worker else "everything"
            warnings.warn(
                f"{self.name} failed at {group.name} ({fault}): the CPU runs {left_to_cpu} from now on; further faults "
                f"are counted, not reported{advice}",
                stacklevel=2,
            )
        return None

    def open_cpu(self, group: Group, rows: int) -> Runner:
        if self._cpu is None:
            self._cpu = self._make_cpu()
        return self._cpu.open(group, rows)

    def close(self) -> None:
        """Close both backends. After a hang the NPU's stays open, because closing it would hang too."""
        if self._worker is not None:
            try:
                self._call(self._npu.close, OPEN_SECONDS)
            except Hang:
                return
            self._worker.stop()
            self._worker = None
        if self._cpu is not None:
            self._cpu.close()

    def _call(self, work: Callable[[], Any], seconds: float) -> Any:
        assert self._worker is not None
        try:
            return self._worker.call(work, seconds)
        except Hang:
            self._worker = None
            raise

    def _test(self, group: Group, rows: int, runner: Runner) -> str:
        """Test a context on golden vectors, on as many rows as it has. Returns the fault, "" for none."""
        golden = self._golden()[group.name]
        for name, array in golden.inputs.items():
            target = runner.inputs[name]
            count = min(len(array), len(target))
            target[:count], target[count:] = array[:count], array[-1]
        try:
            outputs = self._call(runner.run, CALL_SECONDS)
        except Hang:
            raise
        except BackendError as refused:
            return str(refused)
        if flaw := self._flaw(group, rows, outputs):
            return flaw
        expected = {name: array[:rows] for name, array in golden.outputs.items()}
        error = relative_error(
            {name: outputs[name][: len(array)] for name, array in expected.items()}, expected
        )
        return "" if error <= self._bound else f"its relative error is {error:.2g}"

    def _flaw(self, group: Group, rows: int, outputs: Mapping[str, np.ndarray]) -> str:
        """Describe outputs that cannot be right: wrong shape, not finite, or all zero. Returns "" for no flaw."""
        for port in group.outputs:
            array = outputs.get(port.name)
            if array is None or array.shape != (rows, port.width):
                shape = None if array is None else array.shape
                return f"{port.name} has the shape {shape} instead of {(rows, port.width)}"
            if not np.isfinite(array).all():
                return f"{port.name} is not finite"
        all_zero = not any(array.any() for array in outputs.values())
        if all_zero and any(array.any() for array in self._golden()[group.name].outputs.values()):
            return "all outputs are zero"
        return ""
