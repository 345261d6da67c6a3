"""The error of int8, as KL divergence of the logits, and the selection of projections for `mixed`.

KL is in nats a token against the logits of the reference, over a text that did not choose any parameter. One projection
is measured on the first CHUNK tokens. Several are measured together on the whole text, because errors do not simply
add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths, divergence
from rwkv_npu.models.spec import Group
from rwkv_npu.quant.npu import Int8Maths, Quantised
from rwkv_npu.runtime.reference import read
from rwkv_npu.runtime.weights import ModelSource, widened

CHUNK = 256  # tokens of a step
KEPT = 1 << 30  # bytes of kept reference outputs at most. A measurement can start from them

Outputs = Mapping[str, np.ndarray]


class KLEvaluator:
    """Measures the KL divergence of int8 projections on `ids` (M,). The reference logits are computed once."""

    def __init__(self, source: ModelSource, ids: np.ndarray):
        self._source = source
        self._chunks = [[ids[start : start + CHUNK]] for start in range(0, len(ids), CHUNK)]
        self._weight = widened(source)
        self._order = {group.name: number for number, group in enumerate(source.program.groups)}
        # Without the head: no group follows it, and logits are large.
        widths = sum(port.width for group in source.program.groups[:-1] for port in group.outputs)
        self._keep = 4 * widths * CHUNK <= KEPT
        self._kept: dict[str, Outputs] = {}  # reference outputs of the first chunk, by group
        self._expected = list(self._logits(self._chunks, NumpyMaths(self._weight), 0))

    def alone(self, label: str, quantised: Quantised) -> float:
        """KL(reference || the model with this projection in int8), mean over the first CHUNK tokens."""
        maths = Int8Maths(self._weight, {label: quantised}.get)
        first = self._first_group(label) if self._keep else 0
        return self._divergence(self._logits(self._chunks[:1], maths, first))

    def together(self, quantised: Mapping[str, Quantised]) -> float:
        """KL(reference || the model with these projections in int8), mean over all tokens."""
        return self._divergence(self._logits(self._chunks, Int8Maths(self._weight, quantised.get), 0))

    def _divergence(self, logits: Iterable[np.ndarray]) -> float:
        pairs = zip(self._expected, logits, strict=False)
        return float(np.concatenate([divergence(*pair) for pair in pairs]).mean())

    def _first_group(self, label: str) -> int:
        """Number of the first group that a projection affects, or of an earlier one."""
        parts = label.split(".")
        if parts[0] != "blocks":
            return len(self._order) - 1
        layer = int(parts[1])
        if self._source.program.fusion == "projection":
            return 3 * layer
        # att.in of a layer belongs to the group of the layer before, the rest to the layer's own group.
        inside = parts[2] == "ffn" or parts[3] == "output"
        return layer + 1 if inside else layer

    def _logits(
        self, chunks: Sequence[Sequence[np.ndarray]], maths: NumpyMaths, first: int
    ) -> Iterator[np.ndarray]:
        """Logits (rows, V) of each chunk. Groups before number `first` reuse the kept reference outputs."""

        def run(group: Group, inputs: Arrays) -> Outputs:
            if self._order[group.name] < first:
                return self._kept[group.name]
            outputs = self._source.evaluate(group, maths, dict(inputs))
            if self._keep and group.name not in self._kept and group.role != "head":
                self._kept[group.name] = {name: array.copy() for name, array in outputs.items()}
            return outputs

        return read(self._source, run, chunks)


def select(
    costs: Mapping[str, float],
    sizes: Mapping[str, int],
    max_kl: float,
    measure: Callable[[Sequence[str]], float],
) -> tuple[list[str], float]:
    """Select projections for int8. Returns their names and their KL together.

    costs: KL of each alone. sizes: bytes of each. measure: KL of several together. Projections are sorted by cost for
    their bytes; a binary search finds the longest prefix of that order whose KL stays within `max_kl`.
    """
    order = sorted(costs, key=lambda name: max(costs[name], 0.0) / sizes[name])
    together = measure(order)
    if together <= max_kl:
        return order, together
    good, most, together = 0, len(order) - 1, 0.0
    while good < most:
        middle = (good + most + 1) // 2
        kl = measure(order[:middle])
        if kl <= max_kl:
            good, together = middle, kl
        else:
            most = middle - 1
    return order[:good], together
