"""What the machine in `machine.py` can be told: instructions, formats of matrices, arguments of recurrences.

Nothing here needs numba.
"""

from __future__ import annotations

import numpy as np

TILE_ROWS = 4  # rows for which there is memory come in whole tiles
ALIGNMENT = 64

# What an instruction does. Those before SHIFT treat each row for itself.
ADD, SUB, MUL, ADD_VECTOR, MUL_VECTOR, MIX, SCALE, TANH, SIGMOID, RELU = range(10)
LAYER_NORM, ROW_MATMUL, QUANTISE, SHIFT, KEEP, LINEAR, RECUR = range(10, 17)

INT4, INT8, FP16, BF16, FP32 = range(5)  # formats of a matrix

INSTRUCTION = np.dtype(
    [
        ("op", np.int64),
        ("wait", np.int64),  # 1: for all threads, before it
        ("clock", np.int64),  # address of the nanoseconds that pass from this wait to the next are added to
        ("rows", np.int64),
        ("width", np.int64),  # floats of a row of `out` that count
        ("stride", np.int64),  # floats from one row of `out` to the next
        ("other_stride", np.int64),  # the same of the one operand that lies otherwise, where there is one
        # Addresses: the result, and two operands.
        ("out", np.int64),
        ("a", np.int64),  # other_stride: of KEEP, LINEAR
        ("b", np.int64),  # other_stride: of SHIFT, ROW_MATMUL
        ("vector", np.int64),  # (width,) fp32; of LAYER_NORM the weight; of RECUR its arguments
        ("bias", np.int64),
        ("number", np.float64),  # SCALE: the factor; LAYER_NORM: epsilon; SHIFT, KEEP: sequences
        # LINEAR: a (rows, k) fp32, or int8 with b its scales and `sums`; matrix (k, n) of `format`. QUANTISE: k
        ("format", np.int64),
        ("k", np.int64),
        ("n", np.int64),  # RECUR: heads of all sequences
        ("sums", np.int64),
        ("weights", np.int64),  # RECUR: the address of its code
        ("scales", np.int64),
    ],
    align=True,
)

# Arguments of a recurrence, int64 each: sizes, then addresses. Values and y are (T, B, stride) of which H*N count,
# the table of parameters (count, H*N), the states as `spec.state_shapes` has them, for B sequences.
A_T, A_B, A_H, A_N, A_STRIDE, A_TABLE, A_Y, A_STATES = range(8)
A_VALUES = A_STATES + 3
ARGUMENTS = A_VALUES + 8
