"""int8 as the NPU computes it: rounding, sums, ranges, and the choice of calibration method and smoothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rwkv_npu.models.maths import divergence
from rwkv_npu.quant.npu import (
    HIGHEST,
    INT8_WIDTH,
    LOWEST,
    MIN_SCALE,
    Int8Maths,
    ProjectionParams,
    Quantised,
    QuantParams,
    int8_parts,
    round_weight,
    spans,
)
from rwkv_npu.quant.ranges import ALGORITHMS, Histogram, Samples, choose
from rwkv_npu.quant.smoothing import smoothings

RNG = np.random.default_rng(0)
NUMBERS = st.floats(-1e4, 1e4, width=32)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def samples_of(rows: np.ndarray, weight: np.ndarray) -> Samples:
    products = [rows[:, k0:k1] @ weight[k0:k1] for k0, k1 in spans(int8_parts(len(weight)))]
    made = np.array([[product.min(), product.max()] for product in products])
    return Samples(rows, rows.min(0), rows.max(0), made)


@given(NUMBERS, NUMBERS, arrays(np.float32, 20, elements=NUMBERS))
def test_rounding_is_to_the_nearest_of_256_values_and_0_is_one(a: float, b: float, x: np.ndarray) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    affine = QuantParams.covering(low, high)
    assert LOWEST <= affine.zero <= HIGHEST and affine.round(np.zeros(1, np.float32))[0] == 0
    rounded = affine.round(x)
    np.testing.assert_array_equal(affine.round(rounded), rounded)
    numbers = rounded / np.float32(affine.scale) + affine.zero
    assert np.abs(numbers - np.rint(numbers)).max() < 1e-3
    assert numbers.min() > LOWEST - 0.5 and numbers.max() < HIGHEST + 0.5
    lowest, highest = affine.span
    # The ends move by half a step at most, so that 0 has a number.
    if high - low > 255 * MIN_SCALE:
        assert abs(lowest - low) <= 0.51 * affine.scale and abs(highest - high) <= 0.51 * affine.scale
    inside = (x >= lowest) & (x <= highest)
    assert np.all(np.abs(rounded - x)[inside] <= 0.501 * affine.scale)
    assert np.all(rounded[x < lowest] == np.float32(lowest)) or np.allclose(rounded[x < lowest], lowest)


@given(arrays(np.float32, (5, 4), elements=st.floats(-100, 100, width=16)))
def test_a_column_of_weights_uses_all_its_numbers(weight: np.ndarray) -> None:
    numbers, steps = round_weight(weight)
    low, high = np.minimum(weight.min(0), 0), np.maximum(weight.max(0), 0)
    used = np.maximum(numbers.max(0), 0) - np.minimum(numbers.min(0), 0)
    assert np.all((used == HIGHEST - LOWEST) | (high == low))
    assert np.all(np.abs(numbers * steps - weight) <= 0.51 * steps)
    # A compiler that rounds them again finds the same.
    again, same = round_weight(numbers * steps)
    np.testing.assert_array_equal(again, numbers)
    np.testing.assert_allclose(same, steps, rtol=1e-6)


def test_products_equal_integer_products() -> None:
    weight, x = normal(96, 40), normal(7, 96)
    numbers, (steps,) = round_weight(weight)
    given_, made = QuantParams.covering(-2.5, 3.0), QuantParams.covering(-20.0, 25.0)
    found = Quantised.of(ProjectionParams(given_, (made,)), weight).linear(x)
    q = np.clip(np.rint(x / np.float32(given_.scale)) + given_.zero, LOWEST, HIGHEST).astype(np.int64)
    sums = (q - given_.zero) @ numbers.astype(np.int64)
    real = sums * (given_.scale * steps.astype(np.float64) / made.scale)
    expected = np.clip(np.rint(real) + made.zero, LOWEST, HIGHEST)
    np.testing.assert_array_equal(np.rint(found / np.float32(made.scale)) + made.zero, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(deadline=None, max_examples=20)
@given(arrays(np.float32, 400, elements=st.floats(-50, 50, width=32)))
@example(np.full(400, -1e-34, np.float32))
@example(np.full(400, -5e-18, np.float32))
def test_ranges_lie_within_the_sampled_values(algorithm: str, x: np.ndarray) -> None:
    low, high = float(x.min()), float(x.max())
    whole, found = QuantParams.covering(low, high), ALGORITHMS[algorithm](Histogram.of(x, low, high))
    assert found.scale <= whole.scale * 1.0001
    error = [float(np.sqrt(np.square(affine.round(x) - x).mean())) for affine in (whole, found)]
    if algorithm == "mmse":  # as closely as a histogram knows, which has 64 bins for a step
        assert error[1] <= error[0] + whole.scale / 32


def test_mse_clips_rare_values_where_that_helps() -> None:
    x = np.concatenate([normal(100_000), np.float32([-40.0, 40.0])])
    seen = Histogram.of(x, -40.0, 40.0)
    whole = ALGORITHMS["normal"](seen)
    assert ALGORITHMS["mmse"](seen).scale < 0.9 * whole.scale


def test_the_smallest_held_out_error_is_taken() -> None:
    rows, weight = normal(400, 48), normal(48, 32)
    rows[:, 5] *= 60
    samples = samples_of(rows, weight)
    candidates = smoothings(weight, samples)
    each = [
        choose("w", weight, samples, [smoothing], [algorithm])
        for smoothing in candidates
        for algorithm in ALGORITHMS
    ]
    best = choose("w", weight, samples, candidates)
    assert best.error == min(choice.error for choice in each)
    plain = choose("w", weight, samples)
    assert best.params.smoothing is not None and best.error < 0.7 * plain.error


def test_the_head_is_compared_by_kl() -> None:
    """A token that is certain now and then has a logit far from all others: to clip it costs little in squares, and
    much of what is predicted."""
    rows, weight = normal(600, 64), normal(64, 400)
    rows[::7], weight[:, 0] = np.sign(weight[:, 0]), 8 * np.sign(weight[:, 0])  # then its logit is 512
    samples = samples_of(rows, weight)
    head, other = (
        Quantised.of(choose(name, weight, samples).params, weight) for name in ("head.weight", "w")
    )
    held = samples.halves()[1]
    exact = held @ weight
    assert divergence(exact, head.linear(held)).mean() < divergence(exact, other.linear(held)).mean()


def test_outputs_before_a_relu_use_no_negative_numbers() -> None:
    weight, rows = normal(64, 32), normal(400, 64)
    samples = samples_of(rows, weight)
    key, both = (choose(f"blocks.0.{name}.weight", weight, samples).params for name in ("ffn.key", "att.key"))
    assert key.outputs[0].zero == LOWEST and Quantised.of(key, weight).linear(rows).min() == 0
    assert key.outputs[0].scale < 0.6 * both.outputs[0].scale


def test_wide_products_are_sums_of_parts() -> None:
    """Each part has its own range. Negative products count even before a Relu, since the parts are added first."""
    K = INT8_WIDTH + 64
    weight, rows = normal(K, 8), normal(300, K)
    samples = samples_of(rows, weight)
    ranges = choose("blocks.0.ffn.key.weight", weight, samples, algorithms=["normal"]).params
    quantised = Quantised.of(ranges, weight)
    assert len(ranges.outputs) == len(quantised.scales) == 2
    x, parts = ranges.input.round(rows), []
    for (k0, k1), output in zip(spans(int8_parts(K)), ranges.outputs, strict=True):
        product = rows[:, k0:k1] @ weight[k0:k1]
        np.testing.assert_allclose(output.span, [product.min(), product.max()], atol=output.scale)
        parts.append(output.round(x[:, k0:k1] @ quantised.values()[k0:k1]))
    np.testing.assert_allclose(
        quantised.linear(rows), parts[0] + parts[1], atol=1.1 * ranges.outputs[0].scale
    )
    error = np.square(quantised.linear(rows) - rows @ weight).mean() / np.square(rows @ weight).mean()
    assert error < 0.02**2


def test_all_zero_channels_and_columns() -> None:
    rows, weight = normal(64, 16), normal(16, 8)
    rows[:, 3], weight[:, 2] = 0, 0
    samples = samples_of(rows, weight)
    for smoothing in smoothings(weight, samples):
        found = choose("w", weight, samples, [smoothing])
        made = Quantised.of(found.params, weight).linear(rows)
        assert np.isfinite(found.error) and np.isfinite(made).all()
    silent = np.zeros((16, 8), np.float32)
    nothing = choose("w", silent, samples_of(np.zeros((4, 16), np.float32), silent)).params
    assert not Quantised.of(nothing, silent).linear(rows).any()


def test_only_chosen_projections_are_rounded() -> None:
    weights = {"blocks.0.a": normal(8, 8), "blocks.0.b": normal(8, 8), "blocks.0.s": normal(2, 8, 8)}
    weight = weights["blocks.0.a"]
    quantised = Quantised.of(choose("a", weight, samples_of(normal(64, 8), weight)).params, weight)
    f = Int8Maths(weights.__getitem__, {"blocks.0.a": quantised, "blocks.0.s": quantised}.get).block(0)
    x = normal(3, 8)
    np.testing.assert_array_equal(f.linear(x, "a"), quantised.linear(x))
    np.testing.assert_array_equal(f.linear(x, "b"), x @ weights["blocks.0.b"])
    np.testing.assert_array_equal(f.linear(x, "s", 1), x @ weights["blocks.0.s"][1])


def test_smoothing_is_used_only_if_it_helps_enough() -> None:
    weight = normal(48, 32)
    samples = samples_of(normal(400, 48), weight)
    assert choose("w", weight, samples, smoothings(weight, samples)).params.smoothing is None
