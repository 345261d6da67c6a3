"""The measurements behind `rwkv-npu bench`: matrix products, and whole models, on this machine and on an RK3588.

    products    sizes, operands and checks of matrix products, and the timing of calls
    backends    the libraries that multiply, on the CPU and on the NPU
    child       one process for each measurement: both ends of its protocol
    measure     the tasks of such a process
    machine     facts of the machine, its bandwidth, disturbances by others
    matmul      the sweep of `bench matmul`
    inference   the rows of `bench inference`
    document    rows, and the file that keeps them
    analysis    crossovers, steps and Minuit's fits
    report      tables, CSV and the log of the fits
    plot        pictures

Estimates for a board come from `runtime.estimate`.
"""

INSTALL = "in the clone, pip install -e '.[bench]'"
