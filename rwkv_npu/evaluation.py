"""How well a model predicts a text, and how far it is from another that reads the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.model import Model
from rwkv_npu.tokenizer import END_OF_TEXT

CHUNK = 64  # tokens whose logits are in memory together


@dataclass(frozen=True)
class Evaluation:
    """bits_per_byte: negative log2 likelihood of the tokens over the bytes of their text (None without text).

    perplexity: per token. kl_mean, kl_p99: KL(reference || model) in nats per token; top1: share of positions
    where both would choose the same token. None without a reference.
    """

    tokens: int
    bytes: int | None
    bits_per_byte: float | None
    perplexity: float
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Model,
    ids: Sequence[int],
    *,
    text_bytes: int | None = None,
    reference: Model | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Read `ids` after an end-of-text token and score each of them; `text_bytes` is the length of their text.

    Raises UsageError for no ids or a reference of another vocabulary size, BackendError for logits that are not
    finite.
    """
    if not len(ids):
        raise UsageError("there is nothing to evaluate: the text is empty")
    if reference is not None and reference.spec.V != model.spec.V:
        raise UsageError(
            f"the models have vocabularies of {model.spec.V} and {reference.spec.V}: no comparison"
        )
    targets = np.asarray(ids, np.int64)
    inputs = np.concatenate([[END_OF_TEXT], targets[:-1]])
    state = model.new_state()
    reference_state = reference.new_state() if reference else None
    likelihood, divergences, agreed = 0.0, [], 0
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        logits, state = model.forward(inputs[rows], state, all_logits=True, inplace=True)
        log_p = log_softmax(logits)
        likelihood += float(np.take_along_axis(log_p, targets[rows, None], 1).sum(dtype=np.float64))
        if reference is not None:
            logits, reference_state = reference.forward(
                inputs[rows], reference_state, all_logits=True, inplace=True
            )
            log_q = log_softmax(logits)
            divergences.append((np.exp(log_q) * (log_q - log_p)).sum(-1, dtype=np.float64))
            agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        if progress:
            progress(len(log_p))
    count = len(targets)
    kl = np.concatenate(divergences) if divergences else None
    return Evaluation(
        tokens=count,
        bytes=text_bytes,
        bits_per_byte=-likelihood / np.log(2) / text_bytes if text_bytes else None,
        perplexity=float(np.exp(-likelihood / count)),
        kl_mean=None if kl is None else float(kl.mean()),
        kl_p99=None if kl is None else float(np.quantile(kl, 0.99)),
        top1=None if kl is None else agreed / count,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(M, V) fp32 -> (M, V) fp64: what two models differ by can be less than fp32 resolves."""
    if not np.isfinite(logits).all():
        raise BackendError("the model's logits are not finite: its weights, or its precision, are at fault")
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
