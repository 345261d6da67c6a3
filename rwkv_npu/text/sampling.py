"""Choose the next token of each sequence from its logits, like the rwkv package.

Source: `PIPELINE.sample_logits` and `PIPELINE.generate` in `rwkv/utils.py` (rwkv 0.8.32). Both work in this order:
bans and penalties change the logits; top-p and top-k select tokens by their probability at temperature 1; the
temperature then shapes the probabilities of the selected tokens. Deliberate differences:

- temperature 0 takes the largest logit (the package: one of several equal ones by chance);
- top-p 1 filters nothing (the package: only the largest stays if the fp32 sum is below 1);
- of equal logits at the cut of top-k the lowest ids stay (the package: those that its sort puts last);
- min-p, which the package lacks, comes after top-k.

`choose` is the reference, in NumPy. `kernels.sampling` is the same in compiled code, for systems with numba.
Both compute exponentials and sums in fp64: in fp32 a choice would depend on the order of summation.
Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from rwkv_npu import kernels
from rwkv_npu.arguments import check_number
from rwkv_npu.errors import BackendError, UsageError

NOT_FINITE = "the logits hold NaN or infinity, or no token is left to choose"
TEMPERATURES = 1e-6, 1e30  # others are clipped to this range: beyond it the choice stays the same
THRESHOLDS = 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-6, 0.0


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options. The defaults are those of the rwkv package, without its penalties.

    Raises UsageError for a value out of range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 0.85  # 1 is off; 0 leaves the most likely token
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996  # multiplies every token's count at each step

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, math.inf)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_number("top_k", self.top_k, 0, math.inf, whole=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("presence_penalty", self.presence_penalty, -1000.0, 1000.0)
        check_number("frequency_penalty", self.frequency_penalty, -1000.0, 1000.0)
        check_number("penalty_decay", self.penalty_decay, 0.0, 1.0)


class Choice(NamedTuple):
    """A chosen token. Log-probabilities are those of the unchanged logits."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # (token, log-probability) of the most likely tokens, best first


