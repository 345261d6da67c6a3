"""Samples tokens step by step, and decodes them to text.

Stop strings are searched across tokens. Text that may be the start of a stop string is held back.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from rwkv_npu.arguments import check_text
from rwkv_npu.errors import BackendError, TokenizerError, UsageError
from rwkv_npu.formats.state import State
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.text.chat import overlap
from rwkv_npu.text.sampling import Sampler
from rwkv_npu.text.tokenizer import END_OF_TEXT, Tokenizer


class Step:
    """One sampled token.

    token: its id. logprob: its log-probability, before temperature, penalties and filters.
    text: the text that is final with this token, "" while a character or a stop string may be incomplete.
    held: text that may be the start of a stop string. A caller who stops the generation here appends it.
    finish_reason: None, "stop" (end of text or a stop string) or "length", on the last step only.
    """

    def __init__(
        self, token: int, logprob: float, text: str, finish_reason: str | None, held: str, reader: _Reader
    ):
        self.token, self.logprob, self.text, self.finish_reason = token, logprob, text, finish_reason
        self.held, self._reader = held, reader

    @property
    def state(self) -> State:
        """The state after this token. If the model has not read the token yet, it does so now.

        The next step changes this state. Copy it to keep it.
        """
        return self._reader.read()

    def __repr__(self) -> str:
        return f"Step(token={self.token}, text={self.text!r}, finish_reason={self.finish_reason!r})"


class _Reader:
    """The state of a generation, and the sampled token that the model has not read yet.

    The text of a token is shown before the model reads it. The last token is read only if its state is used.
    """

    def __init__(self, engine: Engine, logits: np.ndarray, state: State):
        self._engine, self.logits, self._state = engine, logits, state
        self._pending: int | None = None
        self._broken = False

    def sample(self, sampler: Sampler) -> tuple[int, float]:
        self.read()
        token, logprob = sampler.sample(self.logits)
        self._pending = token
        return token, logprob

    def read(self) -> State:
        if self._broken:
            raise BackendError("the state is lost: the backend failed while it read a token")
        if self._pending is not None:
            self._broken = True  # if the forward fails, some layers have read the token and others have not
            self.logits, _ = self._engine.forward([self._pending], self._state, inplace=True)
            self._pending, self._broken = None, False
        return self._state


class TextStream:
    """The text of a sequence of tokens, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]):
        if stop and tokenizer is None:
            raise TokenizerError(
                "stop strings need a tokenizer, and this model has none: give tokenizer=FILE"
            )
        for text in stop:
            check_text("a stop string", text)
        if "" in stop:
            raise UsageError("a stop string must not be empty")
        self._decoder = tokenizer.decoder() if tokenizer else None
        self._stop = tuple(stop)
        self.held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token. Returns the text that is final, and True after a stop string, which is left out of the text."""
        if self._decoder is None or token == END_OF_TEXT:
            return "", False
        self.held += self._decoder.push(token)
        found = [(at + len(stop), at) for stop in self._stop if (at := self.held.find(stop)) >= 0]
        if found:
            _, begin = min(found)  # the stop string that ends first
            text, self.held = self.held[:begin], ""
            self._decoder = None
            return text, True
        final = len(self.held) - overlap(self.held, self._stop)
        text, self.held = self.held[:final], self.held[final:]
        return text, False

    def finish(self) -> str:
        """The text that was held back."""
        rest = self._decoder.finish() if self._decoder else ""
        text, self.held = self.held + rest, ""
        return text


def steps(
    engine: Engine,
    stream: TextStream,
    logits: np.ndarray,
    state: State,
    sampler: Sampler,
    *,
    max_tokens: int | None,
    stop_ids: Collection[int] = (END_OF_TEXT,),
) -> Iterator[Step]:
    """Sample tokens, beginning with `logits`: at most `max_tokens` (None: no limit). Updates `state` in place.

    A token of `stop_ids` ends the text, and adds nothing to it.
    """
    reader = _Reader(engine, logits, state)
    for count in itertools.count(1):
        token, logprob = reader.sample(sampler)
        text, stopped = ("", True) if token in stop_ids else stream.push(token)
        reason = "stop" if stopped else "length" if count == max_tokens else None
        if reason:
            text += stream.finish()
        yield Step(token, logprob, text, reason, stream.held, reader)
        if reason:
            return
