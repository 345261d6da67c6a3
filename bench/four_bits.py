"""Measure what four bits cost on the CPU: KL from fp32 by rounding and by the choice of matrices, on several texts.

    python -m bench.four_bits CHECKPOINT -o bench/results/four-bits-NAME [--text FILE ...]

Every row is a conversion (`--cpu`), read by the compiled kernels, against the checkpoint's own values in fp32. The
texts are the demo model's held-out text and the files of --text; none of them is read by a conversion. Bytes are those
of the packed file, which a token reads once. OUT.json is saved after each row, and the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import rwkv_npu
from bench.saving import save
from rwkv_npu.cli.common import log_to_stderr
from rwkv_npu.evaluation import evaluate
from rwkv_npu.formats.bundle import open_bundle, packed_file
from rwkv_npu.text.corpus import held_out_text, read_tokens

TOKENS, CONTEXT = 8192, 4096
# Rows of the study: options of a conversion.
ROWS: dict[str, dict[str, Any]] = {
    "int8": {"cpu": "int8"},
    "int4, to nearest": {"cpu": "int4", "calibrate": "none"},
    "int4": {"cpu": "int4"},
    "auto, --max-kl 0.01": {"cpu": "auto", "max_kl": 0.01},
    "auto": {"cpu": "auto"},
    "auto, --max-kl 0.003": {"cpu": "auto", "max_kl": 0.003},
}


def measure(checkpoint: str, options: dict[str, Any], texts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Convert, and compare the predictions on every text with the checkpoint's."""
    bundle = rwkv_npu.convert(checkpoint, folder / "model.rwkv", target="none", force=True, **options)
    cpu = options["cpu"]
    rounding = open_bundle(bundle).manifest.rounding.get(cpu)
    row: dict[str, Any] = {
        "bytes": (bundle / packed_file(cpu)).stat().st_size,
        "four_bits": rounding.four_bits if rounding else (),
        "kl_limited": rounding.kl if rounding else None,
        "texts": {},
    }
    with (
        rwkv_npu.load(bundle, backend="numba", precision=cpu) as model,
        rwkv_npu.load(checkpoint, backend="numba") as reference,
    ):
        for name, ids in texts.items():
            with tqdm(total=len(ids), desc=name, unit="token", disable=None) as bar:
                found = evaluate(model, ids, reference=reference, context=CONTEXT, progress=bar.update)
            row["texts"][name] = {"kl": found.kl_mean, "kl_p99": found.kl_p99, "top1": found.top1}
    return row


def table(result: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown."""
    yield f"# Four bits of {result['checkpoint']}, {result['parameters'] / 1e6:.1f} M parameters, on the CPU"
    yield ""
    yield f"`{result['command']}`"
    yield ""
    tokens = ", ".join(f"{name} ({count} tokens)" for name, count in result["tokens"].items())
    yield (
        f"KL from fp32 in nats a token, contexts of {CONTEXT}: {tokens}. No conversion reads these texts. Bytes are "
        "those of the packed matrices, beside them relative to int4."
    )
    yield ""
    yield (
        "| | bytes | | "
        + " | ".join(f"{name}: KL | 99th | same first choice" for name in result["tokens"])
        + " |"
    )
    yield "|---|--:|--:|" + "--:|--:|--:|" * len(result["tokens"])
    int4 = result["rows"].get("int4, to nearest", {}).get("bytes")
    for name, row in result["rows"].items():
        share = "" if int4 is None else f"{row['bytes'] / int4:.2f}"
        cells = [
            cell
            for one in row["texts"].values()
            for cell in (f"{one['kl']:.2g}", f"{one['kl_p99']:.2g}", f"{100 * one['top1']:.1f} %")
        ]
        yield f"| {name} | {row['bytes']} | {share} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--out", required=True, help="output files OUT.json and OUT.md")
    parser.add_argument("--text", nargs="*", default=[], help="texts beside the demo model's held-out text")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a text, at most")
    arguments = parser.parse_args(argv)
    with rwkv_npu.load(arguments.checkpoint, backend="numpy") as model:
        read = {"held-out": held_out_text(model.encode)}
        read |= {Path(file).name: read_tokens(file, model.encode) for file in arguments.text}
        parameters = model.spec.parameters
    texts = {name: tokens.ids[: arguments.tokens] for name, tokens in read.items()}
    result: dict[str, Any] = {
        "checkpoint": Path(arguments.checkpoint).name,
        "parameters": parameters,
        "command": f"python -m bench.four_bits {shlex.join(argv)}",
        "tokens": {name: len(ids) for name, ids in texts.items()},
        "rows": {},
    }
    out = Path(f"{arguments.out}.json")
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
        if {**found, "rows": {}} != result:
            raise SystemExit(f"{out} belongs to another study: remove it, or give another output")
        result = found
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder, log_to_stderr():
        for name, options in ROWS.items():
            if name not in result["rows"]:
                result["rows"][name] = measure(arguments.checkpoint, options, texts, Path(folder))
                save(arguments.out, result, "\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
