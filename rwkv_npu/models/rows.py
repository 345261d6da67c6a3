"""The rows of one forward: tokens of one or more sequences, end to end, and the states that they continue.

Letters: M rows, S segments, L layers, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.spec import Spec, state_shapes


class Rows:
    """M rows in S segments. A segment is a run of consecutive tokens of one sequence.

    ids (M,): token ids. counts, firsts, lasts (S,): number of rows, first row and last row of each segment.
    states: the state of each segment, part -> (L, ...) fp32. A forward updates it in place.
    """

    def __init__(self, tokens: Sequence[Sequence[int] | np.ndarray], states: Sequence[Arrays]):
        self.ids = np.concatenate([np.asarray(piece, np.int64) for piece in tokens])
        self.counts = np.array([len(piece) for piece in tokens], np.int64)
        self.lasts = np.cumsum(self.counts) - 1
        self.firsts = self.lasts + 1 - self.counts
        self.states = states

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def segments(self) -> Iterator[tuple[slice, Arrays]]:
        """Rows and state of each segment."""
        bounds = zip(self.firsts.tolist(), self.lasts.tolist(), self.states, strict=True)
        return ((slice(first, last + 1), state) for first, last, state in bounds)

    @cached_property
    def mask(self) -> np.ndarray:
        """(M, 1) fp32: 1 where the row above is of the same segment, 0 at the first row of each segment."""
        mask = np.ones((len(self), 1), np.float32)
        mask[self.firsts] = 0
        return mask

    def previous(self, part: str, layer: int) -> np.ndarray:
        """The row before each segment, read from its state: (M, D), at the segment's first row, 0 elsewhere."""
        stored = [state[part][layer] for state in self.states]
        if len(self) == 1:
            return stored[0][None]
        rows = np.zeros((len(self), len(stored[0])), np.float32)
        rows[self.firsts] = stored
        return rows

    def store(self, part: str, layer: int, rows: np.ndarray) -> None:
        """Store the last of each segment's `rows` (M, D) in its state."""
        for last, state in zip(self.lasts.tolist(), self.states, strict=True):
            state[part][layer] = rows[last]

    def addresses(self, spec: Spec) -> np.ndarray:
        """Addresses of the parts of each state, (S, parts) int64, for compiled code that updates them in place.

        Raises UsageError for arrays that compiled code cannot update.
        """
        for state in self.states:
            check_parts(state, spec)
        names = state_shapes(spec)
        return np.array([[state[name].ctypes.data for name in names] for state in self.states], np.int64)


def check_parts(parts: object, spec: Spec) -> None:
    """Check that a state has every part, as arrays that a forward can update. Raises UsageError."""
    for name, shape in state_shapes(spec).items():
        part = parts.get(name) if isinstance(parts, Mapping) else None
        if not isinstance(part, np.ndarray):
            raise UsageError(f"the state lacks {name}")
        wanted = (spec.L, *shape)
        if part.shape != wanted or part.dtype != np.float32 or not part.flags.carray:
            raise UsageError(
                f"{name} of a state must be float32 {wanted}, writable and in C order, "
                f"not {part.dtype} {part.shape}"
            )
