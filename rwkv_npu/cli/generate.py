"""`rwkv-npu generate`: print text as it is generated to stdout, and statistics to stderr."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import add_model_flags, load_model
from rwkv_npu.cli.reading import Interrupt, Unfinished, read_prompt
from rwkv_npu.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from rwkv_npu.backends.base import Faults
    from rwkv_npu.formats.state import State
    from rwkv_npu.model import Model
    from rwkv_npu.text.generation import Step

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def add(commands: Any) -> None:
    p = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt. The text goes to stdout, statistics to stderr.",
    )
    add_model_flags(p)
    p.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads it from stdin")
    p.add_argument(
        "-f", "--file", metavar="FILE", help="read the prompt from a file, without its last newline"
    )
    p.add_argument(
        "-e", "--escape", action="store_true", help=r"\n, \t, \r and \\ in --prompt and --stop are escapes"
    )
    p.add_argument(
        "--raw", action="store_true", help="keep a byte order mark and carriage returns of the file"
    )
    p.add_argument("--ids", action="store_true", help="prompt and output are token ids, not text")
    limit = "(default: 256); -1: no limit; 0: only read the prompt into --state"
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help=limit)
    p.add_argument(
        "--temp",
        dest="temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="temperature; 0 is greedy (default: 1)",
    )
    p.add_argument("--top-p", type=float, default=0.85, metavar="P", help="1 is off (default: 0.85)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    p.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="(default: 0)")
    p.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="(default: 0)")
    p.add_argument("--penalty-decay", type=float, default=0.996, metavar="X", help="(default: 0.996)")
    p.add_argument("-s", "--seed", type=int, metavar="N", help="(default: a different text each time)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    ids = "end at this token too, beside the model's own end of text; repeatable"
    p.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID", help=ids)
    never = "never sample this token; repeatable"
    p.add_argument("--ban", action="append", default=[], type=int, metavar="ID", help=never)
    keep = "continue from this state file if it exists, and save the state there at the end"
    p.add_argument("--state", metavar="FILE", help=keep)
    p.add_argument("--state-in", metavar="FILE", help="start from this state file, which is never written")
    p.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    lines = "print JSON lines: token, text, logprob and finish_reason of each token, statistics last"
    p.add_argument("--json", action="store_true", help=lines)
    p.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: the N most likely tokens at each step"
    )
    p.add_argument("-v", "--verbose", action="store_true", help="explain the choice of backends on stderr")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # 1. Check the command line, before a model is loaded.
    prompt = _prompt(arguments)
    if arguments.ids:
        _parse_ids(prompt)
    _check(arguments)
    state_file, tuned = _state_file(arguments)
    start = _start_file(arguments, state_file)
    if start is None and not prompt.strip(" ," if arguments.ids else ""):
        raise UsageError("the prompt is empty and there is no state to continue: give one of them")

    # 2. Load.
    begin = time.perf_counter()
    model = load_model(arguments, verbose=arguments.verbose)
    with model, Interrupt() as interrupt:
        state = model.new_state() if start is None else model.load_state(start, arguments.layout)
        ids: Sequence[int] = _parse_ids(prompt) if arguments.ids else model.encode_prompt(prompt)
        if not len(ids) and state.logits is None:
            raise UsageError(
                f"the prompt is empty, and {start} holds no prediction to continue from: give a prompt"
            )
        statistics = Statistics(load=time.perf_counter() - begin, faults=model.engine.counters.faults)
        if arguments.echo:
            print(prompt, end=" " if arguments.ids else "", flush=True)

        # 3. Read the prompt, then generate.
        unfinished = Unfinished(state_file, start, model, ids, state.tokens_seen)
        begin = time.perf_counter()
        state, statistics.prompt_tokens, complete = read_prompt(model, ids, state, unfinished, interrupt)
        statistics.prompt = time.perf_counter() - begin
        ends_line = True
        if complete and arguments.max_tokens != 0:
            state, ends_line = _generate(model, state, arguments, statistics, interrupt, begin)

        # 4. Save. An unfinished prompt leaves the state file as it was.
        if not complete:
            note = unfinished.save(state)
            print(f"rwkv-npu: interrupted{note}", file=sys.stderr)
        elif tuned:
            print(f"{state_file} is a tuned state and stays as it is", file=sys.stderr)
        elif state_file:
            state.save(state_file)
            unfinished.remove()
    if arguments.json:
        print(json.dumps({"statistics": statistics.to_json()}))
    else:
        _end_line(ends_line)
    print(_fitted(statistics.line()), file=sys.stderr)
    return 130 if interrupt.asked else 0


# -- the text --------------------------------------------------------------------------------------------


def _generate(
    model: Model,
    state: State,
    arguments: argparse.Namespace,
    statistics: Statistics,
    interrupt: Interrupt,
    begin: float,
) -> tuple[State, bool]:
    """Print the continuation of `state`. Returns the state after it, and True if the text ends with a newline.

    begin: time at which reading the prompt began.
    """
    text = "\n"
    step = None
    logits = state.logits
    for step in model.generate(
        [],
        state,
        stop=arguments.stop,
        stop_ids=arguments.stop_id,
        banned=arguments.ban,
        max_tokens=None if arguments.max_tokens == -1 else arguments.max_tokens,
        **_sampling(arguments),
    ):
        statistics.total = time.perf_counter() - begin
        statistics.tokens += 1
        statistics.first_token = statistics.first_token or statistics.total
        held = step.held if interrupt.asked else ""  # nothing follows that could complete a stop string
        if arguments.json:
            print(_json_line(model, step, step.text + held, logits, arguments.logprobs), flush=True)
        elif arguments.ids:
            print(step.token, end=" ", flush=True)
            text = " "
        elif step.text or held:
            print(step.text + held, end="", flush=True)
            text = step.text + held
        if interrupt.asked:
            break
        if arguments.logprobs and step.finish_reason is None:
            logits = step.state.logits
    return (state if step is None else step.state), text.endswith("\n")


def _json_line(model: Model, step: Step, text: str, logits: np.ndarray | None, logprobs: int | None) -> str:
    facts: dict[str, Any] = {"token": step.token, "text": text, "logprob": step.logprob}
    if logprobs and logits is not None:
        facts["top"] = _most_likely(model, logits, logprobs)
    return json.dumps({**facts, "finish_reason": step.finish_reason}, ensure_ascii=False)


def _most_likely(model: Model, logits: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The most likely tokens of logits (V,), before temperature, penalties and filters."""
    import numpy as np

    exact = logits.astype(np.float64)
    logprobs = exact - exact.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    return [
        {
            "token": int(token),
            "text": model.tokenizer.decode([int(token)]) if model.tokenizer else "",
            "logprob": float(logprobs[token]),
        }
        for token in np.argsort(-logprobs, kind="stable")[:count]
    ]


