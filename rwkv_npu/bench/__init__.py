"""The measurements behind `rwkv-npu bench`: what the NPU buys, and what it is compared with.

    problem, shapes                 what is multiplied, in which sizes
    backends, rknn                  who multiplies
    timing, machine, roofline       how it is timed, on what, and what that can do at most
    child, series                   one process for each (backend, dtype), and its handle
    matmul                          the sweep: which rows, in which order, kept in a file
    record, document                a row, and the files that hold many
    report, fit, steps, crossover   what is made of the rows
    plot, pictures, fit_picture     and drawn; figures has what all pictures share
    inference, inference_*          the other benchmark: whole models

Of a model, `matmul` needs the shapes of its projections only.
"""
