"""The times of the stand-in's clock, by the estimate: microseconds of a run, by group and row count.

    with open(path, "w") as file: file.write(table(spec, artifacts))
    RKNN_STANDIN_CLOCK=1 RKNN_STANDIN_TIMES=path

A time is that of the NPU alone: products, operators, transposes, and the C call. Whatever the CPU does before and after
a run takes the time that it takes on this machine. `busy_seconds` reads how long each core was busy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Spec
from rwkv_npu.runtime.estimate import npu_ms
from rwkv_npu.runtime.operators import count_operators
from rwkv_npu.runtime.rk3588 import DRAMS, NPU_CORES, TERMS, Terms


def times(
    spec: Spec,
    artifacts: Sequence[Artifact],
    dram: str = DRAMS[0],
    terms: Terms = TERMS,
    bound: str = "central",
) -> dict[tuple[str, int], float]:
    """Microseconds of a run by group and row count. artifacts: of one fusion and precision."""
    counts = {a.rows: count_operators(spec, a.fusion, a.rows) for a in artifacts}
    call = terms["c_call"].at(bound)
    return {
        (a.group, a.rows): call + 1e3 * sum(npu_ms(a, counts[a.rows][a.group], dram, terms, bound))
        for a in artifacts
    }


def table(microseconds: dict[tuple[str, int], float]) -> str:
    """The table for RKNN_STANDIN_TIMES."""
    return "".join(f"{group} {rows} {us:.3f}\n" for (group, rows), us in microseconds.items())


def busy_seconds(library: str | Path) -> list[float]:
    """Seconds that each core was busy in this process, since it loaded the stand-in at the path `library`."""
    busy_us = ctypes.CDLL(str(library)).standin_busy_us
    busy_us.argtypes, busy_us.restype = [ctypes.c_int], ctypes.c_uint64
    return [busy_us(core) / 1e6 for core in range(NPU_CORES)]
