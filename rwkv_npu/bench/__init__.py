"""The measurements behind `rwkv-npu bench`: what the NPU buys, and what it is compared with.

    problem, shapes   what is multiplied, in which sizes
    backends, rknn    who multiplies
    timing, machine   how it is timed, and on what
    child, series     one process for each (backend, dtype), and its handle
    matmul            the sweep: which rows, in which order, kept in a file
    record            a row, and the files that hold many
    report, fit, steps, crossover, plot   what is made of the rows

Nothing here knows a model's maths: `matmul` needs shapes only.
"""
