"""How much of a model's predictions each projection costs when it is in int8, and which of them can be.

The distance is the KL divergence of the logits, in nats a token, from those of the reference, over a text that ranges
were not chosen by. A projection's own is measured with it alone in int8, on the beginning of that text; those of many
are measured together, since errors do not simply add up, on all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from rwkv_npu.formats.state import new_state
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths, divergence
from rwkv_npu.models.network import Network
from rwkv_npu.models.spec import Group
from rwkv_npu.quant.npu import Int8Maths, Quantised
from rwkv_npu.runtime.weights import ModelSource, widened

CHUNK = 256  # tokens of a step; on those of the first one each projection is measured alone
KEPT = 1 << 30  # bytes of the reference's outputs that may be kept, to begin where a projection is

Outputs = Mapping[str, np.ndarray]


class Judge:
    """Reads `ids` (M,) once in the reference, and then as often as asked with some projections in int8."""

    def __init__(self, source: ModelSource, ids: np.ndarray):
        self._source = source
        self._chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
        self._weight = widened(source)
        self._network = Network(source.program, source.tensor)
        self._order = {group.name: place for place, group in enumerate(source.program.groups)}
        # Of the head nothing is kept: it is the last, and what it makes is large.
        widths = sum(port.width for group in source.program.groups[:-1] for port in group.outputs)
        self._keep = 4 * widths * CHUNK <= KEPT
        self._kept: dict[str, Outputs] = {}  # by group, of the first chunk
        self._expected = list(self._logits(self._chunks, NumpyMaths(self._weight), 0))

    def alone(self, label: str, quantised: Quantised) -> float:
        """KL(reference || the model with this projection in int8), the mean over the first CHUNK tokens."""
        maths = Int8Maths(self._weight, {label: quantised}.get)
        first = self._place(label) if self._keep else 0
        return self._divergence(self._logits(self._chunks[:1], maths, first))

    def together(self, quantised: Mapping[str, Quantised]) -> float:
        """KL(reference || the model with `quantised`, by label, in int8), the mean over all tokens."""
        return self._divergence(self._logits(self._chunks, Int8Maths(self._weight, quantised.get), 0))

    def _divergence(self, found: Iterable[np.ndarray]) -> float:
        return float(
            np.concatenate([divergence(*pair) for pair in zip(self._expected, found, strict=False)]).mean()
        )

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

    def _logits(self, chunks: Sequence[np.ndarray], maths: NumpyMaths, first: int) -> Iterator[np.ndarray]:
        """(rows, V) of each chunk; groups before number `first`, if that is not 0, are not computed again."""
        source = self._source
        state = new_state(source.spec, source.fingerprint, source.initial_states())
        parts = {name: part[:, None] for name, part in state.parts.items()}

        def run(group: Group, inputs: Arrays) -> Outputs:
            if self._order[group.name] < first:
                return self._kept[group.name]
            outputs = source.evaluate(group, maths, dict(inputs))
            if self._keep and group.name not in self._kept and group.role != "head":
                self._kept[group.name] = {name: array.copy() for name, array in outputs.items()}
            return outputs

        for chunk in chunks:
            yield self._network.logits(run, self._network.hidden(run, chunk[:, None], parts))


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
