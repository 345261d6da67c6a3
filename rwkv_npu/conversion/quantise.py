"""The int8 of a conversion: ranges for every projection that may have it, and which of them do.

The ranges are chosen by rows that the model gives its projections while it reads a text, and kept in the bundle
(`calib/int8.safetensors`). What int8 costs is measured on the end of that text, which no range was chosen by. What was
found is noted beside the ranges as it is found, so that an interrupted conversion goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from rwkv_npu.conversion.calibration import calibrate
from rwkv_npu.conversion.sensitivity import Judge, select
from rwkv_npu.formats.bundle import INT8, MANIFEST, Bundle, Int8Set, Sensitivity
from rwkv_npu.formats.files import remove_within, write_atomically
from rwkv_npu.formats.safetensors import TensorPlan, replace_tensors
from rwkv_npu.models.spec import Kind, Spec, tensors
from rwkv_npu.progress import progress
from rwkv_npu.quant.ranges import ALGORITHMS, Choice, choose
from rwkv_npu.quant.smoothing import smoothings
from rwkv_npu.runtime.weights import BundleSource

MAX_KL = 0.005  # nats a token
NOTES = "calib/int8.json"
MEASURED = 1024  # tokens on which int8 is measured, no more than a quarter of the text
FEW = 1000  # tokens, less than which are said to be too few
LEAST = 8  # tokens of a text that can be parted so
VERSION = 7  # of the way in which ranges are chosen, and graphs made

# What may be done about the error of int8: which algorithms choose ranges, and whether channels may be smoothed.
REMEDIES: dict[str, tuple[Sequence[str], bool]] = {
    "all": (tuple(ALGORITHMS), True),
    "ranges": (tuple(ALGORITHMS), False),
    "smoothing": (("normal",), True),
    "none": (("normal",), False),
}


def sizes(spec: Spec) -> dict[str, int]:
    """The projections that may be in int8, with the bytes that they take then. Low-rank ones stay in floating point:
    they are small, and steer the state."""
    return {
        t.name: t.shape[0] * t.shape[1] for t in tensors(spec) if t.kind is Kind.LINEAR and not t.optional
    }


def key_of(bundle: Bundle, ids: np.ndarray, remedies: str) -> str:
    """What the ranges follow from, apart from the weights."""
    text = f"{VERSION} {remedies} {bundle.manifest.scaling}".encode()
    return hashlib.blake2b(text + ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


def quantise_bundle(
    bundle: Bundle,
    ids: np.ndarray,
    precision: str,
    max_kl: float,
    mapped: Collection[str] | None,
    remedies: str,
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Choose what artifacts of `precision` have in int8, for the manifest, and return the names: those of a map, all of
    them for w8a8, else as many as `max_kl` allows. `remedies` is one of REMEDIES."""
    quantised = Quantisation(bundle, ids, remedies, say)
    if precision == "mixed" and mapped is None:
        chosen = quantised.take_most(precision, max_kl)
    else:
        chosen = quantised.take(precision, sizes(bundle.spec) if mapped is None else mapped)
    say("\n".join(describe(precision, chosen, quantised.table)))
    return chosen.projections


