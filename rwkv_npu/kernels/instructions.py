"""The instructions of the machine in `machine.py`: codes, fields, formats of matrices, segment table, arguments.

Nothing here needs numba.
"""

from __future__ import annotations

import numpy as np

TILE_ROWS = 4  # memory holds whole tiles of rows
ALIGNMENT = 64

# Codes. Those before SHIFT compute each row by itself.
ADD, SUB, MUL, ADD_VECTOR, MUL_VECTOR, MIX, SCALE, TANH, SIGMOID, RELU = range(10)
LAYER_NORM, ROW_MATMUL, QUANTISE, SHIFT, SHIFT_STATE, STORE_STATE, LINEAR, WKV = range(10, 18)

INT4, INT8, FP16, BF16, FP32 = range(5)  # formats of a matrix

# The fields that all instructions have in the same meaning: op, wait, clock, rows, and of their result out, width
# and stride. Operands a and b lie as the result does, unless `other_stride` is said to be theirs.
#
# op                  result                             other fields
# ADD, SUB, MUL       a + b, a - b, a * b                a, b
# ADD_VECTOR          a + vector                         a, vector
# MUL_VECTOR          a * vector                         a, vector
# MIX                 a + b * vector                     a, b, vector
# SCALE               a * number                         a, number
# TANH SIGMOID RELU   of a                               a
# LAYER_NORM          (a - mean) / deviation             a, vector: weight, bias, number: epsilon
#                       * vector + bias
# ROW_MATMUL          row a times its matrix in b        a, b, other_stride: of b
# QUANTISE            a as int8, in blocks of k          a, k: width with padding, b: scales, sums: sums of the blocks
# SHIFT               the row of a above where the       a, b, vector: the mask, other_stride: of the mask
#                       mask is 1, else that of b
# SHIFT_STATE         the row of a above; at a           a, vector: the segment table, k: word of the state's part in a
#                       segment's first row the            segment, n: bytes from there to the layer
#                       state's
# STORE_STATE         (none; out: 0) each segment's      a, other_stride: of a, vector, k, n: as SHIFT_STATE
#                       last row of a, into its state
# LINEAR              a times a matrix (k, n)            a, format, k, n, weights, scales: of the matrix; a fp32 with
#                                                          other_stride, or int8 with b: its scales, and sums;
#                                                          gemv, gemm: the kernels for few and for many rows
# WKV                 a layer's recurrence               vector: its arguments, weights: its code, n: heads
INSTRUCTION = np.dtype(
    [
        ("op", np.int64),
        ("wait", np.int64),  # 1: a barrier before it
        ("clock", np.int64),  # address of the nanoseconds to which the time until the next barrier is added
        ("rows", np.int64),
        ("width", np.int64),  # floats of a row of `out` that count
        ("stride", np.int64),  # floats from one row of `out` to the next
        ("other_stride", np.int64),
        ("out", np.int64),  # this and the operands are addresses
        ("a", np.int64),
        ("b", np.int64),
        ("vector", np.int64),  # address of (width,) fp32, or as the table says
        ("bias", np.int64),
        ("number", np.float64),
        ("format", np.int64),
        ("k", np.int64),
        ("n", np.int64),
        ("sums", np.int64),
        ("weights", np.int64),
        ("scales", np.int64),
        ("gemv", np.int64),
        ("gemm", np.int64),
    ],
    align=True,
)

# The segment table: lines of SEGMENT_WORDS int64. Line 0 has the numbers of segments and of rows, line 1 + s describes
# segment s: its first row, its number of rows, and the address of each part of its state, in the order of
# `spec.state_shapes`. A part holds all layers: `att.shift` first, then those of the recurrence, `ffn.shift` last.
SEGMENT_WORDS = 8
S_SEGMENTS, S_ROWS = range(2)
S_FIRST, S_COUNT, S_STATE = range(3)
S_RECURRENT = S_STATE + 1

# The arguments of a recurrence, int64 each: the address of the segment table; bytes from the beginning of a part of the
# state to the layer; heads, head size, floats from one row to the next; then the addresses of the parameters
# (count, H*N), of y, and of the projections' outputs, all (M, stride) of which H*N count.
A_SEGMENTS, A_LAYER, A_H, A_N, A_STRIDE, A_TABLE, A_Y, A_VALUES = range(8)
ARGUMENTS = A_VALUES + 8
