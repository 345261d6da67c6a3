"""Hugging Face's folders, and their tensors under BlinkDL's names.

Three forms are common. transformers has RWKV-4 (`RwkvForCausalLM`). Files of RWKV-5 and -6 are similar, but the last
part of each name is BlinkDL's. flash-linear-attention, fla for short, has RWKV-7 (`RWKV7ForCausalLM`): its low-rank
matrices are transposed, and its older files have the six mixes in one tensor. Its RWKV-6 (`RWKV6ForCausalLM`) has
another order of the mixes, and another epsilon in the norm of the heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.files import is_file, is_folder

CHAT_TEMPLATE = "chat_template.jinja"  # also the name within a bundle
_MAX_JSON = 64 << 20
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".st", ".pth", ".gguf", ".pt", ".bin")
_UNFINISHED = (".part", ".crdownload", ".incomplete", ".download", ".tmp")  # suffixes of unfinished downloads
_MIXES = "rwkvag"  # their order in `x_x` of fla's older files

_SHARD = re.compile(r".+-\d+-of-\d+\.\w+")

# -- folders ---------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint. path: a file, the index of its shards, or a folder."""
    if path.name.endswith(".index.json"):
        return _shards(path)
    if not is_folder(path):
        _refuse_by_name(path)
        return [path]
    for name in _WEIGHTS:
        if is_file(path / f"{name}.index.json"):
            return _shards(path / f"{name}.index.json")
        if is_file(path / name):
            return [path / name]
    if is_file(path / "manifest.json"):
        raise CheckpointError(f"{path} is a bundle, which was converted already, not a checkpoint")
    try:
        # Hidden files are not models: macOS keeps attributes of a file in ._FILE.
        visible = [file for file in path.iterdir() if not file.name.startswith(".")]
        every = sorted(file for file in visible if file.suffix in _SUFFIXES and is_file(file))
        # A .gguf beside other files is llama.cpp's copy of them.
        found = [file for file in every if file.suffix != ".gguf"] or every
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from None
    loading = sorted(file.name for file in visible if file.suffix in _UNFINISHED)
    if not found and loading:
        raise CheckpointError(
            f"{path} holds {loading[0]}, a download that is not finished, and no checkpoint"
        )
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint: no {', '.join('*' + s for s in _SUFFIXES[:4])} file"
        )
    if len(found) > 1 and all(_SHARD.fullmatch(file.name) for file in found):
        raise CheckpointError(
            f"{path} holds {len(found)} shards and no index: download its {found[0].name.split('-')[0]}."
            f"{found[0].suffix[1:]}.index.json too"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4]) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(
            f"{path} holds {len(found)} weight files ({names}) and no index: name one of them"
        )
    return found


