"""The backends by name. Each is one module, imported when it is chosen."""

from __future__ import annotations

import importlib
from typing import Any

from rwkv_npu.backends.base import Backend
from rwkv_npu.errors import BackendError

# name: (module, class, what to install where an import fails)
BACKENDS = {
    "numpy": ("numpy", "NumpyBackend", "numpy"),
    "ort": ("ort", "OrtBackend", "onnxruntime"),
    "numba": ("numba", "NumbaBackend", "numba"),
    "torch": ("torch", "TorchBackend", "torch"),
    "rknn-sim": ("rknn_sim", "RknnSimBackend", "rwkv_npu"),
    "rknn": ("rknn", "RknnBackend", "rwkv_npu"),
    "rknn-matmul": ("rknn_matmul", "RknnMatmulBackend", "rwkv_npu"),
}
# Backends that need a board. They run with a fallback (fallback.py), and take `cores` beside `threads`.
NPU_BACKENDS = ("rknn", "rknn-matmul")
# Backends that run a bundle's artifacts.
COMPILED = ("rknn", "rknn-sim")
# Backends that use a bundle's weights as stored, unless the user requests a precision.
REFERENCES = ("numpy", "torch")
# Precisions to which a backend itself converts the stored weights.
MADE_PRECISIONS = {"rknn-matmul": ("fp16", "w8a8")}


def open_backend(name: str, source: Any, **options: Any) -> Backend:
    """Open the backend `name` on the weights `source`. Raises BackendError if it is unknown or not installed."""
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r} is unknown: use one of {', '.join(BACKENDS)}")
    module, cls, package = BACKENDS[name]
    try:
        backend = getattr(importlib.import_module(f"rwkv_npu.backends.{module}"), cls)
    except ImportError as error:
        raise BackendError(f"backend {name} needs {package}: pip install {package} ({error})") from error
    return backend(source, **options)
