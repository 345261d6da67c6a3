"""Saves the scores of an unfinished evaluation, so that it can continue after Ctrl-C or a kill.

The file is a safetensors file. It has a column for each score, with one number for each item (a token or a text), and
the recurrent states after the last item. Its metadata identifies the evaluation; any other evaluation refuses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.safetensors import TensorFile, TensorPlan, replace_tensors
from rwkv_npu.formats.state import State

FORMAT = "rwkv_npu evaluation 1"
SAVE_S = 10.0  # seconds between two saves: the most work that a kill can lose


class Journal:
    """The scores of `count` items, saved to `path` (None: not saved).

    columns: names of the scores. identity: the parts that identify the evaluation, such as model and text.
    scores: name -> (count,) fp64; the first `done` are computed. states: the state of each model after them; none if
    every item begins with a new state.
    Raises UsageError for a file of another evaluation, and for one that is damaged or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        identity: Mapping[str, str],
        columns: Sequence[str],
        count: int,
        states: Sequence[State] = (),
    ):
        self.path = None if path is None else Path(path)
        self.identity = dict(identity)
        self.scores = {name: np.empty(count) for name in columns}
        # One tuple, so that Ctrl-C cannot separate the count from its states.
        self._at: tuple[int, tuple[State, ...]] = (0, tuple(states))
        if self.path and self.path.exists() and self.path.stat().st_size:
            self._at = self._load(self.path, states)
        self._saved, self._saved_at = self.done, time.monotonic()

    @property
    def done(self) -> int:
        return self._at[0]

    @property
    def states(self) -> tuple[State, ...]:
        return self._at[1]

    def add(self, scores: Mapping[str, np.ndarray], states: Sequence[State] = ()) -> None:
        """Append the scores of the next items. Saves the file every SAVE_S seconds."""
        stop = self.done + len(next(iter(scores.values())))
        for name, values in scores.items():
            self.scores[name][self.done : stop] = values
        self._at = stop, tuple(states)
        if time.monotonic() - self._saved_at > SAVE_S:
            self.save()

    def save(self) -> None:
        """Write the file atomically. Raises UsageError."""
        if self.path is None or self.done == self._saved:
            return
        done, states = self._at
        plans = [_plan(name, column[:done]) for name, column in self.scores.items()]
        for number, state in enumerate(states):
            plans += [_plan(f"state.{number}.{name}", part) for name, part in state.parts.items()]
        metadata = {"format": FORMAT, "identity": json.dumps(self.identity), "done": str(done)}
        try:
            replace_tensors(self.path, plans, metadata)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from error
        self._saved, self._saved_at = done, time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.save()

    def _load(self, path: Path, states: Sequence[State]) -> tuple[int, tuple[State, ...]]:
        with TensorFile(path, error=_unreadable) as file:
            done = self._check(path, file.metadata)
            for name, column in self.scores.items():
                column[:done] = _read(file, name, (done,), np.float64)
            loaded = [
                {
                    name: _read(file, f"state.{number}.{name}", part.shape, part.dtype)
                    for name, part in state.parts.items()
                }
                for number, state in enumerate(states)
            ]
        return done, tuple(replace(state, parts=parts) for state, parts in zip(states, loaded, strict=True))

    def _check(self, path: Path, metadata: Mapping[str, str]) -> int:
        """Number of items in the file. Raises UsageError if it belongs to another evaluation or is damaged."""
        if metadata.get("format") != FORMAT:
            raise UsageError(f"{path} is not from an evaluation that was interrupted: name another file")
        try:
            theirs, done = dict(json.loads(metadata["identity"])), int(metadata["done"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path} is damaged ({error!r:.80}): name another file") from None
        if theirs.keys() != self.identity.keys():
            raise UsageError(f"{path} is of another kind of evaluation: name another file")
        if other := [name for name, value in self.identity.items() if theirs[name] != value]:
            another = "text or another number of its tokens" if other[0] == "text" else other[0]
            raise UsageError(f"{path} belongs to an evaluation with another {another}: name another file")
        if not 0 <= done <= len(next(iter(self.scores.values()))):
            raise UsageError(f"{path} is damaged (it has {done} scores): name another file")
        return done


def digest(content: bytes) -> str:
    """A short digest that stands for large content in an identity."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _unreadable(problem: str) -> UsageError:
    return UsageError(
        f"{problem}: damaged, or not from an evaluation that was interrupted; name another file"
    )


def _plan(name: str, array: np.ndarray) -> TensorPlan:
    return TensorPlan(name, array.dtype, array.shape, lambda: array)


def _read(file: TensorFile, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A copy of a tensor. Raises UsageError for one of another shape or type."""
    found = file.array(name)
    if found.shape != shape or found.dtype != dtype:
        raise UsageError(f"{file.path}: {name} is {found.dtype} {found.shape}, not {np.dtype(dtype)} {shape}")
    return found.copy()
