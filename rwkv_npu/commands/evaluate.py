"""`rwkv-npu eval`: figures to stdout, as lines or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import json

from tqdm import tqdm

from rwkv_npu.commands.common import load_model
from rwkv_npu.errors import UsageError
from rwkv_npu.evaluation import Evaluation, evaluate
from rwkv_npu.texts import read_text


def run(arguments: argparse.Namespace) -> int:
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens is {arguments.max_tokens}: it must be at least 1")
    text = read_text(arguments.text) if arguments.text else default_text()
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(load_model(arguments))
        ids = model.encode(text)
        size = len(text.encode())
        if arguments.max_tokens is not None and arguments.max_tokens < len(ids):
            ids = ids[: arguments.max_tokens]
            size = (
                sum(len(model.tokenizer.token_bytes(token) or b"") for token in ids) if model.tokenizer else 0
            )
        reference = None
        if arguments.against or arguments.against_backend:
            other = {
                "model": arguments.against or arguments.model,
                "backend": arguments.against_backend or "auto",
                "precision": None,
                "plan": None,
                "fusion": None,
            }
            reference = opened.enter_context(load_model(argparse.Namespace(**{**vars(arguments), **other})))
        with tqdm(total=len(ids), desc="eval", unit="token", leave=False, disable=None) as bar:
            result = evaluate(model, ids, text_bytes=size, reference=reference, progress=bar.update)
    print(json.dumps(result.to_json(), indent=1) if arguments.json else _table(result))
    return 0


def default_text() -> str:
    """Prose that the demo model was not trained on."""
    return (importlib.resources.files("rwkv_npu") / "data" / "demo" / "heldout.txt").read_text(
        encoding="utf-8"
    )


def _table(result: Evaluation) -> str:
    lines = [f"tokens         {result.tokens}", f"perplexity     {result.perplexity:.3f} per token"]
    if result.bits_per_byte is not None:
        lines.append(f"bits per byte  {result.bits_per_byte:.4f}")
    if result.kl_mean is not None:
        lines.append(
            f"KL             {result.kl_mean:.3g} nats per token (99th percentile {result.kl_p99:.3g})"
        )
        lines.append(f"top-1 agrees   {100 * (result.top1 or 0):.2f} %")
    return "\n".join(lines)
