"""Tuned states: the result of a fine-tuning that trains only the initial state, `blocks.N.att.time_state` (H, N, N).

BlinkDL's programs write a `.pth`, with each matrix in the order [value, key]. web-rwkv and ai00 write a `.st` file,
transposed and in fp16. A state file of this project holds a tuned state if its state has read no token.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from rwkv_npu.errors import StateError, UsageError
from rwkv_npu.formats.bundle_check import check_spec, from_json
from rwkv_npu.formats.checkpoint import Checkpoint, read_tensors
from rwkv_npu.formats.files import is_file, os_reason, replacing
from rwkv_npu.formats.layout import BLINKDL, WEB_RWKV, strip_prefixes, transposed_state
from rwkv_npu.formats.pth_writer import write_pth
from rwkv_npu.formats.safetensors import TensorPlan, write_tensors
from rwkv_npu.formats.state import State, is_tuned, load_state, read_notes
from rwkv_npu.models.spec import Spec


def set_initial_state(checkpoint: Checkpoint, path: Path, layout: str | None = None) -> str:
    """Put the tuned state at `path` into a checkpoint. Returns the digest of its values. Raises like `load_state`."""
    tuned = time_states(load_state(path, checkpoint.spec, checkpoint.fingerprint, layout), path)
    digest = hashlib.blake2b(tuned.tobytes(), digest_size=16).hexdigest()
    checkpoint.amend({_name(layer): partial(np.asarray, part) for layer, part in enumerate(tuned)}, digest)
    return digest


def time_states(state: State, path: Path) -> np.ndarray:
    """The tuned state (L, H, N, N) in a state. Raises StateError for a state that has read tokens."""
    if "att.wkv" not in state.parts:
        raise StateError(f"{path} is a state of RWKV-4, which has no tuned ones")
    if state.tokens_seen or state.parts["att.shift"].any() or state.parts["ffn.shift"].any():
        raise StateError(
            f"{path} has read {state.tokens_seen} tokens, and a tuned state none: it has no place for all of it"
        )
    if not np.isfinite(state.parts["att.wkv"]).all():
        raise StateError(f"{path} holds NaN or infinity")
    return state.parts["att.wkv"]


def read_alone(path: Path, layout: str | None = None) -> State:
    """Read a state without its model. The dimensions come from the file: its metadata, or a tuned state's shapes.

    A tuned state does not show its generation or vocabulary. RWKV-7 is assumed: RWKV-5 and -6 have the same shapes.
    Raises like `load_state`.
    """
    if not is_file(path):
        raise StateError(f"{path} is no file")
    if is_tuned(path):
        return load_state(path, _shapes(path), "", layout)
    notes = read_notes(path)
    try:
        spec: Spec = from_json(Spec, json.loads(notes["spec"]), "its spec")
        check_spec(spec)
    except (KeyError, ValueError, RecursionError):
        raise StateError(f"{path} does not say what model it is of") from None
    return load_state(path, spec, notes.get("fingerprint", ""))


def _shapes(path: Path) -> Spec:
    """A spec with the layers, heads and head size of a tuned state."""
    names = strip_prefixes(read_tensors(path))
    first = names.get(_name(0))
    if not isinstance(first, np.ndarray) or first.ndim != 3 or not first.size:
        raise StateError(f"{path} is no tuned state: it lacks {_name(0)} (heads, N, N)")
    H, N, _ = first.shape
    return Spec("7", D=H * N, L=len(names), H=H, N=N, A=H * N, F=0, V=0)


def save_tuned(path: Path, tuned: np.ndarray, layout: str) -> None:
    """Write a tuned state (L, H, N, N) in BlinkDL's or web-rwkv's layout.

    Raises UsageError if the file exists, StateError if the write fails or a value is beyond web-rwkv's fp16.
    """
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists: name another file, or remove it first")
    dtype = np.dtype(np.float16 if layout == WEB_RWKV else np.float32)
    with np.errstate(over="ignore"):
        stored = (transposed_state(tuned) if layout == WEB_RWKV else tuned).astype(dtype)
    if not np.isfinite(stored).all():
        raise StateError(f"{path} cannot hold this state: web-rwkv's files are in fp16, up to 65504")
    plans = [
        TensorPlan(_name(i), dtype, part.shape, partial(np.asarray, part)) for i, part in enumerate(stored)
    ]
    try:
        with replacing(path) as aside:
            if layout == BLINKDL:
                write_pth(aside, plans, folder="state")
            else:
                write_tensors(aside, plans, {"format": "pt"})
    except OSError as error:
        raise StateError(f"cannot write {path}: {os_reason(error)}") from error


def _name(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"
