"""Write the files of a bundle that every machine can use: weights, host tensors and graphs for the CPU.

Each file appears complete, by a rename. So an interrupted conversion can continue with the existing files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.formats.bundle import (
    HOST,
    INT8,
    MATHS,
    SELF_TEST,
    WEIGHTS,
    Bundle,
    FileRecord,
    Manifest,
    graph_file,
    packed_file,
    packed_label,
    record_file,
)
from rwkv_npu.formats.files import write_atomically
from rwkv_npu.formats.huggingface import CHAT_TEMPLATE
from rwkv_npu.formats.safetensors import Entry, TensorFile, TensorPlan, replace_tensors
from rwkv_npu.graphs.onnx import external_model
from rwkv_npu.graphs.trace import Constant, trace_group
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Group, Kind, Spec, Tensor, groups, tensors
from rwkv_npu.progress import Progress, progress
from rwkv_npu.quant.cpu import SCALE, Packed, pack, packed_shapes
from rwkv_npu.runtime.weights import CheckpointSource, ModelSource
from rwkv_npu.text.tokenizer import Tokenizer

STORAGE = {"fp16": np.float16, "fp32": np.float32}  # precisions of weights that every backend reads

_CHUNK_ELEMENTS = 1 << 22

log = logging.getLogger("rwkv_npu")


def write_weights(folder: Path, source: CheckpointSource, cpu: str) -> None:
    """Write `host.safetensors` and `graphs/weights.safetensors`, unless they exist."""
    (folder / "graphs").mkdir(parents=True, exist_ok=True)
    present = [tensor for tensor in tensors(source.spec) if source.has(tensor.name)]
    projections = [tensor for tensor in present if tensor.kind.is_projection]
    others = [tensor for tensor in present if not tensor.kind.is_projection]
    for name, selected, dtype in ((WEIGHTS, projections, STORAGE[cpu]), (HOST, others, None)):
        path = folder / name
        if not path.exists():
            log.info(f"writing {name}")
            plans = [_plan(source, tensor, dtype) for tensor in selected]
            replace_tensors(path, plans)


def _plan(source: CheckpointSource, tensor: Tensor, dtype: Any) -> TensorPlan:
    """The plan of a tensor in the model's layout. `dtype` None keeps the checkpoint's dtype."""
    stored = source.tensor(tensor.name).dtype if dtype is None else dtype
    if tensor.kind is Kind.VECTOR:
        stored = np.float32

    def produce() -> Iterator[np.ndarray]:
        array = source.tensor(tensor.name)
        step = max(1, _CHUNK_ELEMENTS // max(1, array[:1].size))
        for start in range(0, len(array), step):
            yield array[start : start + step]

    return TensorPlan(tensor.name, stored, tensor.used_shape, produce)


def write_packed(
    folder: Path, source: ModelSource, precision: str, four_bits: Mapping[str, Callable[[], Packed]]
) -> None:
    """Write `cpu/PRECISION.safetensors`, unless it exists: every projection, quantised from the checkpoint's values.

    four_bits: makes the projections that have four bits. All others have eight.
    """
    path = folder / packed_file(precision)
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    plans: list[TensorPlan] = []
    with progress(f"quantise to {precision}", "matrix") as bar:
        for tensor in tensors(source.spec):
            if tensor.kind.is_projection and source.has(tensor.name):
                plans += _packed_plans(source, tensor, four_bits.get(tensor.name), bar)
        bar.total = len(plans) // 2
        replace_tensors(path, plans)


def _packed_plans(
    source: ModelSource, tensor: Tensor, four_bits: Callable[[], Packed] | None, bar: Progress
) -> Iterator[TensorPlan]:
    """Plans of a projection's data and scales, or of each matrix of a stack. Data must be written before its scales."""
    *stack, k, n = tensor.used_shape
    data_shape, scales_shape = packed_shapes(k, n, 4 if four_bits else 8)
    for index in range(stack[0]) if stack else [None]:
        scales: list[np.ndarray] = []

        def data(index: int | None = index, scales: list[np.ndarray] = scales) -> np.ndarray:
            array = source.tensor(tensor.name)
            packed = four_bits() if four_bits else pack(array if index is None else array[index], 8)
            scales.append(packed.scales)
            bar.update()
            return packed.data

        label = packed_label(tensor.name, index)
        yield TensorPlan(f"{label}.data", np.uint8, data_shape, data)
        yield TensorPlan(f"{label}.scales", SCALE, scales_shape, scales.pop)


def write_graphs(bundle: Bundle) -> None:
    """Write the graphs of both fusions, unless they exist. M is symbolic; weights are referenced by file offset."""
    with TensorFile(bundle.path / WEIGHTS) as weights:

        def locate(constant: Constant) -> Entry:
            entry = weights.entry(constant.name)
            if constant.index is None:
                return entry
            count, *shape = entry.shape
            size = entry.nbytes // count
            return Entry(entry.dtype, tuple(shape), entry.offset + constant.index * size, size)

        for fusion in FUSIONS:
            program = Program(bundle.spec, fusion, bundle.manifest.scaling)
            for group in program.groups:
                path = bundle.path / graph_file(fusion, group.name)
                if not path.exists():
                    trace = trace_group(program, group)
                    model = external_model(trace, group.name, bundle.tensor, Path(WEIGHTS).name, locate)
                    write_atomically(path, model.SerializeToString())


def describe_groups(spec: Spec) -> dict[str, list[dict[str, Any]]]:
    """The groups of both fusions with their ordered inputs and outputs, in the manifest's form."""
    return {fusion: [_describe(group) for group in groups(spec, fusion)] for fusion in FUSIONS}


def _describe(group: Group) -> dict[str, Any]:
    def port(name: str, width: int) -> dict[str, Any]:
        return {"name": name, "shape": ["M", width], "dtype": "float32"}

    return {
        "name": group.name,
        "maths": MATHS,
        "inputs": [port(**asdict(p)) for p in group.inputs],
        "outputs": [port(**asdict(p)) for p in group.outputs],
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> str | None:
    """Copy the vocabulary into the bundle, unless the package ships it. Returns the manifest's name for it."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer.source, str):
        return f"builtin:{tokenizer.source}"
    name = "tokenizer.json" if tokenizer.source.suffix == ".json" else "vocab.txt"
    write_atomically(folder / name, tokenizer.source.read_bytes())
    return name


def record_files(folder: Path, manifest: Manifest) -> dict[str, FileRecord]:
    """Size and digest of every file of the bundle, except the manifest. Known records are kept."""
    packed = map(packed_file, manifest.packed)
    names = [HOST, WEIGHTS, SELF_TEST, *packed, *(a.path for a in manifest.artifacts)]
    for fusion, described in manifest.groups.items():
        names += [graph_file(fusion, group["name"]) for group in described]
    if manifest.tokenizer and not manifest.tokenizer.startswith("builtin:"):
        names.append(manifest.tokenizer)
    if (folder / CHAT_TEMPLATE).is_file():
        names.append(CHAT_TEMPLATE)
    if manifest.int8:
        names.append(INT8)
    known = manifest.files
    return {name: known.get(name) or record_file(folder / name) for name in names}
