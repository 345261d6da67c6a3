"""A stand-in for torch, copied as `torch.py` into the private environment, never imported by this package.

The compiler imports torch for models in torch's own format, and touches three of these names whatever it reads. The
other three number the elements of a tensor that a graph cuts, for which NumPy serves. The real one weighs up to 5 GB.
"""

import contextlib
import sys
import types
from collections.abc import Sequence

import numpy as np

__version__ = "0.0.0"


class Tensor:
    """Nothing is one."""


class no_grad(contextlib.ContextDecorator):
    """Does nothing, as a decorator and as a context."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


def arange(end: int) -> np.ndarray:
    return np.arange(end)


def split(array: np.ndarray, sizes: Sequence[int], dim: int = 0) -> list[np.ndarray]:
    return np.split(array, np.cumsum(sizes)[:-1], axis=dim)


def cat(arrays: Sequence[np.ndarray], dim: int = 0) -> np.ndarray:
    return np.concatenate(arrays, axis=dim)


nn = types.ModuleType("torch.nn")
nn.Module = type("Module", (), {})  # type: ignore[attr-defined]
if __name__ == "torch":  # under its own name it must not stand in anyone's way
    sys.modules["torch.nn"] = nn
