"""Run RWKV language models with the Rockchip NPU doing the large matrix products.

model = rwkv_npu.load("model.rwkv")
for step in model.generate("Return the "):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rwkv_npu import errors

if TYPE_CHECKING:
    from rwkv_npu.conversion.converter import convert
    from rwkv_npu.formats.state import State
    from rwkv_npu.model import Model, load, load_state
    from rwkv_npu.models.spec import Spec
    from rwkv_npu.text.generation import Step

# ONNX Runtime, huggingface_hub and Ray report their use to their makers. They read these variables when they are
# imported, which is after this module, and child processes inherit them. A value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__version__ = "0.1.0"
__all__ = ["Model", "Spec", "State", "Step", "convert", "errors", "load", "load_state"]

_HOME = {
    "Model": "model",
    "Spec": "models.spec",
    "State": "formats.state",
    "Step": "text.generation",
    "convert": "conversion.converter",
    "load": "model",
    "load_state": "model",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used, so that the command line starts at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"rwkv_npu.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
