"""The files by which a root folder looks like an RK3588: device tree, NPU nodes, clocks, cores.

qemu looks for every absolute path in the root folder first, so these files hide the host's. Without the description of
the cores, ONNX Runtime reads the host's and crashes.
"""

from __future__ import annotations

from pathlib import Path

MODEL = "Emulated RK3588 board (tools/board of rwkv_npu)"
DRIVER, KERNEL = "0.9.8", "6.1.43-emulated"
LOCK = "run/lock/rwkv_npu.lock"  # each emulated board has its own lock, as if it were another machine
MEMORY_KB = {
    "MemTotal": 16_000_000,
    "MemFree": 9_000_000,
    "MemAvailable": 12_000_000,
    "CmaTotal": 16384,
    "CmaFree": 8192,
}
LITTLE, BIG = range(4), range(4, 8)  # Cortex-A55, Cortex-A76
CLUSTERS = ("0-3", "4-5", "6-7")  # cores that share a clock
NPU, DDR = "fdab0000.npu", "dmc"
_FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
)


def chip_files() -> dict[str, str]:
    """Paths, without the first slash, and contents. Clocks are at their maximum, governors at `performance`."""
    files = {
        "proc/device-tree/compatible": "rwkv-npu,emulated\0rockchip,rk3588\0",
        "proc/device-tree/model": MODEL + "\0",
        "proc/cpuinfo": "\n".join(_cpuinfo(core) for core in (*LITTLE, *BIG)),
        "proc/meminfo": "".join(f"{name}: {size} kB\n" for name, size in MEMORY_KB.items()),
        "proc/sys/kernel/osrelease": f"{KERNEL}\n",
        "dev/dri/renderD129": "",
        LOCK: "",
        "sys/class/drm/renderD129/device/uevent": "DRIVER=RKNPU\nOF_NAME=npu\n",
        "sys/module/rknpu/version": f"{DRIVER}\n",
        "sys/kernel/debug/rknpu/version": f"RKNPU driver: v{DRIVER}\n",
    }
    files |= _frequency(f"sys/class/devfreq/{NPU}", 1_000_000_000, 300_000_000)
    files |= _frequency(f"sys/class/devfreq/{DDR}", 2_112_000_000, 528_000_000)
    cpu = "sys/devices/system/cpu"
    files |= {f"{cpu}/{name}": "0-7\n" for name in ("possible", "present", "online")}
    for cluster, cores in enumerate(CLUSTERS):
        first, last = map(int, cores.split("-"))
        maximum = 1_800_000 if first in LITTLE else 2_400_000
        files |= _clock(f"{cpu}/cpufreq/policy{first}", maximum) | {
            f"{cpu}/cpufreq/policy{first}/related_cpus": " ".join(map(str, range(first, last + 1))) + "\n"
        }
        for core in range(first, last + 1):
            files |= _topology(f"{cpu}/cpu{core}/topology", core, cluster, cores)
            files |= _clock(f"{cpu}/cpu{core}/cpufreq", maximum)
    return files


def write_chip(root: Path) -> None:
    for name, content in chip_files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / LOCK).parent.chmod(0o1777)


def _cpuinfo(core: int) -> str:
    variant, part = ("0x4", "0xd0b") if core in BIG else ("0x2", "0xd05")
    return (
        f"processor\t: {core}\nBogoMIPS\t: 48.00\nFeatures\t: {_FEATURES}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: {variant}\nCPU part\t: {part}\nCPU revision\t: 0\n"
    )


def _topology(folder: str, core: int, cluster: int, cores: str) -> dict[str, str]:
    return {
        f"{folder}/core_id": f"{core}\n",
        f"{folder}/physical_package_id": f"{cluster}\n",
        **{
            f"{folder}/{kind}_list": f"{cores}\n"
            for kind in ("core_siblings", "cluster_cpus", "package_cpus")
        },
    }


def _clock(folder: str, maximum: int) -> dict[str, str]:
    """cpufreq, in kHz."""
    return {
        f"{folder}/scaling_governor": "performance\n",
        f"{folder}/scaling_available_governors": "ondemand performance schedutil\n",
        f"{folder}/scaling_cur_freq": f"{maximum}\n",
        f"{folder}/scaling_max_freq": f"{maximum}\n",
        f"{folder}/cpuinfo_max_freq": f"{maximum}\n",
        f"{folder}/cpuinfo_min_freq": "408000\n",
    }


def _frequency(folder: str, maximum: int, minimum: int) -> dict[str, str]:
    """devfreq, in Hz."""
    return {
        f"{folder}/governor": "performance\n",
        f"{folder}/available_governors": "userspace performance simple_ondemand\n",
        f"{folder}/cur_freq": f"{maximum}\n",
        f"{folder}/max_freq": f"{maximum}\n",
        f"{folder}/min_freq": f"{minimum}\n",
        f"{folder}/available_frequencies": f"{minimum} {maximum}\n",
    }
