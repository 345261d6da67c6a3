"""Activation statistics: the model reads a text on the CPU, and the inputs and outputs of its projections are recorded.

One pass serves both fp16 range scaling, which needs the absmax of every tensor, and int8, which needs sampled rows. The
text is split into short and long contexts, because activations after thousands of tokens differ from those after a few.
A uniform sample of the rows is kept, with the same tokens for every projection. Extremes cover all rows.

Letters: M rows of a step, K width of a projection's input, n sampled rows, P parts of K.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from rwkv_npu.quant import gptq
from rwkv_npu.quant.cpu import BLOCK
from rwkv_npu.quant.npu import int8_parts, spans
from rwkv_npu.quant.ranges import Samples
from rwkv_npu.runtime.reference import read
from rwkv_npu.runtime.weights import ModelSource, widened
from rwkv_npu.text.corpus import Tokens, calibration_text, holds_ids, read_tokens
from rwkv_npu.text.sampling import Sampler, SamplingOptions
from rwkv_npu.text.tokenizer import END_OF_TEXT, Tokenizer

KEEP = 4096  # sampled rows of each projection
MEMORY = 2 << 30  # limit of their bytes: large models keep fewer rows
ROWS = 256  # tokens of a step. Statistics do not depend on it; weights are widened once a step
# Tokens of a context. Each kind gets a quarter of all tokens, one long context gets half.
SHORT, MEDIUM = 64, 512
SLICE = 512  # the chip adds products over K in slices of this width, and their sums are probably fp16

TOKENS = 8192  # of the text at most; half of them are one context
SAMPLED = 1024  # tokens to sample from a model without a vocabulary
SEQUENCES = 16  # sampled at a time
LEAST = 8  # tokens of a text. A quarter is held out, and statistics need two rows

log = logging.getLogger("rwkv_npu")


@dataclass
class Statistics:
    """Activation statistics of `tokens` tokens, under the `Scaling` of the weights.

    projections: by the label of the whole matrix (`graphs.Constant.label`), the same for both fusions.
    moments: second moments H = X^T X / rows of the inputs of some projections, a matrix for each part of K
        (`gptq.parts`).
    absmax: of every intermediate that is not the input of a projection, by name. LABEL: a projection's product, with
        its partial sums. NORM: the residual that a norm reads; NORM.out: its result. GROUP.INPUT: an input of a group.
        Also each layer's squares, and the inputs of its sigmoids and tanhs.
    """

    projections: dict[str, Samples]
    absmax: dict[str, float]
    tokens: int
    moments: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write everything except `tokens` to `path`, atomically."""
        path.parent.mkdir(exist_ok=True)
        plans = [
            TensorPlan(f"{label}.{kind}", array.dtype, array.shape, partial(np.asarray, array))
            for label, samples in self.projections.items()
            for kind, array in vars(samples).items()
        ]
        absmax = [
            TensorPlan(f"{name}.absmax", np.float64, (1,), partial(np.array, [value]))
            for name, value in self.absmax.items()
        ]
        moments = [
            TensorPlan(f"{label}.moment.{number}", np.float32, H.shape, partial(np.asarray, H))
            for label, parts in self.moments.items()
            for number, H in enumerate(parts)
        ]
        replace_tensors(path, [*plans, *absmax, *moments])

    @staticmethod
    def load(path: Path, tokens: int) -> Statistics:
        """Open the statistics that `save` wrote, memory-mapped. Raises CheckpointError."""
        file = TensorFile(path)
        names = list(file.names)
        labels = [name.removesuffix(".rows") for name in names if name.endswith(".rows")]
        kinds = ("rows", "low", "high", "products")
        projections = {label: Samples(*(file.array(f"{label}.{kind}") for kind in kinds)) for label in labels}
        absmax = {
            name.removesuffix(".absmax"): float(file.array(name)[0])
            for name in names
            if name.endswith(".absmax")
        }
        moments: dict[str, list[np.ndarray]] = {}
        for name in names:
            label, kind, _ = (*name.rsplit(".", 2), "")[:3]
            if kind == "moment":
                moments.setdefault(label, []).append(file.array(name))
        return Statistics(projections, absmax, tokens, moments)


