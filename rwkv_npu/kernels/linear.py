"""The kernels that execute LINEAR instructions: for every matrix format, one for few rows (gemv), one for many (gemm).

A call computes one piece of an instruction: a share of its strips (gemv) or panels (gemm). The result has the same bits
however many pieces there are.
"""

from __future__ import annotations

from typing import Any

from rwkv_npu.kernels.compiler import Kernel, inner
from rwkv_npu.kernels.instructions import BF16, FP16, FP32, INT4, INT8
from rwkv_npu.kernels.machine import instruction
from rwkv_npu.kernels.products import (
    ROWS,
    gemm_bf16,
    gemm_fp16,
    gemm_fp32,
    gemm_int4,
    gemm_int8,
    gemv_bf16,
    gemv_fp16,
    gemv_fp32,
    gemv_int4,
    gemv_int8,
)
from rwkv_npu.quant.cpu import LANES, PANEL


def _gemv_quantised(format_: str, product: Any) -> Kernel:
    def gemv(op, piece, pieces, scratch):  # type: ignore[no-untyped-def]
        t = instruction(op, 0)
        first, last = _strips(t, piece, pieces)
        product(t.a, t.b, t.sums, t.rows, t.weights, t.scales, t.k, first, last, t.out, t.stride)

    return Kernel(gemv, name=f"gemv_{format_}")


def _gemv_floats(format_: str, product: Any) -> Kernel:
    def gemv(op, piece, pieces, scratch):  # type: ignore[no-untyped-def]
        t = instruction(op, 0)
        first, last = _strips(t, piece, pieces)
        product(t.a, t.other_stride, t.rows, t.weights, t.k, first, last, t.out, t.stride)

    return Kernel(gemv, name=f"gemv_{format_}")


def _gemm_quantised(format_: str, product: Any) -> Kernel:
    def gemm(op, piece, pieces, scratch):  # type: ignore[no-untyped-def]
        t = instruction(op, 0)
        parts, jobs = _jobs(t, pieces)
        for job in range(jobs * piece // pieces, jobs * (piece + 1) // pieces):
            i, j = _rows(t, job % parts, parts)
            x, w, panel = (t.a, t.b, t.sums), (t.weights, t.scales), job // parts
            product(*x, i, j, *w, t.k, panel, scratch, t.out, t.stride)

    return Kernel(gemm, name=f"gemm_{format_}")


def _gemm_floats(format_: str, product: Any) -> Kernel:
    def gemm(op, piece, pieces, scratch):  # type: ignore[no-untyped-def]
        t = instruction(op, 0)
        parts, jobs = _jobs(t, pieces)
        for job in range(jobs * piece // pieces, jobs * (piece + 1) // pieces):
            first, last = _rows(t, job % parts, parts)
            panel = job // parts
            product(t.a, t.other_stride, first, last, t.weights, t.k, panel, scratch, t.out, t.stride)

    return Kernel(gemm, name=f"gemm_{format_}")


@inner
def _strips(t, piece, pieces):  # type: ignore[no-untyped-def]
    """(first, last) strip of a piece."""
    strips = t.n // LANES
    return strips * piece // pieces, strips * (piece + 1) // pieces


@inner
def _jobs(t, pieces):  # type: ignore[no-untyped-def]
    """(parts, jobs): a job is one panel times one part of the rows. Rows are split if there are too few panels."""
    panels, tiles = -(-t.n // PANEL), -(-t.rows // ROWS)
    parts = 1 if panels >= pieces else min(tiles, -(-pieces // panels))
    return parts, panels * parts


@inner
def _rows(t, part, parts):  # type: ignore[no-untyped-def]
    """(first, last) row of a part, which is whole tiles."""
    tiles = -(-t.rows // ROWS)
    return tiles * part // parts * ROWS, tiles * (part + 1) // parts * ROWS


GEMV = {
    INT4: _gemv_quantised("int4", gemv_int4),
    INT8: _gemv_quantised("int8", gemv_int8),
    FP16: _gemv_floats("fp16", gemv_fp16),
    BF16: _gemv_floats("bf16", gemv_bf16),
    FP32: _gemv_floats("fp32", gemv_fp32),
}
GEMM = {
    INT4: _gemm_quantised("int4", gemm_int4),
    INT8: _gemm_quantised("int8", gemm_int8),
    FP16: _gemm_floats("fp16", gemm_fp16),
    BF16: _gemm_floats("bf16", gemm_bf16),
    FP32: _gemm_floats("fp32", gemm_fp32),
}
