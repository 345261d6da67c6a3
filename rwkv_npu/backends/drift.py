"""Notices when an int8 model is given what it was not calibrated for, and says so once.

Ranges of int8 are fixed when an artifact is compiled; what lies beyond is clipped, and nothing fails. Every few calls
the inputs of one are compared with the largest that calibration saw. A text has a peak now and then: only where they
are common is it another kind of text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, cycle

import numpy as np

from rwkv_npu.backends.base import Backend, Runner
from rwkv_npu.models.maths import largest
from rwkv_npu.models.spec import Group

# By group and input, the largest magnitude that calibration saw.
Peaks = Mapping[str, Mapping[str, float]]

EVERY = 13  # calls of a runner for one that is looked at
ENOUGH = 32  # calls that are looked at before anything is said
COMMON = 1 / 16  # of them beyond the ranges: calibration's own text has one in thousands


@dataclass
class Drift:
    """What was seen since the model was loaded."""

    looked: int = 0
    beyond: int = 0
    said: bool = False

    def note(self, group: str, ranges: Mapping[str, float], inputs: Mapping[str, np.ndarray]) -> None:
        """Look at the inputs of a call. Warns once."""
        self.looked += 1
        found = {name: largest(inputs[name]) for name in ranges}
        over = {name: x for name, x in found.items() if x > ranges[name]}
        self.beyond += bool(over)
        if over and not self.said and self.looked >= ENOUGH and self.beyond > COMMON * self.looked:
            self.said = True
            name, magnitude = next(iter(over.items()))
            warnings.warn(
                f"inputs leave the ranges of int8 in {self.beyond} of {self.looked} calls looked at ({name} of {group} "
                f"reaches {magnitude:.3g}, calibrated to {ranges[name]:.3g}), which costs quality: convert with "
                "--calibrate and a text of this kind, or use --precision fp16",
                stacklevel=4,
            )


class WatchedRunner:
    """A runner that looks at its own calls: of a count that all shared, some would have no turn where the number of
    groups is a multiple. Its first turn comes `place` calls late, so that a token's are spread over the groups."""

    def __init__(self, runner: Runner, group: Group, ranges: Mapping[str, float], drift: Drift, place: int):
        self._runner, self._group, self._ranges, self._drift = runner, group.name, ranges, drift
        self._turns = cycle([turn == place % EVERY for turn in range(EVERY)])

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return self._runner.inputs

    def run(self) -> Mapping[str, np.ndarray]:
        if next(self._turns):
            self._drift.note(self._group, self._ranges, self._runner.inputs)
        return self._runner.run()


class Watched:
    """A backend with artifacts in int8, and their ranges. Groups without any are not looked at, nor inputs of which
    calibration saw zeros alone, as of a short text whose contexts end within a step: it says nothing of them."""

    def __init__(self, backend: Backend, ranges: Peaks):
        self.name, self._backend, self.drift = backend.name, backend, Drift()
        self._ranges = {
            group: {name: x for name, x in inputs.items() if x > 0} for group, inputs in ranges.items()
        }
        self._places = count()

    def row_counts(self, group: Group) -> tuple[int, ...] | None:
        return self._backend.row_counts(group)

    def open(self, group: Group, rows: int, batch: int = 1) -> Runner:
        runner, ranges = self._backend.open(group, rows, batch), self._ranges.get(group.name)
        return WatchedRunner(runner, group, ranges, self.drift, next(self._places)) if ranges else runner

    def close(self) -> None:
        self._backend.close()
