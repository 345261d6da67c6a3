"""A board without a board: Rockchip's own RKNNLite on an emulated RK3588, with a stand-in for the NPU's library.

    build     a root folder from Debian's arm64 packages and PyPI's aarch64 wheels, for qemu-user: no chroot, no binfmt
    chip      the files by which such a root looks like an RK3588
    standin/  librknnrt.so in C: it reads real .rknn files and hands the rows to a process on the host
    files     files that the stand-in opens, without the compiler
    compute   that process: NumPy with every operation rounded to fp16, and int8 products where artifacts have them
              (half); or any backend of this project
    calls     reads the stand-in's log of calls
    clock     times of runs by the estimate, for the stand-in's clock; busy time of its cores

`python -m tools.board build` makes it (in the user's cache folder), `python -m tools.board run -- CMD ...` runs a
command in it, `rwkv-npu` and `python` among them.

Nothing here is part of the package. Nothing that runs here shows the speed of a board, because the clock repeats the
estimate. It does not show an NPU's results either: these come from this project's own fp16 arithmetic, not from
Rockchip's library or simulator. Every version that the stand-in reports contains the word stand-in.

The stand-in's environment variables:

    RKNN_STANDIN_SOCKET   the socket of the process that computes groups (the matmul functions need none)
    RKNN_STANDIN_NULL     1: nothing is computed, every run returns at once
    RKNN_STANDIN_LOG      a file that gets a line for every call
    RKNN_STANDIN_CLOCK    FACTOR: rknn_run sleeps for FACTOR times the time in the table, and holds its cores
    RKNN_STANDIN_TIMES    the table of the clock: lines GROUP ROWS MICROSECONDS
    RKNN_STANDIN_FAULTS   FAULT[,FAULT...], each NAME[@N | @N+ | /N][:GROUP]: at the N-th call, from the N-th on, at
                          every N-th, else always; with :GROUP, of contexts of that group alone

    run-fails      rknn_run, or rknn_matmul_run, returns -3
    zeros, nan     a run succeeds, and its outputs are zeros, or have a NaN among them
    wrong-size     an output has half of its bytes
    hang           a run does not return for `hang-seconds=N` seconds (an hour)
    killed         the process is killed within a run, as by the system when memory ends
    init-memory    opening a context finds no memory
    fds=N          every context takes N file descriptors (3): with a limit on them, they run out
    old-runtime    files of this version are refused, as by old runtimes
    old-version    versions of runtime and driver are old ones
    core-mask      choosing cores is refused
    no-io-memory   memory for inputs and outputs is refused
    native-blocks  the native layout of inputs and outputs is in blocks of 8 columns, not row-major
    no-dynamic     the matmul interface has no dynamic shapes

For matmul contexts the group is its shape, as `1x768x3072`.
"""
