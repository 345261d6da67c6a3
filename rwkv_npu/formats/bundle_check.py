"""Checks of a bundle's files against its spec, before a backend uses them.

A bundle may come from an untrusted source. Its checksums have no key, so a changed file can have a matching checksum.
Compiled code does not check sizes, and a matrix of a wrong size would make it access memory beyond the end. Every
tensor is therefore compared with the table of tensors (models/spec.py) by shape, dtype and alignment.

All functions raise ValueError with one line that names the problem.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from rwkv_npu.formats.files import stays_inside
from rwkv_npu.formats.safetensors import ALIGNMENT, BFLOAT16, TensorFile
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Kind, Port, Scaling, Spec, Tensor, groups, tensors
from rwkv_npu.quant.cpu import PRECISIONS, SCALE, packed_shapes
from rwkv_npu.quant.npu import HIGHEST, LOWEST, int8_parts

if TYPE_CHECKING:
    from rwkv_npu.formats.bundle import Manifest

STORAGE = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}  # of `graphs/weights.safetensors`

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
_RANKS = {"6": {"mix", "decay"}, "7": {"w", "a", "v", "g"}, "7a": {"w", "a", "v", "g", "s"}}
_LONGEST_STRING = 4096
_LARGEST_INT = 2**53
_MOST_LAYERS = 9999
_WIDEST = 2**24
_MOST_ROWS = 4096  # of an artifact, and of a self-test

# -- JSON ------------------------------------------------------------------------------------------------


def from_json(cls: Any, data: Any, where: str) -> Any:
    """Build the dataclass `cls` from parsed JSON, and check each value's type against its field.

    Unknown keys are ignored, because a newer minor version of the format may have them.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is not an object")
    hints = get_type_hints(cls)
    for item in fields(cls):
        if item.name not in data and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where} lacks {item.name}")
    return cls(
        **{name: _value(data[name], kind, f"{where}.{name}") for name, kind in hints.items() if name in data}
    )


