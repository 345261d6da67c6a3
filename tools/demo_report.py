"""Write the shipped files of the demo model, and PROVENANCE.md, which compares the model with plain compressors.

All figures are bits per byte of the same held-out text. Documents are joined by one zero byte, for the model by id 0.
Each method encodes these bytes, but they do not count in the length of the text.
"""

import csv
import gzip
import json
import lzma
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from demo_model import DemoModel, stepwise
from demo_training import held_out_bits, load_weights
from demo_vocab import Vocabulary

ORDER = 5
PROMPTS = ["Return the ", "The default value is", "This method", "Raised when", "If the", ""]
CURVE_ROWS = 12


def sample(
    model: DemoModel,
    vocabulary: Vocabulary,
    prompt: str,
    *,
    count: int = 80,
    temperature: float = 0.8,
    top_p: float = 0.85,
    seed: int = 7,
) -> str:
    """Continue a prompt by up to `count` tokens, until id 0. Returns the prompt and its continuation."""
    torch.manual_seed(seed)
    ids = vocabulary.encode(prompt) or [0]
    given = len(ids) if prompt else 0
    with torch.no_grad():
        logits, state = model(torch.tensor([ids]))
        while len(ids) < given + count:
            last = logits[0, -1, : len(vocabulary)] / max(temperature, 1e-6)
            probability, order = last.softmax(0).sort(descending=True)
            kept = probability * (probability.cumsum(0) - probability < top_p)
            ids.append(int(order[torch.multinomial(kept / kept.sum(), 1)]))
            if ids[-1] == 0:
                break
            logits, state = model(torch.tensor([ids[-1:]]), state, stepwise)
    return vocabulary.decode(ids)


def joined(texts: Sequence[str]) -> bytes:
    return b"\0".join(text.encode() for text in texts)


def ngram_bits(training: bytes, text: bytes, order: int = ORDER) -> float:
    """Bits that a byte n-gram model needs for `text`, with Witten-Bell interpolation down to a uniform distribution."""
    # By length: number of occurrences of these bytes.
    uses: list[dict[bytes, int]] = [{} for _ in range(order + 1)]
    for length in range(order + 1):
        counts = uses[length]
        for end in range(length, len(training) + 1):
            piece = training[end - length : end]
            counts[piece] = counts.get(piece, 0) + 1
    # By length: number of different bytes that follow.
    followers: list[dict[bytes, int]] = [{} for _ in range(order)]
    for length in range(order):
        for piece in uses[length + 1]:
            followers[length][piece[:-1]] = followers[length].get(piece[:-1], 0) + 1
    bits = 0.0
    for at in range(len(text)):
        chance = 1 / 256
        for length in range(min(order - 1, at) + 1):
            context = text[at - length : at]
            kinds = followers[length].get(context, 0)
            if not kinds:
                break
            seen = uses[length + 1].get(text[at - length : at + 1], 0)
            chance = (seen + kinds * chance) / (uses[length][context] + kinds)
        bits -= math.log2(chance)
    return bits


