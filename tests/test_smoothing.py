"""SmoothQuant: folding it changes no result, and it helps with outlier channels."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rwkv_npu.quant.ranges import Samples
from rwkv_npu.quant.smoothing import ALPHAS, smoothing, smoothings

RNG = np.random.default_rng(0)


def samples_of(rows: np.ndarray) -> Samples:
    return Samples(rows, rows.min(0), rows.max(0), np.zeros((1, 2)))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def rounded(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Round to 255 steps, with one scale for x or one for each column."""
    step = np.maximum(np.abs(x).max(axis), 1e-30) / 127
    return np.rint(x / step) * step


def error(rows: np.ndarray, weight: np.ndarray, scale: np.ndarray | None) -> float:
    """Relative error of the product in 8 bits."""
    scale = np.ones(len(weight), np.float32) if scale is None else scale
    exact = rows @ weight
    found = rounded(rows / scale, None) @ rounded(weight * scale[:, None], 0)
    return float(np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()))


@settings(deadline=None)
@given(
    arrays(np.float32, (6,), elements=st.floats(0, 2**20, width=32)),
    arrays(np.float32, (6, 4), elements=st.floats(-(2**10), 2**10, width=32, allow_subnormal=False)),
    st.sampled_from(ALPHAS),
)
def test_folding_changes_no_bit(absmax: np.ndarray, weight: np.ndarray, alpha: float) -> None:
    scale = smoothing(absmax, weight, alpha)
    assert scale.shape == (6,) and scale.dtype == np.float32
    assert (scale > 0).all() and np.isfinite(scale).all() and (np.frexp(scale)[0] == 0.5).all()
    rows = np.where(absmax < 2**-30, 0, absmax).astype(np.float32) * np.array([[1], [-0.5]], np.float32)
    np.testing.assert_array_equal((rows / scale) * scale, rows)
    weight = np.where(np.abs(weight) < 2**-30, 0, weight).astype(np.float32)
    for k in range(6):  # each term of the sum
        np.testing.assert_array_equal(
            np.outer(rows[:, k] / scale[k], weight[k] * scale[k]), np.outer(rows[:, k], weight[k])
        )


def test_all_zero_channels_get_bounded_factors() -> None:
    rows = normal(50, 8)
    rows[:, 3] = 0
    for scale in smoothings(normal(8, 5), samples_of(rows))[1:]:
        assert scale is not None and scale.max() / scale.min() < 2**17
    assert (smoothing(np.zeros(8), np.zeros((8, 5)), 0.5) == 1).all()


def test_outlier_channels_get_more_int8_numbers() -> None:
    """6 of 256 channels fifty times as large: the error falls to less than half."""
    rows, weight = normal(400, 256), normal(256, 64)
    rows[:, :6] *= 50
    weight[:6] /= 50
    fitted, held = rows[::2], rows[1::2]
    plain, *smooth = (error(held, weight, scale) for scale in smoothings(weight, samples_of(fitted)))
    assert len(smooth) == len(ALPHAS) and min(smooth) < plain / 2


def test_even_channels_are_left_nearly_alone() -> None:
    rows, weight = normal(400, 256), normal(256, 64)
    for scale in smoothings(weight, samples_of(rows))[1:]:
        assert scale is not None and set(np.unique(scale)) <= {0.5, 1.0, 2.0}
