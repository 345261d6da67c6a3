"""The instruction format of the machine in `machine.py`: codes, fields, matrix formats, and the tables in memory."""

from __future__ import annotations

import numpy as np

TILE_ROWS = 4  # memory holds whole tiles of rows
ALIGNMENT = 64

# The codes. Those smaller than SHIFT compute each row independently of the others.
ADD, SUB, MUL, ADD_VECTOR, MUL_VECTOR, MIX, SCALE, TANH, SIGMOID, RELU = range(10)
LAYER_NORM, ROW_MATMUL, QUANTISE, SHIFT, SHIFT_STATE, STORE_STATE, LINEAR, WKV = range(10, 18)

INT4, INT8, FP16, BF16, FP32 = range(5)  # formats of a matrix

# op, wait, clock, rows, out, width and stride mean the same in every instruction. The other fields are used as this
# table says. Fp32 operands have the stride of the result, unless the table gives them `other_stride`.
#
# op                  result                             other fields
# ADD, SUB, MUL       a + b, a - b, a * b                a, b
# ADD_VECTOR          a + vector                         a, vector
# MUL_VECTOR          a * vector                         a, vector
# MIX                 a + b * vector                     a, b, vector
# SCALE               a * number                         a, number
# TANH SIGMOID RELU   the function of a                  a
# LAYER_NORM          (a - mean) / deviation             a, vector: weight, bias, number: epsilon
#                       * vector + bias
# ROW_MATMUL          row a times its matrix in b        a, b, other_stride: of b
# QUANTISE            a as int8, in blocks               a, k: width with padding; b: where the scales go,
#                                                          sums: where the sums of the blocks go
# SHIFT               the row before in a where the      a, b, vector: the mask, other_stride: of the mask
#                       mask is 1, else the row of b
# SHIFT_STATE         the row before in a; in a          a, vector: the segment table, k: the word of a segment that
#                       segment's first row, its           has the address of the state's part, n: bytes from
#                       state                              there to the layer
# STORE_STATE         none (out is 0): writes each       a, other_stride: of a; vector, k, n as in SHIFT_STATE
#                       segment's last row of a into
#                       its state
# LINEAR              a times a matrix (k, n)            format, k, n, weights, scales: of the matrix;
#                                                          a: fp32, with other_stride; or int8, with b: its scales,
#                                                          and sums; gemv, gemm: kernels for few and for many rows
# WKV                 a layer's recurrence               vector: its arguments, weights: its code, n: heads
INSTRUCTION = np.dtype(
    [
        ("op", np.int64),
        ("wait", np.int64),  # 1: a barrier before it
        ("clock", np.int64),  # address of a counter: the ns until the next barrier are added to it
        ("rows", np.int64),
        ("width", np.int64),  # floats of a row of `out`, without padding
        ("stride", np.int64),  # floats from one row of `out` to the next
        ("other_stride", np.int64),
        ("out", np.int64),  # an address, like a and b
        ("a", np.int64),
        ("b", np.int64),
        ("vector", np.int64),  # address of (width,) fp32, or what the table says
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

# The segment table: lines of SEGMENT_WORDS int64. A segment is the rows of one sequence. Line 0 has the number of
# segments and of rows. Line 1 + s describes segment s: its first row, its number of rows, and the address of each part
# of its state, in the order of `spec.state_shapes`: `att.shift`, the parts of the recurrence, `ffn.shift`. Each part
# holds all layers.
SEGMENT_WORDS = 8
S_SEGMENTS, S_ROWS = range(2)
S_FIRST, S_COUNT, S_STATE = range(3)
S_RECURRENT = S_STATE + 1

# The arguments of a recurrence, int64 each: the address of the segment table; the layer's offset in bytes in a part of
# the state; heads H, head size N, floats from one row to the next; then the addresses of the parameters (count, H*N),
# of the result y, and of the projections' outputs. y and the outputs are (M, stride), of which H*N columns are used.
A_SEGMENTS, A_LAYER, A_H, A_N, A_STRIDE, A_TABLE, A_Y, A_VALUES = range(8)
ARGUMENTS = A_VALUES + 8
