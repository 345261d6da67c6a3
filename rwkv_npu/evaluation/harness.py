"""Runs EleutherAI's lm-evaluation-harness (lm-eval 0.4) on a model: an adapter, and a call of its command line.

The harness has a table of models and no plugins. So the model is registered in this process, and `lm-eval run` is
called here. As in its own models, a text without context begins after an end-of-text token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from rwkv_npu.errors import UsageError
from rwkv_npu.evaluation.likelihood import log_likelihood
from rwkv_npu.evaluation.text import CHUNK
from rwkv_npu.model import Model
from rwkv_npu.progress import progress
from rwkv_npu.text.tokenizer import END_OF_TEXT

NAME = "rwkv-npu"
TOKENS = 256  # the most tokens of a generated answer, unless its task sets another limit


def run(model: Model, words: Sequence[str]) -> int:
    """Call lm-eval's command line for `model`: its tasks, separated by commas, then flags of `lm-eval run`.

    Returns its exit status. Raises UsageError without tasks, without lm-eval, or without a tokenizer.
    """
    if not words or words[0].startswith("-"):
        raise UsageError("lm-eval needs tasks, separated by commas: lambada_openai,piqa")
    model.encode("")  # raises without a tokenizer: the harness gives text
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UsageError(f"the harness is not installed ({error}): pip install lm-eval") from None
    register_model(NAME)(_adapter(model))
    command = ["lm-eval", "run", "--model", NAME, "--tasks", *words]
    before, sys.argv = sys.argv, command
    try:
        cli_evaluate()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        sys.argv = before
    return 0


def _adapter(model: Model) -> type:
    """The harness's class for `model`. It is defined in a function, because lm-eval takes seconds to import."""
    from lm_eval.api.model import TemplateLM

    base: Any = TemplateLM

    class Adapter(base):
        tokenizer_name = NAME

        def __init__(self, **_: Any) -> None:
            super().__init__()

        @property
        def eot_token_id(self) -> int:
            return END_OF_TEXT

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.encode(string)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            scorer, scores = Scorer(model), []
            for _texts, context, continuation in progress("score", "request", over=requests):
                scores.append(scorer.score(context, continuation))
            return scores

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            scorer = Scorer(model)
            texts = [request.args[0] for request in requests]
            return [scorer.score([END_OF_TEXT], model.encode(text))[0] for text in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            for request in progress("generate", "request", over=requests):
                context, options = request.args
                answers.append(generate(model, context, options))
            return answers

    return Adapter


class Scorer:
    """Scores continuations. The state after a context is kept, since the answers of a question share it."""

    def __init__(self, model: Model) -> None:
        self._model, self._context = model, list[int]()

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """log p of the continuation after the context, and True if each of its tokens is the likeliest."""
        if not continuation:
            return 0.0, True
        if list(context) != self._context:
            self._logits, self._state = self._model.forward(context)
            self._context = list(context)
        row, state = self._logits, self._state
        targets = np.asarray(continuation)
        total, likeliest = 0.0, True
        for begin in range(0, len(targets), CHUNK):
            part, last = targets[begin : begin + CHUNK], begin + CHUNK >= len(targets)
            rows, read = row[None], part[:-1] if last else part
            if len(read):
                more, state = self._model.forward(read, state, all_logits=True)
                rows = np.concatenate([rows, more])
            total += float(log_likelihood(rows[: len(part)], part).sum())
            likeliest &= bool((rows[: len(part)].argmax(1) == part).all())
            row = rows[-1]
        return total, likeliest


def generate(model: Model, context: str, options: dict[str, Any]) -> str:
    """Continue a context as a task asks: `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`."""
    until = options.get("until") or ()
    greedy = not options.get("do_sample", False)
    steps = model.generate(
        context or [END_OF_TEXT],
        stop=[until] if isinstance(until, str) else [text for text in until if text],
        max_tokens=options.get("max_gen_toks", TOKENS),
        temperature=0.0 if greedy else options.get("temperature", 1.0),
        top_p=options.get("top_p", 1.0),
        seed=0,
    )
    return "".join(step.text for step in steps)
