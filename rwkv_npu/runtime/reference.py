"""The reference's forward over token ids. Calibration, int8 measurement, sampling and golden vectors use it."""

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
    """Read `chunks` one after the other, beginning with new states. Yields the logits of each chunk, (M, V).

    A chunk has ids of every sequence; its rows are the sequences end to end. run: computes a group.
    last_row: compute the head for the last row only, (1, V).
    Chunks are taken one at a time: a generator may make a chunk from the logits of the chunk before it.
    """
    network = Network(source.program, source.tensor)
    states: list[Arrays] = []
    for tokens in chunks:
        if not states:
            state = new_state(source.spec, source.fingerprint, source.initial_states())
            states = [state.copy().parts for _ in tokens]
        hidden = network.hidden(run, Rows(tokens, states))
        yield network.logits(run, hidden[-1:] if last_row else hidden)
