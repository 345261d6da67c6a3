"""Write the text that `rwkv-npu convert` calibrates with by default: prose, code, and paragraphs in many languages.

    python tools/calibration_text.py

The parts are mixed, so that the first tokens are a sample of the whole, however many are read. The prose is that of the
running CPython, without the demo model's held-out text. The code is an old version of this project's, in
`calibration_code.txt`. The paragraphs of `calibration_languages.txt` were written for this text.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import demo_corpus

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "rwkv_npu" / "data"
PROSE = 90_000  # bytes
SIGNED = re.compile(r"copyright|author|@\w+\.\w", re.IGNORECASE)  # texts with names of people are left out
# A copy of some code of this project. Using the sources themselves would change the text, and every published int8
# figure, with each change of the code.
OWN = ["tools/calibration_code.txt", "tools/calibration_languages.txt"]


def prose() -> list[str]:
    """Documents of the language reference and of docstrings, in an order given by a hash. No held-out text."""
    held_out = set(demo_corpus.paragraphs((DATA / "demo" / "heldout.txt").read_text("utf-8")))
    training, _ = demo_corpus.split(demo_corpus.collect())
    chosen, size = [], 0
    for text in shuffled(training):
        if size < PROSE and not SIGNED.search(text) and held_out.isdisjoint(demo_corpus.paragraphs(text)):
            chosen.append(text)
            size += len(text.encode())
    return chosen


def pieces(path: Path) -> list[str]:
    """The parts of a file between two blank lines: functions, a paragraph, or a question with its answer."""
    return [piece.strip("\n") for piece in path.read_text("utf-8").split("\n\n\n")]


def shuffled(texts: list[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def main() -> int:
    own = [piece for name in OWN for piece in pieces(ROOT / name)]
    (DATA / "calibration.txt").write_text("\n\n".join(shuffled(prose() + own)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
