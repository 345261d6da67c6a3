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
        token = draw(self.adjusted(logits), self.options, self.rng)
        self.accept(token)
        return token, log_probability(logits, token)

    def adjusted(self, logits: np.ndarray) -> np.ndarray:
        """The logits less penalties, -inf where banned; float32 (V,), a copy."""
        penalised = penalise(logits, self.counts, self.options)
        penalised[self._banned] = -np.inf
        return penalised

    def accept(self, token: int) -> None:
        """Counts a token as drawn, if there are penalties: all counts decay, then its own grows by 1."""
        if self.options.presence_penalty == 0 and self.options.frequency_penalty == 0:
            return
        self.counts = {seen: count * self.options.penalty_decay for seen, count in self.counts.items()}
        self.counts[token] = self.counts.get(token, 0.0) + (0.0 if self._uncounted(token) else 1.0)


def draw(logits: np.ndarray, options: SamplingOptions, rng: np.random.Generator) -> int:
    """One token from logits (V,), by one number from `rng`."""
    tokens, probabilities = candidates(logits, options)
    cumulative = np.cumsum(probabilities)
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(tokens[min(place, len(tokens) - 1)])


def candidates(logits: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, probabilities) to draw from: ids (n,) ascending, float64 (n,) of sum 1. Greedy leaves one."""
    peak = _peak(logits)
    if options.temperature == 0:
        return np.array([np.argmax(logits)]), np.ones(1)
    kept = min_p_filter(top_k_filter(top_p_filter(logits, options.top_p), options.top_k), options.min_p)
    tokens = np.flatnonzero(kept > -np.inf)
    temperature = min(max(options.temperature, 1e-6), 1e30)  # within float32
    weights = np.exp((kept[tokens] - peak) / temperature).astype(np.float64)
    return tokens, weights / weights.sum()


def penalise(logits: np.ndarray, counts: Mapping[int, float], options: SamplingOptions) -> np.ndarray:
    """logits (V,) less presence + count * frequency for each token of `counts`; a float32 copy."""
    penalised = np.array(logits, dtype=np.float32)
    if counts:
        tokens = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
        repeats = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
        penalised[tokens] -= options.presence_penalty + repeats * options.frequency_penalty
    return penalised


def top_p_filter(logits: np.ndarray, top_p: float) -> np.ndarray:
    """logits (V,) with -inf outside the fewest most likely tokens that hold `top_p` of the probability.

    Tokens as likely as the last one of them all stay. top_p 1 returns the logits themselves.
    """
    if top_p >= 1:
        return logits
    weights = np.exp(logits - _peak(logits))
    total = float(weights.sum(dtype=np.float64))
    # Tokens below this weight hold less than 1 - top_p together, so the cut lies above it.
    floor = min((1 - top_p) * total / len(weights), 1.0)
    cut = _weight_at_mass(weights[weights >= floor], top_p * total)
    return np.where(weights >= cut, logits, np.float32(-np.inf))


def _weight_at_mass(weights: np.ndarray, mass: float) -> np.floating:
    """The weight at which the sum from the largest down reaches `mass`, by halving rather than by sorting."""
    while len(weights) > 512:
        middle = len(weights) // 2
        weights = np.partition(weights, middle)
        upper = float(weights[middle:].sum(dtype=np.float64))
        if upper >= mass:
            weights = weights[middle:]
        else:
            weights, mass = weights[:middle], mass - upper
    descending = np.sort(weights)[::-1]
    place = int(np.searchsorted(np.cumsum(descending, dtype=np.float64), mass))
    return descending[min(place, len(descending) - 1)]


def top_k_filter(logits: np.ndarray, top_k: int) -> np.ndarray:
    """logits (V,) with -inf outside the `top_k` largest; of equals at the cut the lowest ids. 0 keeps all."""
    if top_k == 0:
        return logits
    alive = logits[logits > -np.inf]  # also much faster to partition than many equal values
    if top_k >= len(alive):
        return logits
    cut = np.partition(alive, -top_k)[-top_k]
    keep = logits > cut
    keep[np.flatnonzero(logits == cut)[: top_k - np.count_nonzero(keep)]] = True
    return np.where(keep, logits, np.float32(-np.inf))


def min_p_filter(logits: np.ndarray, min_p: float) -> np.ndarray:
    """logits (V,) with -inf where a token is less likely than `min_p` times the most likely. 0 keeps all."""
    if min_p <= 0:
        return logits
    return np.where(logits >= _peak(logits) + math.log(min_p), logits, np.float32(-np.inf))


def log_probability(logits: np.ndarray, token: int) -> float:
    """Natural logarithm of softmax(logits)[token], for logits (V,)."""
    peak = _peak(logits)
    return float(logits[token]) - peak - math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))


def _peak(logits: np.ndarray) -> float:
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise BackendError("the logits hold NaN or infinity, or no token is left to choose")
    return peak


def _check(flag: str, value: float, low: float, high: float, *, whole: bool = False) -> None:
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and math.isfinite(value) and low <= value <= high:
        return
    number = "a whole number" if whole else "a number"
    allowed = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
    raise UsageError(f"{flag} must be {number} {allowed}, not {value!r}")