def baselines(training: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """Bits per byte of the held-out texts by name of the method."""
    known, text = joined(training), joined(held_out)
    preset = lzma.PRESET_EXTREME | 9
    both = len(lzma.compress(known + b"\0" + text, preset=preset)) - len(lzma.compress(known, preset=preset))
    sizes = {
        f"byte {ORDER}-gram, interpolated (Witten-Bell), of the training text": ngram_bits(known, text) / 8,
        "xz -9e of the training text and the held-out text, less that of the training text": both,
        "xz -9e": len(lzma.compress(text, preset=preset)),
        "zlib, level 9": len(zlib.compress(text, 9)),
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
    }
    counted = sum(len(part.encode()) for part in held_out)
    return {name: 8 * size / counted for name, size in sizes.items()}


def loss_curve(path: Path) -> str:
    """A Markdown table of about a dozen rows of loss.csv."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    every = max(1, math.ceil(len(rows) / CURVE_ROWS))
    shown = rows[len(rows) - 1 :: -every][::-1]
    lines = [" | ".join(name.replace("_", " ") for name in header), "|".join(["--:"] * len(header))]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in shown)])


def command_line(start: dict[str, Any]) -> str:
    """The shell command of one start of the run. A resumed run has several starts."""
    arguments = {name: value for name, value in start["arguments"].items() if name != "corpus"}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in arguments.items())
    return f"python tools/train_demo.py train --out RUN --corpus ... {flags}    # from step {start['step']}"


def ship(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def write(run: Path, data: Path, training: Sequence[str], held_out: Sequence[str]) -> None:
    data.mkdir(parents=True, exist_ok=True)
    for source, name in (("best.pth", "model.pth"), ("vocab.txt", "vocab.txt"), ("loss.csv", "loss.csv")):
        ship(run / source, data / name)
    write_text(data / "heldout.txt", "\n\n".join(held_out) + "\n")
    model, vocabulary = load_weights(data / "model.pth"), Vocabulary.read(data / "vocab.txt")
    encoded = [vocabulary.encode(text) for text in held_out]
    size = sum(len(text.encode()) for text in held_out)
    figures = {"**this model**": held_out_bits(model, encoded, size)} | baselines(training, held_out)
    samples = [sample(model, vocabulary, prompt) for prompt in PROMPTS]
    starts = json.loads((run / "arguments.json").read_text("utf-8"))
    corpus = starts[-1]["arguments"]["corpus"]
    dimensions = model.size
    text = Template(PROVENANCE).substitute(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        dimensions=f"D = {dimensions.embedding}, L = {dimensions.layers}, F = {dimensions.ffn}, "
        f"V = {dimensions.vocabulary}",
        file_size=f"{(data / 'model.pth').stat().st_size:,}",
        tokens=len(vocabulary.tokens),
        unused=dimensions.vocabulary - len(vocabulary),
        corpus=", ".join(corpus) if isinstance(corpus, list) else corpus,
        training_bytes=f"{sum(len(text.encode()) for text in training):,}",
        training_documents=f"{len(training):,}",
        held_out_bytes=f"{size:,}",
        held_out_documents=len(held_out),
        bytes_per_token=f"{size / sum(map(len, encoded)):.2f}",
        commands="\n".join(map(command_line, starts)),
        versions=", ".join(f"{name} {version}" for name, version in starts[-1]["versions"].items()),
        figures="\n".join(f"| {name} | {bits:.3f} |" for name, bits in figures.items()),
        curve=loss_curve(data / "loss.csv"),
        samples="\n\n".join(f"```\n{text}\n```" for text in samples),
    )
    write_text(data / "PROVENANCE.md", text)


def write_text(target: Path, text: str) -> None:
    """Write a file atomically."""
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, target)


PROVENANCE = """\
# The demo model

A small RWKV-7 that was trained for this project, so that everything can be tried without a download. It
writes English in the register of Python's documentation; it knows nothing and follows no instructions.
This file is written by `tools/train_demo.py report`.

| file | content |
|---|---|
| `model.pth` | official RWKV-7 layout, bf16, $parameters parameters ($dimensions), $file_size bytes |
| `vocab.txt` | $tokens tokens in the World file format; id 0 ends a text, the last $unused rows are unused |
| `loss.csv` | the loss curve |
| `heldout.txt` | the held-out text, which `rwkv-npu eval` reads by default |

## Data and licence

The prose that ships with CPython: the language reference in `pydoc_data.topics`, and docstrings and block
comments of the standard library and its tests, cleaned by `tools/demo_corpus.py` (doctests, tables and code
dropped, paragraphs put on one line, copies dropped). Collections, newest first: $corpus.

Copyright (c) 2001 Python Software Foundation; all rights reserved. Python and its documentation are licensed
under the PSF License Agreement, version 2 (PSF-2.0, <https://docs.python.org/3/license.html>); a few modules
carry notices of their own, listed there. `heldout.txt` is an extract of that text, changed only by the cleaning
named above, and stays under that licence. The weights and the vocabulary are under this project's (Apache-2.0).

- training: $training_documents documents, $training_bytes bytes
- held out: $held_out_documents documents, $held_out_bytes bytes ($bytes_per_token bytes a token): 3 % of the
  documents by a hash of their names, tests excepted, less those that share a paragraph with the training text

## Training

```
python3.13 tools/demo_corpus.py > 3.13.0.jsonl    # and so on, once per collection
$commands
python tools/train_demo.py report --out RUN --corpus ...
```

$versions. The schedule follows the clock, so a run on another machine takes another number of steps.
A run that was stopped and resumed has several lines of `train` above; what followed the last checkpoint was
lost. The weights are those of the lowest line of `loss.csv`, so its figure is chosen on the text that it
measures and a little kind; the curve shows by how much. Not every line is shown here.

$curve

## Held-out text

| method | bits per byte |
|---|--:|
$figures

The model reads rows of 1,024 tokens, each from an empty state. Documents are joined by one zero byte or id 0,
which is paid for and not counted.

## Samples

Temperature 0.8, top-p 0.85, seed 7, up to 80 tokens; the last has no prompt.

$samples
"""
