"""Reads what the system tells of the machine: chip, cores, clocks, memory, the NPU's driver and runtime.

Everything is read below `root`, where Linux on a board shows it, and is None or empty where it does not. Nothing is
changed, and the NPU is not touched.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Where RKNNLite looks for the runtime, in this order.
LIBRARIES = ("usr/lib/librknn_runtime.so", "usr/lib64/librknn_runtime.so", "usr/lib/librknnrt.so")
# The oldest that are advised: older drivers hang and lose memory, librknnrt 2.2 was seen to multiply to zeros.
OLDEST_DRIVER, OLDEST_RUNTIME = "0.9.6", "2.3.0"
_CORES = {"0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76"}
_ALIKE = 0.85  # of the fastest's clock: cores without a known kind are of its kind down to this
_DEVFREQ = {"dmc": "ddr", "npu": "npu"}


@dataclass(frozen=True)
class Clock:
    """A clock and what sets it, in MHz: a cluster of the CPU (`cpu4`, by its first core), `ddr` or `npu`."""

    name: str
    folder: Path
    governor: str | None
    mhz: int | None
    max_mhz: int | None


def soc(root: Path = ROOT) -> str | None:
    """The Rockchip chip, such as rk3588 (an rk3588s is one too); None on other machines."""
    names = (read(root / "proc/device-tree/compatible") or "").split("\0")
    chips = [match[1] for name in reversed(names) if (match := re.match(r"rockchip,(rk\d+)", name))]
    return chips[0] if chips else None


def model(root: Path = ROOT) -> str | None:
    """The board's name, such as Radxa ROCK 5B."""
    return (read(root / "proc/device-tree/model") or "").strip("\0") or None