class Quantisation:
    """Ranges and sensitivities of a bundle's projections, calibrated with `ids` (M,)."""

    def __init__(self, bundle: Bundle, ids: np.ndarray, remedies: str, say: Callable[[str], None]):
        self._bundle, self._say = bundle, say
        self._algorithms, self._smooth = REMEDIES[remedies]
        measured = max(1, min(MEASURED, len(ids) // 4))
        self._fitted, self._measured = ids[:-measured], ids[-measured:]
        self._source = BundleSource(bundle, "layer", bundle.manifest.cpu)
        self._key = key_of(bundle, ids, remedies)
        manifest, there = bundle.manifest, (bundle.path / INT8).is_file()
        # Whether what the manifest says follows from these ranges.
        self._unchanged = there and manifest.int8_key == self._key and bool(manifest.sensitivity)
        noted = self._noted() if there else None
        known = manifest.sensitivity if self._unchanged else None
        self.table = noted or known or self._choose_ranges()
        manifest.int8_key, manifest.sensitivity = self._key, self.table

    def take(self, precision: str, names: Collection[str]) -> Int8Set:
        """Have exactly `names` in int8."""
        known = self._bundle.manifest.int8.get(precision)
        if known is not None and self._unchanged and set(known.projections) == set(names):
            return known
        return self._keep(precision, names, self._together(names), None)

    def take_most(self, precision: str, max_kl: float) -> Int8Set:
        """Have as much in int8 as leaves the KL of the logits under `max_kl`."""
        known = self._bundle.manifest.int8.get(precision)
        if known is not None and known.max_kl == max_kl and self._unchanged:
            return known
        self._measure_each()
        costs = {row.name: row.kl or 0.0 for row in self.table}
        names, kl = select(costs, sizes(self._bundle.spec), max_kl, self._together)
        return self._keep(precision, names, kl, max_kl)

    def _keep(self, precision: str, names: Collection[str], kl: float, max_kl: float | None) -> Int8Set:
        spec, bytes_of = self._bundle.spec, sizes(self._bundle.spec)
        everything = sum(
            int(np.prod(t.shape)) for t in tensors(spec) if t.kind.is_projection and not t.optional
        )
        ordered = tuple(name for name in bytes_of if name in names)
        chosen = Int8Set(ordered, sum(bytes_of[name] for name in ordered) / everything, kl, max_kl)
        self._bundle.manifest.int8[precision] = chosen
        return chosen

    # -- ranges --

    def _noted(self) -> list[Sensitivity] | None:
        """The table of a conversion that was interrupted."""
        try:
            notes = json.loads((self._bundle.path / NOTES).read_text(encoding="utf-8"))
            if notes["key"] != self._key:
                return None
            return [Sensitivity(**row) for row in notes["table"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _choose_ranges(self) -> list[Sensitivity]:
        self._say("choosing the ranges of int8")
        if len(self._fitted) < FEW:
            self._say(
                f"{len(self._fitted)} tokens are few to choose ranges by: other texts will leave them, and int8 will "
                "cost more than is measured here; thousands serve"
            )
        with progress("calibrate", "token", total=len(self._fitted)) as bar:
            seen = calibrate(self._source, self._fitted, progress=bar.update)
        bytes_of = sizes(self._bundle.spec)
        table, plans = [], []
        for name in progress("choose ranges", "matrix", over=bytes_of):
            weight, samples = np.asarray(self._source.tensor(name), np.float32), seen.projections[name]
            candidates = smoothings(weight, samples) if self._smooth else [None]
            choice = choose(name, weight, samples, candidates, self._algorithms)
            smoothed = choice.ranges.smoothing is not None
            table.append(Sensitivity(name, bytes_of[name], choice.algorithm, smoothed, choice.error))
            plans += _plans(name, choice)
        path = self._bundle.path / INT8
        path.parent.mkdir(exist_ok=True)
        self._forget()
        replace_tensors(path, plans)
        self._bundle.forget_ranges()
        self._note(table)
        return table

    def _forget(self) -> None:
        """What follows from other ranges goes: first from the manifest, in case of a kill."""
        manifest, folder = self._bundle.manifest, self._bundle.path
        (folder / NOTES).unlink(missing_ok=True)
        if lost := sorted({(a.target, a.precision, a.fusion) for a in manifest.artifacts if a.int8}):
            self._say(
                "artifacts in int8 of other ranges go: convert again to have "
                + ", ".join(f"--target {t} --precision {p} --fusion {f}" for t, p, f in lost)
            )
        stale = manifest.forget_int8()
        gone = {INT8, *stale}
        manifest.files = {name: record for name, record in manifest.files.items() if name not in gone}
        if (folder / MANIFEST).exists():
            write_atomically(folder / MANIFEST, manifest.to_json().encode())
        for name in stale:
            remove_within(folder, name)

    def _note(self, table: list[Sensitivity]) -> None:
        notes = {"key": self._key, "table": [asdict(row) for row in table]}
        write_atomically(self._bundle.path / NOTES, json.dumps(notes).encode())

    # -- what it costs --

    def _measure_each(self) -> None:
        waiting = [number for number, row in enumerate(self.table) if row.kl is None]
        if waiting:
            self._say(f"measuring what int8 costs, {len(waiting)} projections one by one")
        for number in progress("measure int8", "matrix", over=waiting):
            row = self.table[number]
            kl = self._judge.alone(row.name, self._bundle.quantised(row.name))
            self.table[number] = replace(row, kl=kl)
            self._note(self.table)

    def _together(self, names: Collection[str]) -> float:
        """KL of the logits with `names` in int8."""
        return self._judge.together({name: self._bundle.quantised(name) for name in names})

    @cached_property
    def _judge(self) -> Judge:
        return Judge(self._source, self._measured)


def describe(precision: str, chosen: Int8Set, table: list[Sensitivity]) -> Iterator[str]:
    """What was found, a line a projection, those that cost most first."""
    if any(row.kl is not None for row in table):
        yield "  KL alone  error   ranges                    projection"
    for row in sorted(table, key=lambda row: -(row.kl or 0.0)):
        how = row.algorithm + (", smoothed" if row.smoothed else "")
        where = "w8a8" if row.name in chosen.projections else "fp16"
        kl = "" if row.kl is None else f"{row.kl:.2e}"
        yield f"  {kl:8s}  {100 * row.error:5.2f} %  {how:24s}  {where}  {row.name}"
    limit = "" if chosen.max_kl is None else f", {chosen.max_kl:g} is allowed"
    yield (
        f"{precision}: {len(chosen.projections)} of {len(table)} large projections in int8, "
        f"{100 * chosen.share:.1f} % of all weights, KL {chosen.kl:.2g} nats a token{limit}"
    )


def _plans(name: str, choice: Choice) -> list[TensorPlan]:
    ranges = choice.ranges
    affines = np.array([[a.scale, a.zero] for a in (ranges.input, *ranges.outputs)], np.float32)
    arrays: Mapping[str, Any] = {"ranges": affines, "smoothing": ranges.smoothing}
    return [
        TensorPlan(f"{name}.{kind}", np.float32, array.shape, partial(np.asarray, array))
        for kind, array in arrays.items()
        if array is not None
    ]
