"""A faulty NPU backend, and engines that run on it with a fallback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from rwkv_npu.backends.base import Backend, Faults, GoldenVectors, Runner
from rwkv_npu.backends.fallback import Fallback
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.errors import BackendError
from rwkv_npu.models.spec import Group
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.selftest import SELF_TEST_ROWS, golden_vectors
from rwkv_npu.runtime.weights import ModelSource

ADVICE = "; try something"
KINDS = ("code", "nan", "inf", "zeros", "rows", "missing")


class FaultyRunner:
    """Computes with NumPy, then applies the next fault. Its next run reuses the outputs' buffers."""

    def __init__(self, npu: FaultyNpu, group: Group, runner: Runner):
        self._npu, self._group, self._runner = npu, group, runner
        self.inputs = runner.inputs
        self._outputs: dict[str, np.ndarray] = {}

    def run(self) -> Mapping[str, np.ndarray]:
        for array in self._outputs.values():
            array.fill(np.nan)
        fault = self._npu.next_fault(self._group)
        if fault == "code":
            raise BackendError("rknn_run returned -3")
        if fault == "hang":
            self._npu.never.wait()
        outputs = {name: np.array(array) for name, array in self._runner.run().items()}
        last = self._group.outputs[-1].name
        if fault == "missing":
            del outputs[last]
        elif fault == "rows":
            outputs[last] = outputs[last][:-1]
        elif fault:
            outputs[last][-1, 0] = {"nan": np.nan, "inf": np.inf, "zeros": 0}[fault]
            if fault == "zeros":
                outputs = {name: np.zeros_like(array) for name, array in outputs.items()}
        self._outputs = outputs
        return outputs


class FaultyNpu(NumpyBackend):
    """A backend with fixed row counts.

    faults: the faults of the calls after opening, "" for none. chip(group): a fault of every call of that group.
    queues: number of threads that run its groups, which are dealt by layer.
    """

    name = "faulty"

    def __init__(
        self,
        source: ModelSource,
        faults: Iterable[str] = (),
        chip: Callable[[Group], str] = lambda g: "",
        queues: int = 1,
    ):
        super().__init__(source)
        self.queues = queues
        self._faults, self._chip = iter(faults), chip
        self.opened = self.closed = False
        self.made = 0  # faults since it was opened
        self.never = threading.Event()

    def row_counts(self, group: Group) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) if group.role == "head" else (1, 8)

    def queue(self, group: Group) -> int:
        return group.layer % self.queues

    def open(self, group: Group, rows: int) -> FaultyRunner:  # type: ignore[override]
        assert rows in self.row_counts(group)
        return FaultyRunner(self, group, super().open(group, rows))

    def next_fault(self, group: Group) -> str:
        fault = self._chip(group) or (next(self._faults, "") if self.opened else "")
        self.made += bool(fault and self.opened)
        return fault

    def close(self) -> None:
        self.closed = True


def engine_with_fallback(
    source: ModelSource, npu: FaultyNpu, recorded: Mapping[str, GoldenVectors] | None = None
) -> tuple[Engine, Fallback]:
    """An engine on `npu` with NumPy as fallback. `check_self_tests` is left to the caller."""
    rows = golden_vectors(source, SELF_TEST_ROWS) if recorded is None else recorded
    fallback = Fallback(npu, lambda: rows, lambda: NumpyBackend(source), Faults(), advice=ADVICE)
    engine = plain_engine(source, fallback, fallback.faults)
    npu.opened = True
    return engine, fallback


def plain_engine(source: ModelSource, backend: Backend, faults: Faults | None = None) -> Engine:
    return Engine(
        source.program,
        source.tensor,
        assign=lambda group, decode: backend,
        fingerprint=source.fingerprint,
        initial=source.initial_states(),
        faults=faults,
    )
