"""How much of a model's predictions each projection costs when it is in int8, and which of them can be.

The distance is the KL divergence of the logits, in nats a token, from those of the reference, over a text that ranges
were not chosen by. A projection's own is measured with it alone in int8; those of many are measured together, since
errors do not simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from rwkv_npu.int8 import Int8Maths, Quantised
from rwkv_npu.maths import NumpyMaths, log_softmax
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.network import Network
from rwkv_npu.sources import ModelSource
from rwkv_npu.spec import Group
from rwkv_npu.state import new_state

CHUNK = 64  # tokens of a step
KEPT = 1 << 30  # bytes of the reference's outputs that may be kept, to begin where a projection is
WIDENED = 4 << 30  # bytes of weights that may be kept in fp32

Outputs = Mapping[str, np.ndarray]


class Judge:
    """Reads `ids` (M,) once in the reference, and then as often as asked with some projections in int8."""

    def __init__(self, source: ModelSource, ids: np.ndarray):
        self._source, self._ids = source, ids
        self._weights: dict[str, np.ndarray] = {}
        self._widen = 4 * source.spec.parameters <= WIDENED
        self._network = Network(source.program, source.tensor)
        self._order = {group.name: place for place, group in enumerate(source.program.groups)}
        # Of the head nothing is kept: it is the last, and what it makes is large.
        widths = sum(port.width for group in source.program.groups[:-1] for port in group.outputs)
        self._kept: dict[tuple[int, str], Outputs] | None = {} if 4 * widths * len(ids) <= KEPT else None
        self._expected = list(self._logits(NumpyMaths(self._weight), 0))

    def divergence(self, quantised: Mapping[str, Quantised]) -> float:
        """KL(reference || the model with `quantised`, by label, in int8), the mean over all tokens."""
        first = min(map(self._place, quantised), default=len(self._order) - 1)
        total = 0.0
        maths = Int8Maths(self._weight, quantised.get)
        for expected, found in zip(self._expected, self._logits(maths, first), strict=True):
            p, q = log_softmax(expected), log_softmax(found)
            total += float((np.exp(p) * (p - q)).sum())
        return total / len(self._ids)

    def _place(self, label: str) -> int:
        """The first group that multiplies with a projection, or one before it."""
        parts = label.split(".")
        if parts[0] != "blocks":
            return len(self._order) - 1
        layer = int(parts[1])
        if self._source.program.fusion == "projection":
            return 3 * layer
        # att.in of a layer is in the group of the layer before; all that follows it is in its own.
        inside = parts[2] == "ffn" or parts[3] == "output"
        return layer + 1 if inside else layer

    def _logits(self, maths: NumpyMaths, first: int) -> Iterator[np.ndarray]:
        """Of every step (rows, V); groups before number `first` are not computed again."""
        source = self._source
        state = new_state(source.spec, source.fingerprint, source.initial_states())
        parts = {name: part[:, None] for name, part in state.parts.items()}
        for number, start in enumerate(range(0, len(self._ids), CHUNK)):

            def run(group: Group, inputs: Arrays, number: int = number) -> Outputs:
                key = number, group.name
                if self._kept is not None and self._order[group.name] < first:
                    return self._kept[key]
                outputs = source.evaluate(group, maths, dict(inputs))
                if self._kept is not None and key not in self._kept and group.role != "head":
                    self._kept[key] = {name: array.copy() for name, array in outputs.items()}
                return outputs

            x = self._network.hidden(run, self._ids[start : start + CHUNK, None], parts)
            yield self._network.logits(run, x)

    def _weight(self, name: str) -> np.ndarray:
        if not self._widen:
            return self._source.tensor(name)
        if name not in self._weights:
            self._weights[name] = np.asarray(self._source.tensor(name), np.float32)
        return self._weights[name]


def select(
    costs: Mapping[str, float],
    sizes: Mapping[str, int],
    max_kl: float,
    measure: Callable[[Sequence[str]], float],
) -> tuple[list[str], float]:
    """The projections to have in int8, and what they cost together.

    costs: KL of each alone; sizes: bytes of each. Those that cost least for their bytes come first, and of that order
    as many are taken as `measure`, of all of them together, leaves under `max_kl`.
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
