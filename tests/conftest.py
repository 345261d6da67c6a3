"""Fixtures shared by the tests."""

from __future__ import annotations

import sys

import pytest

from rwkv_npu import toolkit
from rwkv_npu.toolkit.install import install


@pytest.fixture(scope="session")
def toolkit_environment() -> toolkit.Environment:
    """Rockchip's compiler, installed in the user's cache on first use. For tests marked `compiler`."""
    found = toolkit.find(toolkit.DEFAULT_VERSION)
    return found or install(progress=lambda line: print(line, file=sys.stderr))
