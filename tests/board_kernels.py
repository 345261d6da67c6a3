"""Run on the emulated board: the products of int8 and int4, for tokens and for prompts, compared with NumPy's.

Prints JSON: the instruction set, and for each kernel the largest error, the number of its `sdot` instructions and the
seconds of its compilation.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from numba import njit

from rwkv_npu.kernels import instruction_sets, products
from rwkv_npu.kernels.program import aligned_bytes
from rwkv_npu.quant.cpu import BLOCK, LANES, PANEL, pack, unpack

K, N = BLOCK, PANEL  # the smallest matrix
ROWS = {"gemv": 1, "gemm": products.ROWS}


def aligned(array: np.ndarray) -> np.ndarray:
    copy = aligned_bytes(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one block as the kernels take them: numbers, scales and offsets; and what the numbers stand for."""

    @njit(nogil=True)
    def run(x, stride, rows, k, q, scales, offsets):  # type: ignore[no-untyped-def]
        products.quantise_rows(x, stride, 0, rows, k, q, scales, offsets)

    q, scales = aligned(np.zeros(x.shape, np.int8)), aligned(np.zeros((len(x), 1), np.float32))
    offsets = aligned(np.zeros((len(x), 1), np.int32))
    run(x.ctypes.data, K, len(x), K, q.ctypes.data, scales.ctypes.data, offsets.ctypes.data)
    return q, scales, offsets, q * scales


def measure(
    kernel: str, bits: int, rows: int, operands: tuple[np.ndarray, ...], weight: np.ndarray
) -> dict[str, Any]:
    product = getattr(products, f"{kernel}_int{bits}")

    @njit(nogil=True)
    def gemv(q, scales, offsets, rows, w, w_scales, scratch, y):  # type: ignore[no-untyped-def]
        product(q, scales, offsets, rows, w, w_scales, K, 0, N // LANES, y, PANEL)

    @njit(nogil=True)
    def gemm(q, scales, offsets, rows, w, w_scales, scratch, y):  # type: ignore[no-untyped-def]
        product(q, scales, offsets, 0, rows, w, w_scales, K, 0, scratch, y, PANEL)

    run = gemv if kernel == "gemv" else gemm
    packed = pack(weight, bits)
    w, w_scales = aligned(packed.data), aligned(packed.scales.view(np.uint16))
    scratch, y = (
        aligned_bytes(products.SCRATCH_BYTES),
        aligned(np.full((products.ROWS, PANEL), np.nan, np.float32)),
    )
    q, scales, offsets, x = operands
    begin = time.perf_counter()
    addresses = [array.ctypes.data for array in (q, scales, offsets)]
    run(*addresses, rows, w.ctypes.data, w_scales.ctypes.data, scratch.ctypes.data, y.ctypes.data)
    seconds = time.perf_counter() - begin
    expected = x[:rows].astype(np.float64) @ unpack(packed)
    (assembly,) = run.inspect_asm().values()
    return {
        "error": float(np.abs(y[:rows] - expected).max() / np.abs(expected).max()),
        "sdot": sum(line.split()[:1] == ["sdot"] for line in assembly.splitlines()),
        "seconds": round(seconds, 1),
    }


def main(kernels: list[str]) -> None:
    rng = np.random.default_rng(0)
    operands = quantise(aligned(rng.standard_normal((products.ROWS, K)).astype(np.float32)))
    weight = rng.standard_normal((K, N)).astype(np.float32)
    found = {
        f"{kernel} int{bits}": measure(kernel, bits, ROWS[kernel], operands, weight)
        for kernel in kernels
        for bits in (8, 4)
    }
    print(json.dumps({"set": instruction_sets.current().name, "kernels": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
