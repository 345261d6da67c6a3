"""The error of quantised projections, as KL divergence of the logits, and the selection of those that have fewer bits.

KL is in nats a token against the logits of the reference, over a text that did not choose any parameter. One projection
is measured on the first tokens. Several are measured together on the whole text, because errors do not simply
add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import NumpyMaths, divergence
from rwkv_npu.models.spec import Group
from rwkv_npu.quant.npu import Int8Maths, Product
from rwkv_npu.runtime.reference import read
from rwkv_npu.runtime.weights import ModelSource, widened

CHUNK = 256  # tokens of a step
BISECTIONS = 7
STEPS = 2000  # the knapsack counts the allowed costs in so many steps, because it needs whole numbers
KEPT = 1 << 30  # bytes of reference outputs to keep at most, for measurements to start from

Outputs = Mapping[str, np.ndarray]


class KLEvaluator:
    """Measures the KL divergence of quantised projections on `ids` (M,), `chunk` tokens a step.

    The reference logits are computed once.
    """

    def __init__(self, source: ModelSource, ids: np.ndarray, chunk: int = CHUNK):
        self._source = source
        self._chunks = [[ids[start : start + chunk]] for start in range(0, len(ids), chunk)]
        self._weight = widened(source)
        self._order = {group.name: number for number, group in enumerate(source.program.groups)}
        # Without the head: no group follows it, and logits are large.
        widths = sum(port.width for group in source.program.groups[:-1] for port in group.outputs)
        self._keep = 4 * widths * chunk <= KEPT
        self._kept: dict[str, Outputs] = {}  # reference outputs of the first chunk, by group
        self._expected = list(self._logits(self._chunks, NumpyMaths(self._weight), 0))

    def alone(self, quantised: Mapping[str, Product]) -> float:
        """KL(reference || the model with these projections quantised), mean over the first chunk.

        Quick for projections of one layer: the layers before it are not computed again.
        """
        maths = Int8Maths(self._weight, quantised.get)
        first = min(map(self._first_group, quantised)) if self._keep else 0
        return self._divergence(self._logits(self._chunks[:1], maths, first))

    def together(self, quantised: Mapping[str, Product]) -> float:
        """KL(reference || the model with these projections quantised), mean over all tokens."""
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
    """Select projections to quantise. Returns their names and their KL together.

    costs: KL of each alone. sizes: bytes that each saves. measure: KL of several together. Projections are sorted by
    cost for their bytes; a binary search finds the longest prefix of that order whose KL stays within `max_kl`.
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


def select_largest(
    costs: Mapping[str, float],
    sizes: Mapping[str, int],
    max_kl: float,
    measure: Callable[[Sequence[str]], float],
) -> tuple[list[str], float]:
    """As `select`, for costs that differ by orders of magnitude: not a prefix, but the largest set that fits.

    The single costs do not add up exactly to the joint KL. So bisection finds the sum of costs that `max_kl` allows.
    """
    every = sorted(costs)
    together = measure(every)
    if together <= max_kl:
        return every, together
    best: tuple[list[str], float] = ([], 0.0)
    low, high = 0.0, 2 * max_kl
    for _ in range(BISECTIONS):
        allowed = (low + high) / 2
        names = knapsack(costs, sizes, allowed)
        together = measure(names)
        if together > max_kl:
            high = allowed
            continue
        low = allowed
        if sum(sizes[name] for name in names) > sum(sizes[name] for name in best[0]):
            best = names, together
    return best


def knapsack(costs: Mapping[str, float], sizes: Mapping[str, int], allowed: float) -> list[str]:
    """The names with the largest total size whose costs, each rounded up to a step, add up to `allowed` at most."""
    names = sorted(costs)
    steps = {name: int(np.ceil(max(costs[name], 0.0) / allowed * STEPS)) for name in names}
    most = np.zeros(STEPS + 1, np.int64)  # total size, by the number of steps that may be spent
    taken = np.zeros((len(names), STEPS + 1), bool)
    for row, name in enumerate(names):
        step = steps[name]
        if step <= STEPS:
            more = most[: STEPS + 1 - step] + sizes[name]
            taken[row, step:] = more > most[step:]
            most[step:] = np.maximum(most[step:], more)
    left, chosen = STEPS, []
    for row in range(len(names) - 1, -1, -1):
        if taken[row, left]:
            chosen.append(names[row])
            left -= steps[names[row]]
    return sorted(chosen)
