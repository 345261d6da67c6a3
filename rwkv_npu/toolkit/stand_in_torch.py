"""A replacement for torch, copied as `torch.py` into the private environment. This package never imports it.

The compiler imports torch to read models in torch's format. If a graph splits a tensor, it numbers the elements with
`arange`, `split` and `cat`, which NumPy has too. It touches the other names for every model. The real torch takes up to
5 GB.
"""

import contextlib
import sys
import types
from collections.abc import Sequence

import numpy as np

__version__ = "0.0.0"


class Tensor:
    """Exists for isinstance checks. No object is an instance."""


class no_grad(contextlib.ContextDecorator):
    """Does nothing, as a decorator and as a context manager."""

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
if __name__ == "torch":  # only when it replaces torch: any other import must not change sys.modules
    sys.modules["torch.nn"] = nn
