"""int8 and int4 products: exact for every value, and a row has the same bits alone and among others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from platform import machine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from rwkv_npu.kernels import products
from rwkv_npu.kernels.instruction_sets import SETS, current
from rwkv_npu.kernels.processor import available
from rwkv_npu.kernels.products import ROWS, SCRATCH_BYTES
from rwkv_npu.kernels.program import aligned_bytes
from rwkv_npu.quant.cpu import BLOCK, LANES, PANEL, SCALE, ZERO, Packed, pack, unpack

# Values that a sum of products could overflow with, among others.
EXTREMES = {
    8: st.sampled_from([-127, 127, -128, -1, 0, 1]) | st.integers(-128, 127),
    4: st.sampled_from([-8, 7, 0]) | st.integers(-8, 7),
}


@njit
def quantise(*arguments: Any) -> None:
    products.quantise_rows(*arguments)


def compiled(bits: int) -> tuple[Any, Any]:
    gemv, gemm = (getattr(products, f"{name}_int{bits}") for name in ("gemv", "gemm"))

    @njit
    def run_gemv(*arguments: Any) -> None:
        gemv(*arguments)

    @njit
    def run_gemm(*arguments: Any) -> None:
        gemm(*arguments)

    return run_gemv, run_gemm


KERNELS = {bits: compiled(bits) for bits in (4, 8)}


def aligned(array: np.ndarray, dtype: Any) -> np.ndarray:
    copy = aligned_bytes(array.size * np.dtype(dtype).itemsize).view(dtype).reshape(array.shape)
    copy[:] = array
    return copy


class Product:
    """x (rows, K) fp32 times a packed matrix, by gemv or gemm."""

    def __init__(self, packed: Packed, x: np.ndarray):
        self.packed, self.K, self.N = packed, packed.padded_k, len(packed.data) * LANES
        self.rows, self.stride = len(x), -(-max(self.K, self.N) // PANEL) * PANEL
        tiled = -(-self.rows // ROWS) * ROWS
        whole = np.zeros((tiled, self.stride), np.float32)
        whole[: self.rows, : x.shape[1]] = x
        self.x = aligned(whole, np.float32)
        self.q = aligned(np.zeros((tiled, self.K)), np.int8)
        self.scales = aligned(np.zeros((tiled, self.K // BLOCK)), np.float32)
        self.offsets = aligned(np.zeros((tiled, self.K // BLOCK)), np.int32)
        rows = self.q, self.scales, self.offsets
        quantise(self.x.ctypes.data, self.stride, 0, tiled, self.K, *(a.ctypes.data for a in rows))

    def _run(self, call: Callable[..., None]) -> np.ndarray:
        y = aligned(np.full((len(self.q), self.stride), np.nan), np.float32)
        q, scales, offsets = (a.ctypes.data for a in (self.q, self.scales, self.offsets))
        weights = aligned(self.packed.data, np.uint8), aligned(self.packed.scales.view(np.uint16), np.uint16)
        call(q, scales, offsets, *(a.ctypes.data for a in weights), y.ctypes.data)
        return y[: self.rows, : self.N].copy()

    def gemv(self) -> np.ndarray:
        run = KERNELS[self.packed.bits][0]

        def call(q: int, scales: int, offsets: int, w: int, ws: int, y: int) -> None:
            run(q, scales, offsets, self.rows, w, ws, self.K, 0, self.N // LANES, y, self.stride)

        return self._run(call)

    def gemm(self) -> np.ndarray:
        run, scratch = KERNELS[self.packed.bits][1], aligned_bytes(SCRATCH_BYTES)

        def call(q: int, scales: int, offsets: int, w: int, ws: int, y: int) -> None:
            for panel in range(self.N // PANEL):
                at = scratch.ctypes.data
                run(q, scales, offsets, 0, len(self.q), w, ws, self.K, panel, at, y, self.stride)

        return self._run(call)


def packed(q: np.ndarray, bits: int) -> Packed:
    """Stored numbers (K, N) for scales of 1: every value that 8 or 4 bits can hold."""
    K, N = q.shape
    q = (q + ZERO[bits]).astype(np.uint8)
    rows = 4 * 8 // bits
    q = q.reshape(K // rows, rows // 4, 4, N // LANES, LANES).transpose(3, 0, 1, 4, 2)
    data = q[:, :, 0] if bits == 8 else q[:, :, 0] | q[:, :, 1] << 4
    data = np.ascontiguousarray(data).reshape(N // LANES, -1)
    return Packed(data, np.ones((N // LANES, K // BLOCK, LANES), SCALE), (K, N))


def fill(draw: Any, values: st.SearchStrategy[int], shape: tuple[int, int]) -> np.ndarray:
    """Numbers that are all equal, equal in a row or column, or random."""
    K, N = shape
    kind = draw(st.sampled_from(["one", "columns", "rows", "any"]))
    if kind == "any":
        few = np.array(draw(st.lists(values, min_size=2, max_size=6)))
        return few[np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, len(few), shape)]
    size = {"one": (1, 1), "columns": (1, N), "rows": (K, 1)}[kind]
    few = draw(st.lists(values, min_size=size[0] * size[1], max_size=size[0] * size[1]))
    return np.broadcast_to(np.reshape(few, size), shape)


@st.composite
def operands(draw: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (K, N) of stored numbers, and rows of whole numbers with a 127 in each block: quantising keeps them."""
    K, rows = BLOCK * draw(st.integers(1, 3)), draw(st.integers(1, 9))
    weights = fill(draw, EXTREMES[bits], (K, PANEL))
    x = fill(draw, st.sampled_from([-127, 127]) | st.integers(-127, 127), (rows, K)).copy()
    x[:, ::BLOCK] = np.where(x[:, ::BLOCK] < 0, -127, 127)
    return weights, x


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_are_exact(bits: int, data: st.DataObject) -> None:
    """Sums of a block, and of three blocks, are below 2^24, so that fp32 represents them exactly."""
    weights, x = data.draw(operands(bits))
    product = Product(packed(weights, bits), x.astype(np.float32))
    assert (product.q[: len(x)] == x).all() and (product.scales[: len(x)] == 1).all()
    expected = x.astype(np.int64) @ weights.astype(np.int64)
    for y in (product.gemv(), product.gemm()):
        assert (y == expected).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight", ["lowest", "highest"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_overflow(bits: int, weight: str, sign: int) -> None:
    value = {"lowest": -(1 << (bits - 1)), "highest": (1 << (bits - 1)) - 1}[weight]
    product = Product(
        packed(np.full((BLOCK, PANEL), value), bits), np.full((5, BLOCK), 127.0 * sign, np.float32)
    )
    for y in (product.gemv(), product.gemm()):
        assert (y == BLOCK * 127 * sign * value).all()


