"""fp16 range scaling: powers of two that keep the intermediates of an fp16 graph in range.

Two intermediates can grow without bound: the residual, which grows with depth in v4 to v6, and the square in the
channel mix. Both are scaled by powers of two, which is exact except for numbers near fp16's smallest. The chip gives no
sign of an overflow. So the scales keep every intermediate of the activation statistics below LIMIT.
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
LIMIT = LARGEST / 8  # leaves three bits for other texts

# Tokens of the package's text to read for fp16. These suffice, because extremes appear early.
TOKENS = 2048

_ONCE = ("ffn.key.weight", "ffn.key.weight.in")  # divided by the channel mix's scale
_TWICE = ("square", "ffn.value.weight", "ffn.value.weight.in")  # divided by the square of that scale
_RESIDUAL = ("ln1", "ln2", "att.output.weight", "att.output.weight.in")  # multiplied by the residual's scale

log = logging.getLogger("rwkv_npu")


def choose_scaling(spec: Spec, statistics: Statistics) -> Scaling:
    """The scales nearest to 1 that keep everything they can change below LIMIT.

    statistics: in layer fusion, without any scaling.
    """
    absmax = magnitudes(spec, statistics, Scaling())
    layers = []
    for layer in range(spec.L):
        block = f"blocks.{layer}."
        once, twice, residual = (
            _halvings(max(absmax[block + name] for name in names)) for names in (_ONCE, _TWICE, _RESIDUAL)
        )
        # The layer's output, and the channel mix's product in it, have this layer's scale, not the next one's.
        output = _halvings(max(absmax[f"{block}out"], absmax[f"{block}ffn.value.weight"]))
        layers.append((2.0 ** max(once, ceil(twice / 2)), 2.0 ** -max(residual, output)))
    return Scaling(layers=tuple(layers))


def magnitudes(spec: Spec, statistics: Statistics, scaling: Scaling) -> dict[str, float]:
    """The absmax of every intermediate under `scaling`, computed from statistics without any scaling.

    NAME.in is the input of a projection, `blocks.I.out` the residual after layer I.
    """
    inputs = {f"{label}.in": float(s.absmax.max()) for label, s in statistics.projections.items()}
    absmax = {**statistics.absmax, **inputs}
    following = [*(f"blocks.{layer}.ln1" for layer in range(1, spec.L)), "ln_out"]
    absmax |= {f"blocks.{layer}.out": absmax[norm] for layer, norm in enumerate(following)}
    return {name: value * _factor(spec, name, scaling) for name, value in absmax.items()}


def measure_range(
    spec: Spec, statistics: Statistics, scaling: Scaling, fusion: str, *, adding: bool
) -> dict[str, Any]:
    """The largest absmax under `scaling`, its name, and the number of tokens read. Logs intermediates above LIMIT.

    adding: `scaling` is fixed, because the bundle to add to has graphs with it.
    """
    absmax = magnitudes(spec, statistics, scaling)
    name, largest = max(absmax.items(), key=lambda item: item[1])
    if large := too_large(absmax):
        less = ": fusion='projection' puts fewer of them on the NPU" if fusion == "layer" else ""
        advice = ": force=True chooses the scales anew" if adding else less
        log.info(
            f"{len(large)} intermediates exceed {LIMIT:.0f}, an eighth of fp16's range ({name}: {largest:.0f}){advice}"
        )
    return {"tokens": statistics.tokens, "largest": largest, "at": name}


def scaled_samples(spec: Spec, statistics: Statistics, scaling: Scaling, label: str) -> Samples:
    """The samples of a projection under `scaling`, from statistics without any. Powers of two keep them exact."""
    samples = statistics.projections[label]
    inputs, products = (_factor(spec, name, scaling) for name in (f"{label}.in", label))
    if inputs == products == 1:
        return samples
    factor = np.float32(inputs)
    return Samples(
        samples.rows * factor, samples.low * factor, samples.high * factor, samples.products * products
    )


def too_large(absmax: dict[str, float]) -> dict[str, float]:
    """The values above LIMIT, by name, the largest first."""
    return {name: x for name, x in sorted(absmax.items(), key=lambda item: -item[1]) if x > LIMIT}


def _factor(spec: Spec, name: str, scaling: Scaling) -> float:
    """The factor by which `scaling` multiplies the intermediate `name`."""
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
