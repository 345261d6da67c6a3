"""The ids that a conversion calibrates with: of the user's files, of the text that ships with the package, or of the
model's own making where its vocabulary is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.maths import NumpyMaths
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Network
from rwkv_npu.sampling import Sampler, SamplingOptions
from rwkv_npu.sources import ModelSource
from rwkv_npu.spec import Group
from rwkv_npu.state import new_state
from rwkv_npu.texts import Tokens, calibration_text, holds_ids, read_tokens
from rwkv_npu.tokenizer import END_OF_TEXT, Tokenizer

TOKENS = 8192  # read at most: half of them are one context
SAMPLED = 1024  # of the model's own making, where each takes a pass
SEQUENCES = 16  # that are sampled at a time

Say = Callable[[str], None]


def calibration_ids(
    files: Sequence[str],
    tokenizer: Tokenizer | None,
    source: ModelSource,
    *,
    say: Say = lambda line: None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """(M,) int64, TOKENS at most, of several files the same share of each.

    `say` is told what was chosen, and what about it may be wrong; `progress` of each token that is sampled.
    Raises UsageError for a file that is empty, binary or no ids, or for text where there is no tokenizer.
    """
    if files:
        read = [_read(file, tokenizer, say) for file in files]
        return _shared([tokens.ids for tokens in read])
    if tokenizer is not None:
        say("calibrating with the text that ships with rwkv-npu")
        return calibration_text(tokenizer.encode).ids[:TOKENS]
    say(
        "no vocabulary is known for this model: calibrating with tokens sampled from it, which is a weaker "
        "check than a text (give --tokenizer FILE, or --calibrate with ids)"
    )
    return sample_ids(source, SAMPLED, progress=progress)


def _read(file: str, tokenizer: Tokenizer | None, say: Say) -> Tokens:
    if tokenizer is None and not holds_ids(file):
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
    """The beginnings of all pieces, equally long as far as they go, TOKENS together."""
    share, left = [], TOKENS
    for number, piece in enumerate(sorted(pieces, key=len)):
        share.append(piece[: left // (len(pieces) - number)])
        left -= len(share[-1])
    return np.concatenate(share)


def sample_ids(
    source: ModelSource, count: int, *, seed: int = 0, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """(count,) ids that the model writes by itself, at temperature 1, in SEQUENCES texts one after the other.

    The same every time. `progress` is called with the tokens of each step.
    """
    spec = source.spec
    network, maths = Network(source.program, source.tensor), NumpyMaths(source.tensor)

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
