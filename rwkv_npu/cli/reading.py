"""Read a prompt in pieces, with a progress bar. Ctrl-C ends it after a piece, and the tokens read so far are kept."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_npu.formats.state import State
    from rwkv_npu.model import Model

LONG_PROMPT = 1024  # tokens; a shorter prompt shows no progress
PIECE = 512  # tokens; Ctrl-C is checked after each piece


class Interrupt:
    """Handles Ctrl-C. The first sets `asked`, and the current piece or token is finished. The second ends at once."""

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


class Unfinished:
    """The state after a part of a prompt, saved beside the state file when Ctrl-C ends the reading.

    The file's name holds a digest of the model, of the state before the prompt, and of the prompt. So the same command
    finds it, and another command does not. before: number of tokens that the state before the prompt has read.
    """

    def __init__(
        self, state_file: Path | None, start: Path | None, model: Model, ids: Sequence[int], before: int
    ):
        self._model, self._ids, self._before = model, ids, before
        self.path: Path | None = None
        if state_file is not None:
            digest = hashlib.sha256(f"{model.fingerprint} {list(ids)}".encode())
            digest.update(start.read_bytes() if start else b"")
            self.path = state_file.with_name(f"{state_file.name}.{digest.hexdigest()[:12]}.partial")

    def load(self) -> tuple[int, State] | None:
        """(number of prompt tokens that are read, state after them). None if nothing was saved."""
        if self.path is None or not self.path.exists():
            return None
        state = self._model.load_state(self.path)
        return state.tokens_seen - self._before, state

    def save(self, state: State) -> str:
        """Save `state`. Returns text to append to the message about the interruption."""
        read = state.tokens_seen - self._before
        if self.path is None:
            return " while reading the prompt; with --state FILE the tokens read so far would be kept"
        if not read:
            return ""
        state.save(self.path)
        return f": {self.path} keeps {read} of {len(self._ids)} tokens, and the same command continues from there"

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def read_prompt(
    model: Model, ids: Sequence[int], state: State, unfinished: Unfinished, interrupt: Interrupt
) -> tuple[State, int, bool]:
    """Read a prompt, from where `unfinished` stopped. Returns (state, number of tokens read now, True if complete)."""
    done = 0
    kept = unfinished.load()
    if kept is not None:
        done, state = kept
        print(f"continuing from {unfinished.path}: {done} of {len(ids)} tokens are read", file=sys.stderr)
    first = done
    chunk = model.engine.chunk
    piece = chunk * max(1, PIECE // chunk)  # whole chunks, so that pieces do not change the result
    with _Bar(len(ids), done) as bar:
        while done < len(ids) and not interrupt.asked:
            _, state = model.forward(ids[done : done + piece], state, inplace=True, progress=bar.update)
            done = min(done + piece, len(ids))
    return state, done - first, done == len(ids)


class _Bar:
    """A progress bar for a long prompt, on a terminal only."""

    def __init__(self, total: int, done: int):
        self._bar = None
        if total - done >= LONG_PROMPT:
            from tqdm import tqdm  # a short prompt does not wait for this import

            hide_without_terminal = None
            self._bar = tqdm(
                total=total,
                initial=done,
                desc="prompt",
                unit="token",
                leave=False,
                disable=hide_without_terminal,
            )

    def update(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
