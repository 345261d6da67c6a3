"""Turns requests of any API into jobs of the scheduler, and answers into events.

The APIs (openai.py, ollama.py, llama.py) differ in names and shapes only. This module holds what they share: a prompt,
the options of its answers, and an asynchronous stream of events.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.state import State
from rwkv_npu.model import Model
from rwkv_npu.serve.answers import Answer, Event, Grammar, Options, SampledToken
from rwkv_npu.serve.cache import Checkpoints, StateCache, Store
from rwkv_npu.serve.scheduler import Job, Scheduler
from rwkv_npu.text.chat import AnswerParser, Message, Prompt, Template, history, render
from rwkv_npu.text.tokenizer import Tokenizer

log = logging.getLogger("rwkv_npu.serve")


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and the options of its answers.

    prompt: text, or token ids. count: number of answers, which share one reading of the prompt. parser: creates the
    parser of each answer. grammar: creates the grammar of each answer. chat, tools: the messages and tools that the
    prompt was rendered from. With them, the finished answer is read into the cache as the next prompt will hold it.
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
    """Token counts of a request."""

    prompt: int = 0
    cached: int = 0
    written: int = 0
    thought: int = 0


@dataclass
class Running:
    """A request in progress. Its usage grows while `events` arrive."""

    job: Job
    usage: Usage
    events: AsyncIterator[Event]


@dataclass
class Limits:
    """Limits of one request."""

    prompt_tokens: int = 1 << 17
    max_tokens: int = 1 << 15
    default_tokens: int = 2048
    count: int = 8


class Service:
    """One model with its chat template, scheduler and cache.

    name: the model's name, as clients see it. neutral_sampling: accept OpenAI's neutral values (temperature 1, top_p 1,
    no penalties). By default, a request with exactly these values gets the template's defaults instead.
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
            raise UsageError("this model has no vocabulary, but a server needs one: give tokenizer=FILE")
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
        """OpenAI's `system_fingerprint`. The same fingerprint and seed give the same answer.

        The suffix `_rows` marks an exception: results also depend on the number of sequences, except with the numba
        backend in int8 or int4.
        """
        exact = set(self.model.engine.backends) == {"numba"} and self.model.precision in ("int8", "int4")
        return f"fp_{self.identity[:12]}" + ("" if exact else "_rows")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def chat_request(
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
    ) -> GenerationRequest:
        """The generation request of a chat. state: the messages continue it. Raises UsageError for invalid messages."""
        if not messages:
            raise UsageError("the chat has no messages: it needs at least one of the user")
        # Structured output has no thought: the grammar holds from the first token.
        think = think if grammar is None else "off"
        prompt = render(self.template, messages, think=think, tools=tools, call=call)
        if grammar is not None and re.match(r"\s*<think(?!.*</think>)", prompt.opened, re.DOTALL):
            rest = ">\n" if prompt.opened.endswith("</think") else "\n</think>\n"
            prompt = Prompt(prompt.text + (">" if prompt.opened.endswith("<think") else "") + rest, "")

        def parser() -> AnswerParser:
            raw = grammar is not None
            return AnswerParser(opened=prompt.opened, stops=self.template.stops, always=stop, raw=raw)

        known = () if state is not None else tuple(messages)
        return GenerationRequest(prompt.text, options, parser, count, grammar, state, known, tools)

    def completion_request(
        self,
        prompt: str | Sequence[int],
        options: Options,
        *,
        stop: Sequence[str] = (),
        grammar: Callable[[], Grammar] | None = None,
        count: int = 1,
        state: State | None = None,
    ) -> GenerationRequest:
        """The generation request of a text to continue."""
        return GenerationRequest(
            prompt, options, lambda: AnswerParser(always=stop, plain=True, raw=True), count, grammar, state
        )

    async def run(self, request: GenerationRequest) -> Running:
        """Start a request. Closing `events` cancels it.

        Raises UsageError for a request beyond the limits, BusyError if the queue is full.
        """
        ids = await asyncio.to_thread(self._ids, request.prompt)
        usage = Usage(prompt=len(ids))
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        answers = [
            Answer(
                index,
                self.tokenizer,
                self.vocabulary,
                self._seeded(request.options, index),
                request.parser(),
                listen,
                request.grammar() if request.grammar else None,
            )
            for index in range(request.count)
        ]

        def started(cached: int) -> None:
            usage.cached = cached

        job = Job(ids, answers, request.state, started)
        await asyncio.to_thread(self.scheduler.prepare, job)
        self.scheduler.submit(job)
        events = self._events(request, job, answers, usage, queue)
        # If the client leaves before its response begins, nothing runs the generator, not even to close it.
        weakref.finalize(events, job.cancel)
        return Running(job, usage, events)

    async def _events(
        self,
        request: GenerationRequest,
        job: Job,
        answers: Sequence[Answer],
        usage: Usage,
        queue: asyncio.Queue[Event],
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
        if request.chat and len(answers) == 1:
            # Read the answer as the next prompt will hold it: cleaned, and without its thought.
            turns = [*request.chat, Message("assistant", text[0])]
            await asyncio.to_thread(self._read_when_idle, turns, request.tools)

    def _read_when_idle(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        self.scheduler.read_when_idle(self.encode(history(self.template, turns, tools=tools)))

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) > self.limits.prompt_tokens:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, more than this server's limit of {self.limits.prompt_tokens}"
            )
        if min(ids) < 0 or max(ids) >= self.model.spec.V:
            raise UsageError(f"the prompt has ids outside the model's vocabulary of {self.model.spec.V}")
        return ids

    def _seeded(self, options: Options, index: int) -> Options:
        """Options with a seed of its own for each answer. The same seed and index give the same answer."""
        return options if options.seed is None or index == 0 else replace(options, seed=options.seed + index)

    async def collect(self, running: Running) -> list[Completion]:
        """Wait for all answers of a request."""
        completions = [Completion() for _ in running.job.writers]
        async with aclosing(running.events) as events:  # type: ignore[type-var]
            async for event in events:
                completions[event.index].add(event)
        return completions

    def close(self) -> None:
        self.scheduler.close()


@dataclass
class Completion:
    """A complete answer."""

    content: str = ""
    thought: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    reason: str = ""

    def add(self, event: Event) -> None:
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
    """A hash of all that a state depends on besides its tokens: weights, precision, fusion, initial state."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"1 {model.fingerprint} {model.precision} {model.engine.program.fusion}".encode())
    for part in model.new_state().parts.values():
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
