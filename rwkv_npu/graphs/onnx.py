"""ONNX models of traced groups: with weights inside, in an external file, or quantised.

A model is made from a `Trace` (trace.py) and `tensor(name)`, which returns a tensor in `Tensor.used_shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from rwkv_npu.formats.safetensors import Entry
from rwkv_npu.graphs.trace import Constant, Trace
from rwkv_npu.quant.cpu import BLOCK, Packed, stored_numbers
from rwkv_npu.quant.npu import Quantised

Tensors = Callable[[str], np.ndarray]

OPSET = 17  # the first with LayerNormalization; Rockchip's compiler takes up to 19
IR_VERSION = 8  # Rockchip's compiler cannot read the default of newer versions of onnx

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
INT8_ROWS = 4  # the accuracy level of MatMulNBits that quantises rows too, block by block


def inline_model(
    trace: Trace, name: str, tensor: Tensors, dtype: type[np.floating] = np.float32
) -> onnx.ModelProto:
    """The graph with its weights inside, projections in `dtype`."""
    projections = [
        _initialiser(label, constant.of(tensor(constant.name)), dtype)
        for label, constant in trace.projections.items()
    ]
    return _model(trace, name, tensor, projections)


def external_model(
    trace: Trace, name: str, tensor: Tensors, location: str, place: Callable[[Constant], Entry]
) -> onnx.ModelProto:
    """The graph with its projections in an external file. place(constant): dtype, shape, offset and bytes in it."""
    projections = []
    for label, constant in trace.projections.items():
        dtype, shape, offset, nbytes = place(constant)
        proto = TensorProto(name=label, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype))
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", nbytes)):
            proto.external_data.add(key=key, value=str(value))
        projections.append(proto)
    return _model(trace, name, tensor, projections)


def quantised_model(
    trace: Trace, name: str, tensor: Tensors, packed: Callable[[Constant], Packed]
) -> onnx.ModelProto:
    """The graph with quantised projections, for ONNX Runtime's MatMulNBits, which quantises rows too."""
    model = _model(trace, name, tensor, [])
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in trace.projections:
            label = node.input[1]
            weight = packed(trace.projections[label])
            data, scales = _in_blocks(label, weight)
            model.graph.initializer.extend([data, scales])
            node.CopyFrom(_quantised_product(node, weight, data.name, scales.name))
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def _in_blocks(label: str, weight: Packed) -> tuple[TensorProto, TensorProto]:
    """A weight in MatMulNBits' layout, column by column: data (N, blocks, bytes of a block), scales (N x blocks)."""
    n, blocks = weight.shape[1], weight.padded_k // BLOCK
    q = stored_numbers(weight).swapaxes(0, 1).reshape(weight.padded_k, -1)[:, :n].T.reshape(n, blocks, BLOCK)
    if weight.bits == 4:
        q = q[..., ::2] | q[..., 1::2] << 4
    scales = weight.scales.swapaxes(0, 1).reshape(blocks, -1)[:, :n].T.reshape(-1)
    return _initialiser(f"{label}.data", q, np.uint8), _initialiser(f"{label}.scales", scales, np.float32)


def _quantised_product(product: onnx.NodeProto, weight: Packed, data: str, scales: str) -> onnx.NodeProto:
    """A MatMulNBits node that replaces a MatMul."""
    k, n = weight.shape
    return helper.make_node(
        "MatMulNBits",
        [product.input[0], data, scales],
        list(product.output),
        name=product.name,
        domain=MICROSOFT,
        accuracy_level=INT8_ROWS,
        K=k,
        N=n,
        bits=weight.bits,
        block_size=BLOCK,
    )


def zeros_in(tensor: Tensors) -> Callable[[Constant], bool]:
    """A predicate: True for constants that are all zero in fp16, the compiler's precision."""

    def is_zero(constant: Constant) -> bool:
        array = constant.of(tensor(constant.name))
        with np.errstate(over="ignore", under="ignore"):
            # First a few rows: most constants have a nonzero value there.
            return not any(part.astype(np.float16, copy=False).any() for part in (array[:4], array))

    return is_zero


def traced_model(
    trace: Trace, name: str, tensor: Tensors, quantised: Mapping[str, Quantised] = MappingProxyType({})
) -> onnx.ModelProto:
    """The graph for Rockchip's compiler: a trace with fixed rows, and its weights inside in fp32.

    quantised: projections by label that become int8. The graph has their dequantised weights.
    """

    def values(constant: Constant) -> np.ndarray:
        whole = quantised.get(constant.whole.label)
        return constant.of(tensor(constant.name)) if whole is None else constant.cut(whole.values())

    projections = [_initialiser(label, values(c), np.float32) for label, c in trace.projections.items()]
    return _model(trace, name, tensor, projections)


def _model(trace: Trace, name: str, tensor: Tensors, projections: list[TensorProto]) -> onnx.ModelProto:
    nodes, casts = [], {}
    for proto in projections:
        if proto.data_type != TensorProto.FLOAT:
            casts[proto.name] = f"{proto.name}.fp32"
            nodes.append(helper.make_node("Cast", [proto.name], [casts[proto.name]], to=TensorProto.FLOAT))
    for node in trace.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [casts.get(used, used) for used in node.input]
        nodes.append(copy)
    vectors = [_initialiser(label, c.of(tensor(c.name)), np.float32) for label, c in trace.vectors.items()]
    literals = [_initialiser(label, array, array.dtype) for label, array in trace.literals.items()]
    graph = helper.make_graph(nodes, name, trace.inputs, trace.outputs, [*projections, *vectors, *literals])
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rwkv_npu")


def _initialiser(label: str, array: np.ndarray, dtype: Any) -> TensorProto:
    data = np.asarray(array, dtype, order="C")
    kind = helper.np_dtype_to_tensor_dtype(data.dtype)
    return helper.make_tensor(label, kind, data.shape, data.tobytes(), raw=True)
