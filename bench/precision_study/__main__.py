"""What each precision and each remedy costs a model: KL from fp32 and bits per byte, by position in the context.

    python -m bench.precision_study CHECKPOINT -o bench/results/precision-NAME [--text FILE] [--simulate]

Rows of `numpy` are int8 as the package emulates it, for every large projection, without and with each remedy. Rows of
`rknn-sim` (with --simulate) are bundles in Rockchip's simulator: fp16, w8a8, and mixed with its table. What is measured
is kept in OUT.json after each row, and the same command goes on from there; OUT.md is made of it. Nothing here was
measured on a board.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import rwkv_npu
from bench.saving import save
from rwkv_npu.bundle import open_bundle
from rwkv_npu.calibration import Calibration, calibrate
from rwkv_npu.calibration_ids import default_ids
from rwkv_npu.checkpoint import open_checkpoint
from rwkv_npu.evaluation import evaluate
from rwkv_npu.int8 import Int8Maths, Quantised
from rwkv_npu.maths import NumpyMaths
from rwkv_npu.model import Model
from rwkv_npu.opening import Options, open_engine
from rwkv_npu.plan import Plan
from rwkv_npu.quantisation import sizes
from rwkv_npu.ranges import ALGORITHMS, quantise
from rwkv_npu.remedies import smoothings
from rwkv_npu.sources import CheckpointSource
from rwkv_npu.texts import held_out_text, read_tokens

TOKENS, CONTEXT, ROWS = 8192, 4096, 64
# How the ranges of a row are chosen: with smoothing, and by which algorithms.
REMEDIES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "w8a8, no remedy": (False, ("normal",)),
    "w8a8, ranges by held-out error": (False, tuple(ALGORITHMS)),
    "w8a8, smoothing": (True, ("normal",)),
    "w8a8, both": (True, tuple(ALGORITHMS)),
}
SIMULATED = ("fp16", "w8a8", "mixed")


class Emulated(CheckpointSource):
    """A checkpoint with projections in int8."""

    int8: dict[str, Quantised] = {}

    def maths(self) -> NumpyMaths:
        return Int8Maths(self.tensor, self.int8.get)


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self._checkpoint, self._out = arguments.checkpoint, arguments.out
        self._json = Path(f"{self._out}.json")
        self._reference = rwkv_npu.load(self._checkpoint, backend="numpy")
        encode, text = self._reference.encode, arguments.text
        read = held_out_text(encode) if text is None else read_tokens(text, encode)
        self._ids = read.ids[: arguments.tokens]
        share = len(self._ids) / len(read.ids)
        self._bytes = None if read.bytes is None else round(read.bytes * share)
        what = {
            "checkpoint": Path(self._checkpoint).name,
            "text": Path(text or "heldout.txt").name,
            "tokens": len(self._ids),
        }
        what["command"] = "python -m bench.precision_study " + shlex.join(sys.argv[1:])
        what["parameters"] = self._reference.spec.parameters
        self.result: dict[str, Any] = {**what, "context": CONTEXT, "rows": {}, "mixed": None}
        if self._json.is_file():
            found = json.loads(self._json.read_text(encoding="utf-8"))
            if {**found, "rows": {}, "mixed": None} != self.result:
                raise SystemExit(f"{self._json} is of another study: remove it, or name another output")
            self.result = found

    def measure(self, name: str, opened: Callable[[], Model]) -> None:
        """Add a row, unless it is there."""
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
        self.result["rows"][name] = found.to_json()
        self.keep()

    def keep(self) -> None:
        save(self._out, self.result, "\n".join(table(self.result)))

    def emulate(self) -> None:
        """Rows of `numpy`."""
        if {f"numpy: {name}" for name in REMEDIES} <= self.result["rows"].keys():
            return
        plain = CheckpointSource(open_checkpoint(Path(self._checkpoint)))
        ids = default_ids(self._reference.tokenizer, plain, say, at_least=ROWS)
        with tqdm(total=len(ids), desc="calibrate", unit="token", disable=None) as bar:
            seen = calibrate(plain, ids, rows=ROWS, progress=bar.update)
        for name, (smooth, algorithms) in REMEDIES.items():
            source = Emulated(open_checkpoint(Path(self._checkpoint)))
            source.int8 = _quantised(source, seen, smooth, algorithms)
            self.measure(
                f"numpy: {name}",
                lambda source=source: Model(open_engine(source, Plan("numpy"), Options()), None, source),
            )

    def simulate(self, folder: Path) -> None:
        """Rows of `rknn-sim`, and the table by which mixed was chosen."""
        for precision in SIMULATED:
            name = f"rknn-sim: {precision}"
            if name in self.result["rows"]:
                continue
            bundle = rwkv_npu.convert(
                self._checkpoint, folder / "bundle", precision=precision, rows=ROWS, say=say
            )
            self.measure(
                name,
                lambda bundle=bundle, precision=precision: rwkv_npu.load(
                    bundle, backend="rknn-sim", precision=precision
                ),
            )
            if precision == "mixed":
                manifest = open_bundle(bundle).manifest
                sensitivity = [asdict(row) for row in manifest.sensitivity]
                self.result["mixed"] = {**asdict(manifest.int8["mixed"]), "sensitivity": sensitivity}
                self.keep()


def say(line: str) -> None:
    print(line, file=sys.stderr)


def _quantised(
    source: CheckpointSource, seen: Calibration, smooth: bool, algorithms: tuple[str, ...]
) -> dict[str, Quantised]:
    """Every large projection, as the package would have it with these remedies."""
    found = {}
    for name in sizes(source.spec):
        weight, samples = np.asarray(source.tensor(name), np.float32), seen.projections[name]
        candidates = smoothings(weight, samples) if smooth else (None,)
        found[name] = quantise(name, weight, samples, candidates, algorithms).quantised
    return found


def table(result: dict[str, Any]) -> Iterator[str]:
    """The study in Markdown."""
    yield f"# Precision of {result['checkpoint']}, {result['parameters'] / 1e6:.1f} M parameters"
    yield ""
    yield f"`{result['command']}`"
    yield ""
    yield (
        f"{result['tokens']} tokens of {result['text']} in contexts of {result['context']}, against fp32 in NumPy. KL "
        "in nats a token, by position in the context. `numpy` is this package's emulation of int8, `rknn-sim` "
        "Rockchip's simulator; nothing was measured on a board."
    )
    yield ""
    yield "| | KL | 99th percentile | 0-64 | 64-512 | 512-4096 | same first choice | bits per byte |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for name, row in result["rows"].items():
        by_position = {stretch["begin"]: stretch["kl_mean"] for stretch in row["positions"]}
        kls = [row["kl_mean"], row["kl_p99"], *(by_position.get(begin) for begin in (0, 64, 512))]
        cells = ["" if kl is None else f"{kl:.2g}" for kl in kls]
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        yield f"| {name} | {' | '.join(cells)} | {100 * row['top1']:.1f} % | {bits} |"
    if result["mixed"]:
        yield from _sensitivity(result["mixed"])


def _sensitivity(mixed: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"`mixed` has {100 * mixed['share']:.1f} % of the weights in int8. Each projection alone, the dearest first:"
    yield ""
    yield "| projection | KL alone | error of the product | ranges | in mixed |"
    yield "|---|--:|--:|---|---|"
    for row in sorted(mixed["sensitivity"], key=lambda row: -(row["kl"] or 0)):
        how = row["algorithm"] + (", smoothed" if row["smoothed"] else "")
        where = "w8a8" if row["name"] in mixed["projections"] else "fp16"
        kl = "" if row["kl"] is None else f"{row['kl']:.2e}"
        yield f"| {row['name']} | {kl} | {100 * row['error']:.2f} % | {how} | {where} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--out", required=True, help="OUT.json and OUT.md are written")
    parser.add_argument("--text", help="what is predicted (default: the demo model's held-out text)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--simulate", action="store_true", help="Rockchip's simulator as well")
    arguments = parser.parse_args()
    study = Study(arguments)
    study.emulate()
    if arguments.simulate:
        with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
            study.simulate(Path(folder))
    study.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
