"""ONNX Runtime on the CPU: one session for each group, and one pool of threads for all sessions.

A pool for each session would be very slow: dozens of pools would spin on the same cores.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError, first_line
from rwkv_npu.models.spec import Group

# Prepacked weights multiply one row twice as fast. Without them a model opens faster and holds its weights once.
PREPACK = True

_pool_threads: int | None = None  # threads of the process's pool, which cannot be resized


def share_threads(threads: int | None) -> None:
    """Create the process's pool at first use. threads: None takes one for each large core."""
    global _pool_threads
    wanted = threads or _default_threads()
    if _pool_threads is None:
        from onnxruntime.capi import _pybind_state

        _pybind_state.set_global_thread_pool_sizes(wanted, 1)
        _pool_threads = wanted
    elif threads is not None and wanted != _pool_threads:
        kept = f"{_pool_threads} threads" if _pool_threads else "the number of threads it chose"
        warnings.warn(f"ONNX Runtime has one pool for the process: it stays with {kept}", stacklevel=4)


def _default_threads() -> int:
    """One thread for each large core, or 0 (ONNX Runtime's choice: one a core) if all cores are alike and usable."""
    big = hardware.big_cores()
    return 0 if big == hardware.core_numbers() else len(big)


class OrtRunner:
    """A session with inputs and outputs bound once, to arrays that live as long as the runner."""

    def __init__(self, session: Any, group: Group, rows: int):
        self._session = session
        self.inputs = allocate_inputs(group, rows)
        self._outputs = {port.name: np.empty((rows, port.width), np.float32) for port in group.outputs}
        self._binding = session.io_binding()
        for name, array in self.inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in self._outputs.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))

    def run(self) -> Mapping[str, np.ndarray]:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
        return self._outputs


class OrtBackend:
    name = "ort"

    def __init__(self, source: Source, *, threads: int | None = None):
        share_threads(threads)
        self._source = source
        self._sessions: dict[str, Any] = {}
        self._options = ort.SessionOptions()
        self._options.use_per_session_threads = False
        self._options.log_severity_level = 3
        if not PREPACK:
            self._options.add_session_config_entry("session.disable_prepacking", "1")

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int) -> OrtRunner:
        if group.name not in self._sessions:
            try:
                session = ort.InferenceSession(
                    self._source.onnx(group), self._options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # as above
                raise BackendError(f"ONNX Runtime cannot open {group.name}: {first_line(error)}") from error
            self._sessions[group.name] = session
        return OrtRunner(self._sessions[group.name], group, rows)

    def close(self) -> None:
        self._sessions.clear()
