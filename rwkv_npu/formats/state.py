"""The recurrent state of one sequence: all that a model remembers of the tokens it has read.

fp32 and independent of backend, precision and fusion, so that a state made on one serves on another.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from rwkv_npu.errors import StateError
from rwkv_npu.formats.files import write_atomically
from rwkv_npu.models.spec import Spec, state_shapes

FORMAT = "rwkv_npu state 1"
EMPTY_Q = -1e30  # v4: the running maximum of an empty history


@dataclass
class State:
    """`parts` maps each name of `spec.state_shapes` to (L, ...) fp32.

    `logits` (V,) are those after the last token, None before the first. `tokens_seen` counts tokens.
    """

    spec: Spec
    fingerprint: str
    parts: dict[str, np.ndarray]
    logits: np.ndarray | None = None
    tokens_seen: int = 0

    def copy(self) -> State:
        return replace(self, parts={name: part.copy() for name, part in self.parts.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, `blocks.N.PART` and `logits`, aside and then by one rename.

        Raises StateError when it cannot be written; a file that was there before is then still there.
        """
        from safetensors.numpy import save

        tensors = {
            f"blocks.{layer}.{name}": np.ascontiguousarray(part[layer])
            for name, part in self.parts.items()
            for layer in range(self.spec.L)
        }
        if self.logits is not None:
            tensors["logits"] = self.logits
        metadata = {
            "format": FORMAT,
            "generation": self.spec.generation,
            "spec": json.dumps(self.spec.to_json()),
            "fingerprint": self.fingerprint,
            "tokens_seen": str(self.tokens_seen),
        }
        try:
            write_atomically(Path(path), save(tensors, metadata))
        except OSError as error:
            raise StateError(f"cannot write the state to {path}: {error.strerror}") from error


class Batch(Sequence[State]):
    """States of several sequences side by side, as one call updates them. Each is a view: what happens to it happens to
    the batch.

    `parts` maps names to (L, B, ...) fp32.
    """

    def __init__(self, states: Sequence[State], parts: dict[str, np.ndarray]):
        self.parts = parts
        self._states = [
            replace(state, parts={name: part[:, b] for name, part in parts.items()})
            for b, state in enumerate(states)
        ]

    @staticmethod
    def of(states: Sequence[State]) -> Batch:
        """Copies of states of one model."""
        names = states[0].parts
        return Batch(states, {name: np.stack([s.parts[name] for s in states], axis=1) for name in names})

    @overload
    def __getitem__(self, index: int) -> State: ...

    @overload
    def __getitem__(self, index: slice) -> list[State]: ...

    def __getitem__(self, index: int | slice) -> State | list[State]:
        return self._states[index]

    def __len__(self) -> int:
        return len(self._states)

    def advance(self, tokens: int, logits: np.ndarray) -> None:
        """Note that every sequence has read so many tokens, and the logits (B, V) after them."""
        for state, row in zip(self._states, logits, strict=True):
            state.tokens_seen += tokens
            state.logits = row


def new_state(spec: Spec, fingerprint: str, initial: dict[int, np.ndarray]) -> State:
    """The state before the first token; `initial` gives the tuned `time_state` (H, N, N) of a layer."""
    parts = {name: np.zeros((spec.L, *shape), np.float32) for name, shape in state_shapes(spec).items()}
    if "att.q" in parts:
        parts["att.q"].fill(EMPTY_Q)
    for layer, time_state in initial.items():
        parts["att.wkv"][layer] = time_state
    return State(spec, fingerprint, parts)


def load_state(path: str | os.PathLike[str], spec: Spec, fingerprint: str) -> State:
    """Read a state for a model of this spec.

    Raises StateError for a file that is no state, or one of another generation or shape; warns when it comes
    from other weights.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise StateError(f"cannot read the state {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise StateError(f"{path} is no state file, or is cut short ({error})") from error
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path} is not a state file of rwkv_npu")
    if metadata.get("generation") != spec.generation:
        raise StateError(
            f"state {path} is of RWKV-{metadata.get('generation')}, the model is RWKV-{spec.generation}"
        )
    parts = {
        name: np.stack([_part(path, tensors, f"blocks.{layer}.{name}", shape) for layer in range(spec.L)])
        for name, shape in state_shapes(spec).items()
    }
    if f"blocks.{spec.L}.att.shift" in tensors:
        raise StateError(f"state {path} has more layers than the model's {spec.L}")
    logits = _part(path, tensors, "logits", (spec.V,)) if "logits" in tensors else None
    if metadata.get("fingerprint") != fingerprint:
        warnings.warn(f"state {path} was made with other weights than this model's", stacklevel=2)
    return State(spec, fingerprint, parts, logits, _count(path, metadata))


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
