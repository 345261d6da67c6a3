"""What a backend is: something that opens groups and runs them. It knows no model, no file and no plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rwkv_npu.models.maths import Maths, NumpyMaths
from rwkv_npu.models.network import Whole
from rwkv_npu.models.spec import Group, Spec
from rwkv_npu.quant.cpu import Packed


@dataclass(frozen=True)
class Recorded:
    """Inputs of a group in a pass of the model, and what the reference made of them: (rows, width) or (1, width)."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass
class Faults:
    """What went wrong on an NPU: calls that failed, and the groups that the CPU runs since then, with the reason."""

    calls: int = 0
    groups: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """What a backend may ask of a model, whether it comes from a bundle or from a checkpoint."""

    @property
    def spec(self) -> Spec: ...

    @property
    def program(self) -> Any:
        """What the groups compute (`models.network.Program`)."""

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in the shape in which the maths uses it: vectors in fp32, the others as stored."""

    def packed(self, name: str, index: int | None = None) -> Packed | None:
        """A projection, or number `index` of a stack, as the CPU multiplies it quantised; None where it does not."""

    def weight(self, name: str) -> np.ndarray:
        """As `tensor`, in the precision that was asked for: what quantised numbers stand for, in fp32."""

    def release(self, name: str) -> None:
        """Say that a projection was copied and will not be read again."""

    def maths(self) -> NumpyMaths:
        """What multiplies in NumPy, in the precision that was asked for."""

    def evaluate(self, group: Group, f: Maths, x: dict[str, Any]) -> dict[str, Any]:
        """Outputs of a group for its inputs, computed with the operations of `f`."""

    def onnx(self, group: Group) -> str | bytes:
        """The group's graph with symbolic M and B: the path of a file, or its bytes."""


class Runner(Protocol):
    """A group opened for a number of rows and sequences.

    The backend owns `inputs`, (M, width) or (B, width) fp32; the caller fills them and calls `run`. What that
    returns is valid until the next run of this runner, and of several rows a sequence until the next but one run of a
    group of its role: layers after the first may take turns in two sets of arrays. With one row, runners of different
    groups may run at the same time.
    """

    @property
    def inputs(self) -> dict[str, np.ndarray]: ...

    def run(self) -> Mapping[str, np.ndarray]: ...


class Backend(Protocol):
    name: str

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        """Numbers of rows, ascending, for which the group can be opened at one sequence; None: any, any B."""

    def open(self, group: Group, rows: int, batch: int = 1) -> Runner:
        """Open `group` for M = `rows` of which `batch` sequences. Raises BackendError."""

    def close(self) -> None: ...


@runtime_checkable
class Walker(Protocol):
    """A backend that can also go the whole way from the embedding to the head at once, recurrences included."""

    def open_walk(self, rows: int, batch: int) -> WalkRunner:
        """Open all groups but the head for M = `rows` of which `batch` sequences, on one state. Raises BackendError."""


class WalkRunner(Whole, Protocol):
    """A walk opened for a number of rows and sequences. `run` raises UsageError for arrays that are no such state."""

    def seconds(self) -> dict[str, float]:
        """Of the last run, by role of group, and of the `recurrence`."""


def relative_error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The worst output's root mean square of the difference over that of the expected; inf where not finite."""
    worst = 0.0
    for name, want in expected.items():
        difference = np.asarray(found[name], np.float64).reshape(want.shape) - want
        scale = float(np.sqrt(np.square(want, dtype=np.float64).mean()))
        error = float(np.sqrt(np.square(difference).mean())) / max(scale, 1e-12)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def allocate_inputs(group: Group, rows: int, batch: int) -> dict[str, np.ndarray]:
    """Zeroed fp32 arrays for the inputs of a group."""
    return {
        port.name: np.zeros((batch if port.per_sequence else rows, port.width), np.float32)
        for port in group.inputs
    }
