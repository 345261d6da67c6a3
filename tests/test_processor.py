"""The instruction set that kernels are compiled for: detected, or forced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rwkv_npu.kernels import cache, instruction_sets, processor
from rwkv_npu.kernels.instruction_sets import SETS, select

# Words of an RK3588's auxiliary vector: asimddp and asimdhp among others, and no i8mm.
RK3588_HWCAP = 0x119FFF


def test_features_of_an_arm_processor() -> None:
    assert processor.arm_features(RK3588_HWCAP, 0) == {"dotprod", "fullfp16"}
    assert processor.arm_features(0, 1 << 13) == {"i8mm"}
    assert processor.arm_features(~(1 << 20), 0) == {"fullfp16"}


@pytest.mark.parametrize(
    ("architecture", "features", "name"),
    [
        ("x86_64", "avx avx2 avx512f avx512vnni", "AVX-512 VNNI"),
        ("x86_64", "avx avx2 avxvnni", "AVX-VNNI"),
        ("x86_64", "avx avx2 avx512f", "AVX2"),
        ("x86_64", "sse2 avx", "plain code"),
        ("aarch64", "neon dotprod i8mm", "Arm i8mm"),
        ("aarch64", "neon dotprod fullfp16", "Arm dotprod"),
        ("aarch64", "neon", "Arm NEON"),
        ("riscv64", "v", "plain code"),
    ],
)
def test_the_best_instruction_set_is_selected(architecture: str, features: str, name: str) -> None:
    assert select(architecture, frozenset(features.split())).name == name


def test_any_processor_has_an_instruction_set() -> None:
    assert not SETS[-1].features and not SETS[-1].architecture
    assert instruction_sets.describe() == f"int8 products: {instruction_sets.current().name}"


def child(code: str, features: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_CPU_FEATURES": features}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_forced_feature_that_is_missing_is_refused() -> None:
    """It is refused before anything is compiled or run."""
    code = "from rwkv_npu import kernels; kernels.load('pool').work.address"
    done = child(code, "+sse2,+a-feature-of-no-processor")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "NUMBA_CPU_FEATURES forces a-feature-of-no-processor, which this processor lacks: remove it from the list"
    )
    assert "compiling" not in done.stderr


def test_forced_features_select_instruction_set_and_cache() -> None:
    code = (
        "from rwkv_npu.kernels import cache, instruction_sets\n"
        "print(cache.key(), instruction_sets.current().name)"
    )
    done = child(code, "+")
    identity, _, name = done.stdout.strip().partition(" ")
    assert name == "plain code", done.stderr
    assert identity != cache.key()