class Reservoir:
    """A uniform sample of a stream of unknown length (Vitter's algorithm R)."""

    def __init__(self, keep: int, rng: np.random.Generator):
        self.keep, self._rng, self._seen = keep, rng, 0
        self._numbers = np.zeros(keep, np.int64)

    def admit(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Offer the next `count` items. Returns the indices of those to keep, and their slots 0 .. keep - 1."""
        numbers = np.arange(self._seen, self._seen + count)
        slots = np.where(numbers < self.keep, numbers, self._rng.integers(0, numbers + 1))
        self._seen += count
        kept = np.flatnonzero(slots < self.keep)[::-1]
        _, last = np.unique(slots[kept], return_index=True)  # the last of several items for one slot wins
        kept = kept[last]
        self._numbers[slots[kept]] = numbers[kept]
        return kept, slots[kept]

    def order(self) -> np.ndarray:
        """The slots, sorted by the order of their items in the stream."""
        return np.argsort(self._numbers)


@dataclass
class _Recorder:
    """Collects statistics. The rows `kept` of the present step go into the `slots` of the sample."""

    keep: int
    kept: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    samples: dict[str, Samples] = field(default_factory=dict)
    absmax: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    moments: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def rows(self, label: str, x: np.ndarray) -> None:
        K = x.shape[1]
        if label not in self.samples:
            low = np.full(K, np.inf, np.float32)
            products = np.array([[np.inf, -np.inf]] * len(int8_parts(K)))
            self.samples[label] = Samples(np.empty((self.keep, K), np.float32), low, -low, products)
        samples = self.samples[label]
        samples.rows[self.slots] = x[self.kept]
        samples.low = np.minimum(samples.low, x.min(0))
        samples.high = np.maximum(samples.high, x.max(0))
        if label in self.moments:
            start = 0
            for H in self.moments[label]:
                part = x[:, start : start + len(H)]
                H += part.T @ part
                start += len(H)

    def product(self, label: str, part: int, x: np.ndarray) -> None:
        span = self.samples[label].products[part]
        span[:] = min(span[0], x.min()), max(span[1], x.max())

    def tensor(self, name: str, x: np.ndarray) -> None:
        self.absmax[name] = max(self.absmax[name], largest(x))


class RecordingMaths(NumpyMaths):
    """The reference operations; each records the statistics of its inputs or outputs."""

    def __init__(self, weight: Callable[[str], np.ndarray], recorder: _Recorder, prefix: str = ""):
        super().__init__(weight, prefix)
        self._recorder = recorder

    def block(self, layer: int) -> RecordingMaths:
        return RecordingMaths(self._weight, self._recorder, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        """The product, added up as on the chip: in the parts of K that int8 has, each in slices of width SLICE.

        Partial sums are recorded too, because one can be larger than the whole sum.
        """
        label, weight = packed_label(self._prefix + name, index), self._weight(self._prefix + name)
        weight = weight if index is None else weight[index]
        self._recorder.rows(label, x)
        parts = []
        for part, (k0, k1) in enumerate(spans(int8_parts(len(weight)))):
            parts.append(self._sliced(label, x[:, k0:k1], weight[k0:k1]))
            self._recorder.product(label, part, parts[-1])
        product = reduce(np.add, parts)
        self._recorder.tensor(label, product)
        return product

    def _sliced(self, label: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        product = matmul(x[:, :SLICE], weight[:SLICE])
        self._recorder.tensor(label, product)
        for start in range(SLICE, len(weight), SLICE):
            part = matmul(x[:, start : start + SLICE], weight[start : start + SLICE])
            product += part
            self._recorder.tensor(label, part)
            self._recorder.tensor(label, product)
        return product

    def layer_norm(self, x: np.ndarray, name: str, eps: float = LAYER_NORM_EPS) -> np.ndarray:
        self._recorder.tensor(self._prefix + name, x)
        normalised = super().layer_norm(x, name, eps)
        self._recorder.tensor(f"{self._prefix}{name}.out", normalised)
        return normalised

    def tanh(self, x: np.ndarray) -> np.ndarray:
        self._recorder.tensor(f"{self._prefix}tanh", x)
        return super().tanh(x)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        self._recorder.tensor(f"{self._prefix}sigmoid", x)
        return super().sigmoid(x)

    def relu(self, x: np.ndarray) -> np.ndarray:
        positive = super().relu(x)
        self._recorder.tensor(f"{self._prefix}square", np.square(positive))
        return positive

    def row_matmul(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        self._recorder.tensor(f"{self._prefix}row_matmul", largest(x) * s)
        return super().row_matmul(x, s)


def calibrate(
    source: ModelSource,
    ids: Sequence[int] | np.ndarray,
    *,
    rows: int = ROWS,
    keep: int = KEEP,
    moments: Collection[str] = (),
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Statistics:
    """Read `ids` in steps of `rows` tokens, and record activation statistics.

    keep: limit of the sampled rows of each projection; together they take at most MEMORY bytes. moments: names of
    the projections that need second moments, which take at most MEMORY bytes too. progress: called with the number of
    tokens after each step.
    Raises UsageError for fewer than two ids or an id outside the vocabulary, CheckpointError if the model's values do
    not stay finite.
    """
    tokens, spec = check_ids(ids, source.spec, at_least=2), source.spec
    pieces = list(contexts(tokens))
    limit = min(keep, sum(map(len, pieces)), MEMORY // (4 * _row_width(spec)))
    sample = Reservoir(max(2, limit), np.random.default_rng(seed))
    recorder = _Recorder(sample.keep, moments=_empty_moments(spec, moments))
    maths = RecordingMaths(widened(source), recorder)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        for port in group.inputs:
            recorder.tensor(f"{group.name}.{port.name}", inputs[port.name])
        return source.evaluate(group, maths, dict(inputs))

    def steps(context: np.ndarray) -> Iterator[list[np.ndarray]]:
        for number, step in enumerate(np.split(context, range(rows, len(context), rows))):
            recorder.kept, recorder.slots = sample.admit(len(step))
            yield [step]
            if progress:
                progress(len(step) - (number == 0))  # the end-of-text token does not count

    for context in pieces:
        for _ in read(source, run, steps(context)):
            pass
    for samples in recorder.samples.values():
        samples.rows = samples.rows[sample.order()]
    if not np.isfinite(list(recorder.absmax.values())).all():
        raise CheckpointError(
            "the model's values do not stay finite over the calibration text: its weights may be damaged"
        )
    for parts in recorder.moments.values():
        for H in parts:
            H /= sum(map(len, pieces))
    return Statistics(recorder.samples, dict(recorder.absmax), len(tokens), recorder.moments)


def contexts(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Split tokens into contexts: a quarter into short ones, a quarter into medium ones, half into one.

    Each begins with an end-of-text token, as texts do in training. This token has extremes of its own.
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
    """Sum of the input widths of all projections."""
    shapes = [tensor.used_shape for tensor in tensors(spec) if tensor.kind.is_projection]
    return sum(shape[0] * shape[1] if len(shape) == 3 else shape[0] for shape in shapes)


def _empty_moments(spec: Spec, names: Collection[str]) -> dict[str, list[np.ndarray]]:
    """Zeros for the second moments of matrices. K is split so finely that all parts take at most MEMORY bytes."""
    widths = {t.name: t.used_shape[0] for t in tensors(spec) if t.name in names}
    widest = gptq.WIDEST
    while widest > BLOCK and 4 * sum(K * min(K, widest) for K in widths.values()) > MEMORY:
        widest //= 2
    parts_of = {name: gptq.parts(K, widest) for name, K in widths.items()}
    return {
        name: [np.zeros((end - start, end - start), np.float32) for start, end in parts]
        for name, parts in parts_of.items()
    }


# -- the text --------------------------------------------------------------------------------------------


def read_ids(files: Sequence[str], tokenizer: Tokenizer | None, spec: Spec) -> np.ndarray | None:
    """Read ids from the user's files, (M,) int64: at most TOKENS, the same share of each. None if no file is named.

    Raises UsageError for a file that is empty, binary or not ids, for fewer than LEAST tokens, and for text without a
    tokenizer.
    """
    if not files:
        return None
    return check_ids(_shared([_read_file(file, tokenizer).ids for file in files]), spec, at_least=LEAST)


def default_ids(tokenizer: Tokenizer | None, source: ModelSource) -> np.ndarray:
    """Ids for a user who names no text, (M,) int64.

    They come from the text in the package, or are sampled from a model without a known vocabulary.
    """
    if tokenizer is not None:
        ids = calibration_text(tokenizer.encode).ids[:TOKENS]
        return check_ids(ids, source.spec, at_least=LEAST)
    log.info(
        "no vocabulary is known for this model, so it is calibrated on tokens sampled from it. A text calibrates "
        "better: give tokenizer=FILE, or calibrate= with ids"
    )
    with show_progress("sample", "token", total=SAMPLED) as bar:
        return sample_ids(source, SAMPLED, progress=bar.update)


def check_ids(ids: Sequence[int] | np.ndarray, spec: Spec, *, at_least: int) -> np.ndarray:
    """Convert calibration ids to int64. Raises UsageError."""
    tokens = np.asarray(ids)
    if len(tokens) < at_least:
        raise UsageError(
            f"the calibration text has {len(tokens)} tokens: at least {at_least} are needed, thousands are better"
        )
    if tokens.min() < 0 or tokens.max() >= spec.V:
        wrong = tokens[(tokens < 0) | (tokens >= spec.V)][0]
        raise UsageError(
            f"the calibration ids contain {wrong}, which is outside the model's vocabulary of {spec.V}"
        )
    return tokens.astype(np.int64)


def sample_ids(
    source: ModelSource, count: int, *, seed: int = 0, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """Generate (count,) ids at temperature 1, as SEQUENCES texts one after the other. The result is reproducible.

    progress: called with the number of tokens after each step.
    """
    maths = NumpyMaths(widened(source))
    sampler = Sampler(SamplingOptions(top_p=1.0), seed=seed)
    generated = [np.full(SEQUENCES, END_OF_TEXT)]
    steps = -(-count // SEQUENCES)

    def run(group: Group, inputs: Arrays) -> Mapping[str, np.ndarray]:
        return source.evaluate(group, maths, dict(inputs))

    for logits in read(source, run, (list(generated[-1][:, None]) for _ in range(steps))):
        generated.append(np.array([sampler.sample(row)[0] for row in logits]))
        if progress:
            progress(SEQUENCES)
    return np.stack(generated[1:], axis=1).reshape(-1)[:count].astype(np.int64)


def _read_file(file: str, tokenizer: Tokenizer | None) -> Tokens:
    if tokenizer is None and Path(file).is_file() and not holds_ids(file):
        raise UsageError(
            f"{file} is text, but no vocabulary is known for this model: give tokenizer=FILE, or ids as .json "
            "or .npy"
        )
    tokens = read_tokens(file, tokenizer.encode if tokenizer else _unused_encode)
    if tokens.bytewise:
        log.info(
            f"{file}: the vocabulary has only single bytes for this text, so the model hardly knows its language. "
            "A text like those that the model is used for calibrates better"
        )
    return tokens


def _unused_encode(text: str) -> list[int]:
    raise AssertionError("a file of ids needs no tokenizer")


def _shared(pieces: list[np.ndarray]) -> np.ndarray:
    """Join the beginnings of all pieces, TOKENS ids in all: the same share of each, short pieces whole.

    The last eighth of each share comes at the end, where int8 is measured (quantise.MEASURED).
    """
    shares, left = [], TOKENS
    for number, piece in enumerate(sorted(pieces, key=len)):
        shares.append(piece[: left // (len(pieces) - number)])
        left -= len(shares[-1])
    ends = [len(piece) - len(piece) // 8 for piece in shares]
    return np.concatenate(
        [piece[:end] for piece, end in zip(shares, ends, strict=True)]
        + [piece[end:] for piece, end in zip(shares, ends, strict=True)]
    )
