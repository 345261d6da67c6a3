"""Writes a random checkpoint of any RWKV generation, size and file format, for tests and timings.

Its values have the ranges of a trained model: logits spread by about 2, decays from long to short memory, in-context
rates around 0.5, and a residual of a few units in all layers. An error anywhere is therefore visible in the logits, and
nothing overflows. The model has learnt nothing.

    python tools/make_checkpoint.py out.pth --size v7-0.1b
    python tools/make_checkpoint.py out.safetensors --generation 6 -D 128 -L 3 -V 512 --dtype fp32
    python tools/make_checkpoint.py folder --generation 7 --hf

Each tensor has its own random generator, seeded by its name, and is written a few rows at a time. The file depends on
the arguments only, and writing it needs little memory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rwkv_npu.formats.pth_writer import write_pth
from rwkv_npu.formats.safetensors import TensorPlan, write_tensors
from rwkv_npu.models.official import OFFICIAL, PILE, RANKS, WORLD, default_channel_mix, default_ranks
from rwkv_npu.models.spec import GENERATIONS, Kind, Spec, Tensor, tensors

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
_CHUNK = 1 << 22  # elements drawn at once

SIZES: dict[str, dict[str, Any]] = {
    name: {"generation": generation, "L": L, "D": D, "V": PILE if generation == "4" else WORLD}
    for name, (generation, L, D) in OFFICIAL.items()
}
for _name, _ranks in RANKS.items():
    SIZES[_name]["ranks"] = _ranks


def make_spec(
    generation: str,
    *,
    D: int,
    L: int,
    V: int,
    N: int = 64,
    F: int | None = None,
    A: int | None = None,
    ranks: dict[str, int] | None = None,
) -> Spec:
    A = A or D
    if generation != "4" and A % N:
        raise ValueError(f"{A} channels cannot be split into heads of {N}")
    if F is None:
        F = default_channel_mix(generation, D)
    H, N = (1, A) if generation == "4" else (A // N, N)
    ranks = default_ranks(generation, D) | (ranks or {})
    if L == 1 and "v" in ranks:
        ranks["v"] = 0  # there is no earlier value to mix with
    return Spec(generation, D=D, L=L, H=H, N=N, A=A, F=F, V=V, ranks=ranks)


# -- values ----------------------------------------------------------------------------------------------


# Vectors: mean and deviation, by the end of the name. The first ending that fits counts. Decays are below.
_VECTORS = """
ln_x.weight 0.8 0.1 | .weight 1 0.1 | .bias 0 0.05 | att.time_first -1.2 0.4 | att.time_faaaa 0.3 0.2
att.time_state 0 0.1 | att.a0 0 0.3 | att.v0 0.3 0.3 | att.k_k 0.85 0.1 | att.k_a 1 0.1 | att.r_k -0.02 0.08
ffn.s0 1 0.1
"""
# First and last value of a ramp over the channels, in v5 over the heads.
_DECAYS = {"4": (-5.0, 3.0), "7": (-6.0, 1.0), "7a": (-6.0, 1.0)}

# Matrices: gain relative to 1/sqrt(inputs), which keeps a variance of 1. g2 follows a sigmoid without a bias.
_GAINS = """
att.time_maa_w1 0.6 | att.time_maa_w2 0.3 | att.time_decay_w2 0.4 | att.w2 0.5 | att.a2 0.6 | att.v2 0.6
att.g2 1.8 | att.output.weight 0.5 | ffn.value.weight 0.35 | ffn.s_emb_x.weight 0.15 | ffn.s2 0.3
head.weight 2.0
"""


def _by_ending(table: str, name: str) -> list[float]:
    rows = (row.split() for row in table.replace("\n", "|").split("|") if row.strip())
    return next(([float(x) for x in numbers] for ending, *numbers in rows if name.endswith(ending)), [])


def _values(tensor: Tensor, spec: Spec, seed: int) -> Iterator[np.ndarray]:
    """float32 values of a tensor, in chunks along its first dimension."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if tensor.kind is Kind.VECTOR:
        yield _vector(tensor, spec, rng)
        return
    if tensor.kind is Kind.TABLE:
        scale = 0.15 if tensor.name.endswith("s_emb.weight") else 0.3
    else:
        inputs = tensor.shape[-1] if tensor.kind is not Kind.LOW_RANK else tensor.shape[-2]
        scale = (_by_ending(_GAINS, tensor.name) or [1.0])[0] / math.sqrt(inputs)
    rows = max(1, _CHUNK * tensor.shape[0] // math.prod(tensor.shape))
    for start in range(0, tensor.shape[0], rows):
        shape = (min(rows, tensor.shape[0] - start), *tensor.shape[1:])
        chunk = rng.standard_normal(shape, np.float32)
        chunk *= np.float32(scale)
        yield chunk


def _vector(tensor: Tensor, spec: Spec, rng: np.random.Generator) -> np.ndarray:
    size = math.prod(tensor.shape)
    normal = _by_ending(_VECTORS, tensor.name)
    if tensor.name.endswith(("att.time_decay", "att.w0")):
        low, high = _DECAYS.get(spec.generation, (-6.0, -0.5))
        depth = int(tensor.name.split(".")[1]) / max(1, spec.L - 1)
        # Later layers bend towards slow decays, as in trained models.
        values = low + (high - low) * np.linspace(0, 1, size) ** (0.7 + 1.3 * depth)
        values += 0.3 * rng.standard_normal(size)
    elif normal:
        values = normal[0] + normal[1] * rng.standard_normal(size)
    else:
        values = rng.uniform(0.1, 0.9, size)  # mixes of the token shift
    return values.astype(np.float32).reshape(tensor.shape)


# -- names and forms -------------------------------------------------------------------------------------


def _plans(spec: Spec, dtype: np.dtype, seed: int, time_state: bool, time_first: bool) -> list[TensorPlan]:
    """The tensors to write, with the names and shapes of BlinkDL's files."""
    plans = []
    for tensor in tensors(spec):
        if tensor.optional and not (time_state and tensor.name.endswith("time_state")):
            continue
        name, logarithm = tensor.name, False
        if time_first and name.endswith("att.time_faaaa"):
            name, logarithm = name.replace("time_faaaa", "time_first"), True

        def produce(tensor: Tensor = tensor, logarithm: bool = logarithm) -> Iterator[np.ndarray]:
            for chunk in _values(tensor, spec, seed):
                yield np.log(np.maximum(np.abs(chunk), 0.05)) if logarithm else chunk

        plans.append(TensorPlan(name, dtype, _disk_shape(tensor, spec), produce))
    return plans


def _disk_shape(tensor: Tensor, spec: Spec) -> tuple[int, ...]:
    leaf = tensor.name.rsplit(".", 1)[-1]
    mixes = leaf.startswith(("time_mix_", "time_maa_", "x_")) or leaf in ("w0", "a0", "v0", "k_k", "k_a")
    if tensor.kind is Kind.VECTOR and (mixes or (leaf == "time_decay" and spec.generation == "6")):
        return (1, 1, *tensor.shape)
    return tensor.shape


_RWKV_PARTS = {"att": "attention", "ffn": "feed_forward", "ln0": "pre_ln"}
_RWKV_LEAVES = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
_FLA_PARTS = {"att": "attn", "ffn": "ffn", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
_FLA_TOP = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
_FLA_MODULES = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
_FLA_LOW_RANKS = {
    f"{c}{i}": leaf for c in "wavg" for i, leaf in enumerate(("2.bias", "0.weight", "2.weight"))
}


def _to_huggingface(plan: TensorPlan, spec: Spec) -> TensorPlan:
    """A tensor with the name and orientation of transformers (v4 to v6) or fla (v7)."""
    parts = plan.name.split(".")
    if spec.generation not in ("7", "7a"):
        if plan.name == "head.weight":
            return plan
        parts = [_RWKV_PARTS.get(part, part) for part in parts]
        if parts[-1].startswith("time_mix_"):
            parts[-1] = f"time_mix_{_RWKV_LEAVES[parts[-1][-1]]}"
        return replace(plan, name="rwkv." + ".".join(parts).replace("emb.weight", "embeddings.weight"))
    if parts[0] != "blocks":
        return replace(plan, name=f"{_FLA_TOP[parts[0]]}.{parts[1]}")
    prefix, leaf, whole = f"model.layers.{parts[1]}.{_FLA_PARTS[parts[2]]}.", parts[3], plan.produce
    if parts[2] != "att" or leaf not in _FLA_LOW_RANKS:
        if parts[2] == "att":
            parts[3] = _FLA_MODULES.get(leaf, leaf)
        return replace(plan, name=prefix + ".".join(parts[3:]))
    name = f"{prefix}{leaf[0]}_lora.lora.{_FLA_LOW_RANKS[leaf]}"
    if leaf[1] == "0":
        return replace(plan, name=name, shape=(math.prod(plan.shape),))
    return TensorPlan(name, plan.dtype, plan.shape[::-1], lambda: np.concatenate(list(whole())).T)


def _stack_mixes(plans: list[TensorPlan], spec: Spec) -> list[TensorPlan]:
    """fla's older form: the six mixes of a layer as one tensor `x_x`."""
    by_name = {plan.name: plan for plan in plans}
    for layer in range(spec.L):
        prefix = f"model.layers.{layer}.attn.x_"
        six = [by_name.pop(prefix + c) for c in "rwkvag"]

        def produce(six: list[TensorPlan] = six) -> np.ndarray:
            return np.concatenate([np.ravel(chunk) for plan in six for chunk in plan.produce()])

        by_name[prefix + "x"] = TensorPlan(prefix + "x", six[0].dtype, (6, spec.D), produce)
    return list(by_name.values())


def _config(spec: Spec) -> dict[str, Any]:
    fla = spec.generation in ("7", "7a")
    return {
        "architectures": ["RWKV7ForCausalLM" if fla else "RwkvForCausalLM"],
        "model_type": {"4": "rwkv", "6": "rwkv6", "7": "rwkv7", "7a": "rwkv7"}.get(spec.generation, "rwkv5"),
        **{"vocab_size": spec.V, "hidden_size": spec.D, "num_hidden_layers": spec.L},
        **{"attention_hidden_size": spec.A, "intermediate_size": spec.F},
        **{"rescale_every": 6, "layer_norm_epsilon": 1e-5},
    }


# -- files -----------------------------------------------------------------------------------------------


def make_checkpoint(
    path: Path | str,
    *,
    generation: str,
    D: int,
    L: int,
    V: int,
    N: int = 64,
    F: int | None = None,
    A: int | None = None,
    ranks: dict[str, int] | None = None,
    dtype: str = "bf16",
    seed: int = 0,
    time_state: bool = False,
    time_first: bool | None = None,
    hf: bool = False,
    stacked_mixes: bool = False,
    shards: int = 1,
) -> Spec:
    """Write a random checkpoint and return its spec. The same arguments give the same bytes.

    path: `.pth` or `.bin` for torch.save's format, anything else for safetensors. hf: `path` is a folder that gets
    config.json and model.safetensors, or this number of `shards`. time_first: store the bonus of v5 and v6 as its
    logarithm; None does so for 5.0 and 5.1, like official files. stacked_mixes: fla's older form of the mixes.
    """
    path = Path(path)
    spec = make_spec(generation, D=D, L=L, V=V, N=N, F=F, A=A, ranks=ranks)
    logarithmic = generation in ("5.0", "5.1") if time_first is None else time_first
    plans = _plans(spec, DTYPES[dtype], seed, time_state, logarithmic)
    if not hf:
        _write(path, plans)
        return spec
    path.mkdir(parents=True, exist_ok=True)
    plans = [_to_huggingface(plan, spec) for plan in plans]
    if stacked_mixes:
        plans = _stack_mixes(plans, spec)
    (path / "config.json").write_text(json.dumps(_config(spec), indent=2))
    if shards == 1:
        _write(path / "model.safetensors", plans)
        return spec
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        _write(path / name, plans[i::shards])
        weight_map |= {plan.name: name for plan in plans[i::shards]}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return spec


def _write(path: Path, plans: list[TensorPlan]) -> None:
    if path.suffix in (".pth", ".bin"):
        write_pth(path, plans)
    else:
        write_tensors(path, plans, {"format": "pt"})


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a random RWKV checkpoint.")
    parser.add_argument("path", type=Path, help="*.pth, *.safetensors, or with --hf a folder")
    parser.add_argument("--size", choices=sorted(SIZES), help="dimensions of an official model")
    parser.add_argument("--generation", choices=GENERATIONS, default="7")
    for letter, default in (("D", 128), ("L", 3), ("V", 512), ("N", 64), ("F", None), ("A", None)):
        parser.add_argument(
            f"-{letter}", type=int, default=default, help=f"default: {default or 'as official'}"
        )
    parser.add_argument("--ranks", default="", help="such as w=64,a=64,v=32,g=128")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-state", action="store_true", help="with a tuned initial state")
    parser.add_argument("--hf", action="store_true", help="names and folder of Hugging Face")
    parser.add_argument("--shards", type=int, default=1, help="with --hf: number of files")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    size: dict[str, Any] = {k: getattr(args, k) for k in ("generation", "D", "L", "V", "N", "F", "A")}
    size["ranks"] = {k: int(v) for k, _, v in (item.partition("=") for item in args.ranks.split(",") if item)}
    if args.size:
        size = SIZES[args.size]
    options = {k: getattr(args, k) for k in ("dtype", "seed", "time_state", "hf", "shards")}
    spec = make_checkpoint(args.path, **size, **options)
    print(f"{args.path}: RWKV-{spec.generation}, {spec.parameters / 1e6:.1f}M parameters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
