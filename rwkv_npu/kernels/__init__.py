"""Code that is compiled on the machine it runs on, by numba (extra `fast`): no compiler, no build step.

    recurrence.py      the recurrences of all generations, in v4.py .. v7.py
    sampling.py        the sampler
    recorder.py        groups, and the fused forward, as operations; program.py gives them memory, machine.py
                       executes them, pool.py on several threads
    linear.py          the kernels of products: loops of products.py, tiles of tiles.py, vectors of simd.py
    instruction_sets.py    products of bytes for each kind of processor; processor.py reads which this one is
    compiler.py        functions as machine code, which cache.py keeps; build.py fills the cache

numba is imported when one of them is loaded.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def available() -> bool:
    """Return True if numba can be imported. Warn if it is installed and its import fails."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(f"numba cannot be used, NumPy does its work: {error}", stacklevel=3)
        return False
    return True


def load(module: str) -> ModuleType:
    """A module of this package. Its kernels are compiled, or read from the cache, when they are first needed."""
    return importlib.import_module(f"{__name__}.{module}")