class Sampler:
    """Draws the tokens of one sequence, and counts them for the penalties.

    rng: the only source of random numbers. Each draw takes one. ids: a range that covers all ids whose logits are
    changed.

    Args:
        seed: a whole number >= 0, or a Generator. None: another sequence in each run.
        banned: (V,) bool, True for ids that are never drawn.
        uncounted: True for tokens whose repeats are free, such as `Tokenizer.uncounted`. None: all tokens count.
        logit_bias: amounts to add to the logits of some ids.
    """

    def __init__(
        self,
        options: SamplingOptions | None = None,
        *,
        seed: int | np.random.Generator | None = None,
        banned: np.ndarray | None = None,
        uncounted: Callable[[int], bool] | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> None:
        if seed is not None and not isinstance(seed, np.random.Generator):
            check_number("seed", seed, 0, math.inf, whole=True)
        self.options = options or SamplingOptions()
        self.rng = np.random.default_rng(seed)
        amounts = dict(logit_bias or {})
        if not all(math.isfinite(amount) for amount in amounts.values()):
            raise UsageError("logit_bias must hold finite numbers: to ban a token, use banned")
        amounts |= dict.fromkeys(() if banned is None else np.flatnonzero(banned).tolist(), -math.inf)
        self._fixed = np.array([*amounts.items()], np.float64).reshape(-1, 2)
        self._uncounted = uncounted or (lambda token: False)
        # _drawn: tokens drawn so far and their decayed counts, (n, 2) with room for more. _place: the row of a token.
        self._drawn, self._place = np.empty((16, 2)), dict[int, int]()
        self.ids = range(min(amounts, default=0), max(amounts, default=0) + 1)

    @property
    def counts(self) -> dict[int, float]:
        """The decayed number of draws of each token."""
        return {int(token): count for token, count in self._drawn[: len(self._place)].tolist()}

    def sample(self, logits: np.ndarray) -> tuple[int, float]:
        """Draw a token from logits (V,), which stay unchanged. Returns it and its log-probability in `logits`.

        Raises BackendError if the logits hold NaN or infinity, or only -inf.
        """
        choice = sample(logits[None], [self])[0]
        if isinstance(choice, BackendError):
            raise choice
        return choice.token, choice.logprob

    def changes(self) -> list[np.ndarray]:
        """Arrays (n, 2) of ids and amounts to add to their logits: first biases and bans, then penalties."""
        if not self._place:
            return [self._fixed]
        penalties, options = self._drawn[: len(self._place)].copy(), self.options
        penalties[:, 1] = -(options.presence_penalty + options.frequency_penalty * penalties[:, 1])
        return [self._fixed, penalties]

    def accept(self, token: int) -> None:
        """Count a drawn token, if there are penalties. All counts decay, then its own grows by 1."""
        if self.options.presence_penalty == 0 and self.options.frequency_penalty == 0:
            return
        n = len(self._place)
        self._drawn[:n, 1] *= self.options.penalty_decay
        place = self._place.setdefault(token, n)
        if place == n:
            if n == len(self._drawn):
                self._drawn = np.concatenate([self._drawn, np.empty_like(self._drawn)])
            self._drawn[n] = token, 0.0
            self.ids = range(min(self.ids.start, token), max(self.ids.stop, token + 1))
        self._drawn[place, 1] += 0.0 if self._uncounted(token) else 1.0


def sample(
    logits: np.ndarray,
    samplers: Sequence[Sampler],
    *,
    allowed: Sequence[np.ndarray | None] | None = None,
    top: int = 0,
) -> list[Choice | BackendError]:
    """Draw the next token of each sequence. A choice does not depend on the other sequences.

    Returns a BackendError instead of a choice if the logits of a sequence hold NaN or infinity, or leave no token.

    Args:
        logits: (B, V), which stay unchanged.
        samplers: one for each sequence. It counts the token that it draws.
        allowed: for each sequence None, or a bit mask of the tokens that may be drawn, (ceil(V / 32),) uint32 or int32.
            Token t is bit t % 32 of word t // 32.
        top: number of most likely tokens to return with each choice.
    """
    logits = np.require(logits, np.float32, ["C", "A", "W"])  # compiled code takes no read-only array
    B, V = logits.shape
    masks = [_mask(mask, V) for mask in allowed or [None] * B]
    if any(sampler.ids.start < 0 or sampler.ids.stop > V for sampler in samplers):
        raise UsageError(f"a token of banned, logit_bias or the past is none of the {V} of the vocabulary")
    numbers = [sampler.rng.random() for sampler in samplers]
    compiled, top = _compiled(), min(top, V)
    choices: list[Choice | BackendError] = []
    if compiled is None:
        for row, sampler, number, mask in zip(logits, samplers, numbers, masks, strict=True):
            try:
                choices.append(choose(row, sampler, number, mask, top))
            except BackendError as error:
                choices.append(error)
    else:
        choices += _choose_compiled(compiled, logits, samplers, numbers, masks, top)
    for sampler, choice in zip(samplers, choices, strict=True):
        if isinstance(choice, Choice):
            sampler.accept(choice.token)
    return choices


# -- the reference -----------------------------------------------------------------------------------------


def choose(
    logits: np.ndarray, sampler: Sampler, number: float, allowed: np.ndarray | None = None, top: int = 0
) -> Choice:
    """Choose a token from logits (V,) fp32, by a random number in [0, 1). See `sample`."""
    log_sum = _log_sum(logits)
    tokens, weights = candidates(adjusted(logits, sampler, allowed), sampler.options)
    sums = np.cumsum(weights)
    place = np.searchsorted(sums, number * sums[-1], side="right")
    token = int(tokens[min(place, len(tokens) - 1)])
    best = np.argsort(-logits, kind="stable")[:top] if top else ()
    return Choice(token, float(logits[token]) - log_sum, [(int(t), float(logits[t]) - log_sum) for t in best])


def adjusted(logits: np.ndarray, sampler: Sampler, allowed: np.ndarray | None = None) -> np.ndarray:
    """A copy (V,) of the logits with biases and penalties, and -inf for tokens that are banned or not allowed."""
    changed = np.array(logits, np.float32)
    for changes in sampler.changes():
        changed[changes[:, 0].astype(np.int64)] += changes[:, 1]
    if allowed is not None:
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little", count=len(logits))
        changed[bits == 0] = -np.inf
    return changed


def candidates(logits: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to draw from: their ids (n,), ascending, and their weights (n,) in fp64. Greedy leaves one token.

    Raises BackendError if the logits hold NaN or infinity, or only -inf.
    """
    if not math.isfinite(logits.max()):
        raise BackendError(NOT_FINITE)
    if options.temperature == 0:
        return np.array([np.argmax(logits)]), np.ones(1)
    tokens = top_p(logits, options.top_p)
    if options.top_k:
        tokens = tokens[top_k(logits[tokens], options.top_k)]
    if options.min_p:
        tokens = tokens[min_p(logits[tokens], options.min_p)]
    temperature = np.clip(options.temperature, *TEMPERATURES)
    exponents = (logits[tokens] - np.float64(logits.max())) / temperature
    return tokens, np.where(exponents < -700, 0.0, np.exp(exponents))


def top_p(logits: np.ndarray, mass: float) -> np.ndarray:
    """The ids, ascending, of the smallest set of most likely tokens with the probability `mass`. 1 keeps all.

    Tokens that are as likely as the last one of the set stay too.
    """
    if mass >= 1:
        return np.flatnonzero(logits > -np.inf)
    peak = np.float64(logits.max())
    weights = np.exp(logits - peak)
    wanted = mass * weights.sum()
    # Sorting all tokens is slow. Find the first threshold above which the weights suffice, and sort those tokens only.
    for threshold in THRESHOLDS:
        likely = np.flatnonzero(weights >= threshold)
        if weights[likely].sum() >= wanted:
            break
    descending = np.sort(logits[likely])[::-1]
    place = np.searchsorted(np.cumsum(np.exp(descending - peak)), wanted)
    cut = descending[min(place, len(descending) - 1)]
    return likely[logits[likely] >= cut]


def top_k(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the `count` largest of logits (n,). Among equals at the cut the first ones stay."""
    if count >= len(logits):
        return np.arange(len(logits))
    cut = np.partition(logits, -count)[-count]
    above, equal = np.flatnonzero(logits > cut), np.flatnonzero(logits == cut)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def min_p(logits: np.ndarray, ratio: float) -> np.ndarray:
    """Indices, ascending, of the logits (n,) that are at least `ratio` times as likely as the largest."""
    return np.flatnonzero(logits >= logits.max() + np.float32(math.log(ratio)))


def _log_sum(logits: np.ndarray) -> float:
    """log(sum(exp(logits))) of logits (V,). Raises BackendError if it is not finite."""
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise BackendError(NOT_FINITE)
    # Exponentials in fp32 are several times faster. An error of 1e-7 is harmless: no choice depends on this sum.
    return peak + math.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64))


