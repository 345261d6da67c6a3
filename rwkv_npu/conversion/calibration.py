"""Activation statistics: the model reads a text on the CPU, and what its projections are given is recorded.

One pass serves fp16 range scaling, by the largest magnitudes, and int8, by sampled rows. The text is cut into short and
long contexts: a state with a history of thousands of tokens makes other rows than a new one. A uniform sample of the
rows is kept, the same tokens for every projection; extremes are those of all rows.

Letters: M rows of a step, K width of a projection's input, n rows kept.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import numpy as np

from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.bundle import packed_label
from rwkv_npu.formats.safetensors import TensorFile, TensorPlan, replace_tensors
from rwkv_npu.models.common import Arrays
from rwkv_npu.models.maths import LAYER_NORM_EPS, NumpyMaths, largest, matmul
from rwkv_npu.models.spec import Group, Spec, tensors
from rwkv_npu.progress import progress as show_progress
from rwkv_npu.quant.npu import int8_parts, spans
from rwkv_npu.quant.ranges import Samples
from rwkv_npu.runtime.reference import read
from rwkv_npu.runtime.weights import ModelSource, widened
from rwkv_npu.text.corpus import Tokens, calibration_text, holds_ids, read_tokens
from rwkv_npu.text.sampling import Sampler, SamplingOptions
from rwkv_npu.text.tokenizer import END_OF_TEXT, Tokenizer

KEEP = 4096  # rows of every projection
MEMORY = 2 << 30  # bytes that those rows may take: fewer are kept of large models
ROWS = 256  # tokens of a step: statistics do not depend on it, and weights are widened once a step
SHORT, MEDIUM = 64, 512  # tokens of a context; each kind has a quarter of all tokens, one long context half
SLICE = 512  # the chip adds up products over K in slices of this width, whose sums are probably fp16

TOKENS = 8192  # read at most: half of them are one context
SAMPLED = 1024  # tokens that a model without a vocabulary writes itself, where each takes a pass
SEQUENCES = 16  # sampled at a time
LEAST = 8  # tokens of a text: a quarter is held out, and statistics take two rows

log = logging.getLogger("rwkv_npu")


@dataclass
class Statistics:
    """Activation statistics of `tokens` tokens, under the `Scaling` of the source.

    projections: by the label of the whole matrix (`graphs.Constant.label`), the same for both fusions.
    peaks: the largest magnitude of every intermediate that is no projection's input. By the label of a projection: of
        its product and the partial sums of it. By the name of a norm: of the residual that it reads; with `.out`, of
        its result. As GROUP.INPUT: of a group's inputs. Also of a layer's squares, and of what its sigmoids and tanhs
        read.
    """

    projections: dict[str, Samples]
    peaks: dict[str, float]
    tokens: int

    def save(self, path: Path) -> None:
        """Write all but `tokens` to `path`, whole or not at all."""
        path.parent.mkdir(exist_ok=True)
        plans = [
            TensorPlan(f"{label}.{kind}", array.dtype, array.shape, partial(np.asarray, array))
            for label, samples in self.projections.items()
            for kind, array in vars(samples).items()
        ]
        peaks = [
            TensorPlan(f"{name}.peak", np.float64, (1,), partial(np.array, [peak]))
            for name, peak in self.peaks.items()
        ]
        replace_tensors(path, [*plans, *peaks])

    @staticmethod
    def load(path: Path, tokens: int) -> Statistics:
        """The statistics that `save` wrote, mapped. Raises CheckpointError."""
        file = TensorFile(path)
        names = list(file.names)
        labels = [name.removesuffix(".rows") for name in names if name.endswith(".rows")]
        kinds = ("rows", "low", "high", "made")
        projections = {label: Samples(*(file.array(f"{label}.{kind}") for kind in kinds)) for label in labels}
        peaks = {
            name.removesuffix(".peak"): float(file.array(name)[0]) for name in names if name.endswith(".peak")
        }
        return Statistics(projections, peaks, tokens)


class Reservoir:
    """Chooses some of many items, each with the same probability (Vitter's algorithm R)."""

    def __init__(self, keep: int, rng: np.random.Generator):
        self.keep, self._rng, self._seen = keep, rng, 0
        self._numbers = np.zeros(keep, np.int64)

    def admit(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For the next `count` items: indices of those that are kept, and their slots 0 .. keep - 1."""
        numbers = np.arange(self._seen, self._seen + count)
        slots = np.where(numbers < self.keep, numbers, self._rng.integers(0, numbers + 1))
        self._seen += count
        kept = np.flatnonzero(slots < self.keep)[::-1]
        _, last = np.unique(slots[kept], return_index=True)  # of several for one slot the last one stays
        kept = kept[last]
        self._numbers[slots[kept]] = numbers[kept]
        return kept, slots[kept]

    def order(self) -> np.ndarray:
        """The slots in the order in which their items came, once all are taken."""
        return np.argsort(self._numbers)


@dataclass
class _Recorder:
    """Collects statistics. Rows `chosen` of the present step are kept, in `slots` of `keep`."""

    keep: int
    chosen: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    samples: dict[str, Samples] = field(default_factory=dict)
    peaks: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def rows(self, label: str, x: np.ndarray) -> None:
        K = x.shape[1]
        if label not in self.samples:
            low, made = np.full(K, np.inf, np.float32), np.array([[np.inf, -np.inf]] * len(int8_parts(K)))
            self.samples[label] = Samples(np.empty((self.keep, K), np.float32), low, -low, made)
        samples = self.samples[label]
        samples.rows[self.slots] = x[self.chosen]
        samples.low = np.minimum(samples.low, x.min(0))
        samples.high = np.maximum(samples.high, x.max(0))

    def product(self, label: str, part: int, x: np.ndarray) -> None:
        made = self.samples[label].products[part]
        made[:] = min(made[0], x.min()), max(made[1], x.max())

    def peak(self, name: str, x: np.ndarray) -> None:
        self.peaks[name] = max(self.peaks[name], largest(x))


class RecordingMaths(NumpyMaths):
    """The reference; records what passes through it."""

    def __init__(self, weight: Callable[[str], np.ndarray], recorder: _Recorder, prefix: str = ""):
        super().__init__(weight, prefix)
        self._recorder = recorder

    def block(self, layer: int) -> RecordingMaths:
        return RecordingMaths(self._weight, self._recorder, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """In parts of K, as int8 has them, and each part in slices, as the chip multiplies: a partial sum can be larger
        than the whole."""
        label, weight = packed_label(self._prefix + name, index), self._weight(self._prefix + name)
        weight = weight if index is None else weight[index]
        self._recorder.rows(label, x)
        parts = []
        for part, (k0, k1) in enumerate(spans(int8_parts(len(weight)))):
            parts.append(self._sliced(label, x[:, k0:k1], weight[k0:k1]))
            self._recorder.product(label, part, parts[-1])
        product = reduce(np.add, parts)
        self._recorder.peak(label, product)
        return product

    def _sliced(self, label: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        product = matmul(x[:, :SLICE], weight[:SLICE])
        self._recorder.peak(label, product)
        for start in range(SLICE, len(weight), SLICE):
            part = matmul(x[:, start : start + SLICE], weight[start : start + SLICE])
            product += part
            self._recorder.peak(label, part)
            self._recorder.peak(label, product)
        return product

    def layer_norm(self, x: np.ndarray, name: str, eps: float = LAYER_NORM_EPS) -> np.ndarray:
        self._recorder.peak(self._prefix + name, x)
        normalised = super().layer_norm(x, name, eps)
        self._recorder.peak(f"{self._prefix}{name}.out", normalised)
        return normalised

    def tanh(self, x: np.ndarray) -> np.ndarray:
        self._recorder.peak(f"{self._prefix}tanh", x)
        return super().tanh(x)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        self._recorder.peak(f"{self._prefix}sigmoid", x)
        return super().sigmoid(x)

    def relu(self, x: np.ndarray) -> np.ndarray:
        positive = super().relu(x)
        self._recorder.peak(f"{self._prefix}square", np.square(positive))
        return positive

    def row_matmul(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        self._recorder.peak(f"{self._prefix}row_matmul", largest(x) * s)
        return super().row_matmul(x, s)


def calibrate(
    source: ModelSource,
    ids: Sequence[int] | np.ndarray,
    *,
    rows: int = ROWS,
    keep: int = KEEP,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Statistics:
    """Read `ids` in steps of `rows` tokens, and record what the projections are given.

    keep: rows of each projection that are kept at most; all of them take no more than MEMORY bytes. progress: called
    with the tokens of each step.
    Raises UsageError for less than two ids or one outside the vocabulary, CheckpointError where the model's values do
    not stay finite.
    """
    tokens, spec = check_ids(ids, source.spec, at_least=2), source.spec
    pieces = list(contexts(tokens))
    room = min(keep, sum(map(len, pieces)), MEMORY // (4 * _row_width(spec)))
    sample = Reservoir(max(2, room), np.random.default_rng(seed))
    recorder = _Recorder(sample.keep)
    maths = RecordingMaths(widened(source), recorder)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        for port in group.inputs:
            recorder.peak(f"{group.name}.{port.name}", inputs[port.name])
        return source.evaluate(group, maths, dict(inputs))

    def steps(context: np.ndarray) -> Iterator[list[np.ndarray]]:
        for number, step in enumerate(np.split(context, range(rows, len(context), rows))):
            recorder.chosen, recorder.slots = sample.admit(len(step))
            yield [step]
            if progress:
                progress(len(step) - (number == 0))  # the end of text is none of the user's

    for context in pieces:
        for _ in read(source, run, steps(context)):
            pass
    for samples in recorder.samples.values():
        samples.rows = samples.rows[sample.order()]
    if not np.isfinite(list(recorder.peaks.values())).all():
        raise CheckpointError(
            "the model's values do not stay finite over the calibration text: are its weights whole?"
        )
    return Statistics(recorder.samples, dict(recorder.peaks), len(tokens))


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


def _row_width(spec: Spec) -> int:
    """Numbers in a row of every projection."""
    shapes = [tensor.used_shape for tensor in tensors(spec) if tensor.kind.is_projection]
    return sum(shape[0] * shape[1] if len(shape) == 3 else shape[0] for shape in shapes)


# -- the text --------------------------------------------------------------------------------------------


def read_ids(files: Sequence[str], tokenizer: Tokenizer | None, spec: Spec) -> np.ndarray | None:
    """Ids of the user's files, (M,) int64: TOKENS at most, the same share of each; None where no file is named.

    Raises UsageError for a file that is empty, binary or no ids, for fewer than LEAST tokens, and for text where there
    is no tokenizer.
    """
    if not files:
        return None
    return check_ids(_shared([_read_file(file, tokenizer).ids for file in files]), spec, at_least=LEAST)


def default_ids(tokenizer: Tokenizer | None, source: ModelSource) -> np.ndarray:
    """Ids where the user names no text, (M,) int64: of the text that ships with the package, or sampled from the model
    where its vocabulary is unknown."""
    if tokenizer is not None:
        ids = calibration_text(tokenizer.encode).ids[:TOKENS]
        return check_ids(ids, source.spec, at_least=LEAST)
    log.info(
        "no vocabulary is known for this model: it is calibrated on tokens sampled from it, which says less than a "
        "text (give --tokenizer FILE, or ids to --calibrate)"
    )
    with show_progress("sample", "token", total=SAMPLED) as bar:
        return sample_ids(source, SAMPLED, progress=bar.update)


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


def sample_ids(
    source: ModelSource, count: int, *, seed: int = 0, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """(count,) ids that the model writes by itself, at temperature 1, in SEQUENCES texts one after the other.

    The same every time. `progress` is called with the tokens of each step.
    """
    maths = NumpyMaths(widened(source))
    sampler = Sampler(SamplingOptions(top_p=1.0), seed=seed)
    written = [np.full(SEQUENCES, END_OF_TEXT)]
    steps = -(-count // SEQUENCES)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        return source.evaluate(group, maths, dict(inputs))

    for logits in read(source, run, (list(written[-1][:, None]) for _ in range(steps))):
        written.append(np.array([sampler.sample(row)[0] for row in logits]))
        if progress:
            progress(SEQUENCES)
    return np.stack(written[1:], axis=1).reshape(-1)[:count].astype(np.int64)


def _read_file(file: str, tokenizer: Tokenizer | None) -> Tokens:
    if tokenizer is None and Path(file).is_file() and not holds_ids(file):
        raise UsageError(
            f"{file} is text, and no vocabulary is known for this model: give --tokenizer FILE, or ids as .json "
            "or .npy"
        )
    tokens = read_tokens(file, tokenizer.encode if tokenizer else _no_words)
    if tokens.bytewise:
        log.info(
            f"{file}: the vocabulary has nothing but bytes for this text, so that the model hardly knows its "
            "language: what it is used for would calibrate better"
        )
    return tokens


def _no_words(text: str) -> list[int]:
    raise AssertionError("ids need no tokenizer")


def _shared(pieces: list[np.ndarray]) -> np.ndarray:
    """The beginnings of all pieces, equally long as far as they go, TOKENS together. The end of each comes at the end,
    where int8 is measured (quantise.MEASURED)."""
    share, left = [], TOKENS
    for number, piece in enumerate(sorted(pieces, key=len)):
        share.append(piece[: left // (len(pieces) - number)])
        left -= len(share[-1])
    ends = [len(piece) - len(piece) // 8 for piece in share]
    return np.concatenate(
        [piece[:end] for piece, end in zip(share, ends, strict=True)]
        + [piece[end:] for piece, end in zip(share, ends, strict=True)]
    )
