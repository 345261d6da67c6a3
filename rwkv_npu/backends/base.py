"""The interface of a backend: it opens groups and runs them. It knows no files and no placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rwkv_npu.models.maths import Maths, NumpyMaths
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import Group, Spec
from rwkv_npu.quant.cpu import Packed


@dataclass(frozen=True)
class GoldenVectors:
    """Golden vectors of a group, (rows, width) each: inputs from a forward, and the reference's outputs."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass
class Faults:
    """Faults of an NPU. calls: number of failed calls. groups: those that the CPU runs instead, with the reason."""

    calls: int = 0
    groups: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """The weights of a model for a backend, from a bundle or from a checkpoint."""

    @property
    def spec(self) -> Spec: ...

    @property
    def program(self) -> Any:
        """The computation of the groups (`models.network.Program`)."""

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in `Tensor.used_shape`: vectors in fp32, the others in their stored dtype."""

    def packed(self, name: str, index: int | None = None) -> Packed | None:
        """A projection, or number `index` of a stack, quantised for the CPU; None if it is not quantised."""

    def weight(self, name: str) -> np.ndarray:
        """A tensor in the requested precision: quantised weights are dequantised to fp32, others are as stored."""

    def release(self, name: str) -> None:
        """Free the memory of a projection that was copied and will not be read again."""

    def maths(self) -> NumpyMaths:
        """`maths.Maths` in NumPy, in the requested precision."""

    def evaluate(self, group: Group, f: Maths, x: dict[str, Any]) -> dict[str, Any]:
        """Compute a group with the operations of `f`: inputs by name -> outputs by name."""

    def onnx(self, group: Group) -> str | bytes:
        """The group's graph with symbolic M: the path of a file, or its bytes."""


class Runner(Protocol):
    """A group opened for a number of rows.

    The backend owns `inputs`, (M, width) each. The caller fills them (see `fill`) and calls `run`. Arrays are fp32, or
    fp16 in an NPU's memory. Outputs are valid until the next run of this runner. With several rows, the layer after the
    next one may overwrite them earlier: layers of one role may use two sets of arrays in turn.
    With one row, runners of different groups may run at the same time.
    """

    @property
    def inputs(self) -> dict[str, np.ndarray]: ...

    def run(self) -> Mapping[str, np.ndarray]: ...


@runtime_checkable
class Loader(Protocol):
    """A runner that fills its inputs itself."""

    def load(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy inputs (R, width) for the next run, R <= M."""


def fill(runner: Runner, inputs: Mapping[str, np.ndarray]) -> None:
    """Copy inputs (R, width) into the arrays of a runner for M >= R rows."""
    if isinstance(runner, Loader):
        runner.load(inputs)
    else:
        copy_rows(inputs, runner.inputs)


def copy_rows(inputs: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> None:
    """Copy inputs (R, width) into arrays (M, width), M >= R.

    Padding is at the end, since a row depends only on rows before it. It repeats the last row, because norms of zeros
    may fail on a chip.
    """
    for name, source in inputs.items():
        target, rows = targets[name], len(source)
        target[:rows] = source
        target[rows:] = source[-1]


class Backend(Protocol):
    """Runs the groups of a model on one kind of hardware or library."""

    name: str

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        """Row counts that the group can be opened for, ascending; None: any."""

    def open(self, group: Group, rows: int) -> Runner:
        """Open `group` for M = `rows`. Raises BackendError."""

    def close(self) -> None: ...


@runtime_checkable
class QueuedBackend(Protocol):
    """A backend whose runners are `QueuedRunner`s. Runs in different queues take place at the same time."""

    def queue(self, group: Group) -> int:
        """The number of the queue that runs a group."""


class NpuBackend(Backend, Protocol):
    """A backend on an NPU, which runs with a fallback. Its runners are used in the threads of their queues."""

    def queue(self, group: Group) -> int:
        """The number of the queue that runs a group: groups of one queue run one after the other."""


class QueuedRunner(Runner, Protocol):
    """A runner that runs in the thread of its queue, while the caller does other work.

    Its outputs stay valid until its own next run, whatever else runs.
    """

    def start(self, done: Callable[[], object]) -> None:
        """Begin a run on `inputs`. `done` is called when it has ended, from any thread."""

    def deadline(self) -> float:
        """The time (`time.monotonic`) after which the caller stops waiting for `done` and calls `finish`."""

    def cancel(self) -> None:
        """Cancel the run if it has not begun."""

    def finish(self) -> tuple[Mapping[str, np.ndarray], float]:
        """The outputs of the run that was started, and its seconds."""


class FusedForward(Protocol):
    """All groups but the head, and the recurrences between them, in one call. Opened for a number of rows."""

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Arrays that the caller fills, with the names and widths of `spec.fused_inputs`."""

    def run(self, rows: Rows) -> np.ndarray:
        """Run the forward: returns the head's input (M, D), valid until the next run. Updates the states in place.

        Raises UsageError for states that cannot be updated in place.
        """

    def seconds(self) -> dict[str, float]:
        """Seconds of the last run by role of group, and of the `recurrence`."""


@runtime_checkable
class FusedBackend(Protocol):
    """A backend that also has the fused forward."""

    def open_fused(self, rows: int) -> FusedForward:
        """Open the fused forward for M = `rows`. Raises BackendError."""


def relative_error(outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The relative error of the worst output: rms of the difference over rms of the expected; inf if not finite."""
    worst = 0.0
    for name, want in expected.items():
        difference = np.asarray(outputs[name], np.float64).reshape(want.shape) - want
        scale = float(np.sqrt(np.square(want, dtype=np.float64).mean()))
        error = float(np.sqrt(np.square(difference).mean())) / max(scale, 1e-12)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def allocate_inputs(group: Group, rows: int) -> dict[str, np.ndarray]:
    """Zeroed fp32 arrays for the inputs of a group."""
    return {port.name: np.zeros((rows, port.width), np.float32) for port in group.inputs}
