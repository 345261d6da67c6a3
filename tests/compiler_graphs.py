"""Graphs for Rockchip's compiler, from a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import onnx

from rwkv_npu.graphs.onnx import traced_model, zeros_in
from rwkv_npu.graphs.trace import compiler_trace
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Group
from rwkv_npu.quant.npu import Quantised


def compiler_model(
    program: Program,
    group: Group,
    rows: int,
    tensor: Callable[[str], np.ndarray],
    quantised: Mapping[str, Quantised] = MappingProxyType({}),
) -> onnx.ModelProto:
    """The graph of a group as a conversion compiles it. quantised: projections in int8, by label."""
    int8 = {label: projection.params for label, projection in quantised.items()}
    trace = compiler_trace(program, group, rows, int8, zeros_in(tensor))
    return traced_model(trace, group.name, tensor, quantised)
