"""Measure the error of each weight format on a trained model: the demo on its held-out text, here and in llama.cpp.

    python -m bench.peers.quality --folder /tmp/peers [--save bench/results/quality-demo]

Every system reads the same tokens. Its predictions of each next token are compared with NumPy's in fp32.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from bench.peers.__main__ import commit, say
from bench.peers.study import logits_of, open_child
from bench.peers.systems import SYSTEMS, Failed, Workshop
from bench.saving import save
from rwkv_npu.bench.machine import describe
from rwkv_npu.evaluation.likelihood import compare
from rwkv_npu.text.corpus import held_out_text
from rwkv_npu.text.tokenizer import END_OF_TEXT

DEMO = Path(rwkv_npu.__file__).parent / "data" / "demo" / "model.pth"
RUNTIMES = ("ours", "llama.cpp")


def main() -> int:
    arguments = parse()
    folder = Path(arguments.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    workshop = Workshop(folder, arguments.torch, arguments.threads, say)
    model = rwkv_npu.load(DEMO, backend="numpy")
    ids = held_out_text(model.encode).ids[: arguments.max_tokens].tolist()
    size = sum(len(model.tokenizer.token_bytes(token) or b"") for token in ids)
    reference, _ = model.forward([END_OF_TEXT, *ids[:-1]], all_logits=True)
    shutil.copy(DEMO, folder / "demo.pth")
    shutil.copy(DEMO.with_name("vocab.txt"), folder / "vocab.txt")
    rows: dict[str, Any] = {"fp32 (the reference)": compared(reference, reference, ids, size)}
    failed: dict[str, str] = {}
    for system in (s for s in SYSTEMS if s.runtime in RUNTIMES and s.backend == "auto"):
        try:
            with ExitStack() as stack:
                child, _ = open_child("demo", model.spec.generation, system, workshop, stack)
                logits = logits_of(child, system, workshop, [END_OF_TEXT], ids[:-1])
        except Failed as error:
            failed[system.name] = str(error)
            continue
        rows[system.name] = compared(logits, reference, ids, size)
        say(f"{system.name}: KL {rows[system.name]['kl_mean']:.2g}")
    results = {
        "command": "python -m bench.peers.quality " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "machine": describe(),
        "tokens": len(ids),
        "bytes": size,
        "systems": rows,
        "left_out": failed,
    }
    if arguments.save:
        save(arguments.save, results, report(results))
    print(report(results))
    return 0


def compared(logits: np.ndarray, reference: np.ndarray, ids: Sequence[int], size: int) -> dict[str, float]:
    """KL(reference || logits) in nats a token, bits per byte of the text, and the share of equal best tokens."""
    log_p, kl = compare(logits, np.asarray(ids), reference)
    return {
        "bits_per_byte": float(-log_p.sum() / np.log(2) / size),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "same_best": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
    }


def report(results: dict[str, Any]) -> str:
    lines = [
        "# What each format costs a trained model",
        "",
        f"The demo model ({results['tokens']} tokens, {results['bytes']} bytes of its held-out text), against fp32; "
        f"this project at {results['commit']}; `{results['command']}`.",
        "",
        "| system | bits per byte | KL, mean | KL, 99th percentile | same first choice |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["systems"].items():
        cells = [f"{row['bits_per_byte']:.4f}", f"{row['kl_mean']:.2g}", f"{row['kl_p99']:.2g}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * row['same_best']:.1f} % |")
    lines += [f"\n- left out: {name}: {why}" for name, why in results["left_out"].items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.quality", description=__doc__)
    parser.add_argument("--folder", required=True, help="the folder of bench.peers")
    parser.add_argument("--threads", type=int, default=2, help="of every system (default: 2)")
    parser.add_argument("--max-tokens", type=int, help="of the text (default: all)")
    parser.add_argument("--torch", default="torch==2.13.0", help="as for bench.peers")
    parser.add_argument("--save", help="write SAVE.json and SAVE.md")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
