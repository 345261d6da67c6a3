"""`rwkv-npu generate`: text to stdout as it comes, statistics to stderr."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import add_model_flags, load_model
from rwkv_npu.errors import UsageError

if TYPE_CHECKING:
    from rwkv_npu.backends.base import Faults
    from rwkv_npu.formats.state import State
    from rwkv_npu.model import Model
    from rwkv_npu.text.generation import Step

LONG_PROMPT = 1024  # tokens from which reading the prompt shows its progress


@dataclass
class Statistics:
    """Seconds and tokens of one run."""

    load: float = 0.0
    prompt_tokens: int = 0
    first_token: float = 0.0
    tokens: int = 0
    total: float = 0.0
    faults: Faults | None = None  # of the NPU

    def line(self) -> str:
        parts = [f"load {self.load:.2f} s"]
        if self.prompt_tokens and self.first_token:
            parts.append(
                f"prompt {self.prompt_tokens} tokens, {self.prompt_tokens / self.first_token:.1f} t/s"
            )
        if self.tokens:
            parts.append(f"first token {self.first_token:.2f} s")
        decode = self.total - self.first_token
        rate = f", {(self.tokens - 1) / decode:.1f} t/s" if self.tokens > 1 and decode > 0 else ""
        parts.append(f"generated {self.tokens} tokens{rate}")
        if self.faults and (self.faults.calls or self.faults.groups):
            groups = f", on the CPU: {', '.join(self.faults.groups)}" if self.faults.groups else ""
            parts.append(f"{self.faults.calls} calls to the NPU failed{groups}")
        return " | ".join(parts)


class Interrupt:
    """The first Ctrl-C lets the token in work be finished, so that the state stays whole; the second does not."""

    def __init__(self) -> None:
        self.asked = False
        self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupt:
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


def add(commands: Any) -> None:
    p = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    add_model_flags(p)
    p.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads stdin")
    p.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file, less its last newline")
    p.add_argument("--ids", action="store_true", help="prompt and output are token ids, not text")
    limit = "-1 goes on to the end of the text, 0 only reads the prompt into --state (default: 256)"
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help=limit)
    p.add_argument("--temp", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    p.add_argument("--top-p", type=float, default=0.85, metavar="P", help="(default: 0.85)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    p.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="(default: 0)")
    p.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="(default: 0)")
    p.add_argument("--penalty-decay", type=float, default=0.996, metavar="X", help="(default: 0.996)")
    p.add_argument("-s", "--seed", type=int, metavar="N", help="(default: another text each time)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    p.add_argument(
        "--state", metavar="FILE", help="go on from this state if it exists, and save it at the end"
    )
    p.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    p.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    state_file = _state_file(arguments)
    _check_sampling(arguments)
    statistics = Statistics()
    begin = time.perf_counter()
    model = load_model(arguments, verbose=arguments.verbose)
    with model, Interrupt() as interrupt:
        statistics.faults = model.engine.counters.faults
        state = model.load_state(state_file) if state_file and state_file.exists() else None
        ids: Sequence[int] = _parse_ids(prompt) if arguments.ids else model.encode(prompt)
        statistics.load = time.perf_counter() - begin
        statistics.prompt_tokens = len(ids)
        if arguments.echo:
            print(prompt, end=" " if arguments.ids else "", flush=True)
        final = _stream(model, ids, state, arguments, statistics, interrupt)
        if sys.stdout.isatty():
            print(flush=True)
        if state_file and state_file.suffix == ".pth":
            print(f"{state_file} is a tuned state and stays as it is", file=sys.stderr)
        elif state_file and final is not None:
            final.save(state_file)
    print(statistics.line(), file=sys.stderr)
    return 130 if interrupt.asked else 0


def _stream(
    model: Model,
    ids: Sequence[int],
    state: State | None,
    arguments: argparse.Namespace,
    statistics: Statistics,
    interrupt: Interrupt,
) -> State | None:
    """Print the continuation; the state after it, None where it would be no other than before."""
    begin = time.perf_counter()
    step = None
    with _PromptBar(len(ids), interrupt) as bar:
        try:
            if arguments.max_tokens == 0:  # the prompt is only read, for its state
                return model.forward(ids, state, progress=bar.update)[1]
            steps = _steps(model, ids, state, arguments, bar)
        except _PromptInterrupted:
            return None
    for step in steps:
        statistics.total = time.perf_counter() - begin
        statistics.tokens += 1
        statistics.first_token = statistics.first_token or statistics.total
        if arguments.ids:
            print(step.token, end=" ", flush=True)
        elif step.text:
            print(step.text, end="", flush=True)
        if interrupt.asked:
            print("" if arguments.ids else step.held, end="", flush=True)  # the state has read it
            break
    return step.state if step is not None else None


def _steps(
    model: Model, ids: Sequence[int], state: State | None, arguments: argparse.Namespace, bar: _PromptBar
) -> Iterable[Step]:
    return model.generate(
        ids,
        state,
        stop=arguments.stop,
        max_tokens=None if arguments.max_tokens == -1 else arguments.max_tokens,
        progress=bar.update,
        **_sampling(arguments),
    )


class _PromptInterrupted(Exception):
    pass


class _PromptBar:
    """Progress over a long prompt, and the place where Ctrl-C ends its reading."""

    def __init__(self, total: int, interrupt: Interrupt):
        self._bar, self._interrupt = None, interrupt
        if total >= LONG_PROMPT:
            from tqdm import tqdm  # an import that a short prompt would wait for

            # None: shown on a terminal.
            self._bar = tqdm(total=total, desc="prompt", unit="token", leave=False, disable=None)

    def update(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)
        if self._interrupt.asked:
            raise _PromptInterrupted

    def __enter__(self) -> _PromptBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _prompt(arguments: argparse.Namespace) -> str:
    """The prompt, "" where there is only a state to go on from."""
    if arguments.prompt is not None and arguments.file is not None:
        raise UsageError("give --prompt or --file, not both")
    from rwkv_npu.text.corpus import read_text

    source = arguments.file
    if source is None and (arguments.prompt == "-" or (arguments.prompt is None and not sys.stdin.isatty())):
        source = "-"
    if source is not None:
        return read_text(source).removesuffix("\n")  # editors and echo end with one; prompts do not
    if arguments.prompt is None and not arguments.state:
        raise UsageError("there is no prompt: give --prompt TEXT, --file FILE, or pipe one in")
    prompt: str = arguments.prompt or ""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python hands on what it cannot decode
        raise UsageError("--prompt is not UTF-8 text")
    return prompt


def _check_sampling(arguments: argparse.Namespace) -> None:
    """Raises UsageError for what would be refused anyway, before a model is loaded for it."""
    from rwkv_npu.text.sampling import Sampler, SamplingOptions

    options = _sampling(arguments)
    seed = options.pop("seed")
    Sampler(SamplingOptions(**options), seed=seed)
    if arguments.max_tokens < -1:
        raise UsageError(f"--max-tokens is {arguments.max_tokens}: it must be at least -1")
    if "" in arguments.stop:
        raise UsageError("--stop must not be empty: a stop string has at least one letter")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "temperature": arguments.temp,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p,
        "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty,
        "penalty_decay": arguments.penalty_decay,
        "seed": arguments.seed,
    }


def _state_file(arguments: argparse.Namespace) -> Path | None:
    """The file of --state. Raises UsageError where it could not be saved when all is done."""
    if not arguments.state:
        return None
    path = Path(arguments.state)
    if path.is_dir():
        raise UsageError(f"--state {path} is a folder: name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--state {path}: {path.parent} is no folder that can be written to")
    return path


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError("with --ids the prompt is a list of numbers, such as 12,7,501") from None
