"""The machine of a measurement: its facts, memory bandwidth and peak speed, and disturbance by other processes.

Facts that the system does not show are omitted (virtual machines hide clocks).
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.bench.document import ProductRow
from rwkv_npu.board import hardware
from rwkv_npu.board.hardware import cpu_model

SLOWER = 1.10  # a clock that fell by this factor counts as throttled
PROBE_SLOWER = 1.25  # the same for the probe, which varies more
BUSY = 0.15  # cores used by other processes


def describe() -> dict[str, Any]:
    """The facts of this machine as a flat mapping, without those that cannot be read."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "cores": len(hardware.usable_cores()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "board": hardware.soc(),
        "virtual": " hypervisor" in (hardware.read(Path("/proc/cpuinfo")) or "") or None,
        "load_average": os.getloadavg()[0],
        **clocks(),
    }
    return {key: value for key, value in facts.items() if value is not None}


def instruction_set(root: Path = hardware.ROOT) -> str | None:
    """The processor's most capable instruction set for products of bytes. None if it cannot be read."""
    text = hardware.read(root / "proc/cpuinfo") or ""
    flags = {
        word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()
    }
    return next((name for flag, name in _SETS.items() if flag in flags), None)


# Flag in /proc/cpuinfo -> name. The first flag that a processor has is the most capable.
_SETS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "Arm i8mm",
    "asimddp": "Arm dotprod",
    "asimd": "Arm NEON",
}


def clocks(root: Path = hardware.ROOT) -> dict[str, Any]:
    """Governor and clocks (MHz) of the CPU's clusters, the DDR and the NPU."""
    known = hardware.clocks(root)
    facts: dict[str, Any] = {}
    cpu = [clock for clock in known if clock.name.startswith("cpu")]
    if governors := {clock.governor for clock in cpu if clock.governor}:
        facts["cpu_governor"] = "/".join(sorted(governors))
    if speeds := [clock.mhz for clock in cpu if clock.mhz is not None]:
        facts["cpu_mhz"] = "/".join(map(str, speeds))
    for clock in known:
        if clock not in cpu:
            facts[f"{clock.name}_mhz"], facts[f"{clock.name}_governor"] = clock.mhz, clock.governor
    return {key: value for key, value in facts.items() if value is not None}


@dataclass
class Watch:
    """Compares the machine before and after a row. `flags` names disturbances in between.

    best_probe: the shortest time of `probe` so far. A longer one shows that a clock fell, even if no clock can be read.
    """

    best_probe: float = field(default_factory=lambda: probe())

    def begin(self) -> None:
        self._clocks, self._started = clocks(), time.monotonic()
        self._work, self._own = _busy_seconds(), _own_seconds()

    def flags(self) -> str:
        names = []
        elapsed = time.monotonic() - self._started
        others = _busy_seconds() - self._work - (_own_seconds() - self._own)
        if elapsed > 0.2 and others / elapsed > BUSY:  # the counters have a resolution of 10 ms
            names.append("busy")
        after, last = clocks(), probe()
        self.best_probe = min(self.best_probe, last)
        fell = any(
            _highest(self._clocks, key) > SLOWER * _highest(after, key)
            for key in ("cpu_mhz", "npu_mhz", "ddr_mhz")
        )
        if fell or last > PROBE_SLOWER * self.best_probe:
            names.append("throttled")
        return " ".join(names)


def _highest(facts: dict[str, Any], key: str) -> float:
    return max((float(text) for text in str(facts.get(key, 0)).split("/")), default=0.0)


def probe() -> float:
    """Seconds of a fixed loop, the best of several: inversely proportional to the clock."""
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(20_000):
            pass
        times.append(time.perf_counter() - begin)
    return min(times)


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float:
    """CPU seconds of all cores since the system started, including time stolen by the host."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# -- bandwidth and peak ----------------------------------------------------------------------------------

READ_BYTES = 256 << 20  # far beyond any cache
PEAK_SIZE = 1536


def roofline(threads: int) -> dict[str, float]:
    """GB/s of reading memory with all threads, and GFLOP/s of NumPy's fp32 product: the best of several runs."""
    values = np.ones(READ_BYTES // 4, np.float32)
    matrix, vector = values.reshape(-1, 4096), np.ones(4096, np.float32)
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        readers: list[Callable[[], object]] = [
            lambda: matrix @ vector,
            lambda: list(pool.map(lambda part: np.dot(part, part), parts)),
        ]
        read = min(_best(reader, 9) for reader in readers)
    a = np.ones((PEAK_SIZE, PEAK_SIZE), np.float32)
    c = np.empty_like(a)
    multiply = _best(lambda: np.matmul(a, a, out=c), 9)
    return {
        "bandwidth_gb_per_s": READ_BYTES / read / 1e9,
        "peak_fp32_gflops": 2 * PEAK_SIZE**3 / multiply / 1e9,
    }


def _best(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def peaks(machine: dict[str, float], rows: Iterable[ProductRow]) -> dict[str, float]:
    """GFLOP/s by dtype: the best measured here on the CPU, over all backends and sizes."""
    best = {"fp32": machine["peak_fp32_gflops"]} if "peak_fp32_gflops" in machine else {}
    for row in rows:
        if row.gflops and row.is_measured_here and row.device.startswith("CPU"):
            best[row.dtype] = max(best.get(row.dtype, 0.0), row.gflops)
    return best
