"""Choosing the next token from one vector of logits, as the rwkv package does.

Source: `PIPELINE.sample_logits` and `PIPELINE.generate` in `rwkv/utils.py` (rwkv 0.8.32). The order, in both:
bans and penalties change the logits; top-p and top-k choose who stays, by probability at temperature 1; the
temperature then shapes what is left. Deliberate differences:

- temperature 0 is the largest logit, always (there: chance among equals);
- top-p 1 filters nothing (there: only the largest stays when the float32 sum falls short of 1);
- of equal logits at top-k's cut the lowest ids stay (there: whichever the sort put last);
- min-p, which the package lacks, comes after top-k.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rwkv_npu.errors import BackendError, UsageError

FEW = 4096  # weights that are sorted without further ado
ROUNDS = 4  # of narrowing more of them down, before they are sorted all the same
BLOCK = 128  # weights that are added up at once


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose; the defaults are the rwkv package's, without its penalties.

    UsageError, naming the command line's flag and the range, for a value out of range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 0.85  # 1 is off; 0 leaves the most likely token
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996  # of every token's count, at each step

    def __post_init__(self) -> None:
        _check("--temp", self.temperature, 0.0, math.inf)
        _check("--top-p", self.top_p, 0.0, 1.0)
        _check("--top-k", self.top_k, 0, math.inf, whole=True)
        _check("--min-p", self.min_p, 0.0, 1.0)
        _check("--presence-penalty", self.presence_penalty, -1000.0, 1000.0)
        _check("--frequency-penalty", self.frequency_penalty, -1000.0, 1000.0)
        _check("--penalty-decay", self.penalty_decay, 0.0, 1.0)


class Sampler:
    """Draws tokens of one sequence and remembers what it drew, for the penalties.

    rng: the only source of chance. counts: {token: decayed number of draws}, all the memory there is.

    Args:
        seed: whole number >= 0, or a Generator to draw from; None for another sequence at each run.
        banned: (V,) bool, True for ids never to be drawn.
        uncounted: whether repeats of a token are free (`Tokenizer.uncounted`: the package does not count
            spaces and digits, whose presence is still penalised); by default all tokens count.
    """

    def __init__(
        self,
        options: SamplingOptions | None = None,
        *,
        seed: int | np.random.Generator | None = None,
        banned: np.ndarray | None = None,
        uncounted: Callable[[int], bool] | None = None,
    ) -> None:
        if seed is not None and not isinstance(seed, np.random.Generator):
            _check("--seed", seed, 0, math.inf, whole=True)
        self.options = options or SamplingOptions()
        self.rng = np.random.default_rng(seed)
        self.counts: dict[int, float] = {}
        self._banned = np.empty(0, dtype=np.int64) if banned is None else np.flatnonzero(banned)
        self._uncounted = uncounted or (lambda token: False)

    def sample(self, logits: np.ndarray) -> tuple[int, float]:
        """(token, its log-probability in the softmax of `logits` as given); logits (V,), left as they are.

        BackendError when the logits hold NaN or infinity, or nothing but -inf.
        """
        softmax, changed = Softmax(self.adjusted(logits)), self._changed()
        token = draw(softmax, self.options, self.rng)
        logprob = _log_probability_before(softmax, changed, logits, token)
        self.accept(token)
        return token, logprob

    def adjusted(self, logits: np.ndarray) -> np.ndarray:
        """The logits less penalties, -inf where banned; float32 (V,), a copy."""
        penalised = penalise(logits, self.counts, self.options)
        penalised[self._banned] = -np.inf
        return penalised

    def _changed(self) -> np.ndarray:
        """Ids of all tokens whose logits are adjusted."""
        return np.union1d(self._banned, [*self.counts]).astype(np.int64) if self.counts else self._banned

    def accept(self, token: int) -> None:
        """Counts a token as drawn, if there are penalties: all counts decay, then its own grows by 1."""
        if self.options.presence_penalty == 0 and self.options.frequency_penalty == 0:
            return
        self.counts = {seen: count * self.options.penalty_decay for seen, count in self.counts.items()}
        self.counts[token] = self.counts.get(token, 0.0) + (0.0 if self._uncounted(token) else 1.0)


class Softmax:
    """Logits (V,) and what everything here asks of them, computed once.

    peak: the largest logit. weights: exp(logits - peak), float32. total: their sum.
    BackendError when the logits hold NaN or infinity, or nothing but -inf.
    """

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.peak = logits, float(logits.max())
        if not math.isfinite(self.peak):
            raise BackendError("the logits hold NaN or infinity, or no token is left to choose")
        self.weights = np.exp(logits - np.float32(self.peak))
        self.total = float(self.weights.sum())


def draw(softmax: Softmax, options: SamplingOptions, rng: np.random.Generator) -> int:
    """One token, by one number from `rng`."""
    tokens, probabilities = candidates(softmax, options)
    return int(tokens[_place(probabilities, rng.random() * float(probabilities.sum()))])


def candidates(softmax: Softmax, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, probabilities) to draw from: ids (n,) ascending, float64 (n,) of sum 1. Greedy leaves one."""
    if options.temperature == 0:
        return np.array([np.argmax(softmax.logits)]), np.ones(1)
    tokens = top_p(softmax, options.top_p)
    logits = softmax.logits[tokens]
    if options.top_k:
        kept = top_k(logits, options.top_k)
        tokens, logits = tokens[kept], logits[kept]
    if options.min_p:
        kept = min_p(logits, options.min_p)
        tokens, logits = tokens[kept], logits[kept]
    temperature = min(max(options.temperature, 1e-6), 1e30)  # within float32
    if temperature == 1:
        weights = softmax.weights.take(tokens)
    else:
        weights = np.exp((logits - np.float32(softmax.peak)) / np.float32(temperature))
    probabilities = weights.astype(np.float64)
    return tokens, probabilities / probabilities.sum()


