"""The recurrent state of one sequence: everything that a model remembers of the tokens it has read.

It is fp32 and does not depend on backend, precision or fusion, so every backend can continue it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import StateError, first_line
from rwkv_npu.formats.detect import FLOATS
from rwkv_npu.formats.files import is_file, os_reason, write_atomically
from rwkv_npu.formats.layout import (
    BLINKDL,
    NAME_IT,
    WEB_RWKV,
    check_layout,
    strip_prefixes,
    transposed_state,
)
from rwkv_npu.formats.pth import read_pth
from rwkv_npu.formats.safetensors import TensorFile
from rwkv_npu.models.rows import check_parts
from rwkv_npu.models.spec import Spec, state_shapes

FORMAT = "rwkv_npu state 1"
EMPTY_Q = -1e30  # v4: the running maximum of an empty history


@dataclass
class State:
    """A state. parts: fp32 arrays (L, ...), by the names of `spec.state_shapes`.

    logits: (V,) after the last token, None before the first. tokens_seen: number of tokens read.
    """

    spec: Spec
    fingerprint: str
    parts: dict[str, np.ndarray]
    logits: np.ndarray | None = None
    tokens_seen: int = 0

    def __repr__(self) -> str:
        return f"State(RWKV-{self.spec.generation}, {self.spec.L} layers, {self.tokens_seen} tokens seen)"

    def copy(self) -> State:
        return replace(self, parts={name: part.copy() for name, part in self.parts.items()})

    def save(self, path: str | os.PathLike[str], *, notes: Mapping[str, str] | None = None) -> None:
        """Write the tensors `blocks.N.PART` and `logits` as safetensors, atomically.

        notes: more metadata, which `read_notes` returns. Raises UsageError for a state that lacks a part, StateError if
        the file cannot be written; an existing file then stays as it is.
        """
        from safetensors.numpy import save

        check_parts(self.parts, self.spec)
        tensors = {
            f"blocks.{layer}.{name}": np.ascontiguousarray(part[layer])
            for name, part in self.parts.items()
            for layer in range(self.spec.L)
        }
        if self.logits is not None:
            tensors["logits"] = self.logits
        metadata = {
            **(notes or {}),
            "format": FORMAT,
            "generation": self.spec.generation,
            "spec": json.dumps(self.spec.to_json()),
            "fingerprint": self.fingerprint,
            "tokens_seen": str(self.tokens_seen),
            "checksum": _checksum(tensors),
        }
        try:
            # A link stays a link: the file that it names is replaced.
            write_atomically(Path(os.path.realpath(path)), save(tensors, metadata))
        except (OSError, ValueError) as error:
            raise StateError(f"cannot write the state to {path}: {os_reason(error)}") from error


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def new_state(spec: Spec, fingerprint: str, initial: dict[int, np.ndarray]) -> State:
    """The state before the first token. initial: the tuned `time_state` (H, N, N) by layer."""
    parts = {name: np.zeros((spec.L, *shape), np.float32) for name, shape in state_shapes(spec).items()}
    if "att.q" in parts:
        parts["att.q"].fill(EMPTY_Q)
    for layer, time_state in initial.items():
        parts["att.wkv"][layer] = time_state
    return State(spec, fingerprint, parts)


def is_tuned(path: Path) -> bool:
    """True if a file holds a tuned state. Raises StateError if it holds no state."""
    return _is_zip(path) or _ours(path) is None


def load_state(
    path: str | os.PathLike[str], spec: Spec, fingerprint: str, layout: str | None = None
) -> State:
    """Read a state for a model of this spec: a file of `State.save`, or a tuned state. The content decides.

    layout: blinkdl or web-rwkv, for a tuned state in safetensors, whose content does not show its layout.
    Raises StateError for a file without a state, or a state of another generation or shape; CheckpointError for a
    damaged `.pth`. Warns if the state is of other weights.
    """
    check_layout(layout)
    path = Path(path)
    if _is_zip(path):
        return _tuned(path, spec, fingerprint, read_pth(path), layout or BLINKDL)
    if (found := _ours(path)) is not None:
        return _checked(path, spec, fingerprint, *found)
    with TensorFile(path, error=StateError) as file:
        tensors = {name: file.array(name) for name in file.names}
    if layout is None:
        raise StateError(f"{path} is a tuned state in safetensors, whose layout cannot be told: {NAME_IT}")
    return _tuned(path, spec, fingerprint, tensors, layout)


def load_untrusted_state(path: str | os.PathLike[str], spec: Spec, fingerprint: str) -> State:
    """Read a file of `State.save` that came from a client or another machine.

    Raises StateError for any other file, for a state of other weights, and for numbers that are not finite.
    """
    path = Path(path)
    found = _ours(path)
    if found is None:
        raise StateError(f"{path} is a tuned state, not one that rwkv_npu has saved")
    if found[0].get("fingerprint") != fingerprint:
        raise StateError(f"state {path} was made with other weights than this model's")
    if not all(np.isfinite(array).all() for array in found[1].values()):
        raise StateError(f"state {path} has numbers that are not finite")
    return _checked(path, spec, fingerprint, *found)


def _is_zip(path: Path) -> bool:
    """True for a file as torch.save writes it. Raises StateError for a folder, or a pipe, which would block."""
    if path.exists() and not path.is_file():
        raise StateError(f"cannot read the state {path}: it is not a regular file")
    try:
        return is_file(path) and zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it looks like a zip file with a damaged end
        return False


def _ours(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]] | None:
    """Metadata and tensors of a file of `State.save`; None for a tuned state. Raises StateError for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if metadata.get("format") == FORMAT:
                return metadata, {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise StateError(f"cannot read the state {path}: {os_reason(error)}") from error
    except Exception as error:  # SafetensorError, or NumPy's error for an unknown dtype
        kind = first_line(error) if isinstance(error, SafetensorError) else type(error).__name__
        raise StateError(f"{path} is no state file, or is cut short ({kind})") from error
    if names and all(name.endswith(".time_state") for name in names):
        return None
    raise StateError(f"{path} is not a state file of rwkv_npu, nor a tuned state")


def _checked(
    path: Path, spec: Spec, fingerprint: str, metadata: dict[str, str], tensors: dict[str, np.ndarray]
) -> State:
    if metadata.get("generation") != spec.generation:
        raise StateError(
            f"state {path} is of RWKV-{metadata.get('generation', '?'):.20}, the model is RWKV-{spec.generation}"
        )
    parts = {
        name: np.stack([_part(path, tensors, f"blocks.{layer}.{name}", shape) for layer in range(spec.L)])
        for name, shape in state_shapes(spec).items()
    }
    if f"blocks.{spec.L}.att.shift" in tensors:
        raise StateError(f"state {path} has more layers than the model's {spec.L}")
    logits = _part(path, tensors, "logits", (spec.V,)) if "logits" in tensors else None
    if metadata.get("checksum", "") not in ("", _checksum(tensors)):  # files of version 0.1 have none
        raise StateError(f"state {path} is damaged: its numbers do not have the checksum in its header")
    if metadata.get("fingerprint") != fingerprint:
        warnings.warn(f"state {path} was made with other weights than this model's", stacklevel=3)
    return State(spec, fingerprint, parts, logits, _count(path, metadata))


def _tuned(path: Path, spec: Spec, fingerprint: str, tensors: dict[str, Any], layout: str) -> State:
    """A state before the first token, from the tensors of a tuned state."""
    shape = state_shapes(spec).get("att.wkv")
    if shape is None:
        raise StateError(f"{path} is a tuned state, and RWKV-{spec.generation} has none")
    tensors = strip_prefixes(tensors)
    expected = [f"blocks.{layer}.att.time_state" for layer in range(spec.L)]
    if surplus := sorted(tensors.keys() - set(expected)):
        what = "more layers than" if surplus[0].endswith(".att.time_state") else "other tensors than"
        raise StateError(
            f"{path} has {what} a tuned state of the model's {spec.L} layers: {surplus[0]!r:.80}"
        )
    tuned = {}
    for layer, name in enumerate(expected):
        found = tensors.get(name)
        if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype not in FLOATS:
            what = (
                f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else f"{type(found).__name__}"
            )
            what = "missing" if found is None else what
            raise StateError(f"{path}: {name} is {what}, the model needs {shape}")
        array = found.astype(np.float32)
        tuned[layer] = transposed_state(array) if layout == WEB_RWKV else array
    return new_state(spec, fingerprint, tuned)


def read_notes(path: str | os.PathLike[str]) -> dict[str, str]:
    """Metadata of a state file, {} for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _part(path: Any, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise StateError(f"state {path} lacks {name}")
    found = tensors[name]
    if found.shape != shape or found.dtype != np.float32:
        raise StateError(
            f"state {path}: {name} is {found.dtype} {found.shape}, the model has float32 {shape}"
        )
    return found


def _count(path: Any, metadata: dict[str, str]) -> int:
    count = metadata.get("tokens_seen", "")
    if not (count.isascii() and count.isdigit() and len(count) < 19):
        raise StateError(f"state {path}: tokens_seen is {count!r:.40}, not a count")
    return int(count)
