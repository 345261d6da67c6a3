"""Fills the cache of compiled kernels.

`python -m rwkv_npu.kernels.build NAME...` compiles the kernels named, except those that another process is compiling.
`compiler.prepare` starts several such processes.
"""

from __future__ import annotations

import pkgutil
import sys

from rwkv_npu import kernels
from rwkv_npu.kernels import cache
from rwkv_npu.kernels.compiler import KERNELS, Kernel


def every_kernel() -> list[Kernel]:
    """Load all modules of the package and return their kernels."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name != "build":
            kernels.load(module.name)
    return list(KERNELS.values())


def main(names: list[str]) -> None:
    folder = cache.writable_folder()
    for name in names:
        kernels.load(name.partition(".")[0])
        KERNELS[name].keep(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
