"""Requests of any API as jobs of the scheduler, and their answers as events.

The APIs (openai.py, ollama.py, llama.py) differ in names and shapes only. What they mean is said here once: a prompt,
how its answers are written, and an asynchronous stream of events.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.state import State
from rwkv_npu.model import Model
from rwkv_npu.serve.answers import Answer, Chosen, Event, Grammar, Options
from rwkv_npu.serve.cache import Checkpoints, StateCache, Store
from rwkv_npu.serve.scheduler import Job, Scheduler
from rwkv_npu.text.chat import AnswerParser, Message, Prompt, Template, history, render
from rwkv_npu.text.tokenizer import Tokenizer

log = logging.getLogger("rwkv_npu.serve")


@dataclass(frozen=True)
class Ask:
    """A prompt and how it is answered. prompt: text, or token ids. count: answers, which share one reading of it.

    parser: makes what splits each answer. grammar: makes what restricts it. chat: the messages of the prompt, for the
    cache to know the answer as part of the next turn; tools: those of the prompt.
    """

    prompt: str | Sequence[int]
    options: Options
    parser: Callable[[], AnswerParser]
    count: int = 1
    grammar: Callable[[], Grammar] | None = None
    state: State | None = None
    chat: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    cached: int = 0
    written: int = 0
    thought: int = 0


@dataclass
class Running:
    """A request that runs: its usage grows while `events` come."""

    job: Job
    usage: Usage
    events: AsyncIterator[Event]


@dataclass
class Limits:
    """What one request may ask for."""

    prompt_tokens: int = 1 << 17
    max_tokens: int = 1 << 15
    default_tokens: int = 2048
    count: int = 8


class Service:
    """One model, its template, its scheduler and its cache.

    name: of the model, as clients are told. neutral_sampling: take OpenAI's neutral values (temperature 1, top_p 1, no
    penalties) as a wish; otherwise requests that have just these get the template's defaults.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        template: Template,
        *,
        slots: int = 8,
        queue: int = 64,
        cache_bytes: int = 1 << 30,
        stores: Sequence[Store] = (),
        limits: Limits | None = None,
        neutral_sampling: bool = False,
    ):
        if model.tokenizer is None:
            raise UsageError("this model has no vocabulary, and a server needs one: give --tokenizer FILE")
        self.model, self.name, self.template = model, name, template
        self.tokenizer: Tokenizer = model.tokenizer
        self.limits, self.neutral_sampling = limits or Limits(), neutral_sampling
        self.vocabulary = self.tokenizer.has_text(model.spec.V)
        self.identity, self.started = model_identity(model), int(time.time())
        labels = (f"{template.names['assistant']}:",)
        self.cache = StateCache(cache_bytes, stores)
        checkpoints = Checkpoints(self.tokenizer, self.identity, labels)
        self.scheduler = Scheduler(model.engine, checkpoints, self.cache, slots=slots, queue=queue)

    @property
    def fingerprint(self) -> str:
        """For OpenAI's `system_fingerprint`: answers with the same one and the same seed are the same.

        Other backends than numba add up in an order that depends on how many sequences there are.
        """
        exact = set(self.model.engine.backends) == {"numba"} and self.model.precision in ("int8", "int4")
        return f"fp_{self.identity[:12]}" + ("" if exact else "_rows")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def ask_chat(
        self,
        messages: Sequence[Message],
        options: Options,
        *,
        think: str = "off",
        tools: Sequence[Mapping[str, Any]] = (),
        call: bool = False,
        stop: Sequence[str] = (),
        grammar: Callable[[], Grammar] | None = None,
        count: int = 1,
        state: State | None = None,
    ) -> Ask:
        """A chat as a question. state: what the messages follow. Raises UsageError for messages that make no sense."""
        if not messages:
            raise UsageError("there are no messages: a chat needs one of the user at least")
        prompt = render(self.template, messages, think=think, tools=tools, call=call)
        if grammar is not None and not call and self.template.thinks and think == "off":
            # Structured output begins at once: the empty thought is closed for the model.
            prompt = Prompt(f"{prompt.text}>\n", "")

        def parser() -> AnswerParser:
            raw = grammar is not None
            return AnswerParser(opened=prompt.opened, stops=self.template.stops, always=stop, raw=raw)

        known = () if state is not None else tuple(messages)
        return Ask(prompt.text, options, parser, count, grammar, state, known, tools)

    def ask_text(
        self,
        prompt: str | Sequence[int],
        options: Options,
        *,
        stop: Sequence[str] = (),
        grammar: Callable[[], Grammar] | None = None,
        count: int = 1,
        state: State | None = None,
    ) -> Ask:
        """A text to be continued."""
        return Ask(
            prompt, options, lambda: AnswerParser(always=stop, plain=True, raw=True), count, grammar, state
        )

    def run(self, ask: Ask) -> Running:
        """Start a request. Raises UsageError for one beyond the limits, BusyError where the queue is full.

        Whoever stops to listen (closes `events`) stops the request.
        """
        ids = self._ids(ask.prompt)
        usage = Usage(prompt=len(ids))
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        answers = [
            Answer(
                index,
                self.tokenizer,
                self.vocabulary,
                self._seeded(ask.options, index),
                ask.parser(),
                listen,
                ask.grammar() if ask.grammar else None,
            )
            for index in range(ask.count)
        ]

        def started(cached: int) -> None:
            usage.cached = cached

        job = Job(ids, answers, ask.state, started)
        self.scheduler.submit(job)
        return Running(job, usage, self._events(ask, job, answers, usage, queue))

    async def _events(
        self, ask: Ask, job: Job, answers: Sequence[Answer], usage: Usage, queue: asyncio.Queue[Event]
    ) -> AsyncIterator[Event]:
        text = [""] * len(answers)
        left = len(answers)
        try:
            while left:
                event = await queue.get()
                usage.written = sum(answer.count for answer in answers)
                usage.thought = sum(answer.thought_tokens for answer in answers)
                text[event.index] += "".join(piece.text for piece in event.pieces if not piece.thought)
                left -= event.reason is not None
                yield event
        finally:
            job.cancel()
        if ask.chat and len(answers) == 1:
            self._read_ahead(ask, text[0])

    def _read_ahead(self, ask: Ask, answer: str) -> None:
        """Have the cache know the answer as the next turn's prompt will show it: without its thought, cleaned."""
        turns = [*ask.chat, Message("assistant", answer)]
        self.scheduler.read_when_idle(self.encode(history(self.template, turns, tools=ask.tools)))

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) > self.limits.prompt_tokens:
            raise UsageError(
                f"the prompt has {len(ids)} tokens: this server reads {self.limits.prompt_tokens} at most"
            )
        if min(ids) < 0 or max(ids) >= self.model.spec.V:
            raise UsageError(f"the prompt has ids outside the model's vocabulary of {self.model.spec.V}")
        return ids

    def _seeded(self, options: Options, index: int) -> Options:
        """Several answers to one seed are different, and each is the same again."""
        return options if options.seed is None or index == 0 else replace(options, seed=options.seed + index)

    async def whole(self, running: Running) -> list[Whole]:
        """All answers, complete."""
        found = [Whole() for _ in running.job.writers]
        async with aclosing(running.events) as events:  # type: ignore[type-var]
            async for event in events:
                found[event.index].take(event)
        return found

    def close(self) -> None:
        self.scheduler.close()


@dataclass
class Whole:
    """A complete answer."""

    content: str = ""
    thought: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    reason: str = ""

    def take(self, event: Event) -> None:
        if event.error is not None:
            raise event.error
        for piece in event.pieces:
            if piece.thought:
                self.thought += piece.text
            else:
                self.content += piece.text
        self.tokens.extend(event.tokens)
        self.reason = event.reason or self.reason


def model_identity(model: Model) -> str:
    """Names what a state depends on besides its tokens: weights, precision, partitioning and initial state."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"1 {model.fingerprint} {model.precision} {model.engine.program.fusion}".encode())
    for part in model.new_state().parts.values():
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
