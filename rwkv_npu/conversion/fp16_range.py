"""Scales that keep an fp16 graph in range, chosen by what the model makes of a text.

Of what a graph computes, two things grow without a norm to hold them: the residual, which v4 to v6 let grow with depth,
and the square in the channel mix. Both can be scaled by powers of two, which changes no bit but of numbers near fp16's
smallest. The chip overflows silently, so that nothing seen may come near: no intermediate passes LIMIT.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import ceil, log2

import numpy as np

from rwkv_npu.conversion.calibration import Calibration, calibrate
from rwkv_npu.formats.bundle import Manifest
from rwkv_npu.models.spec import Scaling, Spec
from rwkv_npu.progress import progress
from rwkv_npu.runtime.weights import ModelSource

LARGEST = 65504.0  # of fp16
LIMIT = LARGEST / 8  # what was seen leaves three bits to texts that were not

# Tokens that suffice of our own text: extremes show early, and in fp16 there is nothing else to wait for.
TOKENS = 2048

_ONCE = ("ffn.key.weight", "ffn.key.weight.in")  # divided by the channel mix's scale
_TWICE = ("square", "ffn.value.weight", "ffn.value.weight.in")  # by its square
_RESIDUAL = ("ln1", "ln2", "att.output.weight", "att.output.weight.in")  # multiplied by the residual's scale


def keep_in_range(
    manifest: Manifest, source: ModelSource, ids: np.ndarray, adding: bool, say: Callable[[str], None]
) -> None:
    """Choose the manifest's scales by what the model, without any, makes of `ids`.

    A bundle that is added to keeps those that its graphs have; `say` is told of what passes LIMIT under them.
    """
    say(f"reading {len(ids)} tokens to keep fp16 in range")
    with progress("calibrate", "token", total=len(ids)) as bar:
        seen = calibrate(source, ids, keep=2, progress=bar.update)
    if not adding:
        manifest.scaling = choose_scaling(source.spec, seen)
    found = magnitudes(source.spec, seen, manifest.scaling)
    name, largest = max(found.items(), key=lambda item: item[1])
    manifest.headroom = {"tokens": seen.tokens, "largest": largest, "at": name}
    if loud := too_large(found):
        less = ": --fusion projection has less of it on the NPU" if manifest.fusion == "layer" else ""
        advice = ": --force scales it anew" if adding else less
        say(
            f"{len(loud)} intermediates pass {LIMIT:.0f}, an eighth of fp16's range ({name}: {largest:.0f}){advice}"
        )


def choose_scaling(spec: Spec, seen: Calibration) -> Scaling:
    """The scales nearest to 1 under which nothing of `seen` that they can change passes LIMIT.

    `seen` is a calibration in layer fusion, without any scaling.
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


def magnitudes(spec: Spec, seen: Calibration, scaling: Scaling) -> dict[str, float]:
    """The largest magnitude of every intermediate under `scaling`, for a calibration without any.

    NAME.in is what a projection is given, `blocks.I.out` the residual as layer I leaves it.
    """
    found = {**seen.peaks, **{f"{label}.in": float(s.absmax.max()) for label, s in seen.projections.items()}}
    following = [*(f"blocks.{layer}.ln1" for layer in range(1, spec.L)), "ln_out"]
    found |= {f"blocks.{layer}.out": found[norm] for layer, norm in enumerate(following)}
    return {name: magnitude * _factor(spec, name, scaling) for name, magnitude in found.items()}


def too_large(found: dict[str, float]) -> dict[str, float]:
    """What passes LIMIT, by name, the largest first."""
    return {name: x for name, x in sorted(found.items(), key=lambda item: -item[1]) if x > LIMIT}


def _factor(spec: Spec, name: str, scaling: Scaling) -> float:
    """What `scaling` multiplies an intermediate by."""
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
