"""Compares graphs and artifacts with the reference on inputs that a real pass of the model gives them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from rwkv_npu.backends.ort import OrtBackend
from rwkv_npu.bundle import Bundle, graph_file
from rwkv_npu.maths import NumpyMaths
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Network
from rwkv_npu.sources import BundleSource, ModelSource
from rwkv_npu.spec import FUSIONS, Group
from rwkv_npu.state import new_state

VERIFY_ROWS = 16


def record_inputs(source: ModelSource, rows: int, seed: int = 0) -> dict[str, Arrays]:
    """Inputs of every group in a pass over `rows` tokens, after as many that were read before.

    The tokens are random: what matters is a state with a history and a residual as large as the model makes it.
    """
    recorded: dict[str, Arrays] = {}
    f = NumpyMaths(source.tensor)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        recorded[group.name] = {port.name: inputs[port.name].copy() for port in group.inputs}
        return source.evaluate(group, f, dict(inputs))

    network = Network(source.program, source.tensor)
    state = new_state(source.spec, source.fingerprint, source.initial_states())
    parts = {name: part[:, None] for name, part in state.parts.items()}
    rng = np.random.default_rng(seed)
    for count in (max(rows, 16), rows):
        x = network.hidden(run, rng.integers(1, source.spec.V, (count, 1)), parts)
    network.logits(run, x[-1:])
    return recorded


def reference(source: ModelSource, group: Group, inputs: Arrays) -> Arrays:
    """What NumPy makes of the inputs of a group."""
    return source.evaluate(group, NumpyMaths(source.tensor), dict(inputs))


def relative_error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The worst output's root mean square of the difference over that of the expected; inf where not finite."""
    worst = 0.0
    for name, want in expected.items():
        difference = np.asarray(found[name], np.float64).reshape(want.shape) - want
        scale = float(np.sqrt(np.square(want, dtype=np.float64).mean()))
        error = float(np.sqrt(np.square(difference).mean())) / max(scale, 1e-12)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def verify_graphs(bundle: Bundle) -> None:
    """Run the graphs of both fusions in ONNX Runtime; the errors go into the manifest, by file name."""
    for fusion in FUSIONS:
        source = BundleSource(bundle, fusion)
        recorded = record_inputs(source, VERIFY_ROWS)
        for group in tqdm(source.program.groups, f"verify graphs, {fusion}", unit="graph", disable=None):
            inputs = recorded[group.name]
            runner = OrtBackend(source).open(group, rows=max(map(len, inputs.values())))
            for name, array in inputs.items():
                runner.inputs[name][:] = array
            error = relative_error(runner.run(), reference(source, group, inputs))
            bundle.manifest.graph_errors[graph_file(fusion, group.name)] = error
