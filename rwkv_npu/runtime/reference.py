"""The reference reads ids: calibration, int8 measurement, sampling and golden vectors all go through here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from rwkv_npu.formats.state import new_state
from rwkv_npu.models.network import Network, Run
from rwkv_npu.runtime.weights import ModelSource


def read(
    source: ModelSource, run: Run, chunks: Iterable[np.ndarray], *, last_row: bool = False
) -> Iterator[np.ndarray]:
    """Read `chunks` of ids, (T, B) each, one after the other from a new state; yield the logits of each, (T*B, V).

    run: evaluates a group. last_row: the head computes the last row only, (1, V).
    A chunk is taken from `chunks` after the logits of the one before were used, so that it may follow from them.
    """
    network, parts = Network(source.program, source.tensor), None
    for ids in chunks:
        if parts is None:
            state = new_state(source.spec, source.fingerprint, source.initial_states())
            parts = {name: np.stack([part] * ids.shape[1], axis=1) for name, part in state.parts.items()}
        hidden = network.hidden(run, ids, parts)
        yield network.logits(run, hidden[-1:] if last_row else hidden)
