"""The features that kernels are compiled for: those of this processor, or those that are forced.

`NUMBA_CPU_FEATURES` forces a list, such as "+avx2,+fma", and `NUMBA_CPU_NAME` names the processor to schedule for.
Kernels run where they are compiled, so a forced feature that the processor lacks is refused. The names are LLVM's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import platform
import sys
from typing import Any

import llvmlite.binding

from rwkv_npu.errors import BackendError

# Linux on Arm: feature -> (type of auxv entry, bit). LLVM does not report these features. Linux sets a bit only if
# every core has the feature, small or large.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ARM_FEATURES = {
    "fullfp16": (_AT_HWCAP, 10),
    "dotprod": (_AT_HWCAP, 20),
    "i8mm": (_AT_HWCAP2, 13),
}


def arm_features(hwcap: int, hwcap2: int) -> set[str]:
    """The features by the AT_HWCAP and AT_HWCAP2 words of the auxiliary vector."""
    words = {_AT_HWCAP: hwcap, _AT_HWCAP2: hwcap2}
    return {name for name, (word, bit) in _ARM_FEATURES.items() if words[word] >> bit & 1}


@functools.cache
def available() -> frozenset[str]:
    """The features of this processor."""
    found = {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}
    if sys.platform == "linux" and platform.machine() == "aarch64":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
        found |= arm_features(getauxval(_AT_HWCAP), getauxval(_AT_HWCAP2))
    return frozenset(found)


def features() -> frozenset[str]:
    """The features that kernels are compiled for. Raises BackendError for a forced one that this processor lacks."""
    config = _config()
    if config.CPU_FEATURES is None:
        return frozenset(f for f in available() if config.ENABLE_AVX or not f.startswith("avx"))
    named = {name.strip() for name in config.CPU_FEATURES.split(",")}
    wanted = frozenset(name[1:] for name in named if name[:1] == "+" and name != "+")
    missing = sorted(wanted - available())
    if missing:
        raise BackendError(
            f"NUMBA_CPU_FEATURES forces {', '.join(missing)}, which this processor lacks: remove it from the list"
        )
    return wanted


def name() -> str:
    """LLVM's name of the processor that code is scheduled for."""
    return str(_config().CPU_NAME or llvmlite.binding.get_host_cpu_name())


def configure() -> None:
    """Make numba compile for `features()`. Call this before anything is compiled.

    numba takes LLVM's list, which is incomplete on Arm. And the name of a processor implies features, also those that
    this one lacks if `NUMBA_CPU_NAME` names another. So the list given to numba also switches off the missing ones.
    """
    host, config = llvmlite.binding.get_host_cpu_features(), _config()
    known = {name for name, has in host.items() if has}
    if config.CPU_FEATURES is not None or not features() <= known:
        present, absent = sorted(features()), sorted(name for name, has in host.items() if not has)
        config.CPU_FEATURES = ",".join([f"+{name}" for name in present] + [f"-{name}" for name in absent])


def _config() -> Any:
    return importlib.import_module("numba.core.config")
