"""fp16 range scaling: powers of two that keep an fp16 graph in range, chosen by activation statistics.

Two intermediates of a graph grow without a norm to hold them: the residual, which v4 to v6 let grow with depth, and the
square in the channel mix. Both are scaled by powers of two, which changes no bit except of numbers near fp16's
smallest. The chip overflows silently: so no intermediate of the statistics passes LIMIT.
"""

from __future__ import annotations

import logging
import re
from math import ceil, log2
from typing import Any

import numpy as np

from rwkv_npu.conversion.calibration import Statistics
from rwkv_npu.models.spec import Scaling, Spec
from rwkv_npu.quant.ranges import Samples

LARGEST = 65504.0  # of fp16
LIMIT = LARGEST / 8  # three bits are left to texts that were not read

# Tokens of our own text that suffice for fp16: extremes show early.
TOKENS = 2048

_ONCE = ("ffn.key.weight", "ffn.key.weight.in")  # divided by the channel mix's scale
_TWICE = ("square", "ffn.value.weight", "ffn.value.weight.in")  # by its square
_RESIDUAL = ("ln1", "ln2", "att.output.weight", "att.output.weight.in")  # multiplied by the residual's scale

log = logging.getLogger("rwkv_npu")


def choose_scaling(spec: Spec, seen: Statistics) -> Scaling:
    """The scales nearest to 1 under which nothing that they can change passes LIMIT.

    seen: statistics in layer fusion, without any scaling.
    """
    found = magnitudes(spec, seen, Scaling())
    layers = []
    for layer in range(spec.L):
        block = f"blocks.{layer}."
        once, twice, residual = (
            _halvings(max(found[block + name] for name in names)) for names in (_ONCE, _TWICE, _RESIDUAL)
        )
        # As the layer leaves it, before it is scaled for the next; the channel mix's product is added to it.
        left = _halvings(max(found[f"{block}out"], found[f"{block}ffn.value.weight"]))
        layers.append((2.0 ** max(once, ceil(twice / 2)), 2.0 ** -max(residual, left)))
    return Scaling(layers=tuple(layers))


def magnitudes(spec: Spec, seen: Statistics, scaling: Scaling) -> dict[str, float]:
    """The largest magnitude of every intermediate under `scaling`, from statistics without any.

    NAME.in is the input of a projection, `blocks.I.out` the residual after layer I.
    """
    found = {**seen.peaks, **{f"{label}.in": float(s.absmax.max()) for label, s in seen.projections.items()}}
    following = [*(f"blocks.{layer}.ln1" for layer in range(1, spec.L)), "ln_out"]
    found |= {f"blocks.{layer}.out": found[norm] for layer, norm in enumerate(following)}
    return {name: magnitude * _factor(spec, name, scaling) for name, magnitude in found.items()}


def measure_range(
    spec: Spec, seen: Statistics, scaling: Scaling, fusion: str, *, adding: bool
) -> dict[str, Any]:
    """The largest magnitude under `scaling`, where it is, and how many tokens were read; logs what passes LIMIT.

    adding: `scaling` is fixed, by the graphs of a bundle that is added to.
    """
    found = magnitudes(spec, seen, scaling)
    name, largest = max(found.items(), key=lambda item: item[1])
    if loud := too_large(found):
        less = ": --fusion projection has less of it on the NPU" if fusion == "layer" else ""
        advice = ": --force scales it anew" if adding else less
        log.info(
            f"{len(loud)} intermediates pass {LIMIT:.0f}, an eighth of fp16's range ({name}: {largest:.0f}){advice}"
        )
    return {"tokens": seen.tokens, "largest": largest, "at": name}


def scaled_samples(spec: Spec, seen: Statistics, scaling: Scaling, label: str) -> Samples:
    """The samples of a projection under `scaling`, from statistics without any: exact, by powers of two."""
    samples = seen.projections[label]
    inputs, products = (_factor(spec, name, scaling) for name in (f"{label}.in", label))
    if inputs == products == 1:
        return samples
    factor = np.float32(inputs)
    return Samples(
        samples.rows * factor, samples.low * factor, samples.high * factor, samples.products * products
    )


def too_large(found: dict[str, float]) -> dict[str, float]:
    """The magnitudes above LIMIT, by name, the largest first."""
    return {name: x for name, x in sorted(found.items(), key=lambda item: -item[1]) if x > LIMIT}


def _factor(spec: Spec, name: str, scaling: Scaling) -> float:
    """`scaling` multiplies the intermediate `name` by this."""
    if name in ("ln_out", "last.x"):
        return scaling.residual(spec.L - 1)
    if name == "first.x":
        return scaling.residual(0)
    if group := re.fullmatch(r"mid\.(\d+)\.x", name):
        return scaling.residual(int(group[1]))
    if not (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)):
        return 1.0
    layer, part = int(block[1]), block[2]
    if part in _ONCE:
        return 1 / scaling.channel_mix(layer)
    if part in _TWICE:
        return 1 / scaling.channel_mix(layer) ** 2
    return scaling.residual(layer) if part in (*_RESIDUAL, "out") else 1.0


def _halvings(magnitude: float) -> int:
    return max(0, ceil(log2(magnitude / LIMIT))) if magnitude > 0 else 0
