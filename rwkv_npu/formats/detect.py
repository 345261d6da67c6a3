"""Detects generation and dimensions of a checkpoint, and checks its tensors against them.

Detection uses only names (BlinkDL's), shapes and dtypes. Newer generations are tested first, because each generation
has tensors that the older ones lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

import numpy as np

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.safetensors import BFLOAT16
from rwkv_npu.models.spec import Kind, Spec, Tensor, tensors

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64))

_USE = "use an RWKV-4 to RWKV-7 checkpoint"
_UNSUPPORTED = (
    (
        r"_strategy|_version|_rescale_layer",
        "was converted by the rwkv package for one of its strategies: use the original .pth",
    ),
    (
        r".*\.(lora_[AB]|bone|bone_block|disha)(\.\w+)*",
        "is an adapter, not a model: convert its base model with adapter=FILE",
    ),
    (
        r".*\.(qweight|qzeros|SCB|quant_state.*|weight_scale|weight_mx)",
        "is quantised: use the bf16, fp16 or fp32 original",
    ),
    (r".*rosa.*", f"is an RWKV model with ROSA (RWKV-8), which is not supported: {_USE}"),
    (r"blocks\.\d+\.ffn\.enn\..*", f"is a release candidate of RWKV-8, which is not supported: {_USE}"),
    (
        r"blocks\.\d+\.qkv\..*",
        f"is RWKV-7b, whose DeepEmbed attention needs a cache that grows with the text, which is not supported: {_USE}",
    ),
    (
        r".*\.att\.(gate_w1|gate_w2|time_maa_rkvw_w[12])",
        "is an experimental variant of RWKV-6, which is not supported: use a release (x060)",
    ),
    (
        r"model\.layers\.\d+\.(attn\.q_proj\..*|self_attn\.(time_maa_.*|time_mixer\..*))",
        f"is a hybrid of RWKV with attention, or with another model's layers, which is not supported: {_USE}",
    ),
)


def refuse_unsupported(names: Iterable[str]) -> None:
    """Raises CheckpointError for known kinds of checkpoint that are not supported, recognised by tensor names."""
    names = list(names)
    for pattern, what in _UNSUPPORTED:
        if any(re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL) for name in names):
            raise CheckpointError(f"the checkpoint {what}")
    if names and all(name.endswith(".time_state") for name in names):
        raise CheckpointError(
            "the checkpoint holds a tuned state only, not a model: give it as state=, with its model"
        )


def detect(arrays: dict[str, np.ndarray]) -> Spec:
    """Generation and dimensions of a checkpoint. Raises CheckpointError if it is not a supported one."""
    layers = _layers(arrays)
    generation = _generation(arrays)
    V, D = _shape(arrays, "emb.weight", 2)
    A, _ = _shape(arrays, "blocks.0.att.key.weight", 2)
    F, _ = _shape(arrays, "blocks.0.ffn.key.weight", 2)
    if generation == "4":
        H, N = 1, A
    elif generation in ("5.0", "5.1"):
        H = _array(arrays, "blocks.0.att.time_decay").size
        N = A // max(H, 1)
    else:
        leaf = {"5.2": "time_decay", "6": "time_faaaa"}.get(generation, "r_k")
        H, N = _shape(arrays, f"blocks.0.att.{leaf}", 2)
    ranks = _ranks(arrays, generation, layers)
    if not min(V, D, A, F, H, N) or any(not rank and (c != "v" or layers > 1) for c, rank in ranks.items()):
        raise CheckpointError("the checkpoint has a tensor with a dimension of 0")
    if H * N != A:
        raise CheckpointError(f"the checkpoint has {H} heads of {N} channels, which do not make {A} channels")
    return Spec(generation, D=D, L=layers, H=H, N=N, A=A, F=F, V=V, ranks=ranks)


def _layers(arrays: dict[str, np.ndarray]) -> int:
    found = {int(m[1]) for name in arrays if (m := re.match(r"blocks\.(\d{1,4})\.", name, re.ASCII))}
    if "emb.weight" not in arrays or not found:
        example = min(arrays, default="")
        raise CheckpointError(f"not an RWKV checkpoint: it has tensors such as {example!r:.80}")
    for layer in range(len(found)):
        if layer not in found:
            raise CheckpointError(
                f"the checkpoint has no tensors of layer {layer}; is it one of several files?"
            )
    return len(found)


def _generation(arrays: dict[str, np.ndarray]) -> str:
    def has(leaf: str) -> bool:
        return f"blocks.0.{leaf}" in arrays

    if has("att.r_k"):
        return "7a" if has("ffn.s_emb.weight") else "7"
    if has("att.time_maa_x"):
        return "6"
    if has("att.ln_x.weight"):
        if not has("att.gate.weight"):
            return "5.0"
        decay = _array(arrays, "blocks.0.att.time_decay").shape
        return "5.2" if len(decay) == 2 and decay[1] > 1 else "5.1"
    if has("att.time_decay") and has("att.time_first"):
        return "4"
    raise CheckpointError(f"not an RWKV checkpoint of a known generation: {_USE}")


def _array(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise CheckpointError(f"the checkpoint lacks tensor {name}")
    return arrays[name]


def _shape(arrays: dict[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    shape = _array(arrays, name).shape
    if len(shape) != rank:
        raise CheckpointError(f"{name} has shape {_show(shape)}: expected {rank} dimensions")
    return shape


def _ranks(arrays: dict[str, np.ndarray], generation: str, layers: int) -> dict[str, int]:
    def columns(leaf: str, layer: int = 0) -> int:
        return _shape(arrays, f"blocks.{layer}.{leaf}", 2)[1]

    if generation == "6":
        return {"mix": columns("att.time_maa_w1") // 5, "decay": columns("att.time_decay_w1")}
    if generation not in ("7", "7a"):
        return {}
    ranks = {c: columns(f"att.{c}1") for c in "wag"}
    ranks["v"] = columns("att.v1", 1) if layers > 1 else 0
    if generation == "7a":
        ranks["s"] = columns("ffn.s1")
    return ranks


# -- validation --------------------------------------------------------------------------------------------


def validate(spec: Spec, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The tensors that are present, layer by layer.

    Raises CheckpointError for a tensor that is missing or unknown, or of a wrong shape or dtype.
    """
    expected = {tensor.name: tensor for tensor in tensors(spec)}
    missing = [t.name for t in expected.values() if t.name not in arrays and not t.optional]
    if missing and (found := re.match(r"blocks\.(\d+)\.", missing[0])):
        stray = [name for name in arrays if name.startswith(f"blocks.{found[1]}.")]
        lacking = [name for name in missing if name.startswith(f"blocks.{found[1]}.")]
        if len(stray) < len(lacking):
            raise CheckpointError(
                f"the checkpoint (RWKV-{spec.generation}) has only {_first(stray)} of layer {found[1]}, and lacks "
                f"{_first(lacking)}: is it cut short, or left over from a larger model?"
            )
    if missing:
        raise CheckpointError(f"the checkpoint (RWKV-{spec.generation}) lacks tensor {_first(missing)}")
    surplus = [name for name in arrays if name not in expected]
    if surplus:
        raise CheckpointError(
            f"the checkpoint looks like RWKV-{spec.generation}, but has the unknown tensor {_first(surplus)}"
        )
    for tensor in expected.values():
        if tensor.name in arrays:
            check_tensor(tensor, arrays[tensor.name])
    states = sum(name.endswith(".att.time_state") for name in arrays)
    if states not in (0, spec.L):
        raise CheckpointError(
            f"the checkpoint has a time_state in {states} of {spec.L} layers: expected all or none"
        )
    return {name: tensor for name, tensor in expected.items() if name in arrays}


def check_tensor(tensor: Tensor, array: np.ndarray) -> None:
    """Raises CheckpointError for a tensor of another shape, or one that does not hold floating-point numbers."""
    if array.dtype not in FLOATS:
        raise CheckpointError(f"{tensor.name} has dtype {array.dtype}: expected bfloat16, float16 or float32")
    if tensor.kind is Kind.VECTOR:
        # BlinkDL's files have vectors as (1, 1, D) or (D), and those with a value a head as (H, 1, 1).
        fits = _squeezed(array.shape) in (_squeezed(tensor.shape), _squeezed((prod(tensor.shape),)))
    else:
        fits = array.shape == tensor.shape
    if not fits:
        raise CheckpointError(f"{tensor.name} has shape {_show(array.shape)}: expected {_show(tensor.shape)}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _show(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _first(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (names[0] if len(names[0]) < 80 and names[0].isprintable() else f"{names[0]!r:.80}") + more
