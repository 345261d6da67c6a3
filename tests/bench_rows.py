"""Invented rows of `rwkv-npu bench matmul`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rwkv_npu.bench.document import ProductRow, with_rates


def square(n: int, seconds: float | None = None, **fields: Any) -> ProductRow:
    """A row of an invented series, with 1 GFLOP/s unless a time is given."""
    seconds = 2e-9 * n**3 if seconds is None else seconds
    common = {"backend": "numpy", "device": "CPU (x)", "dtype": "fp32", "accumulate": "fp32", "threads": 2}
    spread = {"time_p10_s": 0.9 * seconds, "time_p90_s": 1.2 * seconds, "time_error_s": 0.01 * seconds}
    rates = with_rates({"time_s": seconds, "m": n, "k": n, "n": n}, 12 * n * n)
    return ProductRow(**{**common, **spread, **rates, "repeats": 9, **fields})


def estimate(n: int, seconds: float | None = None, backend: str = "rknn") -> ProductRow:
    where = {
        "backend": backend,
        "device": "RK3588 NPU, 1 core: estimate",
        "dtype": "fp16",
        "estimated": True,
        "threads": None,
    }
    return square(n, seconds, **where, time_error_s=None, repeats=0)


def published(n: int, seconds: float) -> ProductRow:
    """A row that others measured on a board."""
    row = estimate(n, seconds, "rknn-matmul")
    return replace(row, estimated=False, published=True, time_p10_s=None, time_p90_s=None)
