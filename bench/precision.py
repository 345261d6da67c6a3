"""What precision costs a model on the NPU: fp16, mixed and w8a8 in the simulator, int8 with and without remedies.

    python -m bench.precision CHECKPOINT --text FILE --save FILE.json [--tokens 4096] [--folder DIR]

CHECKPOINT is anything that `rwkv-npu convert` reads; FILE is text that it was not calibrated with. The reference is
the checkpoint itself in fp32. What is simulated is converted into DIR, which is kept and gone on from. Remedies are
compared in NumPy, whose int8 is the simulator's.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rwkv_npu.bundle import open_bundle
from rwkv_npu.calibration import calibrate
from rwkv_npu.calibration_ids import default_ids
from rwkv_npu.converter import convert
from rwkv_npu.evaluation import evaluate
from rwkv_npu.model import Model, load
from rwkv_npu.quantisation import ROWS, sizes
from rwkv_npu.ranges import ALGORITHMS, quantise
from rwkv_npu.remedies import smoothings
from rwkv_npu.sensitivity import Judge
from rwkv_npu.sources import BundleSource

PRECISIONS = ("fp16", "mixed", "w8a8")
JUDGED = 1024  # tokens on which remedies are compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--save", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--folder", metavar="DIR", help="for the bundle (default: one that is removed)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as scratch:
        bundle = Path(arguments.folder or scratch) / "model.rwkv"
        for precision in PRECISIONS:
            convert(arguments.checkpoint, bundle, precision=precision, rows="1,64", say=_say)
        with load(arguments.checkpoint, backend="numpy") as reference:
            text = Path(arguments.text).read_text(encoding="utf-8")
            ids = np.array(reference.encode(text)[: arguments.tokens])
            size = sum(len(reference.tokenizer.token_bytes(token) or b"") for token in ids.tolist())
            simulated = {name: _simulated(bundle, name, ids, size, reference) for name in PRECISIONS}
            simulated["fp32"] = evaluate(reference, ids, text_bytes=size).to_json()
            remedies = dict(_remedies(bundle, ids[:JUDGED], reference))
        manifest = json.loads(open_bundle(bundle).manifest.to_json())
    document = {
        "command": " ".join(["python -m bench.precision", *sys.argv[1:]]),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("rwkv_npu", "numpy")},
        "tokens": len(ids),
        "simulated": simulated,
        "w8a8 in NumPy, KL": remedies,
        **{name: manifest[name] for name in ("int8", "sensitivity", "headroom")},
    }
    Path(arguments.save).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({**simulated, "w8a8 in NumPy, KL": remedies}, indent=1))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _simulated(bundle: Path, precision: str, ids: np.ndarray, size: int, reference: Model) -> dict[str, Any]:
    with load(bundle, backend="rknn-sim", precision=precision) as model:
        with tqdm(total=len(ids), desc=f"simulate {precision}", unit="token", disable=None) as bar:
            found = evaluate(model, ids, text_bytes=size, reference=reference, progress=bar.update)
    return found.to_json()


def _remedies(path: Path, judged: np.ndarray, reference: Model) -> Iterator[tuple[str, float]]:
    """KL of the logits with all large projections in int8, their ranges chosen in several ways."""
    bundle = open_bundle(path)
    source = BundleSource(bundle, "layer", bundle.manifest.cpu)
    ids = default_ids(reference.tokenizer, source, _say, at_least=ROWS)
    seen = calibrate(source, ids, rows=ROWS).projections
    judge = Judge(source, judged)
    names = sizes(bundle.spec)
    ways: dict[str, tuple[list[str], bool]] = {name: ([name], False) for name in ALGORITHMS}
    ways["the best of them"] = (list(ALGORITHMS), False)
    ways["normal, smoothed"] = (["normal"], True)
    ways["the best of them, smoothed"] = (list(ALGORITHMS), True)
    for way, (algorithms, smooth) in ways.items():
        quantised = {}
        for name in tqdm(names, way, unit="matrix", leave=False, disable=None):
            weight = np.asarray(source.tensor(name), np.float32)
            candidates = smoothings(weight, seen[name]) if smooth else [None]
            quantised[name] = quantise(name, weight, seen[name], candidates, algorithms).quantised
        yield way, judge.divergence(quantised)


if __name__ == "__main__":
    sys.exit(main())
