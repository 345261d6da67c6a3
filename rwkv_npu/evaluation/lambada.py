"""LAMBADA: how often a model predicts the last word of a passage (Paperno et al., arXiv 1606.06031).

Scores follow the task `lambada_openai` of EleutherAI's lm-evaluation-harness. The target is the last space of a text
and everything after it. Its tokens are the tokens of the whole text after those of the context. A text is right if each
token of its target is the most likely one. Perplexity is exp of the mean negative log-likelihood of the targets. One
thing differs: here a text is read after an end-of-text token, and the harness has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.evaluation.journal import Journal, digest
from rwkv_npu.evaluation.likelihood import log_likelihood
from rwkv_npu.evaluation.text import model_identity
from rwkv_npu.model import Model
from rwkv_npu.text.corpus import read_text
from rwkv_npu.text.tokenizer import END_OF_TEXT


class Passage(NamedTuple):
    """A text without its last word, and that word with the space before it."""

    context: str
    target: str


@dataclass(frozen=True)
class Lambada:
    """The scores of a model. accuracy: share of the texts whose target was predicted. accuracy_error: its standard
    error, None for one text. perplexity: per target. reference: the scores of a reference model.
    """

    texts: int
    accuracy: float
    accuracy_error: float | None
    perplexity: float
    reference: Lambada | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_lambada(path: str) -> list[Passage]:
    """Passages of a JSONL file, one {"text": ...} a line; other keys are ignored. Raises UsageError naming the line."""
    passages = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                passages.append(split(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UsageError(
                    f'{path}, line {number}: a text of two words at least is needed, as {{"text": "..."}}'
                ) from None
    if not passages:
        raise UsageError(f"{path} holds no texts")
    return passages


def split(text: str) -> Passage:
    """Split a text before its last word. Raises ValueError for a text of one word."""
    context, _, word = text.strip().rpartition(" ")
    if not context:
        raise ValueError("a text of one word")
    # Spaces at the end of a context belong to the target, as they do in tokens.
    bare = context.rstrip()
    return Passage(bare, f"{context[len(bare) :]} {word}")


def evaluate_lambada(
    model: Model,
    passages: Sequence[Passage],
    *,
    reference: Model | None = None,
    progress: Callable[[int], object] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Lambada:
    """Score the last word of every passage; see `evaluate` for `progress` and `resume`.

    Raises UsageError for no passages, or a file of another evaluation; TokenizerError where a model has no tokenizer;
    BackendError for logits that are not finite.
    """
    if not passages:
        raise UsageError("there is nothing to evaluate: no texts")
    models = {"": model} if reference is None else {"": model, "reference.": reference}
    columns = [prefix + name for prefix in models for name in ("log_p", "right")]
    identity = {
        "model": model_identity(model),
        "reference": model_identity(reference) if reference else "",
        "set of texts": digest(json.dumps(passages).encode()),
        "tokenizer": " ".join(one.tokenizer.digest for one in models.values() if one.tokenizer),
    }
    with Journal(resume, identity, columns, len(passages)) as journal:
        if progress and journal.done:
            progress(journal.done)
        for passage in passages[journal.done :]:
            scores = [score for scoring in models.values() for score in _score(scoring, passage)]
            journal.add({name: np.array([score]) for name, score in zip(columns, scores, strict=True)})
            if progress:
                progress(1)
    results = [_lambada(journal.scores[f"{p}log_p"], journal.scores[f"{p}right"]) for p in models]
    return replace(results[0], reference=results[1]) if reference else results[0]


def _score(model: Model, passage: Passage) -> tuple[float, bool]:
    """Log-likelihood of the target, and True if each of its tokens is the most likely one."""
    context = model.encode(passage.context)
    both = model.encode(passage.context + passage.target)
    # If a token crosses the boundary, the harness would score tokens that do not spell the target. Encode it alone.
    apart = both[: len(context)] != context
    target = model.encode(passage.target) if apart else both[len(context) :]
    first, state = model.forward([END_OF_TEXT, *context])
    logits = first[None]
    if len(target) > 1:
        more, _ = model.forward(target[:-1], state, all_logits=True, inplace=True)
        logits = np.concatenate([logits, more])
    return float(log_likelihood(logits, np.array(target)).sum()), bool((logits.argmax(-1) == target).all())


def _lambada(log_p: np.ndarray, right: np.ndarray) -> Lambada:
    count = len(right)
    error = float(right.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return Lambada(count, float(right.mean()), error, float(np.exp(-log_p.mean())))
