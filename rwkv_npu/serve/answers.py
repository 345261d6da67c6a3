"""One answer in progress: sample tokens, parse their text, emit events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rwkv_npu.errors import RwkvNpuError
from rwkv_npu.text.chat import AnswerParser, Piece
from rwkv_npu.text.sampling import Choice, Sampler, SamplingOptions
from rwkv_npu.text.tokenizer import END_OF_TEXT, Tokenizer

CLOSE_THOUGHT = "\n</think>\n"


@dataclass(frozen=True)
class SampledToken:
    """A sampled token, its bytes and log-probability. top: the most likely tokens as (token, log-probability)."""

    token: int
    bytes: bytes
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """An update of answer number `index`: its new text and its new tokens.

    reason: why the answer has ended: "stop", "length" or "error". None while it goes on.
    """

    index: int
    pieces: Sequence[Piece] = ()
    tokens: Sequence[SampledToken] = ()
    reason: str | None = None
    error: RwkvNpuError | None = None


class Grammar(Protocol):
    """Restricts the tokens of an answer."""

    def allowed(self) -> np.ndarray:
        """The mask of tokens that may come next, in the form that `sampling.sample` takes."""

    def push(self, token: int) -> bool:
        """Accept a token. Returns True if the answer is complete."""


@dataclass(frozen=True)
class Options:
    """Options of an answer.

    bias: the amount to add to a token's logit. top_logprobs: None for no log-probabilities. think_budget: the most
    tokens of a thought, which is then closed; None for no limit.
    """

    sampling: SamplingOptions = SamplingOptions()
    seed: int | None = None
    max_tokens: int = 1024
    bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    think_budget: int | None = None


class Answer:
    """Generates one answer (a `scheduler.Writer`).

    listen: called with each Event, in the scheduler's thread. parser: splits the text into thought and content, and
    finds its end. vocabulary: (V,) bool, the ids that have text.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        vocabulary: np.ndarray,
        options: Options,
        parser: AnswerParser,
        listen: Callable[[Event], None],
        grammar: Grammar | None = None,
    ):
        self.index, self.options, self.count, self.thought_tokens = index, options, 0, 0
        self._tokenizer, self._parser, self._listen, self._grammar = tokenizer, parser, listen, grammar
        self.top = options.top_logprobs or 0
        self.sampler = Sampler(
            options.sampling,
            seed=options.seed,
            banned=~vocabulary,
            uncounted=tokenizer.uncounted,
            logit_bias=options.bias,
        )
        self._decoder = tokenizer.decoder()
        self._forced: deque[int] = deque()

    def allowed(self) -> np.ndarray | None:
        return None if self._grammar is None else self._grammar.allowed()

    def take(self, choice: Choice) -> int | None:
        """Accept the sampled token, or a forced one in its place. Returns the token to read next, None at the end."""
        if self._forced:  # the thought has used up its budget: these tokens close it
            choice = Choice(self._forced.popleft(), 0.0, [])
        token = choice.token
        self.count += 1
        pieces = self._parser.push(self._decoder.push(token)) if token != END_OF_TEXT else []
        complete = self._grammar is not None and self._grammar.push(token)
        self.thought_tokens += self._parser.thinking
        budget = self.options.think_budget
        spent = budget is not None and self.thought_tokens >= budget
        if self._parser.thinking and spent and not self._forced:
            self._forced.extend(self._tokenizer.encode(CLOSE_THOUGHT))
        reason = None
        if token == END_OF_TEXT or self._parser.stopped or complete:
            reason = "stop"
        elif self.count >= self.options.max_tokens:
            reason = "length"
        if reason and not self._parser.stopped:
            pieces = [*pieces, *self._parser.push(self._decoder.finish()), *self._parser.finish()]
        data = self._tokenizer.token_bytes(token) or b""
        chosen = SampledToken(token, data, choice.logprob, tuple(choice.top[: self.top]))
        self._listen(Event(self.index, pieces, [chosen], reason))
        return None if reason else token

    def fail(self, error: RwkvNpuError) -> None:
        self._listen(Event(self.index, reason="error", error=error))
