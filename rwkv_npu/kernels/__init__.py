"""CPU code that numba compiles on the machine it runs on (extra `fast`). No C compiler and no build step is needed.

    recurrence.py      the recurrences; one file a generation: v4.py .. v7.py, with chunk.py for prompts and common.py
    sampling.py        the sampler
    halves.py          conversion between fp16 and fp32
    recorder.py        records groups, and the fused forward, as operations; program.py gives them memory,
                       machine.py executes them, pool.py does so on several threads; instructions.py is their format
    linear.py          matrix products: loops in products.py, tiles in tiles.py, vectors in simd.py
    instruction_sets.py    int8 products for each kind of processor; processor.py detects the features of this one
    compiler.py        compiles functions to machine code; cache.py stores it, build.py fills the cache

This file, instructions.py, recorder.py and program.py do not import numba.
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
    """Import a module of this package. Its kernels are compiled, or read from the cache, at first use."""
    return importlib.import_module(f"{__name__}.{module}")
