"""The reference reads ids: calibration, int8 measurement, sampling and golden vectors all go through here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rwkv_npu.formats.state import new_state
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Network, Run
from rwkv_npu.models.rows import Rows
from rwkv_npu.runtime.weights import ModelSource


def read(
    source: ModelSource, run: Run, chunks: Iterable[Sequence[np.ndarray]], *, last_row: bool = False
) -> Iterator[np.ndarray]:
    """Read `chunks`, one after the other from new states; yield the logits of each, (M, V).

    A chunk has some ids of every sequence, and its rows are theirs, one sequence after the other. run: evaluates a
    group. last_row: the head computes the last row only, (1, V).
    A chunk is taken from `chunks` after the logits of the one before were used, so that it may follow from them.
    """
    network = Network(source.program, source.tensor)
    states: list[Arrays] = []
    for tokens in chunks:
        if not states:
            state = new_state(source.spec, source.fingerprint, source.initial_states())
            states = [state.copy().parts for _ in tokens]
        hidden = network.hidden(run, Rows(tokens, states))
        yield network.logits(run, hidden[-1:] if last_row else hidden)
