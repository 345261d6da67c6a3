"""`rwkv-npu chat`: a conversation on the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import add_model_flags, load_model
from rwkv_npu.cli.flags import as_flags
from rwkv_npu.cli.serve import model_template
from rwkv_npu.errors import RwkvNpuError, UsageError

if TYPE_CHECKING:
    from rwkv_npu.cli.conversation import Conversation
    from rwkv_npu.text.chat import Piece

HELP = """\
/undo          remove the last message and its answer
/retry         generate the last answer again
/system TEXT   restart with this instruction (without TEXT: none)
/think WAY     off, free, low, medium or high
/save NAME     save the conversation; /load NAME continues it
/stats         tokens and speed of the last answer
/quit          or Ctrl-D
A line that ends with \\ continues on the next. Ctrl-C stops an answer."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add(commands: Any) -> None:
    p = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model. Commands begin with /: /help lists them.",
    )
    add_model_flags(p)
    p.add_argument("--system", default="", metavar="TEXT", help="instruction before the first message")
    p.add_argument("--state", metavar="FILE", help="conversation to continue; saved there at the end")
    p.add_argument("--template", help="raven, world, g1, g1-20250922 or FILE.jinja (default: by the model)")
    p.add_argument("--think", default="off", help="off (default), free, low, medium or high")
    p.add_argument(
        "-n", "--max-tokens", type=int, default=2048, metavar="N", help="limit of an answer (default: 2048)"
    )
    p.add_argument("--temp", type=float, metavar="X", help="temperature (default: the template's)")
    p.add_argument("--top-p", type=float, metavar="X", help="default: the template's")
    p.add_argument("-s", "--seed", type=int, metavar="N", help="seed, for reproducible answers")
    p.add_argument("-v", "--verbose", action="store_true", help="print what was loaded, and why")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.cli.conversation import Conversation

    state = Path(arguments.state) if arguments.state else None
    if state is not None and not os.access(state.parent, os.W_OK):
        raise UsageError(f"--state {state}: cannot write to the folder {state.parent}")
    options = {"temperature": arguments.temp, "top_p": arguments.top_p, "seed": arguments.seed}
    with load_model(arguments, verbose=arguments.verbose) as model:
        template = model_template(arguments.model, arguments.template, model.spec.V)
        conversation = Conversation(
            model,
            template,
            system=arguments.system,
            think=arguments.think,
            max_tokens=arguments.max_tokens,
            options={name: value for name, value in options.items() if value is not None},
        )
        with contextlib.closing(conversation) as chat:
            if state is not None and state.exists():
                chat.load(state)
            _talk(chat, _lines(template.names["user"]))
            if state is not None:
                chat.save(state)
    return 0


def _talk(chat: Conversation, lines: Iterator[str]) -> None:
    """Answer each line. An error is printed, and the next line is read."""
    statistics = _Statistics()
    for line in lines:
        try:
            if any("\ud800" <= char <= "\udfff" for char in line):
                raise UsageError("a line that is not UTF-8 text was left out")
            if not line.startswith("/"):
                if line.strip():
                    _print_answer(chat.ask(line), statistics)
            elif not _command(chat, line, statistics):
                return
        except RwkvNpuError as error:
            print(as_flags(str(error)), file=sys.stderr)


class _Statistics:
    """Times of the last answer, in seconds."""

    first = total = 0.0

    def line(self, chat: Conversation) -> str:
        decode = self.total - self.first
        rate = (
            f", {(chat.answer_tokens - 1) / decode:.1f} t/s" if chat.answer_tokens > 1 and decode > 0 else ""
        )
        return (
            f"read {chat.prompt_tokens} tokens, first text after {self.first:.2f} s, "
            f"wrote {chat.answer_tokens} tokens{rate}"
        )


def _print_answer(pieces: Iterator[Piece], statistics: _Statistics) -> None:
    """Print an answer as it arrives, with dimmed thoughts. Ctrl-C ends the answer, not the conversation."""
    begin, statistics.first = time.monotonic(), 0.0
    styled, thinking = sys.stdout.isatty(), False
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            statistics.first = statistics.first or time.monotonic() - begin
            if piece.thought and not styled:
                continue  # a pipe receives the answer without its thought
            if piece.thought != thinking:
                thinking = piece.thought
                print(DIM if thinking else f"{PLAIN}\n", end="")
            print(piece.text, end="", flush=True)
    statistics.total = time.monotonic() - begin
    print(PLAIN if thinking else "", flush=True)


def _command(chat: Conversation, line: str, statistics: _Statistics) -> bool:
    """Run a slash command. Returns False if it ends the conversation."""
    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if word in ("/quit", "/exit", "/bye"):
        return False
    if word == "/undo":
        chat.undo()
    elif word == "/retry":
        _print_answer(chat.retry(), statistics)
    elif word == "/system":
        chat.set_system(rest)
    elif word == "/think":
        chat.think = rest or "free"
    elif word in ("/save", "/load"):
        if not rest:
            raise UsageError(f"{word} needs a name")
        path = Path(rest if rest.endswith(".safetensors") else f"{rest}.safetensors")
        (chat.save if word == "/save" else chat.load)(path)
        print(f"{'saved to' if word == '/save' else 'loaded from'} {path}", file=sys.stderr)
    elif word == "/stats":
        print(statistics.line(chat), file=sys.stderr)
    elif word == "/help":
        print(HELP, file=sys.stderr)
    else:
        raise UsageError(f"no such command: {word[:20]} (/help lists the commands)")
    return True


def _lines(user: str) -> Iterator[str]:
    """The user's lines, joined where one ends with a backslash. Ctrl-D ends the iterator."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # an invalid line must not take the lines after it along
        sys.stdin.reconfigure(errors="surrogateescape")
    ask = _editor(f"{user}: ") if sys.stdin.isatty() else input
    while True:
        try:
            line = ask()
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{ask()}"
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt, Ctrl-C clears the line
            print("", file=sys.stderr)
            continue
        yield line


def _editor(prompt: str) -> Callable[[], str]:
    """A line editor with history: prompt_toolkit's if installed, else readline's."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (importing it gives `input` line editing)
        return lambda: input(prompt)
    from rwkv_npu.formats.files import cache_dir

    folder = cache_dir()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
    session: Any = PromptSession(history=FileHistory(str(folder / "chat-history")) if writable else None)
    return lambda: str(session.prompt(prompt))