def kernel(root: Path = ROOT) -> str | None:
    return read(root / "proc/sys/kernel/osrelease")


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name; on a board, which has none, its kinds of cores."""
    if names := _cpuinfo(root, "model name"):
        return names[0]
    parts = [_CORES.get(part, part) for part in _cpuinfo(root, "CPU part")]
    return " + ".join(f"{parts.count(kind)} x {kind}" for kind in sorted(set(parts), reverse=True)) or (
        platform.machine()
    )


def core_numbers(root: Path = ROOT) -> list[int]:
    """Numbers of the cores that are online."""
    return [int(number) for number in _cpuinfo(root, "processor")]


def usable_cores() -> list[int]:
    """The cores that this process may use, in order; all of the machine where the system does not tell (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def big_cores(root: Path = ROOT, among: Collection[int] | None = None) -> list[int]:
    """Numbers of the cores of the fastest kind, ascending, of those that this process may use (or of `among`).

    All of them where they are alike, or where nothing tells them apart.
    """
    allowed = sorted(usable_cores() if among is None else among)
    speeds = {number: _speed(root, number) for number in allowed}
    if not all(speeds.values()):
        return allowed
    fastest = max(allowed, key=lambda number: speeds[number])
    kinds = _kinds(root)
    if kinds.keys() >= set(allowed):  # clusters of one kind may have clocks that differ a little
        return [number for number in allowed if kinds[number] == kinds[fastest]]
    return [number for number in allowed if speeds[number] >= _ALIKE * speeds[fastest]]


def _speed(root: Path, core: int) -> int:
    """The core's capacity as the scheduler knows it, else its highest clock; 0 where neither is shown."""
    folder = root / f"sys/devices/system/cpu/cpu{core}"
    return _number(folder / "cpu_capacity", 1) or _number(folder / "cpufreq/cpuinfo_max_freq", 1) or 0


def _kinds(root: Path) -> dict[int, str]:
    """The kind of each core; empty if one of them is not known."""
    numbers, parts = core_numbers(root), _cpuinfo(root, "CPU part")
    return dict(zip(numbers, parts, strict=True)) if len(parts) == len(numbers) else {}


def _cpuinfo(root: Path, key: str) -> list[str]:
    lines = (read(root / "proc/cpuinfo") or "").splitlines()
    return [
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key
    ]


def clocks(root: Path = ROOT) -> list[Clock]:
    """The clusters of the CPU, then DDR and NPU; virtual machines hide them."""
    found = []
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        speeds = [_number(policy / file, 1000) for file in ("scaling_cur_freq", "cpuinfo_max_freq")]
        cluster = "cpu" + policy.name.removeprefix("policy")
        found.append(Clock(cluster, policy, read(policy / "scaling_governor"), *speeds))
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        if name := _DEVFREQ.get(device.name.rpartition(".")[2]):
            steps = (read(device / "available_frequencies") or "").split()
            highest = max((int(step) // 1_000_000 for step in steps if step.isdigit()), default=None)
            now = _number(device / "cur_freq", 1_000_000)
            found.append(Clock(name, device, read(device / "governor"), now, highest))
    return found


def driver_version(root: Path = ROOT) -> str | None:
    """Version of the kernel's NPU driver, rknpu. Some kernels show it to root alone."""
    for file in ("sys/module/rknpu/version", "sys/kernel/debug/rknpu/version", "proc/rknpu/version"):
        if match := re.search(r"\d+\.\d+\.\d+", read(root / file) or ""):
            return match[0]
    return None


def mainline_driver(root: Path = ROOT) -> bool:
    """Tell whether the NPU is driven by `rocket`, of mainline Linux (6.18 and later), and not by Rockchip's rknpu."""
    events = (
        read(device / "device/uevent") or "" for device in sorted((root / "sys/class/accel").glob("accel*"))
    )
    return any("DRIVER=rocket" in event for event in events) or (root / "sys/module/rocket").is_dir()


def runtime_library(root: Path = ROOT) -> Path | None:
    """The librknnrt.so that RKNNLite would load."""
    return next((root / name for name in LIBRARIES if (root / name).is_file()), None)


def runtime_build(library: Path) -> str | None:
    """Version and build of a librknnrt.so, without loading it: 2.3.2 (429f97ae6b@2025-04-09T09:09:27)."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            match = re.search(rb"librknnrt version: (\d+\.\d+\.\d+( \([^)\0]*\))?)", data)
            return match[1].decode(errors="replace") if match else None
    except (OSError, ValueError):  # unreadable, or empty
        return None


def runtime_version(library: Path) -> str | None:
    """The version alone: 2.3.2."""
    build = runtime_build(library)
    return version(build) if build else None


def version(text: str) -> str:
    """The version in a text: 2.3.2 of `2.3.2 (429f97ae6b@2025-04-09)`."""
    match = re.search(r"\d+(\.\d+)+", text)
    return match[0] if match else "of no known version"


def numbers(text: str) -> tuple[int, ...]:
    """The version in a text, to be compared; none is the oldest."""
    return tuple(int(part) for part in version(text).split(".") if part.isdigit())


def outdated(runtime: str | None, driver: str | None, compiler: str = "") -> str:
    """Names the versions that are older than they should be, "" if none is; unknown ones are not judged.

    It may work all the same, and the self-test has to show it.
    """
    found = []
    if runtime and compiler and numbers(runtime) < numbers(compiler):
        found.append(f"librknnrt {version(runtime)} is older than the artifacts' compiler, {compiler}")
    elif runtime and numbers(runtime) < numbers(OLDEST_RUNTIME):
        found.append(f"librknnrt {version(runtime)} is older than is advised, {OLDEST_RUNTIME}")
    if driver and numbers(driver) < numbers(OLDEST_DRIVER):
        found.append(f"the NPU's driver {version(driver)} is older than is advised, {OLDEST_DRIVER}")
    return f"{', and '.join(found)}: should anything fail, look there (rwkv-npu doctor)" if found else ""


def npu_nodes(root: Path = ROOT) -> list[Path]:
    """The device nodes through which the driver is reached: one of the DRM's, or /dev/rknpu."""
    drm = [
        root / "dev/dri" / device.name
        for device in sorted((root / "sys/class/drm").glob("renderD*"))
        if "DRIVER=RKNPU" in (read(device / "device/uevent") or "")
    ]
    usual = [root / "dev/dri/renderD129"] if soc(root) and not drm else []
    return [node for node in (*drm, *usual, root / "dev/rknpu") if node.exists()]


def may_use(node: Path) -> bool:
    return os.geteuid() == 0 or os.access(node, os.R_OK | os.W_OK)


def memory(root: Path = ROOT) -> dict[str, int]:
    """Bytes by the names of /proc/meminfo: MemTotal, MemAvailable, CmaTotal, CmaFree, ..."""
    return dict(_meminfo(root))


def _meminfo(root: Path) -> Iterator[tuple[str, int]]:
    for line in (read(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith(" kB"):
            yield name, int(value.split()[0]) * 1024


def read(path: Path) -> str | None:
    """The text of a small file without the white space around it; None where it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path, divisor: int) -> int | None:
    text = read(path) or ""
    return int(text) // divisor if text.isdigit() else None
