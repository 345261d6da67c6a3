"""Quantise a model for the CPU: which projections have four bits, and how they are rounded.

For `int4`, a rule selects the projections with four bits (quant.cpu.bits_of). For `auto`, they are the set that saves
most bytes within a limit on the KL divergence. With activation statistics of a text, four bits are rounded by GPTQ,
else to nearest. Each rounded matrix and each measurement is saved at once, so that an interrupted conversion continues
there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from rwkv_npu.conversion.calibration import Statistics
from rwkv_npu.conversion.sensitivity import KLEvaluator, select_largest
from rwkv_npu.conversion.workspace import Notes
from rwkv_npu.conversion.writer import write_packed
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import Bundle, Rounding, packed_file
from rwkv_npu.formats.safetensors import TensorFile, TensorPlan, replace_tensors
from rwkv_npu.models.maths import matmul
from rwkv_npu.models.spec import Kind, Spec, tensors
from rwkv_npu.progress import progress
from rwkv_npu.quant.cpu import SCALE, Packed, bits_of, pack, packed_bytes, unpack
from rwkv_npu.quant.gptq import pack_compensated
from rwkv_npu.runtime.weights import WIDENED, BundleSource, ModelSource

VERSION = 1  # of the method
CHUNK = 128  # tokens on which one projection is measured
NEEDS_TEXT = "cpu='auto' chooses by a text: give tokenizer=FILE, or calibrate= with ids"

log = logging.getLogger("rwkv_npu")


def candidates(spec: Spec, precision: str) -> list[str]:
    """The projections that may have four bits in `int4` or `auto`."""
    if precision == "auto":
        matrices = [t for t in tensors(spec) if t.kind.is_projection and not t.optional]
        return [t.name for t in matrices if len(t.used_shape) == 2]
    return [t.name for t in tensors(spec) if t.kind.is_projection and bits_of(precision, t) == 4]


class FourBits:
    """Matrices in four bits, each rounded at its first use and kept in a file of `folder`.

    key: the names of these files begin with it. statistics: None rounds to nearest.
    """

    def __init__(self, folder: Path, key: str, source: ModelSource, statistics: Statistics | None):
        self._folder, self._key, self._source, self._statistics = folder, key, source, statistics

    def packed(self, name: str) -> Packed:
        weight = self._source.tensor(name)
        if self._statistics is None:
            return pack(weight, 4)
        path = self._folder / f"{self._key}.{name}.safetensors"
        if not path.is_file():
            made = pack_compensated(weight, self._statistics.moments[name])
            plans = [("data", np.uint8, made.data), ("scales", SCALE, made.scales)]
            replace_tensors(path, [TensorPlan(n, d, a.shape, partial(np.asarray, a)) for n, d, a in plans])
        file = TensorFile(path)
        return Packed(file.array("data"), file.array("scales"), (weight.shape[0], weight.shape[1]))


class Unpacked:
    """A packed projection with which the reference can multiply (`npu.Product`). keep: unpack it only once."""

    def __init__(self, packed: Packed, keep: bool):
        self._weight: Callable[[], np.ndarray] = partial(unpack, packed)
        if keep:
            self._weight = cache(self._weight)

    def linear(self, x: np.ndarray) -> np.ndarray:
        return matmul(x, self._weight())


def existing(
    bundle: Bundle, precision: str, wanted: Rounding, notes: Notes, *, any_fits: bool
) -> Rounding | None:
    """The rounding of the bundle's packed weights, None if they must be made.

    wanted: the rounding to look for, with `auto` before its choice. any_fits: accept any finished rounding.
    """
    if not (bundle.path / packed_file(precision)).is_file():
        return None
    noted = notes.get(f"packed {precision}", [VERSION, asdict(wanted)])
    if noted is not None:
        return Rounding(**{**noted, "four_bits": tuple(noted["four_bits"])})
    found = bundle.manifest.rounding.get(precision, Rounding())
    finished = precision in bundle.manifest.packed
    fits = any_fits or replace(found, four_bits=(), kl=None) == wanted
    return found if precision == "int8" or finished and fits else None


def write(
    bundle: Bundle,
    source: ModelSource,
    precision: str,
    wanted: Rounding,
    statistics: Statistics | None,
    measured: np.ndarray | None,
    notes: Notes,
) -> Rounding:
    """Write the packed weights of a precision. Returns how they were rounded, with the choice of `auto`.

    measured: ids (M,) on which `auto` measures the KL divergence. Rounding does not use them.
    """
    text = f"{VERSION} {bundle.manifest.weights_digest} {wanted.text}".encode()
    key = hashlib.blake2b(text, digest_size=8).hexdigest()
    four_bits = FourBits(bundle.path / "calib", key, source, statistics if wanted.text else None)
    rounding, names = wanted, candidates(bundle.spec, precision)
    if precision == "auto":
        if measured is None or wanted.max_kl is None:
            raise UsageError(NEEDS_TEXT)
        names, kl = _choose(bundle, four_bits, measured, wanted.max_kl, notes, key)
        rounding = replace(wanted, four_bits=tuple(names), kl=kl)
        log.info(
            f"auto: {len(names)} matrices in int4, KL {kl:.2g} nats a token (at most {wanted.max_kl:g} allowed)"
        )
    write_packed(bundle.path, source, precision, {name: partial(four_bits.packed, name) for name in names})
    bundle.forget_packed(precision)
    notes.keep(f"packed {precision}", [VERSION, asdict(wanted)], asdict(rounding))
    return rounding


def _choose(
    bundle: Bundle, four_bits: FourBits, measured: np.ndarray, max_kl: float, notes: Notes, key: str
) -> tuple[list[str], float]:
    """Choose the projections that `auto` has in four bits. Returns their names, and their KL together."""
    spec = bundle.spec
    units = _units(spec)
    evaluator = KLEvaluator(BundleSource(bundle, "layer", bundle.manifest.cpu), measured, CHUNK)

    def products(names: Collection[str], keep: bool = False) -> Mapping[str, Unpacked]:
        return {name: Unpacked(four_bits.packed(name), keep) for unit in names for name in units[unit]}

    costs: dict[str, float] = notes.get("sensitivity", key) or {}
    waiting = [unit for unit in units if unit not in costs]
    if waiting:
        log.info("measuring the KL divergence of int4, one by one")
    for unit in progress("measure int4", "matrix", over=waiting):
        costs[unit] = evaluator.alone(products([unit]))
        notes.keep("sensitivity", key, costs)
    by_name = {tensor.name: tensor for tensor in tensors(spec)}
    saved = {
        unit: sum(packed_bytes(by_name[name], 8) - packed_bytes(by_name[name], 4) for name in names)
        for unit, names in units.items()
    }
    keep = 4 * spec.parameters <= WIDENED
    chosen, kl = select_largest(costs, saved, max_kl, lambda names: evaluator.together(products(names, keep)))
    return [name for unit in units if unit in chosen for name in units[unit]], kl


def _units(spec: Spec) -> dict[str, list[str]]:
    """The units of the choice: each large projection alone, the small ones of a layer together."""
    units: dict[str, list[str]] = {}
    kinds = {tensor.name: tensor.kind for tensor in tensors(spec)}
    for name in candidates(spec, "auto"):
        unit = name if kinds[name] is Kind.LINEAR else f"{name.rsplit('.att.', 1)[0]}, low-rank"
        units.setdefault(unit, []).append(name)
    return units
