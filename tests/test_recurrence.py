"""The recurrences over whole chunks against one step after the other in float64, at any decay.

Letters: T tokens, B sequences, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.formats.state import EMPTY_Q
from rwkv_npu.models import common, v4, v7

Arrays = tuple[np.ndarray, ...]

# Relative; what was seen in thousands of draws is 7e-6 where a chunk's decay is near its bound, else 2e-6.
BOUND = 1e-5


@pytest.fixture(autouse=True)
def no_silent_overflow() -> Iterator[None]:
    """Underflow of decays is expected; any other floating-point warning is an error."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        yield


shapes = st.tuples(
    st.integers(1, 100),  # T: up to three chunks and a bit
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 8, 32]),
)
seeds = st.integers(0, 2**32 - 1)


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def in_pieces(wkv: Callable[..., np.ndarray], sequences: Arrays, rest: Arrays, cuts: list[int]) -> np.ndarray:
    """y of the whole sequence, in several calls. `rest` ends with the state, which goes from one to the next."""
    bounds = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(sequences[0])), len(sequences[0])]
    pieces = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    return np.concatenate([wkv(*(x[piece] for x in sequences), *rest) for piece in pieces])


# -- v5 and v6 -------------------------------------------------------------------------------------------

LOG_DECAYS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "trained": lambda rng, shape: -np.exp(rng.uniform(-8, 1, shape)),
    "none": lambda rng, shape: np.zeros(shape),
    "hardly any": lambda rng, shape: np.full(shape, -1e-30),
    "all at once": lambda rng, shape: np.full(shape, -1e4),
    "about a chunk's bound": lambda rng, shape: (
        -rng.choice([1.25, 1.2500001, 2.5, 39.99, 40.0, 40.01], shape)
    ),
    "all kinds": lambda rng, shape: -rng.choice([0.0, 1e-30, 1e-3, 1.0, 20.0, 88.0, 104.0, 1e4], shape),
    # Mostly long memory, and now and then a token that forgets: chunks of every length.
    "rare": lambda rng, shape: -np.where(rng.random(shape) < 0.01, rng.choice([39.0, 1e4], shape), 1e-3),
}


def eagle(
    r: np.ndarray, log_w: np.ndarray, k: np.ndarray, v: np.ndarray, u: np.ndarray, S: np.ndarray
) -> Arrays:
    """y (T, B, H, N) and the last S (B, H, N, N), [v, k], as the paper writes them."""
    r, log_w, k, v, u, S = (x.astype(np.float64) for x in (r, log_w, k, v, u, S))
    y = np.zeros_like(v)
    for t in range(len(r)):
        kv = np.einsum("bhi,bhj->bhij", v[t], k[t])
        y[t] = np.einsum("bhij,bhj->bhi", kv * u[:, None, :] + S, r[t])
        S = S * np.exp(log_w[t])[:, :, None, :] + kv
    return y, S


def wkv(
    r: np.ndarray, log_w: np.ndarray, k: np.ndarray, v: np.ndarray, u: np.ndarray, S: np.ndarray
) -> np.ndarray:
    return common.wkv(r, log_w, u, k, v, S)


@settings(max_examples=100, deadline=None)
@given(shape=shapes, decay=st.sampled_from(sorted(LOG_DECAYS)), cuts=st.lists(st.integers(1, 99)), seed=seeds)
def test_v5_and_v6(shape: tuple[int, int, int, int], decay: str, cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, B, H, N = shape
    r, k, v = (drawn(rng, *shape) for _ in range(3))
    log_w = LOG_DECAYS[decay](rng, shape).astype(np.float32)
    u, S = drawn(rng, H, N), drawn(rng, B, H, N, N)
    expected_y, expected_S = eagle(r, log_w, k, v, u, S)
    # The same with nothing that cancels: what rounding may be measured by, element by element.
    size_y, size_S = eagle(*(np.abs(x) if x is not log_w else x for x in (r, log_w, k, v, u, S)))
    for calls in ([], cuts, range(100)):  # one, some, one for each token
        S_end = S.copy()
        y = in_pieces(wkv, (r, log_w, k, v), (u, S_end), list(calls))
        assert (np.abs(y - expected_y) <= BOUND * size_y).all()
        assert (np.abs(S_end - expected_S) <= BOUND * size_S + 1e-30).all()


def test_chunks_are_as_long_as_the_decay_allows() -> None:
    """The tests above need this: otherwise they would compute no chunk."""
    gentle, harsh = np.full((100, 1, 1, 2), -1e-3, np.float32), np.full((100, 1, 1, 2), -1e4, np.float32)
    assert common._safe_chunk(gentle, 0) == common.CHUNK
    assert common._safe_chunk(gentle, 90) == 100
    assert common._safe_chunk(harsh, 50) == 51


# -- v7 --------------------------------------------------------------------------------------------------

FASTEST = np.exp(-np.exp(-0.5))
DECAYS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "trained": lambda rng, shape: np.exp(-np.exp(-0.5) / (1 + np.exp(-rng.uniform(-8, 2, shape)))),
    "none": lambda rng, shape: np.ones(shape),
    "fastest": lambda rng, shape: np.full(shape, FASTEST),
    "both": lambda rng, shape: rng.choice([1.0, FASTEST], shape),
}
# In-context rates: how much of what S holds under a key is removed before the new value is written.
RATES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "any": lambda rng, shape: rng.random(shape),
    "all or nothing": lambda rng, shape: rng.choice([0.0, 1.0], shape),
    "all": lambda rng, shape: np.ones(shape),
}


