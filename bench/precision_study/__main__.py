"""Measure the error of each precision and remedy: KL from fp32 and bits per byte, by position in the context.

    python -m bench.precision_study CHECKPOINT -o bench/results/precision-NAME [--text FILE] [--simulate]

Rows of `numpy` have every large projection in int8, computed by this package, without and with each remedy. Rows of
`rknn-sim` (with --simulate) are the same bundles in Rockchip's simulator. It also runs fp16, mixed, and the compiler's
own int8, which covers the whole graph with residual and norms. OUT.json is saved after each row, and the same command
continues from it. OUT.md is written from OUT.json. Nothing here is measured on a board.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

import rwkv_npu
from bench.saving import save
from rwkv_npu.backends import rknn_sim
from rwkv_npu.backends.rknn_graph import BundleModel, CompilerGraph, compiler_graph
from rwkv_npu.cli.common import log_to_stderr
from rwkv_npu.conversion.calibration import default_ids
from rwkv_npu.conversion.quantise import MAX_KL
from rwkv_npu.evaluation import count_bytes, evaluate
from rwkv_npu.formats.bundle import Artifact, Bundle, open_bundle
from rwkv_npu.model import Model
from rwkv_npu.quant.npu import ProjectionParams
from rwkv_npu.runtime.loading import Options, open_engine
from rwkv_npu.runtime.placement import Plan
from rwkv_npu.runtime.selftest import passes
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.text.corpus import held_out_text, read_tokens
from rwkv_npu.toolkit import CompileOptions

TOKENS, CONTEXT, ROWS = 8192, 4096, 64
STEPS = 32  # of ROWS tokens, to calibrate the compiler's own int8
# Rows of the study, their precision, remedies and --max-kl.
BUNDLES = [
    ("fp16", "fp16", "all", MAX_KL),
    ("w8a8, no remedy", "w8a8", "none", MAX_KL),
    ("w8a8, ranges by held-out error", "w8a8", "ranges", MAX_KL),
    ("w8a8, smoothing", "w8a8", "smoothing", MAX_KL),
    ("w8a8, both", "w8a8", "all", MAX_KL),
    ("mixed", "mixed", "all", MAX_KL),
    (f"mixed, --max-kl {MAX_KL / 10:g}", "mixed", "all", MAX_KL / 10),
]


def by_the_compiler(ids: np.ndarray, bundle: Bundle) -> Callable[..., CompilerGraph]:
    """Replaces `compiler_graph`: the fp16 graphs of a bundle, quantised by the compiler. Each tensor has one scale."""
    chunks = np.split(ids[: STEPS * ROWS], range(ROWS, STEPS * ROWS, ROWS))
    steps = list(passes(BundleSource(bundle), ([chunk] for chunk in chunks)))

    def graph(
        source: BundleModel, artifact: Artifact, parameters: Mapping[str, ProjectionParams]
    ) -> CompilerGraph:
        rows = [step[artifact.group].inputs for step in steps]
        options = CompileOptions(artifact.target, "w8a8", calibration=rows)
        return replace(compiler_graph(source, artifact, parameters), options=options)

    return graph


class Study:
    def __init__(self, arguments: argparse.Namespace, command: str):
        self._checkpoint, self._out = arguments.checkpoint, arguments.out
        self._json = Path(f"{self._out}.json")
        self._reference = rwkv_npu.load(self._checkpoint, backend="numpy")
        encode, text = self._reference.encode, arguments.text
        read = held_out_text(encode) if text is None else read_tokens(text, encode)
        self._ids = read.ids[: arguments.tokens]
        self._bytes = count_bytes(self._reference, self._ids)
        what = {
            "checkpoint": Path(self._checkpoint).name,
            "text": Path(text or "heldout.txt").name,
            "tokens": len(self._ids),
        }
        what["command"] = command
        what["parameters"] = self._reference.spec.parameters
        self.result: dict[str, Any] = {**what, "context": CONTEXT, "rows": {}, "mixed": None}
        if self._json.is_file():
            found = json.loads(self._json.read_text(encoding="utf-8"))
            if {**found, "rows": {}, "mixed": None} != self.result:
                raise SystemExit(f"{self._json} belongs to another study: remove it, or give another output")
            self.result = found

    def measure(self, name: str, opened: Callable[[], Model], share: float) -> None:
        """Measure a row, unless it exists. share: of the weights in int8."""
        if name in self.result["rows"]:
            return
        with opened() as model, tqdm(total=len(self._ids), desc=name, unit="token", disable=None) as bar:
            found = evaluate(
                model,
                self._ids,
                text_bytes=self._bytes,
                reference=self._reference,
                context=CONTEXT,
                progress=bar.update,
            )
        self.result["rows"][name] = {**found.to_json(), "int8": share}
        self.keep()

    def keep(self) -> None:
        save(self._out, self.result, "\n".join(table(self.result)))

    def bundles(self, folder: Path, simulate: bool) -> None:
        """Convert a bundle for each precision and remedy, and measure a row for each backend."""
        for name, precision, remedies, max_kl in BUNDLES:
            # NumPy computes in fp32 what is not in int8.
            backends = ["numpy"] * (precision != "fp16") + ["rknn-sim"] * simulate
            if all(f"{backend}: {name}" in self.result["rows"] for backend in backends):
                continue
            bundle = self._convert(folder, precision, simulate, remedies, max_kl)
            chosen = open_bundle(bundle).manifest.int8.get(precision)
            for backend in backends:
                opened = partial(rwkv_npu.load, bundle, backend=backend, precision=precision)
                self.measure(f"{backend}: {name}", opened, chosen.share if chosen else 0.0)
            if name == "mixed":
                self.result["mixed"] = _table_of(bundle)
                self.keep()

    def by_the_compiler(self, folder: Path) -> None:
        name = "rknn-sim: w8a8 of all the graph, by the compiler"
        if name in self.result["rows"]:
            return
        bundle = open_bundle(self._convert(folder, "fp16", True))
        source = BundleSource(bundle, precision="fp16")
        graph = by_the_compiler(default_ids(self._reference.tokenizer, source), bundle)
        with mock.patch.object(rknn_sim, "compiler_graph", graph):
            engine = open_engine(source, Plan("rknn-sim"), Options())
        self.measure(name, lambda: Model(engine, None, source), 1.0)

    def _convert(
        self, folder: Path, precision: str, simulate: bool, remedies: str = "all", max_kl: float = MAX_KL
    ) -> Path:
        return rwkv_npu.convert(
            self._checkpoint,
            folder / f"{remedies}.rwkv",
            target="rk3588" if simulate else "none",
            precision=precision,
            remedies=remedies,
            max_kl=max_kl,
            rows=ROWS,
            cpu="fp16",
        )


def _table_of(bundle: Path) -> dict[str, Any]:
    manifest = open_bundle(bundle).manifest
    sensitivity = [asdict(row) for row in manifest.sensitivity]
    return {**asdict(manifest.int8["mixed"]), "sensitivity": sensitivity}


def table(result: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown."""
    yield f"# Precision of {result['checkpoint']}, {result['parameters'] / 1e6:.1f} M parameters"
    yield ""
    yield f"`{result['command']}`"
    yield ""
    yield (
        f"{result['tokens']} tokens of {result['text']} in contexts of {result['context']}, against fp32 in NumPy. KL "
        "in nats a token, by position in the context. `numpy` is int8 as this package computes it, `rknn-sim` "
        "Rockchip's simulator; nothing was measured on a board."
    )
    yield ""
    yield "| | in int8 | KL | 99th percentile | 0-64 | 64-512 | 512-4096 | same first choice | bits per byte |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name, row in result["rows"].items():
        by_position = {stretch["begin"]: stretch["kl_mean"] for stretch in row["positions"]}
        kls = [row["kl_mean"], row["kl_p99"], *(by_position.get(begin) for begin in (0, 64, 512))]
        cells = ["" if kl is None else f"{kl:.2g}" for kl in kls]
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        share = f"{100 * row['int8']:.1f} %"
        yield f"| {name} | {share} | {' | '.join(cells)} | {100 * row['top1']:.1f} % | {bits} |"
    if result["mixed"]:
        yield from _sensitivity(result["mixed"])


def _sensitivity(mixed: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"`mixed` has {100 * mixed['share']:.1f} % of the weights in int8. Each projection, the largest KL first:"
    yield ""
    yield "| projection | KL alone | error of the product | ranges | in mixed |"
    yield "|---|--:|--:|---|---|"
    for row in sorted(mixed["sensitivity"], key=lambda row: -(row["kl"] or 0)):
        how = row["algorithm"] + (", smoothed" if row["smoothed"] else "")
        where = "w8a8" if row["name"] in mixed["projections"] else "fp16"
        kl = "" if row["kl"] is None else f"{row['kl']:.2e}"
        yield f"| {row['name']} | {kl} | {100 * row['error']:.2f} % | {how} | {where} |"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--out", required=True, help="output files OUT.json and OUT.md")
    parser.add_argument("--text", help="text to predict (default: the demo model's held-out text)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--simulate", action="store_true", help="measure in Rockchip's simulator too")
    arguments = parser.parse_args(argv)
    study = Study(arguments, f"python -m bench.precision_study {shlex.join(argv)}")
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder, log_to_stderr():
        study.bundles(Path(folder), arguments.simulate)
        if arguments.simulate:
            study.by_the_compiler(Path(folder))
    study.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