# -- compiled ----------------------------------------------------------------------------------------------


@functools.cache
def _compiled() -> ModuleType | None:
    """The module `kernels.sampling`, None without numba."""
    return kernels.load("sampling") if kernels.available() else None


def _choose_compiled(
    kernel: ModuleType,
    logits: np.ndarray,
    samplers: Sequence[Sampler],
    numbers: Sequence[float],
    masks: Sequence[np.ndarray | None],
    top: int,
) -> list[Choice | BackendError]:
    """Like `choose`, for all rows of logits (B, V) at once."""
    B, V = logits.shape
    changes: list[np.ndarray] = []
    settings, end = [], 0
    for sampler, number in zip(samplers, numbers, strict=True):
        own, o = sampler.changes(), sampler.options
        changes += own
        end += sum(map(len, own))
        temperature = o.temperature and min(max(o.temperature, TEMPERATURES[0]), TEMPERATURES[1])
        log_min_p = math.log(o.min_p) if o.min_p else -math.inf
        settings.append((temperature, o.top_p, min(o.top_k, V), log_min_p, number, end))
    words = np.empty((0, 0), np.uint32)
    if any(mask is not None for mask in masks):
        everything = np.full(-(-V // 32), 0xFFFFFFFF, np.uint32)
        words = np.stack([everything if mask is None else mask for mask in masks])
    out = np.empty((B, 2 + 2 * top))
    kernel.choose(logits, np.array(settings), np.concatenate(changes), words, out)
    choices: list[Choice | BackendError] = []
    for token, logprob, *best in out.tolist():
        likely = [(int(best[i]), best[i + 1]) for i in range(0, 2 * top, 2)]
        choices.append(Choice(int(token), logprob, likely) if token >= 0 else BackendError(NOT_FINITE))
    return choices


# -- checks ------------------------------------------------------------------------------------------------


def _mask(mask: np.ndarray | None, V: int) -> np.ndarray | None:
    if mask is None:
        return None
    words = -(-V // 32)
    if mask.shape != (words,) or mask.dtype not in (np.uint32, np.int32):
        raise UsageError(f"a mask of allowed tokens must be ({words},) uint32, not {mask.shape} {mask.dtype}")
    return np.ascontiguousarray(mask).view(np.uint32)
