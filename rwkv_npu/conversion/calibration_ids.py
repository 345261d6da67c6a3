"""The ids that a conversion calibrates with: of the user's files, of the text that ships with the package, or of the
model's own making where its vocabulary is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkv_npu.conversion.calibration import check_ids
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.state import new_state
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.network import Network
from rwkv_npu.models.spec import Group, Spec
from rwkv_npu.progress import progress
from rwkv_npu.runtime.weights import ModelSource, widened
from rwkv_npu.text.corpus import Tokens, calibration_text, holds_ids, read_tokens
from rwkv_npu.text.sampling import Sampler, SamplingOptions
from rwkv_npu.text.tokenizer import END_OF_TEXT, Tokenizer

TOKENS = 8192  # read at most: half of them are one context
SAMPLED = 1024  # of the model's own making, where each takes a pass
SEQUENCES = 16  # that are sampled at a time

Say = Callable[[str], None]


def read_ids(
    files: Sequence[str], tokenizer: Tokenizer | None, spec: Spec, say: Say, *, at_least: int
) -> np.ndarray | None:
    """(M,) int64, TOKENS at most, the same share of each file; None where no file is given.

    `say` is told what may be wrong with a text. Raises UsageError for a file that is empty, binary or no ids, for
    fewer tokens than `at_least`, and for text where there is no tokenizer.
    """
    if not files:
        return None
    shared = _shared([_read(file, tokenizer, say).ids for file in files])
    return check_ids(shared, spec, at_least=at_least)


def default_ids(tokenizer: Tokenizer | None, source: ModelSource, say: Say, *, at_least: int) -> np.ndarray:
    """(M,) int64 where the user names no text: of the one that ships with the package, or sampled from the model."""
    if tokenizer is not None:
        ids = calibration_text(tokenizer.encode).ids[:TOKENS]
        return check_ids(ids, source.spec, at_least=at_least)
    say(
        "no vocabulary is known for this model: it is calibrated on tokens sampled from it, which says less than a "
        "text (give --tokenizer FILE, or ids to --calibrate)"
    )
    count = max(SAMPLED, at_least)
    with progress("sample", "token", total=count) as bar:
        return sample_ids(source, count, progress=bar.update)


def _read(file: str, tokenizer: Tokenizer | None, say: Say) -> Tokens:
    if tokenizer is None and Path(file).is_file() and not holds_ids(file):
        raise UsageError(
            f"{file} is text, and no vocabulary is known for this model: give --tokenizer FILE, or ids as .json "
            "or .npy"
        )
    tokens = read_tokens(file, tokenizer.encode if tokenizer else _no_words)
    if tokens.bytewise:
        say(
            f"{file}: the vocabulary has nothing but bytes for this text, so that the model hardly knows its "
            "language: what it is used for would calibrate better"
        )
    return tokens


def _no_words(text: str) -> list[int]:
    raise AssertionError("ids need no tokenizer")


def _shared(pieces: list[np.ndarray]) -> np.ndarray:
    """The beginnings of all pieces, equally long as far as they go, TOKENS together. The end of each comes at the end,
    where int8 is measured (quantisation.MEASURED)."""
    share, left = [], TOKENS
    for number, piece in enumerate(sorted(pieces, key=len)):
        share.append(piece[: left // (len(pieces) - number)])
        left -= len(share[-1])
    ends = [len(piece) - len(piece) // 8 for piece in share]
    return np.concatenate(
        [piece[:end] for piece, end in zip(share, ends, strict=True)]
        + [piece[end:] for piece, end in zip(share, ends, strict=True)]
    )


def sample_ids(
    source: ModelSource, count: int, *, seed: int = 0, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """(count,) ids that the model writes by itself, at temperature 1, in SEQUENCES texts one after the other.

    The same every time. `progress` is called with the tokens of each step.
    """
    spec = source.spec
    network, maths = Network(source.program, source.tensor), NumpyMaths(widened(source))

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        return source.evaluate(group, maths, dict(inputs))

    begin = new_state(spec, source.fingerprint, source.initial_states())
    parts = {name: np.stack([part] * SEQUENCES, axis=1) for name, part in begin.parts.items()}
    sampler = Sampler(SamplingOptions(top_p=1.0), seed=seed)
    ids = np.full((1, SEQUENCES), END_OF_TEXT)
    written = []
    for _ in range(-(-count // SEQUENCES)):
        logits = network.logits(run, network.hidden(run, ids, parts))
        ids = np.array([[sampler.sample(row)[0] for row in logits]])
        written.append(ids[0])
        if progress:
            progress(SEQUENCES)
    return np.stack(written, axis=1).reshape(-1)[:count].astype(np.int64)