def _end_line(ends_line: bool) -> None:
    """Start a new line for the statistics on a terminal. A pipe or a file gets the text alone."""
    if sys.stdout.isatty():
        print(flush=True)
    elif not ends_line and (sys.stderr.isatty() or _same_file(sys.stdout, sys.stderr)):
        print(file=sys.stderr)


def _fitted(line: str) -> str:
    """Break a line of statistics to the width of the terminal. In a log it stays one line."""
    if not sys.stderr.isatty():
        return line
    width = shutil.get_terminal_size().columns
    rows: list[str] = []
    for part in line.split(" | "):
        if rows and len(f"{rows[-1]} | {part}") <= width:
            rows[-1] += f" | {part}"
        else:
            rows.append(part)
    return "\n".join(rows)


def _same_file(a: Any, b: Any) -> bool:
    try:
        return os.path.samestat(os.fstat(a.fileno()), os.fstat(b.fileno()))
    except (OSError, ValueError):  # closed, or not a file
        return False


@dataclass
class Statistics:
    """Seconds and tokens of one run. `first_token` and `total` count from the start of reading the prompt."""

    load: float = 0.0
    prompt_tokens: int = 0
    prompt: float = 0.0
    first_token: float = 0.0
    tokens: int = 0
    total: float = 0.0
    faults: Faults | None = None  # of the NPU

    def line(self) -> str:
        parts = [f"load {self.load:.2f} s"]
        if self.prompt_tokens:
            parts.append(f"prompt {self.prompt_tokens} tokens, {self.prompt_tokens / self.prompt:.1f} t/s")
        if self.tokens:
            parts.append(f"first token {self.first_token:.2f} s")
        decode = self.total - self.first_token
        rate = f", {(self.tokens - 1) / decode:.1f} t/s" if self.tokens > 1 and decode > 0 else ""
        parts.append(f"generated {self.tokens} tokens{rate}")
        if self.faults and (self.faults.calls or self.faults.groups):
            groups = f", on the CPU: {', '.join(self.faults.groups)}" if self.faults.groups else ""
            parts.append(f"{self.faults.calls} calls to the NPU failed{groups}")
        return " | ".join(parts)

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        del facts["faults"]
        failed = self.faults.calls if self.faults else 0
        return {**facts, "failed_npu_calls": failed}


