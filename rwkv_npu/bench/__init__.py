"""The measurements of `rwkv-npu bench`: matrix products and whole models, on this machine and estimated for an RK3588.

    products    sizes, operands and checks of matrix products, and the timing of calls
    backends    the libraries that multiply, on the CPU and on the NPU
    child       a process for each measurement: both sides of its protocol
    measure     the tasks that such a process runs
    machine     facts of the machine, its memory bandwidth, disturbance by other processes
    matmul      the sweep of `bench matmul`
    inference   the rows of `bench inference`
    document    rows, and the file that stores them
    analysis    crossovers, steps and Minuit's fits
    report      tables, CSV and the log of the fits
    plot, plot_matmul, plot_inference   pictures

Estimates for a board come from `runtime.estimate`.
"""

INSTALL = "in the clone, pip install -e '.[bench]'"
