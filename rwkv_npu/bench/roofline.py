"""What the machine can do at most: bytes from memory, and operations, a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rwkv_npu.bench.record import Row

READ_BYTES = 256 << 20  # far beyond any cache
PEAK_SIZE = 1536


def measure(threads: int) -> dict[str, float]:
    """Best of several: GB/s of reading memory with all threads, GFLOP/s of NumPy's fp32 product."""
    values = np.ones(READ_BYTES // 4, np.float32)
    matrix, vector = values.reshape(-1, 4096), np.ones(4096, np.float32)
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        readers: list[Callable[[], object]] = [
            lambda: matrix @ vector,
            lambda: list(pool.map(lambda part: np.dot(part, part), parts)),
        ]
        read = min(_best(reader, 9) for reader in readers)
    a = np.ones((PEAK_SIZE, PEAK_SIZE), np.float32)
    c = np.empty_like(a)
    multiply = _best(lambda: np.matmul(a, a, out=c), 9)
    return {
        "bandwidth_gb_per_s": READ_BYTES / read / 1e9,
        "peak_fp32_gflops": 2 * PEAK_SIZE**3 / multiply / 1e9,
    }


def _best(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def peaks(machine: dict[str, float], rows: Iterable[Row]) -> dict[str, float]:
    """GFLOP/s by dtype: the best that was measured here, by any backend of the CPU, at any size."""
    best = {"fp32": machine["peak_fp32_gflops"]} if "peak_fp32_gflops" in machine else {}
    for row in rows:
        if row.gflops and not row.estimated and row.device.startswith("CPU"):
            best[row.dtype] = max(best.get(row.dtype, 0.0), row.gflops)
    return best
