"""Inputs of a group for rows of several sequences, as a forward would give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_npu.models.spec import Group


def ragged_inputs(
    group: Group, rows: int, begins: Sequence[int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random inputs (rows, width). A sequence begins at each of the rows `begins`, which include 0."""
    inputs = {port.name: rng.standard_normal((rows, port.width)).astype(np.float32) for port in group.inputs}
    if "mask" in inputs:
        inputs["mask"][:] = 1
        inputs["mask"][list(begins)] = 0
        for name in inputs.keys() & {"att_prev", "ffn_prev"}:
            inputs[name] *= 1 - inputs["mask"]
    return inputs
