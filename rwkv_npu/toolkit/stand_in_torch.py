"""A stand-in for torch, copied as `torch.py` into the private environment, never imported by this package.

The compiler imports torch for models in torch's own format and touches these three names; none is used when
an ONNX graph is compiled. The real one weighs up to 5 GB.
"""

import contextlib
import sys
import types

__version__ = "0.0.0"


class Tensor:
    """Nothing is one."""


class no_grad(contextlib.ContextDecorator):
    """Does nothing, as a decorator and as a context."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


nn = types.ModuleType("torch.nn")
nn.Module = type("Module", (), {})  # type: ignore[attr-defined]
if __name__ == "torch":  # under its own name it must not stand in anyone's way
    sys.modules["torch.nn"] = nn
