"""Invented rows of `rwkv-npu bench matmul`."""

from __future__ import annotations

from typing import Any

from rwkv_npu.bench import record
from rwkv_npu.bench.record import Row


def square(n: int, seconds: float | None = None, **fields: Any) -> Row:
    """A row of an invented series, as fast as 1 GFLOP/s unless told otherwise."""
    seconds = 2e-9 * n**3 if seconds is None else seconds
    common = {"backend": "numpy", "device": "CPU (x)", "dtype": "fp32", "accumulate": "fp32", "threads": 2}
    spread = {"time_p10_s": 0.9 * seconds, "time_p90_s": 1.2 * seconds, "time_error_s": 0.01 * seconds}
    rates = record.with_rates({"time_s": seconds, "m": n, "k": n, "n": n}, 12 * n * n)
    return Row(**{**common, **spread, **rates, "repeats": 9, **fields})


def estimate(n: int, seconds: float | None = None) -> Row:
    where = {
        "backend": "rknn",
        "device": "RK3588: estimate",
        "dtype": "fp16",
        "estimated": True,
        "threads": None,
    }
    return square(n, seconds, **where, time_p10_s=None, time_p90_s=None, time_error_s=None, repeats=0)
