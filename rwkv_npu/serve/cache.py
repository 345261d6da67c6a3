"""A cache of states after prefixes of prompts. A conversation continues from one, and its past is not read again.

States are kept at checkpoints of a token sequence. The key of a state is a hash of the model's identity and of
all tokens before it. The same key serves memory, disk and a store shared by several machines. One pass over a prompt
computes the keys of all its checkpoints, and the last known key gives its longest cached prefix.

Checkpoints depend on the tokens alone, never on other requests or on the cache. Prompts are read from checkpoint to
checkpoint. So a state has the same bits whether its prefix came from the cache or was read again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rwkv_npu.formats.state import State
from rwkv_npu.text.tokenizer import Tokenizer

SPACING = 512  # tokens: the largest distance of two checkpoints
NEAR = 16  # tokens: the smallest distance of two checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A position in a token sequence: the number of tokens before it, and the key of model and tokens."""

    position: int
    key: str


class Store(Protocol):
    """States outside this process, by key. Its methods do not raise: a store that fails acts like an empty one."""

    def get(self, key: str) -> State | None: ...

    def put(self, key: str, state: State) -> None: ...


class Checkpoints:
    """Finds the checkpoints of token sequences.

    Checkpoints stand after blank lines and labels, where conversations may fork, and at most SPACING tokens apart.

    identity: a name for weights, precision and initial state, which is part of each key. labels: such as "Assistant:".
    """

    def __init__(self, tokenizer: Tokenizer | None, identity: str, labels: Sequence[str]):
        self._tokenizer, self._identity = tokenizer, identity.encode()
        self._ends = tuple(label.encode() for label in ("\n\n", *labels))
        self._longest = max(map(len, self._ends))

    def of(self, ids: Sequence[int]) -> list[Checkpoint]:
        """Checkpoints of `ids`, ascending. A prefix of `ids` has the same checkpoints up to its end."""
        return list(self._find(np.asarray(ids, np.int64)))

    def key(self, ids: Sequence[int]) -> str:
        """The key of the state after all of `ids`."""
        digest = self._hash()
        digest.update(np.asarray(ids, np.int64).tobytes())
        return digest.hexdigest()

    def _find(self, ids: np.ndarray) -> Iterator[Checkpoint]:
        digest, hashed, tail = self._hash(), 0, b""
        for position, token in enumerate(ids.tolist(), 1):
            if self._tokenizer is not None:
                tail = (tail + (self._tokenizer.token_bytes(token) or b""))[-self._longest :]
            since = position - hashed
            if since == SPACING or (since >= NEAR and tail.endswith(self._ends)):
                digest.update(ids[hashed:position].tobytes())
                hashed = position
                yield Checkpoint(position, digest.hexdigest())

    def _hash(self) -> hashlib.blake2b:
        return hashlib.blake2b(self._identity, digest_size=16)


class StateCache:
    """LRU cache of states in memory, backed by stores.

    budget: bytes of states in memory. stores: only `fetch` reads from them, because that may take long.
    """

    def __init__(self, budget: int, stores: Sequence[Store] = ()):
        self._budget, self._stores = budget, tuple(stores)
        self._kept: OrderedDict[str, State] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = self.hits = self.misses = 0

    def position(self, checkpoints: Sequence[Checkpoint]) -> int:
        """Position of the last checkpoint with a state in memory, else 0."""
        return next((one.position for one in reversed(checkpoints) if one.key in self._kept), 0)

    def find(self, checkpoints: Sequence[Checkpoint]) -> tuple[int, State | None]:
        """(position, copy of the state) of the last checkpoint with a state in memory, else (0, None)."""
        with self._lock:
            for checkpoint in reversed(checkpoints):
                if checkpoint.key in self._kept:
                    self._kept.move_to_end(checkpoint.key)
                    self.hits += 1
                    return checkpoint.position, self._kept[checkpoint.key].copy()
        self.misses += 1
        return 0, None

    def fetch(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Load the state of the last known checkpoint from a store into memory, unless memory has it."""
        for checkpoint in reversed(checkpoints):
            if checkpoint.key in self._kept:
                return
            for store in self._stores:
                state = store.get(checkpoint.key)
                if state is not None:
                    self._remember(checkpoint.key, state)
                    return

    def keep(self, key: str, state: State) -> None:
        """Keep a copy of `state` in memory and in every store."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return
        copied = state.copy()
        self._remember(key, copied)
        for store in self._stores:
            store.put(key, copied)

    def __len__(self) -> int:
        return len(self._kept)

    def _remember(self, key: str, state: State) -> None:
        size = size_of(state)
        with self._lock:
            if key in self._kept or size > self._budget:
                return
            self._kept[key] = state
            self.bytes += size
            while self.bytes > self._budget:
                self.bytes -= size_of(self._kept.popitem(last=False)[1])


def size_of(state: State) -> int:
    """Size of a state in bytes."""
    return sum(part.nbytes for part in state.parts.values()) + (
        state.logits.nbytes if state.logits is not None else 0
    )