@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 21), blocks=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_a_row_has_the_same_bits_alone_and_among_others(bits: int, seed: int, rows: int, blocks: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, blocks * BLOCK), np.float32) * random.lognormal(0, 3, (rows, 1))
    matrix = pack(random.standard_normal((blocks * BLOCK, 128), np.float32), bits)
    alone = np.concatenate([Product(matrix, row[None]).gemv() for row in x.astype(np.float32)])
    together = Product(matrix, x.astype(np.float32))
    assert (together.gemv() == alone).all() and (together.gemm() == alone).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_products_equal_those_of_the_stored_numbers(bits: int) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((7, 200), np.float32)
    matrix = pack(random.standard_normal((200, 70), np.float32), bits)
    product = Product(matrix, x)
    q = product.q[:7].reshape(7, -1, BLOCK) * product.scales[:7, :, None].astype(np.float64)
    expected = q.reshape(7, -1)[:, :200] @ unpack(matrix).astype(np.float64)
    found = product.gemm()[:, :70]
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max() * 4


OTHERS = [s for s in SETS if s.architecture in ("", machine()) and s.features <= available()]


@pytest.mark.parametrize("name", [s.name for s in OTHERS if s is not current()])
def test_every_instruction_set_of_this_processor_is_exact(name: str) -> None:
    """Run the tests above in a process in which this instruction set is forced."""
    features = ",".join(f"+{f}" for f in next(s.features for s in OTHERS if s.name == name))
    tests = "the_set or largest or same_bits or stored"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "NUMBA_CPU_FEATURES": features or "+", "EXPECTED_SET": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout


def test_the_instruction_set_is_the_expected_one() -> None:
    assert current().name == os.environ.get("EXPECTED_SET", current().name)
