"""Evaluation on a text: the likelihood of each token, and the KL divergence from a reference's predictions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.evaluation.journal import Journal, digest
from rwkv_npu.evaluation.likelihood import compare, log_likelihood
from rwkv_npu.formats.bundle import artifacts_digest
from rwkv_npu.formats.state import State
from rwkv_npu.model import Model
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.text.tokenizer import END_OF_TEXT

CHUNK = 64  # tokens whose logits are in memory together: 17 MB for a vocabulary of 65536
POSITIONS = (0, 64, 512, 4096)  # first positions of stretches that also have their own scores, to show drift


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Scores of a set of tokens. bits_per_token, perplexity: of the model's predictions, per token.

    kl_mean, kl_p99: KL(reference || model) in nats per token. top1: share of the tokens at which both models find the
    same token most likely. None without a reference.
    """

    tokens: int
    bits_per_token: float
    perplexity: float
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stretch(Figures):
    """Scores of the tokens at positions begin <= i < end of their document. end: None has no limit."""

    begin: int
    end: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """Scores of a whole text. bytes: length of the text, None if unknown.

    bits_per_byte: negative log2 likelihood of the tokens over the bytes of their text, None if these are unknown.
    context: tokens of a document, each read from an empty state; None if the text is one document.
    positions: scores by position, for the stretches that the text has.
    """

    bytes: int | None
    bits_per_byte: float | None
    context: int | None
    positions: tuple[Stretch, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count_bytes(model: Model, ids: np.ndarray) -> int | None:
    """Bytes of the text of `ids`; None if the vocabulary is unknown."""
    if model.tokenizer is None:
        return None
    return sum(len(model.tokenizer.token_bytes(int(token)) or b"") for token in ids)


def evaluate(
    model: Model,
    ids: Sequence[int] | np.ndarray,
    *,
    text_bytes: int | None = None,
    reference: Model | None = None,
    context: int | None = None,
    progress: Callable[[int], object] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Read `ids` after an end-of-text token, and score each of them.

    text_bytes: length of their text. reference: a model that reads the same ids, for comparison.
    context: begin with an end-of-text token and an empty state again after this number of tokens.
    progress: called with the number of tokens since its last call.
    resume: a file for the scores, written at the end and after an interruption too. If it exists, the evaluation
    continues from it, with the same result as without an interruption.
    Raises UsageError for no ids, a reference of another vocabulary size or a file of another evaluation; BackendError
    for logits that are not finite.
    """
    targets = np.asarray(ids, np.int64)
    models = [model] if reference is None else [model, reference]
    _check(targets, models, context)
    columns = ["log_p"] if reference is None else ["log_p", "kl", "agrees"]
    identity = _identity(models, targets, context)
    inputs = np.concatenate([[END_OF_TEXT], targets[:-1]])
    inputs[:: context or len(targets)] = END_OF_TEXT
    with Journal(resume, identity, columns, len(targets), [one.new_state() for one in models]) as journal:
        if progress and journal.done:
            progress(journal.done)
        for piece in _pieces(len(targets), context, journal.done):
            begins = piece.start % (context or len(targets)) == 0
            states = [one.new_state() for one in models] if begins else journal.states
            journal.add(*_score(models, states, inputs[piece], targets[piece]))
            if progress:
                progress(piece.stop - piece.start)
    return _evaluation(journal.scores, text_bytes, context)


def model_identity(model: Model) -> str:
    """Identifies a model's logits: its weights, backends and their precisions. Equal identities: equal logits."""
    source = model.source
    precisions = [str(source.precision_on(name)) for name in model.engine.backends]
    content = model.fingerprint
    if isinstance(source, BundleSource):
        # The choice of int8 projections is only in the manifest.
        manifest = source.bundle.manifest
        in_int8 = [manifest.int8[name].projections for name in precisions if name in manifest.int8]
        content = digest(f"{artifacts_digest(manifest)} {manifest.int8_key} {in_int8}".encode())
    return f"{content} {' '.join(precisions)} {model.describe()}"


def _check(targets: np.ndarray, models: Sequence[Model], context: int | None) -> None:
    if not len(targets):
        raise UsageError("there is nothing to evaluate: the text is empty")
    if len({one.spec.V for one in models}) > 1:
        sizes = " and ".join(str(one.spec.V) for one in models)
        raise UsageError(f"the models have vocabularies of {sizes}: no comparison")
    wrong = targets[(targets < 0) | (targets >= models[0].spec.V)]
    if wrong.size:
        raise UsageError(
            f"token id {wrong[0]} is outside the model's vocabulary of {models[0].spec.V}: was the text encoded for "
            "another model?"
        )
    if context is not None and context < 1:
        raise UsageError(f"context={context}: it must be at least 1")


def _identity(models: Sequence[Model], targets: np.ndarray, context: int | None) -> dict[str, str]:
    reference = model_identity(models[1]) if len(models) > 1 else ""
    return {
        "model": model_identity(models[0]),
        "reference": reference,
        "text": digest(targets.tobytes()),
        "context": str(context),
    }


def _pieces(count: int, context: int | None, done: int) -> Iterator[slice]:
    """Slices to read at once, after `done` tokens: CHUNK tokens, or the rest of a document."""
    length = context or count
    for document in range(0, count, length):
        end = min(document + length, count)
        for start in range(document, end, CHUNK):
            if start >= done:
                yield slice(start, min(start + CHUNK, end))


def _score(
    models: Sequence[Model], states: Sequence[State], inputs: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, np.ndarray], list[State]]:
    """Scores of `targets` when the models read `inputs` after `states`, and the new states.

    The old states stay unchanged, so that they are valid after an interruption.
    """
    read = [one.forward(inputs, state, all_logits=True) for one, state in zip(models, states, strict=True)]
    ours, *references = (logits for logits, _ in read)
    if not references:
        return {"log_p": log_likelihood(ours, targets)}, [state for _, state in read]
    log_p, kl = compare(ours, targets, references[0])
    scores = {"log_p": log_p, "kl": kl, "agrees": ours.argmax(-1) == references[0].argmax(-1)}
    return scores, [state for _, state in read]


def _evaluation(scores: dict[str, np.ndarray], text_bytes: int | None, context: int | None) -> Evaluation:
    count = len(scores["log_p"])
    places = np.arange(count) % (context or count)
    stretches = []
    for begin, end in zip(POSITIONS, (*POSITIONS[1:], None), strict=True):
        chosen = (places >= begin) & (places < (end or count))
        if chosen.any():
            figures = _figures({name: column[chosen] for name, column in scores.items()})
            stretches.append(Stretch(begin=begin, end=end, **figures))
    bits = -float(scores["log_p"].sum()) / np.log(2)
    return Evaluation(
        **_figures(scores),
        bytes=text_bytes,
        bits_per_byte=bits / text_bytes if text_bytes else None,
        context=context,
        positions=tuple(stretches),
    )


def _figures(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `Figures`."""
    nats, kl = -float(scores["log_p"].mean()), scores.get("kl")
    figures = {
        "tokens": len(scores["log_p"]),
        "bits_per_token": nats / np.log(2),
        "perplexity": float(np.exp(nats)),
    }
    if kl is not None:
        figures["kl_mean"], figures["kl_p99"] = float(kl.mean()), float(np.quantile(kl, 0.99))
        figures["top1"] = float(scores["agrees"].mean())
    return figures
