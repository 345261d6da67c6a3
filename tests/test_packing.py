"""Quantised matrices: rounding errors, and packing and unpacking."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.models.spec import Spec, tensors
from rwkv_npu.quant.cpu import (
    BLOCK,
    LANES,
    PANEL,
    bits_of,
    pack,
    pack_floats,
    packed_shapes,
    stored_numbers,
    unpack,
)
from tests.tiny import RANKS

SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 200))


def matrix(shape: tuple[int, int], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def block_peaks(weight: np.ndarray) -> np.ndarray:
    """(K, N): for each element, the largest magnitude in its block."""
    K, N = weight.shape
    whole = np.zeros((-(-K // BLOCK) * BLOCK, N), np.float32)
    whole[:K] = np.abs(weight)
    return np.repeat(whole.reshape(-1, BLOCK, N).max(1), BLOCK, axis=0)[:K]


@given(SHAPES, st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=50, deadline=None)
def test_int8_is_at_most_half_a_step_off(shape: tuple[int, int], seed: int, scale: float) -> None:
    weight = matrix(shape, seed, scale)
    packed = pack(weight, 8)
    assert (packed.data.shape, packed.scales.shape) == packed_shapes(*shape, 8)
    step = block_peaks(weight) / 127
    # A scale is rounded up, to the next bfloat16: by 2^-7 of itself at most.
    assert (np.abs(unpack(packed) - weight) <= step * 0.5 * (1 + 2**-7) * (1 + 1e-5)).all()


@given(SHAPES, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_int4_errors_are_bounded(shape: tuple[int, int], seed: int) -> None:
    weight = matrix(shape, seed)
    packed = pack(weight, 4)
    assert (packed.data.shape, packed.scales.shape) == packed_shapes(*shape, 4)
    error, peaks = np.abs(unpack(packed) - weight), block_peaks(weight)
    assert (error <= peaks * 0.3).all()
    assert np.sqrt(np.square(error).mean()) <= np.sqrt(np.square(peaks / 7).mean() / 12) * 1.05


def test_scales_are_chosen_for_the_least_error() -> None:
    """The error is smaller than with the simple rule, scale = largest / -8."""
    weight = matrix((BLOCK, 512))
    extreme = np.take_along_axis(weight, np.abs(weight).argmax(0)[None], 0)
    scale = extreme / -8
    plain = np.clip(np.rint(weight / scale), -8, 7) * scale
    chosen = unpack(pack(weight, 4))
    assert np.square(chosen - weight).sum() < 0.95 * np.square(plain - weight).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_representable_values_are_exact(bits: int) -> None:
    half = 1 << (bits - 1)
    q = np.random.default_rng(0).integers(1 - half, half, (150, 70))
    q[::BLOCK] = -half if bits == 4 else half - 1  # of every block, so that a step is one
    packed = pack(q.astype(np.float32) * 0.25, bits)
    assert (unpack(packed) == q * 0.25).all()
    inside = stored_numbers(packed).swapaxes(0, 1).reshape(packed.padded_k, -1)[:150, :70]
    assert (inside.astype(int) - half == q).all()


def test_zeros_stay_zeros() -> None:
    for bits in (4, 8):
        assert not unpack(pack(np.zeros((70, 20), np.float32), bits)).any()


def test_columns_of_large_matrices_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix((64, 300))
    whole = pack(weight, 4)
    monkeypatch.setattr("rwkv_npu.quant.cpu._CHUNK", 64 * PANEL)
    parts = pack(weight, 4)
    assert (whole.data == parts.data).all() and (whole.scales == parts.scales).all()


@given(SHAPES, st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_float_strips(shape: tuple[int, int], dtype: type, transposed: bool) -> None:
    weight = matrix(shape).astype(dtype)
    if transposed:
        weight = np.ascontiguousarray(weight.T).T
    strips = pack_floats(weight)
    assert strips.shape[0] * LANES % PANEL == 0 and strips.dtype == dtype
    K, N = shape
    seen = strips.swapaxes(0, 1).reshape(K, -1).astype(np.float32)
    assert (seen[:, :N] == weight.astype(np.float32)).all()
    assert not seen[:, N:].any()


@pytest.mark.parametrize("generation", RANKS)
def test_projections_that_feed_the_state_keep_eight_bits(generation: str) -> None:
    spec = Spec(generation, D=64, L=2, H=4, N=16, A=64, F=256, V=100, ranks=RANKS[generation])
    projections = [tensor for tensor in tensors(spec) if tensor.kind.is_projection]
    assert {bits_of("int8", tensor) for tensor in projections} == {8}
    four = {tensor.name for tensor in projections if bits_of("int4", tensor) == 4}
    assert {"head.weight", "blocks.1.ffn.key.weight", "blocks.1.att.output.weight"} <= four
    assert not any(
        f".att.{name}.weight" in label for name in ("receptance", "key", "value") for label in four
    )
    assert not any(label.endswith(("1", "2")) for label in four)
