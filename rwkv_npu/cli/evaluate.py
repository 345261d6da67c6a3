"""`rwkv-npu eval`: measure how well a model predicts a text. Prints figures, or JSON."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import BACKENDS, add_model_flags, load_model
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.files import resume_file

if TYPE_CHECKING:
    from rwkv_npu.evaluation import Evaluation, Lambada
    from rwkv_npu.model import Model
    from rwkv_npu.progress import Progress


def add(commands: Any) -> None:
    p = commands.add_parser(
        "eval",
        help="measure quality on a text",
        description="Measure how well a model predicts a text. --against compares it with a reference: the KL "
        "divergence of its predictions, by position in the context. The reference runs on the CPU, in fp32 arithmetic "
        "on weights that are not quantized, unless --against-backend or --against-precision say otherwise. For exact "
        "fp32 name the checkpoint: a bundle holds its weights in fp16, unless made with --cpu fp32.",
    )
    add_model_flags(p)
    what = (
        "UTF-8 text, or token ids (.json, .npy); - is stdin (default: one that the demo model has not seen)"
    )
    p.add_argument("--text", metavar="FILE", help=what)
    p.add_argument(
        "--raw", action="store_true", help="keep a byte order mark and carriage returns of the text"
    )
    jsonl = 'measure last-word accuracy on these texts instead: {"text": ...} a line, as of LAMBADA'
    p.add_argument("--lambada", metavar="FILE", help=jsonl)
    p.add_argument(
        "--context", type=int, metavar="N", help="begin anew after every N tokens (default: never)"
    )
    p.add_argument("-n", "--max-tokens", type=int, metavar="N", help="read at most N tokens")
    same = "(default: the model itself, if one of the next two flags is given)"
    p.add_argument("--against", metavar="PATH", help=f"bundle or checkpoint to compare with {same}")
    p.add_argument(
        "--against-backend",
        metavar="NAME",
        choices=BACKENDS,
        help="backend of the reference (default: numba or ort)",
    )
    p.add_argument(
        "--against-precision", metavar="P", help="precision of the reference (default: not quantised)"
    )
    resume = "save scores in this file; if it exists, continue from it"
    p.add_argument("--resume", metavar="FILE", help=resume)
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    tasks = (
        "last on the line: tasks of lm-eval, separated by commas, and flags of its own (pip install lm-eval)"
    )
    p.add_argument("--lm-eval", nargs=argparse.REMAINDER, metavar="TASKS", help=tasks)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.lm_eval is not None:
        from rwkv_npu.evaluation import harness

        with load_model(arguments) as model:
            return harness.run(model, arguments.lm_eval)
    _check(arguments)
    resume = resume_file(arguments.resume)
    measure = _measure_lambada if arguments.lambada else _measure_text
    try:
        with contextlib.ExitStack() as opened:
            result, table = measure(arguments, opened, resume)
    except KeyboardInterrupt:
        kept = f": the same command continues from {resume}" if resume else ""
        print(f"rwkv-npu: interrupted{kept}", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=1) if arguments.json else table)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for flag, value in (("max-tokens", arguments.max_tokens), ("context", arguments.context)):
        if value is not None and value < 1:
            raise UsageError(f"--{flag} {value}: it must be at least 1")
        if value is not None and arguments.lambada:
            raise UsageError(f"--{flag} is for --text: with --lambada every text is read whole")
    if arguments.text and arguments.lambada:
        raise UsageError("give --text or --lambada, not both")


def _measure_text(
    arguments: argparse.Namespace, opened: contextlib.ExitStack, resume: Path | None
) -> tuple[dict[str, Any], str]:
    from rwkv_npu.evaluation import count_bytes, evaluate
    from rwkv_npu.text.corpus import held_out_text, read_tokens

    models = functools.cache(lambda: _models(arguments, opened))

    def encode(text: str) -> list[int]:
        return models()[0].encode(text)

    # A file of ids needs no model. So an error in the file is reported before a model is loaded.
    text = arguments.text
    tokens = held_out_text(encode) if text is None else read_tokens(text, encode, raw=arguments.raw)
    model, reference = models()
    ids = tokens.ids[: arguments.max_tokens]
    whole = tokens.bytes is not None and len(ids) == len(tokens.ids)
    found = evaluate(
        model,
        ids,
        text_bytes=tokens.bytes if whole else count_bytes(model, ids),
        reference=reference,
        context=arguments.context,
        progress=opened.enter_context(_bar(len(ids), "token")).update,
        resume=resume,
    )
    return {**_named(model, reference), **found.to_json()}, _text_table(found, model, reference)


def _measure_lambada(
    arguments: argparse.Namespace, opened: contextlib.ExitStack, resume: Path | None
) -> tuple[dict[str, Any], str]:
    from rwkv_npu.evaluation import evaluate_lambada, read_lambada

    passages = read_lambada(arguments.lambada)
    model, reference = _models(arguments, opened)
    bar = opened.enter_context(_bar(len(passages), "text"))
    found = evaluate_lambada(model, passages, reference=reference, progress=bar.update, resume=resume)
    return {**_named(model, reference), **found.to_json()}, _lambada_table(found, model, reference)


def _bar(total: int, unit: str) -> Progress:
    from rwkv_npu.progress import progress

    return progress("eval", unit, total=total)


# -- models ----------------------------------------------------------------------------------------------


def _models(arguments: argparse.Namespace, opened: contextlib.ExitStack) -> tuple[Model, Model | None]:
    model = opened.enter_context(load_model(arguments))
    if not (arguments.against or arguments.against_backend or arguments.against_precision):
        return model, None
    return model, opened.enter_context(_reference(arguments))


def _reference(arguments: argparse.Namespace) -> Model:
    """Load the model to compare with. By default it runs on the CPU in fp32, on weights that are not quantized."""
    from rwkv_npu.backends import COMPILED, MADE_PRECISIONS
    from rwkv_npu.formats.bundle import is_bundle, read_manifest
    from rwkv_npu.model import demo_model, load
    from rwkv_npu.runtime.loading import CPU_BACKEND

    path = Path(arguments.against or arguments.model or demo_model())
    backend = arguments.against_backend or CPU_BACKEND
    precision = arguments.against_precision
    if precision is None and is_bundle(path) and backend not in (*COMPILED, *MADE_PRECISIONS):
        precision = read_manifest(path).cpu
    return load(
        path,
        backend=backend,
        precision=precision,
        tokenizer=arguments.tokenizer,
        threads=arguments.threads,
        npu_cores=arguments.npu_cores,
        layout=arguments.layout,
    )


def _named(model: Model, reference: Model | None) -> dict[str, Any]:
    return {"model": _name(model), "compared_with": _name(reference) if reference else None}


def _name(model: Model) -> str:
    return f"{model.precision} weights, {model.describe()}"


# -- tables ----------------------------------------------------------------------------------------------


def _text_table(result: Evaluation, model: Model, reference: Model | None) -> str:
    lines = [
        _wrapped(f"model          {_name(model)}"),
        f"tokens         {result.tokens}",
        f"perplexity     {result.perplexity:.3f} per token",
    ]
    if result.bits_per_byte is not None:
        lines.append(f"bits per byte  {result.bits_per_byte:.4f}")
    if reference:
        lines += [
            f"KL             {result.kl_mean:.3g} nats per token (99th percentile {result.kl_p99:.3g})",
            f"top-1 agrees   {100 * (result.top1 or 0):.2f} %",
            _wrapped(f"compared with  {_name(reference)}"),
        ]
    return "\n".join([*lines, "", *_positions(result)])


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 80, subsequent_indent=" " * 15, break_on_hyphens=False)


def _positions(result: Evaluation) -> list[str]:
    """Format a line for every range of positions. With drift, the figures grow from line to line."""
    compared = result.kl_mean is not None
    title = f"{'position':>10}{'tokens':>9}{'bits/token':>12}{'perplexity':>12}"
    lines = [title + (f"{'KL mean':>11}{'KL p99':>11}{'top-1':>9}" if compared else "")]
    for part in result.positions:
        place = f"{part.begin}-{'' if part.end is None else part.end}"
        line = f"{place:>10}{part.tokens:>9}{part.bits_per_token:>12.4f}{part.perplexity:>12.3f}"
        if compared:
            line += f"{part.kl_mean:>11.3g}{part.kl_p99:>11.3g}{100 * (part.top1 or 0):>7.2f} %"
        lines.append(line)
    return lines


def _lambada_table(result: Lambada, model: Model, reference: Model | None) -> str:
    lines = [_wrapped(f"model          {_name(model)}"), *_lambada_lines(result)]
    if reference and result.reference:
        lines += ["", _wrapped(f"compared with  {_name(reference)}"), *_lambada_lines(result.reference)[1:]]
    return "\n".join(lines)


def _lambada_lines(result: Lambada) -> list[str]:
    error = "" if result.accuracy_error is None else f" (standard error {100 * result.accuracy_error:.2f} %)"
    return [
        f"texts          {result.texts}",
        f"accuracy       {100 * result.accuracy:.2f} %{error}",
        f"perplexity     {result.perplexity:.3f} per last word",
    ]
