"""The sampler `text.sampling.choose`, compiled, for all sequences in one call.

All logits are read a few times. Work that needs an order is only done on the few tokens that top-p may keep.
Exponentials and sums are float64, so that the choice does not depend on the order of additions.

Loops go over elements: for one assignment of a slice, numba would compile hundreds of functions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, types

from rwkv_npu.kernels.common import called, exp64, float32s
from rwkv_npu.kernels.compiler import Kernel
from rwkv_npu.kernels.simd import at_least, largest, load_floats, pointer_to
from rwkv_npu.quant.cpu import LANES

BLOCK = 64  # logits that are skipped together if the largest of them is too small
BUCKETS = 256
# A sum of exponentials is updated when logits change, and computed anew where that would lose precision: if the largest
# logit grows by more than SPREAD (e^80 is far from overflow), or less than REMAINDER of the sum is left (nine digits
# stay).
SPREAD = 80.0
REMAINDER = 1e-3

CHOSEN = 2  # the columns of out for the chosen token; those of the most likely tokens follow
LEAST = np.float32(-np.inf)

TEMPERATURE, TOP_P, TOP_K, LOG_MIN_P, NUMBER, END = range(6)  # columns of settings; NUMBER is a random number

_float64s, _uint32s = pointer_to(types.float64), pointer_to(types.uint32)


@called
def _block_max(x: Any, b: Any) -> Any:
    """The largest of block b of x; -inf if the block is empty, as the last one may be."""
    begin, end = b * BLOCK, min((b + 1) * BLOCK, len(x))
    if end - begin == BLOCK:
        block = x.ctypes.data + 4 * begin
        top = load_floats(block)
        for j in range(LANES, BLOCK, LANES):
            top = at_least(top, load_floats(block + 4 * j))
        return largest(top)
    rest = LEAST
    for j in range(begin, end):
        rest = max(rest, x[j])
    return rest


@called
def _total(x: Any, peak: Any) -> Any:
    """Sum of exp(x - peak). It is NaN if x contains NaN or infinity, or only -inf."""
    total = 0.0
    for j in range(len(x)):
        total += exp64(np.float64(x[j]) - peak)
    return total


@called
def _first(x: Any, tops: Any, value: Any) -> Any:
    """The first index of a value that x contains. tops: the largest of each block."""
    b = 0
    while tops[b] != value:
        b += 1
    j = b * BLOCK
    while x[j] != value:
        j += 1
    return j


@called
def _best(x: Any, tops: Any, log_sum: Any, out: Any, b: Any) -> None:
    """Write the largest of x to out[b] as (index, value - log_sum), in descending order, equal ones by index."""
    count, found, least = (out.shape[1] - CHOSEN) // 2, 0, LEAST
    for block in range(len(tops)):
        if found == count and not tops[block] > least:
            continue
        for j in range(block * BLOCK, min((block + 1) * BLOCK, len(x))):
            if found == count and not x[j] > least:
                continue
            at = CHOSEN + 2 * min(found, count - 1)
            while at > CHOSEN and x[int(out[b, at - 2])] < x[j]:
                out[b, at], out[b, at + 1] = out[b, at - 2], out[b, at - 1]
                at -= 2
            out[b, at], out[b, at + 1] = j, x[j] - log_sum
            found = min(found + 1, count)
            least = x[int(out[b, CHOSEN + 2 * (found - 1)])]


@called
def _cut(values: Any, weights: Any, n: Any, wanted: Any, sums: Any) -> Any:
    """The largest c such that the weights of all values >= c add up to `wanted` or more; else the least of n values.

    The range of the values is divided into BUCKETS parts. The sums of their weights tell which part contains c. This
    part is divided again, until all its values are equal. Values and weights are overwritten.
    """
    while True:
        high, low = values[0], values[0]
        for i in range(n):
            high, low = max(high, values[i]), min(low, values[i])
        if high == low:
            return high
        scale = (BUCKETS - 1) / (np.float64(high) - low)
        last = int((np.float64(high) - low) * scale)
        for i in range(BUCKETS):
            sums[i] = 0.0
        for i in range(n):
            sums[int((np.float64(high) - values[i]) * scale)] += weights[i]
        bucket = 0
        while bucket < last and sums[bucket] < wanted:
            wanted -= sums[bucket]
            bucket += 1
        kept = 0
        for i in range(n):
            value, weight = values[i], weights[i]
            if int((np.float64(high) - value) * scale) == bucket:
                values[kept], weights[kept] = value, weight
                kept += 1
        n = kept


@called
def _collect(x: Any, tops: Any, least: Any, tokens: Any, values: Any) -> Any:
    """Write the indices and values of all x >= least, and return their number."""
    n = 0
    for b in range(len(tops)):
        if tops[b] >= least:
            for j in range(b * BLOCK, min((b + 1) * BLOCK, len(x))):
                tokens[n], values[n] = j, x[j]  # without a branch, which would often be mispredicted
                n += x[j] >= least
    return n


@called
def _keep(tokens: Any, values: Any, n: Any, cut: Any, equals: Any) -> Any:
    """Keep the tokens above the cut, and the first `equals` of those equal to it. Returns their number."""
    kept = 0
    for i in range(n):
        token, value = tokens[i], values[i]
        tokens[kept], values[kept] = token, value
        at = value == cut
        kept += (value > cut) | (at & (equals > 0))
        equals -= at
    return kept


@called
def _draw(
    x: Any,
    tops: Any,
    peak: Any,
    total: Any,
    s: Any,
    tokens: Any,
    values: Any,
    copy: Any,
    weights: Any,
    sums: Any,
) -> Any:
    """Draw a token of x (V,). peak: the largest of x. total: the sum of exp(x - peak). s: the row of settings."""
    V = len(x)
    least = np.float32(-3.4028234e38)
    if s[TOP_P] < 1:
        wanted = s[TOP_P] * total
        # All tokens below this logit together weigh less than what top-p drops.
        if wanted < total:
            least = np.float32(peak + math.log(min((total - wanted) / V, 1.0)) - 1e-6 * (1 + abs(peak)))
        # If the largest of each block alone weigh `wanted`, the cut of all tokens is at least the cut of these.
        held = 0.0
        for i in range(len(tops)):
            copy[i], weights[i] = tops[i], exp64(np.float64(tops[i]) - peak)
            held += weights[i]
        if held > wanted * (1 + 1e-9):
            least = max(least, _cut(copy, weights, len(tops), wanted * (1 + 1e-9), sums))
    n = _collect(x, tops, least, tokens, values)
    if s[TOP_P] < 1:
        for i in range(n):
            copy[i] = values[i]
            weights[i] = exp64(np.float64(values[i]) - peak)
        n = _keep(tokens, values, n, _cut(copy, weights, n, wanted, sums), n)
    if 0 < s[TOP_K] < n:
        for i in range(n):
            copy[i], weights[i] = values[i], 1.0
        cut = _cut(copy, weights, n, s[TOP_K], sums)
        above = 0
        for i in range(n):
            above += values[i] > cut
        n = _keep(tokens, values, n, cut, int(s[TOP_K]) - above)
    if s[LOG_MIN_P] > -np.inf:
        n = _keep(tokens, values, n, np.float32(np.float32(peak) + np.float32(s[LOG_MIN_P])), n)
    for i in range(n):
        x_i = (np.float64(values[i]) - peak) / s[TEMPERATURE]
        weights[i] = 0.0 if x_i < -700 else exp64(x_i)
    whole = 0.0
    for i in range(n):
        whole += weights[i]
    rest, i = s[NUMBER] * whole, 0
    while i < n - 1:
        rest -= weights[i]
        if rest < 0:
            break
        i += 1
    return tokens[i]


@called
def _change(x: Any, tops: Any, changes: Any, first: Any, end: Any, peak: Any, total: Any) -> Any:
    """Apply changes first .. end to x. total: the sum of exp(x - peak) before; returns the sum after."""
    for i in range(first, end):
        j = int(changes[i, 0])
        before = x[j]
        after = np.float32(before + changes[i, 1])
        x[j] = after
        total += exp64(np.float64(after) - peak) - exp64(np.float64(before) - peak)
    for i in range(first, end):
        block = int(changes[i, 0]) // BLOCK
        tops[block] = _block_max(x, block)
    return total


@called
def _mask(x: Any, tops: Any, words: Any) -> None:
    """Set x to -inf where the bit of the mask is 0."""
    for j in range(len(x)):
        if not (words[j >> 5] >> (j & 31)) & 1:
            x[j] = -np.inf
    for b in range(len(tops)):
        tops[b] = _block_max(x, b)


@called
def _peak(tops: Any) -> Any:
    """The largest of all blocks; NaN is ignored."""
    peak = LEAST
    for b in range(len(tops)):
        peak = max(peak, tops[b])
    return np.float64(peak)


def choose(logits: Any, settings: Any, changes: Any, masks: Any, out: Any) -> None:
    """Choose a token for each row of logits (B, V).

    settings: (B, 6), columns as named above; the changes of a sequence begin at the END of the one before it.
    changes: (n, 2), ids and what is added to their logits. masks: (B, words) of bits, or empty.
    out: (B, 2 + 2n), the token and its log-probability, then those of the n most likely tokens; the token is -1 if
    there is none to choose.
    """
    kinds = np.float32, np.float64, np.float64, np.uint32, np.float64
    given = logits, settings, changes, masks, out
    arrays = [np.ascontiguousarray(array, kind) for array, kind in zip(given, kinds, strict=True)]
    assert arrays[-1] is out  # it is written
    shapes = *logits.shape, len(changes), *masks.shape, out.shape[1]
    _choose.ctypes(*(array.ctypes.data for array in arrays), *shapes)


def _choose_rows(
    x: Any, s: Any, c: Any, m: Any, o: Any, B: Any, V: Any, n: Any, M: Any, words: Any, top: Any
) -> None:
    """`choose` by the addresses and the shapes of its arrays."""
    logits, masks = carray(float32s(x), (B, V)), carray(_uint32s(m), (M, words))
    settings, changes = carray(_float64s(s), (B, 6)), carray(_float64s(c), (n, 2))
    _choose_each(logits, settings, changes, masks, carray(_float64s(o), (B, top)))


_choose = Kernel(_choose_rows, name="choose", error_model="numpy")


@called
def _choose_each(logits: Any, settings: Any, changes: Any, masks: Any, out: Any) -> None:
    B, V = logits.shape
    changed, tops = np.empty(V, np.float32), np.empty(V // BLOCK + 1, np.float32)
    tokens, weights = np.empty(V + 1, np.int32), np.empty(V)
    values, copy, sums = np.empty(V + 1, np.float32), np.empty(V + 1, np.float32), np.empty(BUCKETS)
    end = 0
    for b in range(B):
        row, s, first = logits[b], settings[b], end
        end = int(s[END])
        out[b, 0] = -1
        for block in range(len(tops)):
            tops[block] = _block_max(row, block)
        peak = _peak(tops)
        total = _total(row, peak)
        if not math.isfinite(total):
            continue
        log_sum = peak + math.log(total)
        if out.shape[1] > CHOSEN:
            _best(row, tops, log_sum, out, b)
        x, masked = row, len(masks) > 0
        if end > first or masked:
            x = changed
            for j in range(V):
                x[j] = row[j]
            before, old_total = peak, total
            total = _change(x, tops, changes, first, end, before, total)
            if masked:
                _mask(x, tops, masks[b])
            peak = _peak(tops)
            if masked or peak > before + SPREAD or total < REMAINDER * old_total:
                total = _total(x, peak)
            else:
                total *= math.exp(before - peak)
            if not math.isfinite(total):
                continue
        if s[TEMPERATURE] == 0:
            token = _first(x, tops, np.float32(peak))
        else:
            token = _draw(x, tops, peak, total, s, tokens, values, copy, weights, sums)
        out[b, 0], out[b, 1] = token, row[token] - log_sum
