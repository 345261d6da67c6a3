"""What a model's projections are given while it reads: rows and ranges to quantise by, peaks to keep fp16 in range.

The model runs on the CPU, in the reference's own formulas, over a text that is cut into short and long contexts: a
state with a history of thousands of tokens makes other rows than a fresh one. Of the rows a uniform sample is kept,
the same tokens for every projection; extremes are those of all rows.

Letters: M rows of a step, K width of a projection's input, n rows kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.bundle import packed_label
from rwkv_npu.formats.state import new_state
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import LAYER_NORM_EPS, NumpyMaths, largest, matmul
from rwkv_npu.models.network import Network
from rwkv_npu.models.spec import Group, Spec, tensors
from rwkv_npu.quant.npu import int8_parts, spans
from rwkv_npu.quant.ranges import Samples
from rwkv_npu.runtime.weights import ModelSource, widened
from rwkv_npu.text.tokenizer import END_OF_TEXT

KEEP = 4096  # rows of every projection
MEMORY = 2 << 30  # bytes that those rows may take: of large models fewer are kept
ROWS = 256  # tokens of a step: what is seen does not depend on it, and weights are widened once a step
SHORT, MEDIUM = 64, 512  # tokens of a context; each kind has a quarter of all tokens, one long context half
SLICE = 512  # the chip adds up products over K in slices of so many, whose sums are probably fp16


@dataclass
class Calibration:
    """What was seen of `tokens` tokens, under the `Scaling` of the source.

    projections: by the label of the whole matrix (`graphs.Constant.label`), the same for both fusions.
    peaks: the largest magnitude of every intermediate that is no projection's input: by the label of a projection that
        of its product and of the partial sums of it, by the name of a norm that of the residual which it reads;
        with `.out` what it makes; of a group's inputs as GROUP.INPUT; and of a layer's squares, and what goes into its
        sigmoids and tanhs.
    """

    projections: dict[str, Samples]
    peaks: dict[str, float]
    tokens: int


class Reservoir:
    """Which of many items are kept, each with the same probability (Vitter's algorithm R)."""

    def __init__(self, keep: int, rng: np.random.Generator):
        self.keep, self._rng, self._seen = keep, rng, 0
        self._numbers = np.zeros(keep, np.int64)

    def admit(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For the next `count` items: which of them are kept, and in which of the places 0 .. keep - 1."""
        numbers = np.arange(self._seen, self._seen + count)
        places = np.where(numbers < self.keep, numbers, self._rng.integers(0, numbers + 1))
        self._seen += count
        kept = np.flatnonzero(places < self.keep)[::-1]
        _, last = np.unique(places[kept], return_index=True)  # of several for one place the last one stays
        kept = kept[last]
        self._numbers[places[kept]] = numbers[kept]
        return kept, places[kept]

    def order(self) -> np.ndarray:
        """The places in the order in which what is kept there came, once all are taken."""
        return np.argsort(self._numbers)


@dataclass
class _Seen:
    """What a pass has seen. `chosen` rows of the present step are kept, in `places` of `keep`."""

    keep: int
    chosen: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    places: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    samples: dict[str, Samples] = field(default_factory=dict)
    peaks: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def rows(self, label: str, x: np.ndarray) -> None:
        K = x.shape[1]
        if label not in self.samples:
            low, made = np.full(K, np.inf, np.float32), np.array([[np.inf, -np.inf]] * len(int8_parts(K)))
            self.samples[label] = Samples(np.empty((self.keep, K), np.float32), low, -low, made)
        samples = self.samples[label]
        samples.rows[self.places] = x[self.chosen]
        samples.low = np.minimum(samples.low, x.min(0))
        samples.high = np.maximum(samples.high, x.max(0))
        samples.seen += len(x)

    def product(self, label: str, part: int, x: np.ndarray) -> None:
        made = self.samples[label].made[part]
        made[:] = min(made[0], x.min()), max(made[1], x.max())

    def peak(self, name: str, x: np.ndarray) -> None:
        self.peaks[name] = max(self.peaks[name], largest(x))


class RecordingMaths(NumpyMaths):
    """The reference, looking at what passes."""

    def __init__(self, weight: Callable[[str], np.ndarray], seen: _Seen, prefix: str = ""):
        super().__init__(weight, prefix)
        self._seen = seen

    def block(self, layer: int) -> RecordingMaths:
        return RecordingMaths(self._weight, self._seen, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """In parts of K, as in int8, and those in slices, as the chip multiplies: a partial sum can be larger than the
        whole."""
        label, weight = packed_label(self._prefix + name, index), self._weight(self._prefix + name)
        weight = weight if index is None else weight[index]
        self._seen.rows(label, x)
        parts = []
        for part, (k0, k1) in enumerate(spans(int8_parts(len(weight)))):
            parts.append(self._sliced(label, x[:, k0:k1], weight[k0:k1]))
            self._seen.product(label, part, parts[-1])
        product = reduce(np.add, parts)
        self._seen.peak(label, product)
        return product

    def _sliced(self, label: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        product = matmul(x[:, :SLICE], weight[:SLICE])
        self._seen.peak(label, product)
        for start in range(SLICE, len(weight), SLICE):
            part = matmul(x[:, start : start + SLICE], weight[start : start + SLICE])
            product += part
            self._seen.peak(label, part)
            self._seen.peak(label, product)
        return product

    def layer_norm(self, x: np.ndarray, name: str, eps: float = LAYER_NORM_EPS) -> np.ndarray:
        self._seen.peak(self._prefix + name, x)
        normalised = super().layer_norm(x, name, eps)
        self._seen.peak(f"{self._prefix}{name}.out", normalised)
        return normalised

    def tanh(self, x: np.ndarray) -> np.ndarray:
        self._seen.peak(f"{self._prefix}tanh", x)
        return super().tanh(x)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        self._seen.peak(f"{self._prefix}sigmoid", x)
        return super().sigmoid(x)

    def relu(self, x: np.ndarray) -> np.ndarray:
        positive = super().relu(x)
        self._seen.peak(f"{self._prefix}square", np.square(positive))
        return positive

    def row_matmul(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        self._seen.peak(f"{self._prefix}row_matmul", largest(x) * s)
        return super().row_matmul(x, s)


def calibrate(
    source: ModelSource,
    ids: Sequence[int] | np.ndarray,
    *,
    rows: int = ROWS,
    keep: int = KEEP,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Read `ids` in steps of `rows` tokens, and record what the projections are given.

    `keep` rows of each are kept at most, and no more than MEMORY bytes of them all. `progress` is called with the
    tokens of each step.
    Raises UsageError for less than two ids or one outside the vocabulary, CheckpointError where the model's values do
    not stay finite.
    """
    tokens, spec = check_ids(ids, source.spec, at_least=2), source.spec
    pieces = list(contexts(tokens))
    room = min(keep, sum(map(len, pieces)), MEMORY // (4 * _width(spec)))
    sample = Reservoir(max(2, room), np.random.default_rng(seed))
    seen = _Seen(sample.keep)
    maths = RecordingMaths(widened(source), seen)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        for port in group.inputs:
            seen.peak(f"{group.name}.{port.name}", inputs[port.name])
        return source.evaluate(group, maths, dict(inputs))

    network = Network(source.program, source.tensor)
    for context in pieces:
        state = new_state(spec, source.fingerprint, source.initial_states())
        parts = {name: part[:, None] for name, part in state.parts.items()}
        for number, step in enumerate(np.split(context, range(rows, len(context), rows))):
            seen.chosen, seen.places = sample.admit(len(step))
            network.logits(run, network.hidden(run, step[:, None], parts))
            if progress:
                progress(len(step) - (number == 0))  # the end of text is none of the user's
    for samples in seen.samples.values():
        samples.rows = samples.rows[sample.order()]
    if not np.isfinite(list(seen.peaks.values())).all():
        raise CheckpointError(
            "the model's values do not stay finite over the calibration text: are its weights whole?"
        )
    return Calibration(seen.samples, dict(seen.peaks), len(tokens))


def check_ids(ids: Sequence[int] | np.ndarray, spec: Spec, *, at_least: int) -> np.ndarray:
    """Ids to calibrate with, as int64. Raises UsageError."""
    tokens = np.asarray(ids)
    if len(tokens) < at_least:
        raise UsageError(
            f"the calibration text has {len(tokens)} tokens: it takes at least {at_least}, and serves with thousands"
        )
    if tokens.min() < 0 or tokens.max() >= spec.V:
        wrong = tokens[(tokens < 0) | (tokens >= spec.V)][0]
        raise UsageError(
            f"the calibration ids hold {wrong}, which is outside the model's vocabulary of {spec.V}"
        )
    return tokens.astype(np.int64)


def contexts(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in contexts: a quarter of them in short ones, a quarter in ones of medium length, half in one.

    Each begins with an end-of-text token, as texts do in training, which has extremes of its own.
    """
    quarter, half = len(tokens) // 4, len(tokens) // 2
    for start, stop, length in (
        (0, quarter, SHORT - 1),
        (quarter, half, MEDIUM - 1),
        (half, len(tokens), len(tokens)),
    ):
        for at in range(start, stop, length):
            yield np.concatenate([[END_OF_TEXT], tokens[at : min(at + length, stop)]])


def _width(spec: Spec) -> int:
    """Numbers in a row of every projection."""
    shapes = [tensor.used_shape for tensor in tensors(spec) if tensor.kind.is_projection]
    return sum(shape[0] * shape[1] if len(shape) == 3 else shape[0] for shape in shapes)
