"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys

import pytest

# Before NumPy is imported: on busy cores the threads of its BLAS wait for each other more than they work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from rwkv_npu import toolkit  # noqa: E402
from rwkv_npu.toolkit.install import install  # noqa: E402


@pytest.fixture(scope="session")
def toolkit_environment() -> toolkit.Environment:
    """Rockchip's compiler, installed in the user's cache on first use. For tests marked `compiler`."""
    found = toolkit.find(toolkit.DEFAULT_VERSION)
    return found or install(progress=lambda line: print(line, file=sys.stderr))
