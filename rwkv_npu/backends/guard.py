"""Stands between an NPU's backend and whoever uses it: nothing that the NPU does wrong gets through.

Every context is tested on recorded rows when it is opened. A call that fails is made once more, and then the CPU
makes it, and all further calls of that group. Calls go through a thread, so that one which never returns can be left
behind. A group's inputs are kept until its outputs are good: the caller sees neither fault nor repetition.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, Recorded, Runner, relative_error
from rwkv_npu.errors import BackendError
from rwkv_npu.models.spec import Group

CALL_SECONDS = (
    10.0  # the slowest calls take a tenth of a second; the driver itself gives up after some seconds
)
OPEN_SECONDS = 120.0  # a large artifact from a slow card

# Relative error (rms) of a context's worst output that is still taken for rounding: what fp16 was seen to make of the
# most delicate outputs is a tenth of it, int8 stays below the other, and what goes wrong is not subtle.
FP16_BOUND, INT8_BOUND = 0.05, 0.25


class Hang(BackendError):
    """A call that did not return."""


class _Call:
    """Work for the thread, and what came of it."""

    def __init__(self, work: Callable[[], Any]):
        self.work, self.done = work, threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None


class Worker:
    """One thread that makes calls in turn. After a `Hang` it is lost, and must not be used again."""

    def __init__(self, name: str):
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call.result = call.work()
            except BaseException as error:  # it is the caller's, who waits for it
                call.error = error
            call.done.release()

    def call(self, work: Callable[[], Any], seconds: float) -> Any:
        """The result of `work`; raises what it raises, or Hang after `seconds`."""
        call = _Call(work)
        self._queue.put(call)
        if not call.done.acquire(timeout=seconds):
            raise Hang(f"no answer within {seconds:g} s")
        if call.error is not None:
            raise call.error
        return call.result

    def stop(self) -> None:
        self._queue.put(None)


class GuardedRunner:
    """`inputs` are the NPU's, and from its group's last fault on the CPU's."""

    def __init__(self, guard: Guard, group: Group, rows: int, npu: Runner | None):
        self._guard, self._group, self._rows = guard, group, rows
        self._npu, self._cpu = npu, None if npu else guard.open_cpu(group, rows)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        if self._cpu is None and self._group.name in self._guard.faults.groups:
            self._cpu = self._guard.open_cpu(self._group, self._rows)
        runner = self._cpu or self._npu
        assert runner is not None
        return runner.inputs

    def run(self) -> Mapping[str, np.ndarray]:
        if self._cpu is None:
            assert self._npu is not None
            outputs = self._guard.run(self._group, self._rows, self._npu)
            if outputs is not None:
                return outputs
            given = self._npu.inputs
            for name, array in self.inputs.items():
                array[...] = given[name]
        assert self._cpu is not None
        return self._cpu.run()


class Guard:
    """A backend around another.

    recorded: gives the rows of the self-test, by group. cpu: makes the backend that steps in, when it is needed.
    faults: where they are counted; several guards may share it. bound: on the self-test's error. advice: what else may
    be tried where numbers come out wrong.
    """

    def __init__(
        self,
        npu: Backend,
        recorded: Callable[[], Mapping[str, Recorded]],
        cpu: Callable[[], Backend],
        faults: Faults,
        *,
        bound: float = FP16_BOUND,
        advice: str = "",
    ):
        self.name, self.faults, self._advice = npu.name, faults, advice
        self._npu, self._recorded, self._make_cpu, self._bound = npu, recorded, cpu, bound
        self._cpu: Backend | None = None
        self._worker: Worker | None = Worker(f"{npu.name} calls")
        self._warned = False
        self._tested: dict[str, str] = {}  # by context: "" or what its self-test found

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        return self._npu.row_counts(group)

    def open(self, group: Group, rows: int) -> GuardedRunner:
        if group.name in self.faults.groups or self._worker is None:
            return GuardedRunner(self, group, rows, None)
        context = f"{group.name} at {rows} rows"
        try:
            runner = self._call(lambda: self._npu.open(group, rows), OPEN_SECONDS)
            fault = self._test(group, rows, runner) and self._test(group, rows, runner)  # as a call: twice
        except Hang as hang:
            raise BackendError(f"{self.name} cannot open {context}: {hang}") from hang
        self._tested[context] = fault
        if fault:
            self.faults.groups[group.name] = f"self-test: {fault}"
        return GuardedRunner(self, group, rows, None if fault else runner)

    def verdict(self) -> None:
        """After all is opened: warn of the contexts that failed their self-test; BackendError if none passed it."""
        failed = {context: fault for context, fault in self._tested.items() if fault}
        if not failed:
            return
        context, fault = next(iter(failed.items()))
        counted = f"{len(failed)} of {len(self._tested)} contexts fail their self-test ({context}: {fault})"
        if len(failed) == len(self._tested):
            raise BackendError(f"{self.name}: {counted}{self._advice}")
        warnings.warn(f"{self.name}: {counted}; their groups run on the CPU{self._advice}", stacklevel=4)

    def run(self, group: Group, rows: int, runner: Runner) -> Mapping[str, np.ndarray] | None:
        """Run `runner`, twice if the first call fails; None if the CPU has to take over."""
        fault, advice = "the NPU was given up", ""
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
            what = "it" if self._worker else "everything"
            warnings.warn(
                f"{self.name} failed at {group.name} ({fault}): the CPU runs {what} from now on; further faults are "
                f"counted, not reported{advice}",
                stacklevel=2,
            )
        return None

    def open_cpu(self, group: Group, rows: int) -> Runner:
        if self._cpu is None:
            self._cpu = self._make_cpu()
        return self._cpu.open(group, rows)

    def close(self) -> None:
        """After a hang the NPU is left as it is: giving it back would wait for it."""
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
        """Test a context on golden vectors, as many rows as it takes. Returns what is wrong, "" if nothing."""
        recorded = self._recorded()[group.name]
        for name, array in recorded.inputs.items():
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
        expected = {name: array[:rows] for name, array in recorded.outputs.items()}
        error = relative_error(
            {name: outputs[name][: len(array)] for name, array in expected.items()}, expected
        )
        return "" if error <= self._bound else f"its error is {error:.2g}, relatively"

    def _flaw(self, group: Group, rows: int, outputs: Mapping[str, np.ndarray]) -> str:
        """Describe outputs that cannot be right: of a wrong shape, not finite, or all zero; "" if there is no flaw."""
        for port in group.outputs:
            array = outputs.get(port.name)
            if array is None or array.shape != (rows, port.width):
                shape = None if array is None else array.shape
                return f"{port.name} has the shape {shape} instead of {(rows, port.width)}"
            if not np.isfinite(array).all():
                return f"{port.name} is not finite"
        silent = not any(array.any() for array in outputs.values())
        if silent and any(array.any() for array in self._recorded()[group.name].outputs.values()):
            return "all outputs are zero"
        return ""
