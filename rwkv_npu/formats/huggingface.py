"""Hugging Face's folders and names, turned into BlinkDL's.

Three forms are common: RWKV-4 of transformers (`RwkvForCausalLM`), RWKV-5 and -6 in the same style with
BlinkDL's leaf names, and RWKV-7 of flash-linear-attention (`RWKV7ForCausalLM`), whose low ranks are
transposed and whose older files keep the six mixes in one tensor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.files import is_file, is_folder

_MAX_JSON = 64 << 20
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".st", ".pth", ".pt", ".bin")
_MIXES = "rwkvag"  # the order within fla's older `x_x`

# -- folders ---------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint given as a file, as the index of its shards, or as a folder."""
    if path.name.endswith(".index.json"):
        return _shards(path)
    if not is_folder(path):
        return [path]
    for name in _WEIGHTS:
        if is_file(path / f"{name}.index.json"):
            return _shards(path / f"{name}.index.json")
        if is_file(path / name):
            return [path / name]
    if is_file(path / "manifest.json"):
        raise CheckpointError(f"{path} is a bundle, which was converted already, not a checkpoint")
    try:
        found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from None
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint: no {', '.join('*' + s for s in _SUFFIXES[:3])} file"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4]) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(
            f"{path} holds {len(found)} weight files ({names}) and no index: name one of them"
        )
    return found


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = list(weight_map.values())
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{index} names a shard that is not a file beside it")
    shards = [index.parent / name for name in sorted(set(names))]
    for shard in shards:
        if not is_file(shard):
            raise CheckpointError(f"{shard}, a shard of the checkpoint, is missing")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size, or CheckpointError."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({type(e).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or {}. Raises CheckpointError if it is damaged or describes another model."""
    path = folder / "config.json"
    if not is_file(path):
        return {}
    config = read_json(path)
    kind = str(config.get("model_type") or config.get("architectures") or "rwkv")
    if "rwkv" not in kind.lower():
        raise CheckpointError(f"{folder} is not an RWKV checkpoint: its config.json says {kind!r:.60}")
    for key in ("layer_norm_epsilon", "norm_eps"):
        if config.get(key, 1e-5) != 1e-5:
            raise CheckpointError(f"{path} sets {key} to {config[key]!r:.20}: only 1e-05 is supported")
    return config


# -- names -----------------------------------------------------------------------------------------------

_STYLE_RWKV = re.compile(
    r"(?:rwkv\d?\.|model\.)?(blocks\.\d+\.(?:attention|feed_forward|pre_ln)\.|embeddings\.)"
)
_STYLE_FLA = re.compile(r"model\.layers\.\d+\.attn\.(?:[rkvo]_proj\.weight|w_lora\.lora\.0\.weight)")
_PARTS_RWKV = {"attention": "att", "feed_forward": "ffn", "pre_ln": "ln0"}
_LEAVES_RWKV = {f"time_mix_{word}": f"time_mix_{word[0]}" for word in ("key", "value", "receptance", "gate")}
_PARTS_FLA = {"attn": "att", "ffn": "ffn", "pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2"}
_TOP_FLA = {
    "model.embeddings.weight": "emb.weight",
    "model.norm.weight": "ln_out.weight",
    "model.norm.bias": "ln_out.bias",
    "lm_head.weight": "head.weight",
}
_MODULES_FLA = {
    "r_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "g_norm": "ln_x",
}
_LOW_RANKS_FLA = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}


def is_huggingface(names: list[str]) -> bool:
    return any(_STYLE_RWKV.match(name) or _STYLE_FLA.match(name) for name in names)


def to_blinkdl(stored: dict[str, np.ndarray], tied: bool = False) -> dict[str, np.ndarray]:
    """The same tensors, as views, under BlinkDL's names. Names of neither form are kept as they are.

    `tied`: the head is the embedding, if the checkpoint has none of its own.
    """
    names = list(stored)
    if any(_STYLE_FLA.match(name) for name in names):
        pairs = [pair for name in names for pair in _from_fla(name, stored[name])]
    elif is_huggingface(names):
        pairs = [(_from_rwkv(name), stored[name]) for name in names]
    else:
        return stored
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError(
            "the checkpoint holds some tensors both under BlinkDL's and Hugging Face's names"
        )
    if tied and "emb.weight" in result:
        result.setdefault("head.weight", result["emb.weight"])
    return result


def _from_rwkv(name: str) -> str:
    name = re.sub(r"^(rwkv\d?|model)\.", "", name)
    if name == "embeddings.weight":
        return "emb.weight"
    if not name.startswith("blocks."):
        return name
    words = name.split(".")
    return ".".join(_PARTS_RWKV.get(word, _LEAVES_RWKV.get(word, word)) for word in words)


def _from_fla(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if match is None or match[2] not in _PARTS_FLA:
        return [(_TOP_FLA.get(name, name), array)]
    part, leaf = _PARTS_FLA[match[2]], match[3]
    prefix = f"blocks.{match[1]}.{part}."
    if part != "att":
        return [(prefix + leaf, array)]
    if leaf == "x_x" and array.ndim and len(array) == len(_MIXES):
        return [(f"{prefix}x_{mix}", array[i]) for i, mix in enumerate(_MIXES)]
    low_rank = re.fullmatch(r"([wavg])_lora\.lora\.(0\.weight|2\.weight|2\.bias)", leaf)
    if low_rank:
        return [(prefix + low_rank[1] + _LOW_RANKS_FLA[low_rank[2]], array.T)]
    module, _, rest = leaf.partition(".")
    return [(prefix + ".".join(filter(None, [_MODULES_FLA.get(module, module), rest])), array)]


# -- rescaled layers -------------------------------------------------------------------------------------


def looks_rescaled(arrays: dict[str, np.ndarray], L: int, every: int) -> bool:
    """Whether output matrices seem to be divided by 2 after every `every` layers.

    transformers does that to the weights of a model in use, so that a model saved after it has answered
    something is saved so. Nothing in the file tells: only the sizes of the weights halve, all at once.
    """
    if every <= 0 or L <= every:
        return False
    for leaf in ("att.output.weight", "ffn.value.weight"):
        sizes = np.array([_mean_size(arrays[f"blocks.{i}.{leaf}"]) for i in range(L)])
        if not np.all(np.isfinite(sizes) & (sizes > 0)):
            return False
        steps = np.diff(np.log2(sizes))
        at_boundary = np.arange(1, L) % every == 0
        usual = np.median(steps[~at_boundary]) if every > 1 else 0.0
        if np.any(steps[at_boundary] - usual > -0.6):
            return False
    return True


def _mean_size(array: np.ndarray) -> float:
    rows = array[:: max(1, len(array) // 16)]
    return float(np.abs(rows.astype(np.float64)).mean())
