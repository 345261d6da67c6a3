"""The graph of an artifact and its options, for Rockchip's compiler and simulator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rwkv_npu.formats.bundle import Artifact, Bundle
from rwkv_npu.graphs.onnx import traced_model, zeros_in
from rwkv_npu.graphs.trace import Trace, compiler_trace, matrices
from rwkv_npu.models.network import Program
from rwkv_npu.quant.npu import ProjectionParams
from rwkv_npu.toolkit import CompileOptions


class BundleModel(Protocol):
    """A model in a bundle."""

    bundle: Bundle
    program: Program


@dataclass(frozen=True)
class CompilerGraph:
    """The traced graph of an artifact. weight_bytes: size of its weights in fp32, which the compiler works in."""

    bundle: Bundle
    trace: Trace
    options: CompileOptions
    weight_bytes: int
    int8: frozenset[str]  # the projections that are in int8
    name: str

    def onnx(self) -> bytes:
        """The graph with its weights, as an ONNX file."""
        quantised = {name: self.bundle.quantised(name) for name in self.int8}
        return traced_model(self.trace, self.name, self.bundle.tensor, quantised).SerializeToString()


def compiler_graph(
    source: BundleModel, artifact: Artifact, parameters: Mapping[str, ProjectionParams] | None = None
) -> CompilerGraph:
    """Trace the graph of an artifact. parameters: `int8_parameters` of its precision; None reads them here."""
    bundle, program = source.bundle, source.program
    if parameters is None:
        parameters = int8_parameters(bundle, artifact.precision)
    group = next(group for group in program.groups if group.name == artifact.group)
    trace = compiler_trace(program, group, artifact.rows, parameters, zeros_in(bundle.tensor))
    identity = {"fingerprint": bundle.manifest.fingerprint, "group": artifact.group, "int8": artifact.int8}
    # Projections in int8 are part of an fp16 graph.
    precision = "fp16" if artifact.precision in bundle.manifest.int8 else artifact.precision
    options = CompileOptions(
        artifact.target,
        precision,
        custom_string=json.dumps({key: value for key, value in identity.items() if value}),
        int8={weight: (input_.span, product.span) for weight, (input_, product) in trace.int8.items()},
    )
    used = {constant.name for constant in trace.projections.values()}
    weight_bytes = sum(4 * matrix.k * matrix.n for matrix in matrices(trace, program.spec))
    return CompilerGraph(
        bundle, trace, options, weight_bytes, frozenset(used & parameters.keys()), group.name
    )


def int8_parameters(bundle: Bundle, precision: str) -> dict[str, ProjectionParams]:
    """Quantization parameters by name, of the projections that are int8 in artifacts of a precision."""
    chosen = bundle.manifest.int8.get(precision)
    return {name: bundle.ranges(name) for name in chosen.projections} if chosen else {}
