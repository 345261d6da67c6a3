"""Compares graphs with the reference on inputs that a real pass of the model gives them."""

from __future__ import annotations

from rwkv_npu.backends.base import relative_error
from rwkv_npu.backends.ort import OrtBackend
from rwkv_npu.formats.bundle import Bundle, graph_file
from rwkv_npu.models.spec import FUSIONS
from rwkv_npu.progress import progress
from rwkv_npu.runtime.selftest import record
from rwkv_npu.runtime.weights import BundleSource

VERIFY_ROWS = 16


def verify_graphs(bundle: Bundle) -> None:
    """Run the graphs of both fusions in ONNX Runtime; the errors go into the manifest, by file name."""
    for fusion in FUSIONS:
        source = BundleSource(bundle, fusion, bundle.manifest.cpu)
        recorded = record(source, VERIFY_ROWS)
        for group in progress(f"verify graphs, {fusion}", "graph", over=source.program.groups):
            given, expected = recorded[group.name].inputs, recorded[group.name].outputs
            runner = OrtBackend(source).open(group, rows=max(map(len, given.values())))
            for name, array in given.items():
                runner.inputs[name][:] = array
            error = relative_error(runner.run(), expected)
            bundle.manifest.graph_errors[graph_file(fusion, group.name)] = error