def _refuse_by_name(path: Path) -> None:
    """Raises CheckpointError if a file's name shows that it is not a whole model."""
    if path.suffix in _UNFINISHED:
        raise CheckpointError(f"{path} is a download that is not finished")
    if path.name.startswith("._"):
        raise CheckpointError(f"{path} holds attributes that macOS keeps of {path.name[2:]}: name that file")
    if (found := re.fullmatch(r".+-(\d+)-of-(\d+)\.\w+", path.name)) and int(found[2]) > 1 and is_file(path):
        raise CheckpointError(
            f"{path} is shard {int(found[1])} of {int(found[2])}: name the folder, or its .index.json file"
        )


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
            raise CheckpointError(f"{index} names the shard {shard.name!r:.100}, which is missing")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({type(e).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, {} if there is none.

    Raises CheckpointError if it is damaged, describes another model, or sets other maths than BlinkDL's models have.
    """
    path = folder / "config.json"
    if not is_file(path):
        return {}
    config = read_json(path)
    kind = str(config.get("model_type") or config.get("architectures") or "rwkv")
    if "rwkv" not in kind.lower():
        raise CheckpointError(f"{folder} is not an RWKV checkpoint: its config.json says {kind!r:.60}")
    for key, supported in _MATHS.items():
        if config.get(key, supported[0]) not in supported:
            shown = " or ".join(map(repr, supported))
            raise CheckpointError(f"{path} sets {key} to {config[key]!r:.20}: only {shown} is supported")
    if config.get("attn"):
        raise CheckpointError(
            f"{path} sets attn: a hybrid, whose layers with attention need a cache that grows with the text"
        )
    if "rwkv7" in kind.lower():
        # The epsilon of the group norm is head_dim * norm_eps in fla, and always 64e-5 in BlinkDL's models.
        head = config.get("head_dim", 64)
        if head != 64:
            raise CheckpointError(
                f"{path} sets head_dim to {head!r:.20}, which makes another epsilon of the group norm: only 64 is "
                "supported"
            )
    return config


# Settings of config.json that change the maths, with the values that are supported, the default first.
_MATHS: dict[str, tuple[Any, ...]] = {
    "layer_norm_epsilon": (1e-5,),
    "norm_eps": (1e-5,),
    "head_size_divisor": (8,),
    "hidden_act": ("sqrelu", "relu2", "squared_relu"),
    "norm_bias": (True,),
    "norm_first": (True,),
    "expand_k": (1,),
    "expand_v": (1,),
}


# -- names -----------------------------------------------------------------------------------------------

_STYLE_RWKV = re.compile(
    r"(?:rwkv\d?\.|model\.)?(blocks\.\d+\.(?:attention|feed_forward|pre_ln)\.|embeddings\.)"
)
_STYLE_FLA = re.compile(r"model\.layers\.\d+\.attn\.(?:[rkvo]_proj\.weight|w_lora\.lora\.0\.weight|bonus)")
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
_MIXES_FLA6 = "rwkvg"  # the order in fla's RWKV-6; BlinkDL's is wkvrg
_ORDER_6 = [_MIXES_FLA6.index(mix) for mix in "wkvrg"]
_VECTORS_FLA6 = {
    "att.x_proj.0.mu": "att.time_maa_x",
    "att.bonus": "att.time_faaaa",
    "att.w_proj.linear.lora.2.bias": "att.time_decay",
    "ffn.key.mu": "ffn.time_maa_k",
    "ffn.receptance.mu": "ffn.time_maa_r",
}
# fla's RWKV-6 adds 1e-5 to the variance of a head, BlinkDL's 64e-5. A head's output is linear in the values. With
# values 8 times as large, its variance is 64 times as large, and adding 64e-5 gives exactly fla's result.
FLA6_VALUES = 8
_LOW_RANKS_FLA = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}


def is_huggingface(names: list[str]) -> bool:
    return any(_STYLE_RWKV.match(name) or _STYLE_FLA.match(name) for name in names)


def is_fla6(names: Iterable[str]) -> bool:
    """True for RWKV-6 of flash-linear-attention."""
    return any(re.fullmatch(r"model\.layers\.\d+\.attn\.bonus", name) for name in names)


def blinkdl_names(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """One tensor under BlinkDL's name, transposed if need be. fla's older `x_x` becomes six tensors."""
    if name.startswith("model.layers.") or name in _TOP_FLA:
        return _from_fla(name, array)
    return [(_from_rwkv(name), array)]


def to_blinkdl(stored: dict[str, np.ndarray], tied: bool = False) -> dict[str, np.ndarray]:
    """The same tensors, as views, under BlinkDL's names. Other names stay.

    tied: use the embedding as the head if the checkpoint has no head.
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
        if not _same(result.setdefault("head.weight", result["emb.weight"]), result["emb.weight"]):
            raise CheckpointError(
                "config.json ties the head to the embedding, and the checkpoint has another head: set "
                "tie_word_embeddings to false, or remove the head"
            )
    return result


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two matrices agree in shape and in a sample of their rows."""
    step = max(1, len(a) // 64) if a.ndim else 1
    return a is b or (a.shape == b.shape and np.array_equal(a[::step], b[::step]))


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
    if (vector := _VECTORS_FLA6.get(f"{part}.{leaf}")) is not None:
        return [(f"blocks.{match[1]}.{vector}", array)]
    if part in ("att", "ffn") and leaf.endswith(".linear.weight") and not leaf.startswith("x_proj"):
        leaf = leaf.replace("g_proj", "gate").replace(".linear", "")
    if leaf == "x_bias" and array.ndim and len(array) == len(_MIXES_FLA6):
        return [(f"{prefix}time_maa_{mix}", array[i]) for i, mix in enumerate(_MIXES_FLA6)]
    if leaf == "x_proj.0.linear.weight" and array.ndim == 2 and len(array) % len(_MIXES_FLA6) == 0:
        by_mix = array.reshape(len(_MIXES_FLA6), -1, array.shape[1])[_ORDER_6]  # (5, M, D)
        return [(f"{prefix}time_maa_w1", by_mix.reshape(array.shape).T)]
    if leaf == "x_proj.2.weight" and array.ndim == 2 and array.shape[1] % len(_MIXES_FLA6) == 0:
        by_mix = array.reshape(len(array), len(_MIXES_FLA6), -1).transpose(1, 2, 0)  # (5, M, D)
        return [(f"{prefix}time_maa_w2", by_mix[_ORDER_6])]
    if low_rank := re.fullmatch(r"w_proj\.linear\.lora\.([02])\.weight", leaf):
        return [(f"{prefix}time_decay_w{1 if low_rank[1] == '0' else 2}", array.T)]
    if part != "att":
        return [(prefix + leaf, array)]
    if leaf == "x_x" and array.ndim and len(array) == len(_MIXES):
        return [(f"{prefix}x_{mix}", array[i]) for i, mix in enumerate(_MIXES)]
    low_rank = re.fullmatch(r"([wavg])_lora\.lora\.(0\.weight|2\.weight|2\.bias)", leaf)
    if low_rank:
        return [(prefix + low_rank[1] + _LOW_RANKS_FLA[low_rank[2]], array.T)]
    module, _, rest = leaf.partition(".")
    return [(prefix + ".".join(filter(None, [_MODULES_FLA.get(module, module), rest])), array)]


# -- chat template ---------------------------------------------------------------------------------------


def chat_template(folder: Path) -> str | None:
    """The source of a folder's chat template; None without one. Raises CheckpointError if a file is damaged."""
    try:
        if is_file(folder / CHAT_TEMPLATE):
            return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        config = folder / "tokenizer_config.json"
        if not is_file(config) or config.stat().st_size > _MAX_JSON:
            return None
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(
            f"{folder}: its chat template or tokenizer_config.json cannot be read"
        ) from None
    source = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(source, list):  # several by name
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template") if named else None
    return source if isinstance(source, str) and source.strip() else None


# -- rescaled layers -------------------------------------------------------------------------------------


def looks_rescaled(arrays: dict[str, np.ndarray], L: int, every: int) -> bool:
    """True if output matrices seem to be divided by 2 after every `every` layers.

    transformers divides the weights of a model that it runs. A model that is saved afterwards keeps the divided
    weights, and nothing else in its file shows it.
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