def _value(value: Any, kind: Any, where: str) -> Any:
    """Convert `value` to the type `kind`: a plain type, a dataclass, or a container or optional of these."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (one for one in arguments if one is not type(None))
        return _value(value, kind, where)
    if is_dataclass(kind):
        return from_json(kind, value, where)
    if origin is dict and isinstance(value, dict):
        return {
            _text(key, where): _value(one, arguments[1], f"{where}.{key:.60}") for key, one in value.items()
        }
    if origin is list and isinstance(value, list):
        return [_value(one, arguments[0], where) for one in value]
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise ValueError(f"{where} has {len(value)} values instead of {len(inner)}")
        return tuple(_value(one, kind, where) for one, kind in zip(value, inner, strict=True))
    if kind is Any:
        return value
    if kind is str:
        return _text(value, where)
    if kind is float and type(value) in (int, float) and not abs(value) > 1e300:
        return float(value)
    if kind is int and type(value) is int and abs(value) <= _LARGEST_INT:
        return value
    if kind is bool and type(value) is bool:
        return value
    raise ValueError(f"{where} is {value!r:.40}, not {getattr(kind, '__name__', kind)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_STRING:
        raise ValueError(f"{where} is {value!r:.40}, not a string of at most {_LONGEST_STRING} characters")
    return value


# -- the manifest ----------------------------------------------------------------------------------------


def check_spec(spec: Spec) -> None:
    """Check that dimensions are possible and agree with each other."""
    if spec.generation not in GENERATIONS:
        raise ValueError(f"its spec is of the unknown generation {spec.generation!r:.20}")
    for name in "DLHNAFV":
        largest = _MOST_LAYERS if name == "L" else _WIDEST
        if not 1 <= getattr(spec, name) <= largest:
            raise ValueError(f"its spec has {name} = {getattr(spec, name)}, not 1 to {largest}")
    if spec.H * spec.N != spec.A:
        raise ValueError(f"its spec has {spec.H} heads of {spec.N} channels, which do not make {spec.A}")
    if set(spec.ranks) != _RANKS.get(spec.generation, set()):
        raise ValueError(f"its spec has the ranks {', '.join(sorted(spec.ranks)):.60}")
    for name, rank in spec.ranks.items():
        unused = name == "v" and spec.L == 1
        if not (0 if unused else 1) <= rank <= _WIDEST:
            raise ValueError(f"its spec has rank {name} = {rank}")


def check_manifest(manifest: Manifest) -> None:
    """Check names, precisions, groups and artifacts of a manifest against its spec and each other."""
    spec = manifest.spec
    check_spec(spec)
    _check_scaling(manifest.scaling, spec)
    if manifest.cpu not in STORAGE and (manifest.cpu or not manifest.packed):
        raise ValueError(f"its cpu precision is {manifest.cpu!r:.20}")
    if manifest.fusion not in FUSIONS:
        raise ValueError(f"its fusion is {manifest.fusion!r:.20}")
    if unknown := set(manifest.packed) - set(PRECISIONS):
        raise ValueError(f"it has packed weights in {min(unknown)!r:.20}")
    if manifest.cpu_default not in ("", manifest.cpu, *manifest.packed):
        raise ValueError(f"its cpu_default {manifest.cpu_default!r:.20} is not in the bundle")
    for name, record in manifest.files.items():
        if not (stays_inside(name) and name.isprintable() and record.size >= 0):
            raise ValueError(f"it lists {name!r:.80}")
    if not all(0 <= token < spec.V for token in manifest.stop_ids):
        raise ValueError("its stop_ids are outside the vocabulary")
    _check_groups(manifest)
    projections = {tensor.name for tensor in tensors(spec) if tensor.kind.is_projection}
    in_int8 = {name for one in manifest.int8.values() for name in one.projections}
    in_int4 = {name for one in manifest.rounding.values() for name in one.four_bits}
    for precision, names in (
        ("int8", in_int8 | {row.name for row in manifest.sensitivity}),
        ("int4", in_int4),
    ):
        if foreign := names - projections:
            raise ValueError(f"it has {min(foreign)!r:.80} in {precision}, which the model does not have")


def _check_scaling(scaling: Scaling, spec: Spec) -> None:
    factors = [scaling.ffn, *(factor for layer in scaling.layers for factor in layer)]
    if not all(0 < factor < 1e30 for factor in factors) or scaling.residual_every < 0:
        raise ValueError("its scaling has a factor that is not a positive number")
    if scaling.layers and len(scaling.layers) != spec.L:
        raise ValueError(f"its scaling has {len(scaling.layers)} layers instead of {spec.L}")


def _check_groups(manifest: Manifest) -> None:
    names = {fusion: {group.name for group in groups(manifest.spec, fusion)} for fusion in FUSIONS}
    for fusion, described in manifest.groups.items():
        if {group.get("name") for group in described} != names.get(fusion):
            raise ValueError(f"its groups of {fusion!r:.20} fusion are not those of the model")
    for artifact in manifest.artifacts:
        where = f"its artifact {artifact.path!r:.80}"
        if artifact.path not in manifest.files:
            raise ValueError(f"{where} is not among its files")
        if artifact.group not in names.get(artifact.fusion, ()):
            raise ValueError(f"{where} is of the group {artifact.group!r:.40}, which the model does not have")
        if not 1 <= artifact.rows <= _MOST_ROWS or artifact.weight_bytes < 0:
            raise ValueError(f"{where} has {artifact.rows} rows and {artifact.weight_bytes} bytes of weights")


# -- tensors ---------------------------------------------------------------------------------------------


def check_tensors(spec: Spec, storage: np.dtype | None, host: TensorFile, weights: TensorFile | None) -> None:
    """Check that host tensors and projections are in their files, in `used_shape` and the right dtype.

    weights, storage: None for a bundle whose projections are all quantised.
    """
    for tensor in tensors(spec):
        file, other = (weights, host) if tensor.kind.is_projection else (host, weights)
        if other is not None and tensor.name in other:
            raise ValueError(f"{other.path} has {tensor.name}, which does not belong there")
        if file is not None and (tensor.name in file or not tensor.optional):
            _check(file, tensor.name, tensor.used_shape, _dtypes(tensor, storage))


def _dtypes(tensor: Tensor, storage: np.dtype | None) -> tuple[np.dtype, ...]:
    if storage is not None and tensor.kind.is_projection:
        return (storage,)
    return (np.dtype(np.float32),) if tensor.kind is Kind.VECTOR else _FLOATS


def check_packed(spec: Spec, weights: TensorFile | None, packed: TensorFile) -> None:
    """Check data and scales, in 8 or 4 bits, of every matrix that `weights` has (None: that the model needs)."""
    for tensor in tensors(spec):
        needed = not tensor.optional if weights is None else tensor.name in weights
        if not needed or not tensor.kind.is_projection:
            continue
        *stack, k, n = tensor.used_shape
        for label in [f"{tensor.name}.{i}" for i in range(stack[0])] if stack else [tensor.name]:
            eight, four = packed_shapes(k, n, 8), packed_shapes(k, n, 4)
            found = packed.entry(f"{label}.data").shape if f"{label}.data" in packed else ()
            data, scales = four if found == four[0] else eight
            _check(packed, f"{label}.data", data, (np.dtype(np.uint8),))
            _check(packed, f"{label}.scales", scales, (SCALE,))


def check_ranges(file: TensorFile, name: str, K: int) -> None:
    """Check the quantization parameters of a projection with K inputs.

    They are scale and zero point (1 + parts, 2), and optional SmoothQuant factors (K,).
    """
    fp32 = (np.dtype(np.float32),)
    label = f"{name}.ranges"
    _check(file, label, (1 + len(int8_parts(K)), 2), fp32)
    scales, zeros = file.array(label).T
    whole = np.isfinite(zeros).all() and (zeros == np.rint(zeros)).all()
    if not (whole and (zeros >= LOWEST).all() and (zeros <= HIGHEST).all()):
        raise ValueError(f"{file.path}: {label} has a zero point outside {LOWEST} to {HIGHEST}")
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError(f"{file.path}: {label} has a scale that is not a positive number")
    label = f"{name}.smoothing"
    if label in file:
        _check(file, label, (K,), fp32)
        smoothing = file.array(label)
        if not (np.isfinite(smoothing).all() and (smoothing > 0).all()):
            raise ValueError(f"{file.path}: {label} has a factor that is not a positive number")


def check_golden(file: TensorFile, named: Mapping[str, Port]) -> None:
    """Check golden vectors: each tensor is (n, width of its port) fp32."""
    for name, port in named.items():
        rows = (file.entry(name).shape if name in file else (1,))[:1]
        count = rows[0] if rows else 0
        _check(
            file, name, (min(max(count, 1), _MOST_ROWS), port.width), (np.dtype(np.float32),), aligned=False
        )


def _check(
    file: TensorFile, name: str, shape: tuple[int, ...], dtypes: Iterable[np.dtype], *, aligned: bool = True
) -> None:
    """Raises ValueError unless `file` has the tensor in this shape, in one of `dtypes`, aligned for the kernels."""
    if name not in file:
        raise ValueError(f"{file.path} lacks {name}")
    entry = file.entry(name)
    if entry.shape != shape or entry.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{file.path}: {name} is {entry.dtype} {entry.shape}, not {wanted} {shape}")
    if aligned and entry.offset % ALIGNMENT and math.prod(shape):
        raise ValueError(f"{file.path}: {name} does not begin on a multiple of {ALIGNMENT} bytes")