def goose(
    r: np.ndarray,
    w: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kappa: np.ndarray,
    b: np.ndarray,
    S: np.ndarray,
) -> Arrays:
    r, w, k, v, kappa, b, S = (x.astype(np.float64) for x in (r, w, k, v, kappa, b, S))
    y = np.zeros_like(v)
    for t in range(len(r)):
        removed = np.einsum("bhij,bhj->bhi", S, kappa[t])
        S = S * w[t][:, :, None, :]
        S = S - np.einsum("bhi,bhj->bhij", removed, b[t]) + np.einsum("bhi,bhj->bhij", v[t], k[t])
        y[t] = np.einsum("bhij,bhj->bhi", S, r[t])
    return y, S


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes,
    decay=st.sampled_from(sorted(DECAYS)),
    rate=st.sampled_from(sorted(RATES)),
    one_key=st.booleans(),
    cuts=st.lists(st.integers(1, 99)),
    seed=seeds,
)
def test_v7(
    shape: tuple[int, int, int, int], decay: str, rate: str, one_key: bool, cuts: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    _, B, H, N = shape
    r, k, v = (drawn(rng, *shape) for _ in range(3))
    # The same key again and again is the worst case for the triangular system.
    kappa = np.broadcast_to(drawn(rng, 1, 1, H, N), shape) if one_key else drawn(rng, *shape)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    b = kappa * RATES[rate](rng, shape).astype(np.float32)
    w = DECAYS[decay](rng, shape).astype(np.float32)
    S = drawn(rng, B, H, N, N)
    expected_y, expected_S = goose(r, w, k, v, kappa, b, S)
    for calls in ([], cuts, range(100)):
        S_end = S.copy()
        y = in_pieces(v7.wkv, (r, w, k, v, kappa, b), (S_end,), list(calls))
        # 1 is what the inputs are spread by: removing cancels, and may leave next to nothing.
        assert np.abs(y - expected_y).max() <= BOUND * (1 + np.abs(expected_y).max())
        assert np.abs(S_end - expected_S).max() <= BOUND * (1 + np.abs(expected_S).max())


def test_v7_without_a_key_removes_nothing() -> None:
    """A key of zeros has no direction: its normalisation must not become 0/0."""
    H, N, T = 2, 8, 40
    rng = np.random.default_rng(0)
    p = {name: drawn(rng, H * N) for name in ("w0", "k_k", "k_a", "ln_x.weight", "ln_x.bias")}
    p["r_k"] = drawn(rng, H, N)
    x = {name: drawn(rng, T, 1, H * N) for name in "rwvag"}
    x["k"] = np.zeros((T, 1, H * N), np.float32)
    state = {"att.wkv": np.zeros((1, H, N, N), np.float32)}
    y = v7.time_mix(p, x, state, {})
    assert np.isfinite(y).all()
    assert not state["att.wkv"].any()


# -- v4 --------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(T=st.integers(1, 40), B=st.integers(1, 3), scale=st.sampled_from([1.0, 80.0, 1e4]), seed=seeds)
def test_v4(T: int, B: int, scale: float, seed: int) -> None:
    """The reference is a softmax over all tokens so far, in float64."""
    A = 5
    rng = np.random.default_rng(seed)
    p = {"w": -np.exp(drawn(rng, A)), "u": drawn(rng, A)}
    r, k, v = drawn(rng, T, B, A), drawn(rng, T, B, A) * np.float32(scale), drawn(rng, T, B, A)
    state = {"att.a": np.zeros((B, A), np.float32), "att.b": np.zeros((B, A), np.float32)}
    state["att.q"] = np.full((B, A), EMPTY_Q, np.float32)
    y = v4.time_mix(p, {"r": r, "k": k, "v": v}, state, {})
    for t in range(T):
        age = np.arange(t - 1, -1, -1, dtype=np.float64)[:, None, None]
        exponents = np.concatenate([k[:t] + age * p["w"], (k[t] + p["u"])[None]]).astype(np.float64)
        weights = np.exp(exponents - exponents.max(0))
        expected = (weights * v[: t + 1]).sum(0) / weights.sum(0) / (1 + np.exp(-r[t].astype(np.float64)))
        # A logarithm of 1e4 is rounded to 1e-3 in fp32.
        assert np.abs(y[t] - expected).max() < 1e-5 * max(1.0, scale)
