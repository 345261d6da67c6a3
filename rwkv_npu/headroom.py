"""Scales that keep an fp16 graph in range, chosen by what the model makes of a text.

Of what a graph computes, two things grow without a norm to hold them: the residual, which v4 to v6 let grow with depth,
and the square in the channel mix. Both can be scaled by powers of two, which changes no bit of the result. The chip
overflows silently, so that nothing seen may come near: no intermediate passes LIMIT.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, takewhile
from math import ceil, log2

import numpy as np

from rwkv_npu.calibration import Calibration
from rwkv_npu.spec import Scaling, Spec

LARGEST = 65504.0  # of fp16
LIMIT = LARGEST / 8  # what was seen leaves three bits to texts that were not


def choose_scaling(spec: Spec, seen: Calibration) -> Scaling:
    """The scales nearest to 1 under which nothing of `seen`, a calibration without any, passes LIMIT."""
    return Scaling(layers=tuple((_channel_mix(i, seen), _residual(spec, i, seen)) for i in range(spec.L)))


def too_large(seen: Calibration, limit: float = LIMIT) -> dict[str, float]:
    """What passes `limit`, by name, the largest first."""
    found = {name: largest for name, largest in magnitudes(seen) if largest > limit}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def magnitudes(seen: Calibration) -> Iterator[tuple[str, float]]:
    """The largest magnitude of every intermediate: `NAME.in` is what a projection is given, `NORM.before` what a norm
    reads before it is scaled from one layer's scale to the next."""
    yield from seen.peaks.items()
    for layer, name in enumerate(_first_norms(seen)):
        if layer:
            rescaled = seen.scaling.residual(layer) / seen.scaling.residual(layer - 1)
            yield f"{name}.before", seen.peaks[name] / rescaled
    for label, samples in seen.projections.items():
        yield f"{label}.in", float(samples.absmax.max())


def _first_norms(seen: Calibration) -> Iterator[str]:
    """ln1 of each layer, where norms are in the graphs."""
    names = (f"blocks.{layer}.ln1" for layer in count())
    return takewhile(seen.peaks.__contains__, names)


def _channel_mix(layer: int, seen: Calibration) -> float:
    block = f"blocks.{layer}."
    # Divided once: what the key makes of its input. Twice: its square, and all that comes of that.
    once = seen.peaks[f"{block}ffn.key.weight"]
    value = f"{block}ffn.value.weight"
    twice = max(
        seen.peaks[f"{block}square"], seen.peaks[value], float(np.max(seen.projections[value].absmax))
    )
    return 2.0 ** max(0, _halvings(once), ceil(_halvings(twice) / 2))


def _residual(spec: Spec, layer: int, seen: Calibration) -> float:
    """Of the residual as it enters a layer, and as attention and channel mix leave it."""
    block, output = f"blocks.{layer}.", f"blocks.{layer}.att.output.weight"
    following = "ln_out" if layer + 1 == spec.L else f"blocks.{layer + 1}.ln1"
    read = [f"{block}ln1", f"{block}ln2", following, output, f"{block}ffn.value.weight"]
    largest = max(*(seen.peaks[name] for name in read), float(np.max(seen.projections[output].absmax)))
    return 2.0 ** -max(0, _halvings(largest))


def _halvings(magnitude: float) -> int:
    return ceil(log2(magnitude / LIMIT)) if magnitude > 0 else 0
