"""What the measurements ran on, and whether it was left alone: clocks, governors, others at work.

Everything is read where the system shows it, and left out where it does not (virtual machines hide clocks).
"""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_npu.board import hardware
from rwkv_npu.board.hardware import cpu_model

SLOWER = 1.10  # a clock that fell by this factor is called throttled,
PROBE_SLOWER = 1.25  # and a probe: it varies more, with what ran just before
BUSY = 0.15  # cores' worth of work by others


def describe() -> dict[str, Any]:
    """The machine as a flat mapping; unreadable facts are left out."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "board": hardware.soc(),
        "virtual": _is_virtual() or None,
        "load_average": os.getloadavg()[0],
        **clocks(),
    }
    return {key: value for key, value in facts.items() if value is not None}


def clocks(root: Path = hardware.ROOT) -> dict[str, Any]:
    """Governor, clocks of the CPU (MHz, of each cluster), the DDR and the NPU."""
    found = hardware.clocks(root)
    facts: dict[str, Any] = {}
    cpu = [clock for clock in found if clock.name.startswith("cpu")]
    if governors := {clock.governor for clock in cpu if clock.governor}:
        facts["cpu_governor"] = "/".join(sorted(governors))
    if speeds := [clock.mhz for clock in cpu if clock.mhz is not None]:
        facts["cpu_mhz"] = "/".join(map(str, speeds))
    for clock in found:
        if clock not in cpu:
            facts[f"{clock.name}_mhz"], facts[f"{clock.name}_governor"] = clock.mhz, clock.governor
    return {key: value for key, value in facts.items() if value is not None}


def _is_virtual() -> bool:
    return " hypervisor" in (hardware.read(Path("/proc/cpuinfo")) or "")


@dataclass
class Watch:
    """Looks at the machine before and after a row; `flags` says what speaks against the figures between.

    The probe is a fixed piece of work in Python: where clocks cannot be read it shows their fall.
    """

    best_probe: float = field(default_factory=lambda: probe())

    def begin(self) -> None:
        self._clocks, self._started = clocks(), time.monotonic()
        self._work, self._own = _busy_seconds(), _own_seconds()

    def flags(self) -> str:
        found = []
        elapsed = time.monotonic() - self._started
        others = _busy_seconds() - self._work - (_own_seconds() - self._own)
        if elapsed > 0.2 and others / elapsed > BUSY:  # the counters tick in hundredths of a second
            found.append("busy")
        after, last = clocks(), probe()
        self.best_probe = min(self.best_probe, last)
        fell = any(
            _highest(self._clocks, key) > SLOWER * _highest(after, key)
            for key in ("cpu_mhz", "npu_mhz", "ddr_mhz")
        )
        if fell or last > PROBE_SLOWER * self.best_probe:
            found.append("throttled")
        return " ".join(found)


def _highest(facts: dict[str, Any], key: str) -> float:
    return max((float(text) for text in str(facts.get(key, 0)).split("/")), default=0.0)


def probe() -> float:
    """Seconds of a fixed loop, the best of several: an inverse clock."""
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
    """Seconds that all cores together were busy since the system started, stolen time among them."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
