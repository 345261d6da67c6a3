"""Golden vectors: each group's inputs in a forward of the model, and the reference's outputs.

Graphs and artifacts are compared on them when they are made, and a board's NPU before it is trusted. They have the
residual that the model's own weights make, outliers and all, which random rows do not have. For the board a few are
kept in the bundle, since the reference takes seconds there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from rwkv_npu.backends.base import Recorded
from rwkv_npu.formats.bundle import SELF_TEST, Bundle
from rwkv_npu.formats.safetensors import TensorPlan, replace_tensors
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import FUSIONS, Group, Port
from rwkv_npu.runtime import reference
from rwkv_npu.runtime.weights import BundleSource, ModelSource

HISTORY = 16  # tokens that each sequence has read before, at least: the states must have a past
SELF_TEST_ROWS = 3  # the second shows whether a row sees the row above, the third whether the mask hides it


def record(source: ModelSource, rows: int, seed: int = 0) -> dict[str, Recorded]:
    """By group, golden vectors of `rows` rows: the tokens of two sequences, of one where there are fewer than three.

    The tokens are random: what matters are states with a history and a residual as large as the model makes it.
    """
    rng = np.random.default_rng(seed)
    counts = [rows] if rows < 3 else [rows - rows // 3, rows // 3]
    history = [rng.integers(1, source.spec.V, max(count, HISTORY)) for count in counts]
    _, recorded = passes(source, [history, [rng.integers(1, source.spec.V, count) for count in counts]])
    return recorded


def passes(source: ModelSource, chunks: Iterable[Sequence[np.ndarray]]) -> Iterator[dict[str, Recorded]]:
    """By group, inputs and outputs of a forward over each of `chunks`, which have ids of every sequence. The head gets
    the last row."""
    recorded: dict[str, Recorded] = {}
    f = NumpyMaths(source.tensor)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        given = {port.name: inputs[port.name].copy() for port in group.inputs}
        outputs = source.evaluate(group, f, dict(inputs))
        recorded[group.name] = Recorded(given, {name: array.copy() for name, array in outputs.items()})
        return outputs

    for _ in reference.read(source, run, chunks, last_row=True):
        yield dict(recorded)


def write_self_test(bundle: Bundle) -> None:
    """Write the golden vectors with which a board tests its NPU, for both fusions, unless they are there."""
    path = bundle.path / SELF_TEST
    if not path.exists():
        plans = [plan for fusion in FUSIONS for plan in _plans(BundleSource(bundle, fusion))]
        replace_tensors(path, plans)


def self_test(source: ModelSource) -> dict[str, Recorded]:
    """The golden vectors of `write_self_test`, by group; made now for a checkpoint, or a bundle that is too old."""
    fusion = source.program.fusion
    ports: dict[str, Port] = {}
    for group in source.program.groups:
        for kind, some in (("in", group.inputs), ("out", group.outputs)):
            ports |= {_name(fusion, group.name, kind, port.name): port for port in some}
    rows = None
    if isinstance(source, BundleSource) and not source.outdated:
        rows = source.bundle.self_test(ports)
    if rows is None:
        return record(source, SELF_TEST_ROWS)

    def read(group: Group, kind: str) -> Arrays:
        some = group.inputs if kind == "in" else group.outputs
        return {port.name: rows[_name(fusion, group.name, kind, port.name)] for port in some}

    return {group.name: Recorded(read(group, "in"), read(group, "out")) for group in source.program.groups}


def _plans(source: ModelSource) -> Iterator[TensorPlan]:
    for group, recorded in record(source, SELF_TEST_ROWS).items():
        for kind, arrays in (("in", recorded.inputs), ("out", recorded.outputs)):
            for port, array in arrays.items():
                name = _name(source.program.fusion, group, kind, port)
                yield TensorPlan(name, np.float32, array.shape, partial(np.asarray, array, np.float32))


def _name(fusion: str, group: str, kind: str, port: str) -> str:
    return f"{fusion}/{group}/{kind}/{port}"