def penalise(logits: np.ndarray, counts: Mapping[int, float], options: SamplingOptions) -> np.ndarray:
    """logits (V,) less presence + count * frequency for each token of `counts`; a float32 copy."""
    penalised = np.array(logits, dtype=np.float32)
    if counts:
        tokens = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
        repeats = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
        penalised[tokens] -= options.presence_penalty + repeats * options.frequency_penalty
    return penalised


def top_p(softmax: Softmax, mass: float) -> np.ndarray:
    """Ids, ascending, of the fewest most likely tokens that hold `mass` of the probability; 1 keeps all.

    Tokens as likely as the last one of them all stay.
    """
    if mass >= 1:
        return np.flatnonzero(softmax.logits > -np.inf)
    weights, wanted = softmax.weights, mass * softmax.total
    spare = softmax.total - wanted
    # All that are smaller than this hold less together than what may be left out.
    likely = weights >= min(spare / len(weights), 1.0)
    low, high = 0.0, math.inf
    if np.count_nonzero(likely) > FEW:
        low, high = _bracket(weights, spare)
        likely = weights >= low
    tokens = np.flatnonzero(likely)
    held = weights.take(tokens)
    if low and held.sum(dtype=np.float64) <= wanted:  # a sample may err
        tokens, held = np.arange(len(weights)), weights
    cut = _weight_at(held, wanted, low, high)
    return tokens.take(np.flatnonzero(held >= cut))


def _weight_at(weights: np.ndarray, wanted: float, low: float = 0.0, high: float = math.inf) -> float:
    """The weight at which the sum from the largest down reaches `wanted`; likely between `low` and `high`."""
    for _ in range(ROUNDS):
        if len(weights) <= FEW:
            break
        part = weights >= high
        held = float((weights * part).sum(dtype=np.float64))
        if held < wanted:
            part, wanted = (weights < high) & (weights >= low), wanted - held
            held = float((weights * part).sum(dtype=np.float64))
        if held < wanted:
            part, wanted = weights < low, wanted - held
        weights = weights.take(np.flatnonzero(part))
        low, high = _bracket(weights, float(weights.sum(dtype=np.float64)) - wanted)
    descending = np.sort(weights)[::-1]
    return float(descending[_reach(descending, wanted)])


def _bracket(weights: np.ndarray, spare: float) -> tuple[float, float]:
    """Two of the weights that likely have between them the one below which the sum is `spare`.

    From a sample of about a thousand: in a sum of small weights there are no few large ones for it to miss.
    """
    stride = max(1, len(weights) // 1024)
    sample = np.sort(weights[::stride])
    sums = np.cumsum(sample, dtype=np.float64) * stride
    places = np.searchsorted(sums, (0.9 * spare, 1.1 * spare))
    low, high = np.minimum(places, len(sample) - 1)
    return float(sample[low]), float(sample[high])


def _reach(weights: np.ndarray, wanted: float) -> int:
    """The first place up to which (n,) weights add up to `wanted`; the last one if none does."""
    place = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), wanted))
    return min(place, len(weights) - 1)


def _place(weights: np.ndarray, mass: float) -> int:
    """The first place up to which (n,) weights add up to more than `mass`; the last one if none does."""
    start = 0
    if len(weights) > 4 * BLOCK:  # blocks first: adding up one after the other is slow
        cumulative = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)))
        block = min(int(np.searchsorted(cumulative, mass, side="right")), len(cumulative) - 1)
        start, mass = block * BLOCK, mass - (float(cumulative[block - 1]) if block else 0.0)
        weights = weights[start : start + BLOCK]
    return start + min(int(np.searchsorted(np.cumsum(weights), mass, side="right")), len(weights) - 1)


def top_k(logits: np.ndarray, count: int) -> np.ndarray:
    """Places, ascending, of the `count` largest of logits (n,); of equals at the cut the first ones."""
    if count >= len(logits):
        return np.arange(len(logits))
    cut = np.partition(logits, -count)[-count]
    above, equal = np.flatnonzero(logits > cut), np.flatnonzero(logits == cut)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def min_p(logits: np.ndarray, ratio: float) -> np.ndarray:
    """Places, ascending, of those of logits (n,) that are at least `ratio` times as likely as the largest."""
    return np.flatnonzero(logits >= logits.max() + np.float32(math.log(ratio)))


def log_probability(softmax: Softmax, token: int) -> float:
    """Natural logarithm of the probability of a token."""
    return float(softmax.logits[token]) - softmax.peak - math.log(softmax.total)


def _log_probability_before(softmax: Softmax, changed: np.ndarray, logits: np.ndarray, token: int) -> float:
    """The same of a token before logits (V,) were changed at some ids, to become those of `softmax`.

    The sum over the others is known. It is all added up again where too little would be left of it, or where what
    was changed was more likely than all others by far.
    """
    if not len(changed):
        return log_probability(softmax, token)
    others = softmax.total - float(softmax.weights[changed].sum(dtype=np.float64))
    before = logits[changed].astype(np.float64) - softmax.peak
    if others > 1e-3 * softmax.total and before.max() < 80:
        total = others + float(np.exp(before).sum())
        return float(logits[token]) - softmax.peak - math.log(total)
    return log_probability(Softmax(logits), token)


def _check(flag: str, value: float, low: float, high: float, *, whole: bool = False) -> None:
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and math.isfinite(value) and low <= value <= high:
        return
    number = "a whole number" if whole else "a number"
    allowed = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
    raise UsageError(f"{flag} must be {number} {allowed}, not {value!r}")
