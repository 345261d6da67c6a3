"""Golden vectors: inputs of each group from a forward of the model, and the reference's outputs.

A conversion tests graphs and artifacts on them, and a board tests its NPU on them before use. Unlike random rows, they
have the outliers of the model's own residual. A bundle contains a few for the board, where the reference would take
seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from rwkv_npu.backends.base import GoldenVectors
from rwkv_npu.formats.bundle import SELF_TEST, Bundle
from rwkv_npu.formats.safetensors import TensorPlan, replace_tensors
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import FUSIONS, Group, Port
from rwkv_npu.runtime import reference
from rwkv_npu.runtime.weights import BundleSource, ModelSource

HISTORY = 16  # fewest tokens that each sequence has read before, so that its state is not the initial one
SELF_TEST_ROWS = 3  # the second row tests the token shift from the row above, the third row its mask


def golden_vectors(source: ModelSource, rows: int, seed: int = 0) -> dict[str, GoldenVectors]:
    """Compute golden vectors of `rows` rows, by group. They are tokens of two sequences, or of one if `rows` < 3.

    Random tokens are enough: the tests need states with a history, and the model's own residual.
    """
    rng = np.random.default_rng(seed)
    counts = [rows] if rows < 3 else [rows - rows // 3, rows // 3]
    history = [rng.integers(1, source.spec.V, max(count, HISTORY)) for count in counts]
    _, recorded = passes(source, [history, [rng.integers(1, source.spec.V, count) for count in counts]])
    return recorded


def passes(source: ModelSource, chunks: Iterable[Sequence[np.ndarray]]) -> Iterator[dict[str, GoldenVectors]]:
    """Run the reference over chunks. A chunk has an array of ids for each sequence.

    Yields the inputs and outputs of each chunk, by group. The head computes the last row only.
    """
    recorded: dict[str, GoldenVectors] = {}
    f = NumpyMaths(source.tensor)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        copies = {port.name: inputs[port.name].copy() for port in group.inputs}
        outputs = source.evaluate(group, f, dict(inputs))
        recorded[group.name] = GoldenVectors(copies, {name: array.copy() for name, array in outputs.items()})
        return outputs

    for _ in reference.read(source, run, chunks, last_row=True):
        yield dict(recorded)


def write_self_test(bundle: Bundle) -> None:
    """Write the golden vectors of both fusions to a bundle, unless it has them."""
    path = bundle.path / SELF_TEST
    if not path.exists():
        plans = [plan for fusion in FUSIONS for plan in _plans(BundleSource(bundle, fusion))]
        replace_tensors(path, plans)


def self_test(source: ModelSource) -> dict[str, GoldenVectors]:
    """The golden vectors of a model by group: from its bundle, or computed for a checkpoint or an old bundle."""
    fusion = source.program.fusion
    ports: dict[str, Port] = {}
    for group in source.program.groups:
        for kind, group_ports in (("in", group.inputs), ("out", group.outputs)):
            ports |= {_name(fusion, group.name, kind, port.name): port for port in group_ports}
    rows = None
    if isinstance(source, BundleSource) and not source.outdated:
        rows = source.bundle.self_test(ports)
    if rows is None:
        return golden_vectors(source, SELF_TEST_ROWS)

    def read(group: Group, kind: str) -> Arrays:
        group_ports = group.inputs if kind == "in" else group.outputs
        return {port.name: rows[_name(fusion, group.name, kind, port.name)] for port in group_ports}

    return {
        group.name: GoldenVectors(read(group, "in"), read(group, "out")) for group in source.program.groups
    }


def _plans(source: ModelSource) -> Iterator[TensorPlan]:
    for group, recorded in golden_vectors(source, SELF_TEST_ROWS).items():
        for kind, arrays in (("in", recorded.inputs), ("out", recorded.outputs)):
            for port, array in arrays.items():
                name = _name(source.program.fusion, group, kind, port)
                yield TensorPlan(name, np.float32, array.shape, partial(np.asarray, array, np.float32))


def _name(fusion: str, group: str, kind: str, port: str) -> str:
    return f"{fusion}/{group}/{kind}/{port}"
