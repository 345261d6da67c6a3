"""The int8 step of a conversion: statistics -> parameters -> selection.

`choose_parameters` chooses scales and zero points of every projection that can be in int8, and writes them to
`calib/int8.safetensors`. `select_projections` decides which projections are in int8. KL is measured on the end of the
text, which chooses no parameters. Every result is saved at once, so that an interrupted conversion continues there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.conversion.sensitivity import KLEvaluator, select
from rwkv_npu.formats.bundle import INT8, Bundle, Int8Set, Sensitivity
from rwkv_npu.formats.files import write_atomically
from rwkv_npu.formats.safetensors import TensorPlan, replace_tensors
from rwkv_npu.models.spec import Kind, Spec, tensors
from rwkv_npu.progress import progress
from rwkv_npu.quant.npu import ProjectionParams, QuantParams
from rwkv_npu.quant.ranges import ALGORITHMS, Choice, Samples, choose
from rwkv_npu.quant.smoothing import smoothings
from rwkv_npu.runtime.weights import BundleSource

MAX_KL = 0.005  # nats a token
NOTES = "calib/int8.json"
MEASURED = 1024  # tokens on which int8 is measured; at most a quarter of the text
FEW = 1000  # tokens: a shorter text gets a warning
# Of the methods that choose parameters and make graphs. Parameters of another version are not reused.
VERSION = 8

# `--remedies`: calibration methods to try, and whether to try SmoothQuant.
REMEDIES: dict[str, tuple[Sequence[str], bool]] = {
    "all": (tuple(ALGORITHMS), True),
    "ranges": (tuple(ALGORITHMS), False),
    "smoothing": (("normal",), True),
    "none": (("normal",), False),
}

log = logging.getLogger("rwkv_npu")


def sizes(spec: Spec) -> dict[str, int]:
    """int8 bytes of the projections that can be in int8, by name.

    Low-rank projections stay in floating point: they are small and steer the state.
    """
    return {
        t.name: t.shape[0] * t.shape[1] for t in tensors(spec) if t.kind is Kind.LINEAR and not t.optional
    }


def split_text(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a text into the part that chooses parameters and the end on which int8 is measured."""
    measured = max(1, min(MEASURED, len(ids) // 4))
    return ids[:-measured], ids[-measured:]


def parameters_key(bundle: Bundle, ids: np.ndarray, remedies: str) -> str:
    """A digest of everything that determines the parameters, except the weights."""
    text = f"{VERSION} {remedies} {bundle.manifest.scaling}".encode()
    return hashlib.blake2b(text + ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


# -- parameters ------------------------------------------------------------------------------------------


def known_parameters(bundle: Bundle, key: str) -> list[Sensitivity] | None:
    """The sensitivity table of the bundle's parameters if they were chosen under `key`, else None.

    It comes from the notes of an interrupted conversion, or from the manifest.
    """
    if not (bundle.path / INT8).is_file():
        return None
    try:
        notes = json.loads((bundle.path / NOTES).read_text(encoding="utf-8"))
        if notes["key"] == key:
            return [Sensitivity(**row) for row in notes["table"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return bundle.manifest.sensitivity or None if bundle.manifest.int8_key == key else None


def choose_parameters(
    bundle: Bundle, samples_of: Callable[[str], Samples], remedies: str, key: str
) -> list[Sensitivity]:
    """Choose scales and zero points of every projection from its samples, write them, and return the table.

    remedies: one of REMEDIES. Each choice is saved under `key`, and read back after an interruption.
    """
    methods, smooth = REMEDIES[remedies]
    log.info("choosing quantization parameters of int8")
    folder = bundle.path / Path(INT8).parent
    folder.mkdir(exist_ok=True)
    table: list[Sensitivity] = []
    plans: list[TensorPlan] = []
    for name, size in progress("choose int8 parameters", "matrix", over=sizes(bundle.spec).items()):
        note = folder / f"{name}.json"
        choice = _noted_choice(note, key)
        if choice is None:
            weight, samples = np.asarray(bundle.tensor(name), np.float32), samples_of(name)
            candidates = smoothings(weight, samples) if smooth else [None]
            choice = choose(name, weight, samples, candidates, methods)
            write_atomically(note, json.dumps({"key": key, **_choice_json(choice)}).encode())
        smoothed = choice.params.smoothing is not None
        table.append(Sensitivity(name, size, choice.algorithm, smoothed, choice.error))
        plans += _plans(name, choice)
    (bundle.path / NOTES).unlink(missing_ok=True)
    replace_tensors(bundle.path / INT8, plans)
    bundle.forget_ranges()
    _note(bundle, key, table)
    return table


def _choice_json(choice: Choice) -> dict[str, Any]:
    params = choice.params
    smoothing = None if params.smoothing is None else params.smoothing.tolist()
    scales = [[tensor.scale, tensor.zero] for tensor in (params.input, *params.outputs)]
    return {
        "affines": scales,
        "smoothing": smoothing,
        "algorithm": choice.algorithm,
        "error": choice.error,
    }


def _noted_choice(note: Path, key: str) -> Choice | None:
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        if saved["key"] != key:
            return None
        inputs, *outputs = (QuantParams(float(scale), int(zero)) for scale, zero in saved["affines"])
        smoothing = None if saved["smoothing"] is None else np.array(saved["smoothing"], np.float32)
        params = ProjectionParams(inputs, tuple(outputs), smoothing)
        return Choice(params, str(saved["algorithm"]), float(saved["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plans(name: str, choice: Choice) -> list[TensorPlan]:
    params = choice.params
    scales = np.array([[t.scale, t.zero] for t in (params.input, *params.outputs)], np.float32)
    arrays: Mapping[str, Any] = {"ranges": scales, "smoothing": params.smoothing}
    return [
        TensorPlan(f"{name}.{kind}", np.float32, array.shape, partial(np.asarray, array))
        for kind, array in arrays.items()
        if array is not None
    ]


def _note(bundle: Bundle, key: str, table: Sequence[Sensitivity]) -> None:
    notes = {"key": key, "table": [asdict(row) for row in table]}
    write_atomically(bundle.path / NOTES, json.dumps(notes).encode())


# -- selection -------------------------------------------------------------------------------------------


def select_projections(
    bundle: Bundle,
    measured: np.ndarray,
    table: list[Sensitivity],
    key: str,
    mapped: Collection[str] | None,
    max_kl: float | None,
) -> tuple[Int8Set, list[Sensitivity]]:
    """Select the projections of a precision for int8. Returns them, and the table with the KLs that were measured.

    mapped: exactly these projections; None: as many as `max_kl` allows. measured: ids (M,) on which KL is measured.
    """
    bytes_of = sizes(bundle.spec)

    @cache
    def evaluator() -> KLEvaluator:
        return KLEvaluator(BundleSource(bundle, "layer", bundle.manifest.cpu), measured)

    def together(names: Collection[str]) -> float:
        return evaluator().together({name: bundle.quantised(name) for name in names})

    if mapped is not None:
        return _int8_set(bundle.spec, mapped, together(mapped), None), table
    assert max_kl is not None, "there is no map, so max_kl limits the choice"
    table = list(table)
    waiting = [number for number, row in enumerate(table) if row.kl is None]
    if waiting:
        log.info(f"measuring the KL divergence of int8, {len(waiting)} projections one by one")
    for number in progress("measure int8", "matrix", over=waiting):
        name = table[number].name
        table[number] = replace(table[number], kl=evaluator().alone({name: bundle.quantised(name)}))
        _note(bundle, key, table)
    names, kl = select({row.name: row.kl or 0.0 for row in table}, bytes_of, max_kl, together)
    return _int8_set(bundle.spec, names, kl, max_kl), table


def _int8_set(spec: Spec, names: Collection[str], kl: float, max_kl: float | None) -> Int8Set:
    bytes_of = sizes(spec)
    everything = sum(int(np.prod(t.shape)) for t in tensors(spec) if t.kind.is_projection and not t.optional)
    ordered = tuple(name for name in bytes_of if name in names)
    return Int8Set(ordered, sum(bytes_of[name] for name in ordered) / everything, kl, max_kl)


def describe(precision: str, int8: Int8Set, table: list[Sensitivity]) -> Iterator[str]:
    """Lines that describe a selection: one for each projection, the largest KL first, and a summary."""
    if any(row.kl is not None for row in table):
        yield "  KL alone  error   method                    projection"
    for row in sorted(table, key=lambda row: -(row.kl or 0.0)):
        method = row.algorithm + (", smoothed" if row.smoothed else "")
        dtype = "w8a8" if row.name in int8.projections else "fp16"
        kl = "" if row.kl is None else f"{row.kl:.2e}"
        yield f"  {kl:8s}  {100 * row.error:5.2f} %  {method:24s}  {dtype}  {row.name}"
    limit = "" if int8.max_kl is None else f" (at most {int8.max_kl:g} allowed)"
    yield (
        f"{precision}: {len(int8.projections)} of {len(table)} large projections in int8, "
        f"{100 * int8.share:.1f} % of all weights, KL {int8.kl:.2g} nats a token{limit}"
    )
