"""Properties of the machine, read from the system: chip, cores, clocks, memory, the NPU's driver and runtime.

Everything is read from the files of Linux below `root`, and is None or empty if the system does not show it. Nothing is
changed, and the NPU is not used.
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
# Oldest recommended versions. Older drivers hang and leak memory; products of librknnrt 2.2 were seen to be all zero.
OLDEST_DRIVER, OLDEST_RUNTIME = "0.9.6", "2.3.0"
_CORES = {"0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76"}
_ALIKE = 0.85  # a core of unknown kind is fast if it has at least this fraction of the highest speed
_DEVFREQ = {"dmc": "ddr", "npu": "npu"}


@dataclass(frozen=True)
class Clock:
    """A clock in MHz and its governor. name: a CPU cluster by its first core, such as `cpu4`; `ddr`; or `npu`."""

    name: str
    folder: Path
    governor: str | None
    mhz: int | None
    max_mhz: int | None


def soc(root: Path = ROOT) -> str | None:
    """The Rockchip chip, such as rk3588 (also for an rk3588s); None on other machines."""
    names = (read(root / "proc/device-tree/compatible") or "").split("\0")
    chips = [match[1] for name in reversed(names) if (match := re.match(r"rockchip,(rk\d+)", name))]
    return chips[0] if chips else None


def model(root: Path = ROOT) -> str | None:
    """The board's name, such as Radxa ROCK 5B."""
    return (read(root / "proc/device-tree/model") or "").strip("\0") or None


def kernel(root: Path = ROOT) -> str | None:
    return read(root / "proc/sys/kernel/osrelease")


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name, or the kinds of its cores on a board, which shows no name."""
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
    """Numbers of the cores that this process may use, ascending. On macOS, which does not show them, all cores."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def big_cores(root: Path = ROOT, among: Collection[int] | None = None) -> list[int]:
    """Numbers of the fastest cores, ascending, among the usable cores (or `among`).

    All of them, if the cores are alike or the system does not show a difference.
    """
    allowed = sorted(usable_cores() if among is None else among)
    speeds = {number: _speed(root, number) for number in allowed}
    if not all(speeds.values()):
        return allowed
    fastest = max(allowed, key=lambda number: speeds[number])
    kinds = _kinds(root)
    if kinds.keys() >= set(allowed):  # clocks of clusters of one kind may differ a little
        return [number for number in allowed if kinds[number] == kinds[fastest]]
    return [number for number in allowed if speeds[number] >= _ALIKE * speeds[fastest]]


def _speed(root: Path, core: int) -> int:
    """The scheduler's capacity of a core, or else its highest clock; 0 if neither is shown."""
    folder = root / f"sys/devices/system/cpu/cpu{core}"
    return _number(folder / "cpu_capacity", 1) or _number(folder / "cpufreq/cpuinfo_max_freq", 1) or 0


def _kinds(root: Path) -> dict[int, str]:
    """The kind of each core by number; empty if one of them is not known."""
    numbers, parts = core_numbers(root), _cpuinfo(root, "CPU part")
    return dict(zip(numbers, parts, strict=True)) if len(parts) == len(numbers) else {}


def _cpuinfo(root: Path, key: str) -> list[str]:
    lines = (read(root / "proc/cpuinfo") or "").splitlines()
    return [
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key
    ]


def clocks(root: Path = ROOT) -> list[Clock]:
    """Clocks of the CPU clusters, then of DDR and NPU. Virtual machines show none."""
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
    """Version of the kernel's NPU driver, rknpu. Some kernels show it to root only."""
    for file in ("sys/module/rknpu/version", "sys/kernel/debug/rknpu/version", "proc/rknpu/version"):
        if match := re.search(r"\d+\.\d+\.\d+", read(root / file) or ""):
            return match[0]
    return None


def mainline_driver(root: Path = ROOT) -> bool:
    """True if the driver of the NPU is mainline Linux's `rocket` (6.18 and later) instead of Rockchip's rknpu."""
    events = (
        read(device / "device/uevent") or "" for device in sorted((root / "sys/class/accel").glob("accel*"))
    )
    return any("DRIVER=rocket" in event for event in events) or (root / "sys/module/rocket").is_dir()


def runtime_library(root: Path = ROOT) -> Path | None:
    """Path of the librknnrt.so that RKNNLite loads."""
    return next((root / name for name in LIBRARIES if (root / name).is_file()), None)


def runtime_build(library: Path) -> str | None:
    """Version and build of a librknnrt.so, such as 2.3.2 (429f97ae6b@2025-04-09T09:09:27), without loading it."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            match = re.search(rb"librknnrt version: (\d+\.\d+\.\d+( \([^)\0]*\))?)", data)
            return match[1].decode(errors="replace") if match else None
    except (OSError, ValueError):  # unreadable, or empty
        return None


def runtime_version(library: Path) -> str | None:
    """Version of a librknnrt.so, such as 2.3.2."""
    build = runtime_build(library)
    return version(build) if build else None


def version(text: str) -> str | None:
    """The version in a text: 2.3.2 from `2.3.2 (429f97ae6b@2025-04-09)`. None if there is none."""
    match = re.search(r"\d+(\.\d+)+", text)
    return match[0] if match else None


def version_numbers(text: str) -> tuple[int, ...]:
    """The version in a text, for comparison. () if there is none, which is older than any version."""
    return tuple(int(part) for part in (version(text) or "").split(".") if part.isdigit())


def outdated(runtime: str | None, driver: str | None, compiler: str = "") -> str:
    """A warning that names versions older than recommended, "" for none. Unknown versions (None) cause no warning.

    compiler: the version that compiled the artifacts. An outdated version may work: the self-test decides.
    """
    problems = []
    if runtime and compiler and version_numbers(runtime) < version_numbers(compiler):
        problems.append(
            f"librknnrt {version(runtime) or runtime} is older than the artifacts' compiler, {compiler}"
        )
    elif runtime and version_numbers(runtime) < version_numbers(OLDEST_RUNTIME):
        problems.append(
            f"librknnrt {version(runtime) or runtime} is older than the recommended {OLDEST_RUNTIME}"
        )
    if driver and version_numbers(driver) < version_numbers(OLDEST_DRIVER):
        problems.append(
            f"the NPU's driver {version(driver) or driver} is older than the recommended {OLDEST_DRIVER}"
        )
    return f"{', and '.join(problems)}: if anything fails, update it (rwkv-npu doctor)" if problems else ""


def npu_nodes(root: Path = ROOT) -> list[Path]:
    """The device nodes of the NPU's driver: a DRM node, or /dev/rknpu."""
    drm = [
        root / "dev/dri" / device.name
        for device in sorted((root / "sys/class/drm").glob("renderD*"))
        if "DRIVER=RKNPU" in (read(device / "device/uevent") or "")
    ]
    usual = [root / "dev/dri/renderD129"] if soc(root) and not drm else []
    return [node for node in (*drm, *usual, root / "dev/rknpu") if node.exists()]


def may_use(node: Path) -> bool:
    """True if this user may read and write a device node."""
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
    """The text of a small file, stripped; None if it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path, divisor: int) -> int | None:
    text = read(path) or ""
    return int(text) // divisor if text.isdigit() else None