# -- arguments -------------------------------------------------------------------------------------------


def _prompt(arguments: argparse.Namespace) -> str:
    """The prompt, "" if there is only a state to continue. With --escape, also replaces the escapes of --stop."""
    from rwkv_npu.text.corpus import read_text

    if arguments.prompt is not None and arguments.file is not None:
        raise UsageError("give --prompt or --file, not both")
    if arguments.escape:
        arguments.stop = [_unescape(text) for text in arguments.stop]
    source = arguments.file
    if source is None and (arguments.prompt == "-" or (arguments.prompt is None and not sys.stdin.isatty())):
        source = "-"
    if source is not None:
        text = read_text(source, raw=arguments.raw)
        return text.removesuffix("\n")  # editors and echo add a newline, which is not part of the prompt
    if arguments.prompt is None and not (arguments.state or arguments.state_in):
        raise UsageError("there is no prompt: give --prompt TEXT, --file FILE, or pipe one in")
    prompt: str = arguments.prompt or ""
    if any(
        "\ud800" <= letter <= "\udfff" for letter in prompt
    ):  # Python's form of bytes that it cannot decode
        raise UsageError("--prompt is not UTF-8 text")
    return _unescape(prompt) if arguments.escape else prompt


def _unescape(text: str) -> str:
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def _check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for values that would be refused after the model is loaded."""
    from rwkv_npu.text.sampling import Sampler, SamplingOptions

    options = _sampling(arguments)
    seed = options.pop("seed")
    Sampler(SamplingOptions(**options), seed=seed)
    if arguments.max_tokens < -1:
        raise UsageError(f"--max-tokens {arguments.max_tokens}: it must be at least -1")
    if "" in arguments.stop:
        raise UsageError("--stop must not be empty: a stop string has at least one character")
    if arguments.json and arguments.echo:
        raise UsageError("--echo is for text: with --json leave it out")
    if arguments.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs is for --json")
    if arguments.logprobs is not None and arguments.logprobs < 0:
        raise UsageError(f"--logprobs {arguments.logprobs}: it must be at least 0")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options and the seed, as arguments of `Model.generate`."""
    from rwkv_npu.text.sampling import SamplingOptions

    return {name: getattr(arguments, name) for name in (*SamplingOptions.__dataclass_fields__, "seed")}


def _state_file(arguments: argparse.Namespace) -> tuple[Path | None, bool]:
    """The file of --state, and True if it holds a tuned state, which is never written.

    Raises UsageError if the state could not be saved at the end.
    """
    from rwkv_npu.formats.state import is_tuned

    if not arguments.state:
        return None, False
    path = Path(arguments.state)
    try:
        target = Path(os.path.realpath(path))  # saving writes to the target of a link, and keeps the link
        if target.is_dir():
            raise UsageError(f"--state {path} is a folder: name a file")
        if target.exists() and not target.is_file():
            raise UsageError(f"--state {path} is no plain file: a state cannot be saved there")
        if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
            raise UsageError(f"--state {path}: {target.parent} is no folder that can be written to")
        tuned = target.exists() and is_tuned(path)
        if target.exists() and not tuned and not os.access(target, os.W_OK):
            raise UsageError(f"--state {path} may not be written: --state-in {path} only reads it")
    except (OSError, ValueError) as error:
        raise UsageError(f"--state {path}: {getattr(error, 'strerror', None) or error}") from error
    if tuned and arguments.max_tokens == 0:
        raise UsageError(
            f"--state {path} is a tuned state, which is never written: name another file to save to"
        )
    return path, tuned


def _start_file(arguments: argparse.Namespace, state_file: Path | None) -> Path | None:
    """The file of the state to start from: --state if it exists, else --state-in."""
    given = Path(arguments.state_in) if arguments.state_in else None
    if given is not None and not given.is_file():
        raise UsageError(f"--state-in {given}: there is no such file")
    return state_file if state_file is not None and state_file.exists() else given


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError("with --ids the prompt is a list of numbers, such as 12,7,501") from None
