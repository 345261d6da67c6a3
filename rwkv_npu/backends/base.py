"""The interface of a backend: it opens groups and runs them. It knows no model, no file and no plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rwkv_npu.models.maths import Maths, NumpyMaths
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import Group, Spec
from rwkv_npu.quant.cpu import Packed


@dataclass(frozen=True)
class Recorded:
    """Golden vectors of a group: inputs in a forward of the model, and the reference's outputs, (rows, width) each."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass
class Faults:
    """Faults of an NPU: the number of failed calls, and the groups that the CPU runs since then, with the reason."""

    calls: int = 0
    groups: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """The weights of a model, as a backend asks for them, whether they come from a bundle or from a checkpoint."""

    @property
    def spec(self) -> Spec: ...

    @property
    def program(self) -> Any:
        """The computation of the groups (`models.network.Program`)."""

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in the shape in which the maths uses it: vectors in fp32, the others as stored."""

    def packed(self, name: str, index: int | None = None) -> Packed | None:
        """A projection, or number `index` of a stack, quantised for the CPU; None where it is not quantised."""

    def weight(self, name: str) -> np.ndarray:
        """As `tensor`, in the precision that was asked for: quantised weights are dequantised, in fp32."""

    def release(self, name: str) -> None:
        """Say that a projection was copied and will not be read again."""

    def maths(self) -> NumpyMaths:
        """The maths in NumPy, in the precision that was asked for."""

    def evaluate(self, group: Group, f: Maths, x: dict[str, Any]) -> dict[str, Any]:
        """Outputs of a group for its inputs, computed with the operations of `f`."""

    def onnx(self, group: Group) -> str | bytes:
        """The group's graph with symbolic M: the path of a file, or its bytes."""


class Runner(Protocol):
    """A group opened for a number of rows.

    The backend owns `inputs`, (M, width) fp32; the caller fills them and calls `run`. The outputs are valid until the
    next run of this runner, and of several rows until the next but one run of a group of its role: layers after the
    first may take turns in two sets of arrays. With one row, runners of different groups may run at the same time.
    """

    @property
    def inputs(self) -> dict[str, np.ndarray]: ...

    def run(self) -> Mapping[str, np.ndarray]: ...


class Backend(Protocol):
    name: str

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        """Numbers of rows, ascending, for which the group can be opened; None: any."""

    def open(self, group: Group, rows: int) -> Runner:
        """Open `group` for M = `rows`. Raises BackendError."""

    def close(self) -> None: ...


class FusedForward(Protocol):
    """All groups but the head, and the recurrences between them, as one call; opened for a number of rows."""

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The caller fills them; their names and widths are `spec.fused_inputs`."""

    def run(self, rows: Rows) -> np.ndarray:
        """The input of the head, (M, D), valid until the next run. The states of `rows` are updated in place.

        Raises UsageError for states that cannot be updated where they lie.
        """

    def seconds(self) -> dict[str, float]:
        """The time of the last run, by role of group, and of the `recurrence`."""


@runtime_checkable
class FusedBackend(Protocol):
    """A backend that has the fused forward as well."""

    def open_fused(self, rows: int) -> FusedForward:
        """Open the fused forward for M = `rows`. Raises BackendError."""


def relative_error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The worst output's root mean square of the difference over that of the expected; inf where not finite."""
    worst = 0.0
    for name, want in expected.items():
        difference = np.asarray(found[name], np.float64).reshape(want.shape) - want
        scale = float(np.sqrt(np.square(want, dtype=np.float64).mean()))
        error = float(np.sqrt(np.square(difference).mean())) / max(scale, 1e-12)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def allocate_inputs(group: Group, rows: int) -> dict[str, np.ndarray]:
    """Zeroed fp32 arrays for the inputs of a group."""
    return {port.name: np.zeros((rows, port.width), np.float32) for port in group.inputs}
