"""Layouts of a checkpoint: programs use the same tensor names for different contents.

    blinkdl    the names and shapes of BlinkDL's own files; `time_first` of RWKV-5 and -6 is the logarithm of the bonus
    web-rwkv   made by the converter of web-rwkv and ai00 (`.st`): names in lower case, `time_faaaa` called
               `time_first`, `time_maa` called `time_mix`, low-rank matrices and tuned states transposed

RWKV-6 files differ in names and RWKV-7 files in shapes. RWKV-5 files do not differ: either layout gives a model that
runs, and one of them computes wrong results. So the caller must name the layout of an ambiguous file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rwkv_npu.errors import CheckpointError, UsageError

BLINKDL, WEB_RWKV = "blinkdl", "web-rwkv"
LAYOUTS = (BLINKDL, WEB_RWKV)
NAME_IT = f"give layout='{WEB_RWKV}' (.st files of web-rwkv and ai00) or layout='{BLINKDL}'"

_PREFIXES = re.compile(r"(?:(?:_forward_module|module|model|_orig_mod)\.)+")
_LOW_RANKS_6 = ("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2")
_LOW_RANKS_7 = tuple(f"att.{rank}{side}" for rank in "wavg" for side in "12")


def check_layout(layout: str | None) -> None:
    """Raises UsageError for an unknown layout."""
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout={layout!r:.40} is unknown: use one of {', '.join(LAYOUTS)}")


def strip_prefixes(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the prefixes of training frameworks from tensor names, in any order.

    The prefix `model.` stays if the names are flash-linear-attention's. Raises CheckpointError if two names become
    equal.
    """
    bare = {name: name[found.end() :] if (found := _PREFIXES.match(name)) else name for name in stored}
    if any(re.match(r"layers\.\d+\.", name) for name in bare.values()):
        inner = {name: name[: len(name) - len(new)] for name, new in bare.items()}
        bare = {name: f"model.{new}" if "model." in inner[name] else new for name, new in bare.items()}
    result = {bare[name]: value for name, value in stored.items()}
    if len(result) != len(stored):
        raise CheckpointError("the checkpoint holds a tensor twice, with different prefixes")
    return result


def to_one_layout(
    arrays: dict[str, np.ndarray], layout: str | None, *, pickled: bool
) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Convert tensors with BlinkDL's names to BlinkDL's layout, as views. Also returns the names of logarithms.

    layout: None detects it. pickled: the file is a `.pth`, which web-rwkv does not write.
    Raises CheckpointError if the layout is ambiguous, or if `layout` is not the file's.
    """
    if "blocks.0.att.r_k" in arrays:
        return _version_7(arrays, layout, pickled), frozenset()
    if "blocks.0.att.time_mix_w1" in arrays:  # only web-rwkv's converter gives this name
        return _version_6(arrays, layout), frozenset()
    if "blocks.0.att.ln_x.weight" not in arrays:
        return arrays, frozenset()  # RWKV-4 is the same in both
    if "blocks.0.att.time_maa_x" in arrays or not _per_channel(arrays):
        # web-rwkv's files differ: their RWKV-6 has renamed mixes, their RWKV-5.1 a decay for every channel.
        if layout == WEB_RWKV:
            raise _other(BLINKDL, layout)
        return _logarithms(arrays)
    if not any(name.endswith(".att.time_first") for name in arrays):
        return _transposed_states(arrays) if layout == WEB_RWKV else arrays, frozenset()
    if layout is None and not pickled:
        raise CheckpointError(
            "the checkpoint's time_first can be the bonus itself (web-rwkv's and ai00's .st files) or its logarithm "
            f"(BlinkDL's files), and the file does not tell: {NAME_IT}"
        )
    if layout == WEB_RWKV:
        return _transposed_states(_renamed(arrays, ".att.time_first", ".att.time_faaaa")), frozenset()
    return _logarithms(arrays)


def _per_channel(arrays: dict[str, np.ndarray]) -> bool:
    """True if the decay has a value for every channel, as in RWKV-5.2."""
    decay = arrays.get("blocks.0.att.time_decay")
    return decay is not None and len([n for n in decay.shape if n > 1]) > 1


def _logarithms(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Rename `time_first` of BlinkDL's files, a logarithm, to the name of the bonus. Also returns the new names."""
    result = _renamed(arrays, ".att.time_first", ".att.time_faaaa")
    return result, frozenset(result.keys() - arrays.keys())


def _version_6(arrays: dict[str, np.ndarray], layout: str | None) -> dict[str, np.ndarray]:
    if layout == BLINKDL:
        raise _other(WEB_RWKV, layout)
    result = _renamed(_renamed(arrays, ".time_mix_", ".time_maa_"), ".att.time_first", ".att.time_faaaa")
    return _transposed_states(_transposed(result, _LOW_RANKS_6))


def _version_7(arrays: dict[str, np.ndarray], layout: str | None, pickled: bool) -> dict[str, np.ndarray]:
    """RWKV-7: names are the same in both layouts. web-rwkv's files have the low-rank matrices transposed."""
    width = arrays["emb.weight"].shape[-1] if "emb.weight" in arrays else 0
    sides = [arrays[f"blocks.0.att.{rank}1"].shape for rank in "wag" if f"blocks.0.att.{rank}1" in arrays]
    ours = all(len(shape) == 2 and shape[0] == width for shape in sides)
    theirs = all(len(shape) == 2 and shape[1] == width for shape in sides)
    if ours and theirs and layout is None and not pickled and sides:
        raise CheckpointError(
            f"the checkpoint's low-rank matrices are square, so that their layout cannot be told: {NAME_IT}"
        )
    if ours != theirs and layout in LAYOUTS and layout != (BLINKDL if ours else WEB_RWKV):
        raise _other(BLINKDL if ours else WEB_RWKV, layout)
    if layout == WEB_RWKV or (theirs and not ours):
        return _transposed_states(_transposed(arrays, _LOW_RANKS_7))
    return arrays


def transposed_state(array: np.ndarray) -> np.ndarray:
    """web-rwkv's `time_state` (H, N, N) as in BlinkDL's files."""
    return array.swapaxes(-1, -2) if array.ndim >= 2 else array


def _transposed_states(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return _transposed(arrays, ("att.time_state",))


def _transposed(arrays: dict[str, np.ndarray], leaves: tuple[str, ...]) -> dict[str, np.ndarray]:
    ends = tuple(f".{leaf}" for leaf in leaves)
    return {name: transposed_state(a) if name.endswith(ends) else a for name, a in arrays.items()}


def _renamed(arrays: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    result = {name.replace(old, new): array for name, array in arrays.items()}
    if len(result) != len(arrays):
        raise CheckpointError(f"the checkpoint has both {old.split('.')[-1]} and {new.split('.')[-1]}")
    return result


def _other(found: str, asked: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint is in {found}'s layout, not in {asked}'s: name none")
