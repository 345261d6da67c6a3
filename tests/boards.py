"""Trees of files like those of an RK3588 board, for code that reads files below a root."""

from __future__ import annotations

from pathlib import Path

FILES: dict[str, str | bytes] = {
    "proc/device-tree/compatible": b"radxa,rock-5b\0rockchip,rk3588\0",
    "proc/device-tree/model": b"Radxa ROCK 5B\0",
    "proc/sys/kernel/osrelease": "6.1.43-15-rk2312",
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nCPU part\t: {'0xd05' if n < 4 else '0xd0b'}\n\n" for n in range(8)
    ),
    **{f"sys/devices/system/cpu/cpu{n}/cpu_capacity": "530" if n < 4 else "1024" for n in range(8)},
    "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\nCmaTotal: 16384 kB\nCmaFree: 8192 kB\n",
    "sys/module/rknpu/version": "0.9.8",
    "sys/class/drm/renderD128/device/uevent": "DRIVER=panthor",
    "sys/class/drm/renderD129/device/uevent": "DRIVER=RKNPU\nOF_NAME=npu",
    "dev/dri/renderD128": "",
    "dev/dri/renderD129": "",
    "usr/lib/librknnrt.so": b"\x7fELF...\0librknnrt version: 2.3.2 (429f97ae6b@2025-04-09T09:09:27)\0...",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "performance",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1800000",
    "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1800000",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "performance",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "2400000",
    "sys/devices/system/cpu/cpufreq/policy4/cpuinfo_max_freq": "2400000",
    "sys/class/devfreq/dmc/governor": "performance",
    "sys/class/devfreq/dmc/cur_freq": "2112000000",
    "sys/class/devfreq/dmc/available_frequencies": "528000000 1068000000 1560000000 2112000000",
    "sys/class/devfreq/fdab0000.npu/governor": "rknpu_ondemand",
    "sys/class/devfreq/fdab0000.npu/cur_freq": "1000000000",
    "sys/class/devfreq/fdab0000.npu/available_frequencies": "200000000 600000000 1000000000",
}


def plant(root: Path, changes: dict[str, str | bytes | None] | None = None) -> Path:
    """Write the tree of a healthy board below `root`, with `changes`: None leaves a file out."""
    for name, content in {**FILES, **(changes or {})}.items():
        if content is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root
