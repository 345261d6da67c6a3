"""States of prompts that were read, so that a conversation goes on without reading it again.

A state is kept at checkpoints of a token sequence and named by a hash of the model's identity and of all tokens before
it. The same name serves memory, disk and a store that several machines share, and the longest known prefix of a prompt
is found by hashing the prompt once: a tree of tokens is not needed, since states exist at checkpoints only.

Checkpoints depend on the tokens alone, never on what else runs or is kept. Prompts are read from checkpoint to
checkpoint, so that a state is the same, bit for bit, whether its prefix came from here or was read again.
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

SPACING = 512  # tokens after which a long text has a checkpoint, whatever it says
NEAR = 16  # tokens that checkpoints are apart at least


@dataclass(frozen=True)
class Checkpoint:
    """A place in a token sequence: `position` tokens are before it, and `key` names them and the model."""

    position: int
    key: str


class Store(Protocol):
    """States outside of this process, by key. Neither call raises: a store that fails is a store that is empty."""

    def get(self, key: str) -> State | None: ...

    def put(self, key: str, state: State) -> None: ...


class Checkpoints:
    """Finds the checkpoints of token sequences.

    identity: names weights, precision and initial state: states of one are of no use to another. labels: text after
    which a conversation forks, such as "Assistant:"; a blank line is always one.
    """

    def __init__(self, tokenizer: Tokenizer | None, identity: str, labels: Sequence[str]):
        self._tokenizer, self._identity = tokenizer, identity.encode()
        self._ends = tuple(label.encode() for label in ("\n\n", *labels))
        self._longest = max(map(len, self._ends))

    def of(self, ids: Sequence[int]) -> list[Checkpoint]:
        """Checkpoints of `ids`, ascending. Those of a prefix are the first ones of the whole."""
        return list(self._walk(np.asarray(ids, np.int64)))

    def key(self, ids: Sequence[int]) -> str:
        """The name of the state after all of `ids`."""
        digest = self._hash()
        digest.update(np.asarray(ids, np.int64).tobytes())
        return digest.hexdigest()

    def _walk(self, ids: np.ndarray) -> Iterator[Checkpoint]:
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
    """States in memory, the least recently used of which go first, and in the stores behind it.

    budget: bytes of states in memory. A state that is asked for is a copy: the caller may change it.
    """

    def __init__(self, budget: int, stores: Sequence[Store] = ()):
        self._budget, self._stores = budget, tuple(stores)
        self._kept: OrderedDict[str, State] = OrderedDict()
        self._pinned: set[str] = set()
        self._lock = threading.Lock()
        self.bytes = self.hits = self.misses = 0

    def find(self, checkpoints: Sequence[Checkpoint]) -> tuple[int, State | None]:
        """(tokens, state) of the last checkpoint that is known; (0, None) where none is."""
        for checkpoint in reversed(checkpoints):
            state = self.get(checkpoint.key)
            if state is not None:
                self.hits += 1
                return checkpoint.position, state
        self.misses += 1
        return 0, None

    def get(self, key: str) -> State | None:
        with self._lock:
            state = self._kept.get(key)
            if state is not None:
                self._kept.move_to_end(key)
                return state.copy()
        for store in self._stores:
            state = store.get(key)
            if state is not None:
                self._remember(key, state.copy())
                return state
        return None

    def keep(self, key: str, state: State, *, pinned: bool = False) -> None:
        """Keep a copy of `state`, here and in every store. A pinned one stays until `unpin`."""
        with self._lock:
            if pinned:
                self._pinned.add(key)
            if key in self._kept:
                self._kept.move_to_end(key)
                return
        copied = state.copy()
        self._remember(key, copied)
        for store in self._stores:
            store.put(key, copied)

    def unpin(self, key: str) -> None:
        with self._lock:
            self._pinned.discard(key)

    def __len__(self) -> int:
        return len(self._kept)

    def _remember(self, key: str, state: State) -> None:
        size = size_of(state)
        with self._lock:
            if key in self._kept or size > self._budget:
                return
            self._kept[key] = state
            self.bytes += size
            for old in [name for name in self._kept if name not in self._pinned]:
                if self.bytes <= self._budget:
                    break
                if old != key:
                    self.bytes -= size_of(self._kept.pop(old))


def size_of(state: State) -> int:
    """Bytes of a state."""
    return sum(part.nbytes for part in state.parts.values()) + (
        state.logits.nbytes if state.logits is not None else 0
    )
