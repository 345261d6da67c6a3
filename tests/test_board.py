"""Properties of a board, read from trees of files like those of real boards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rwkv_npu.backends import ort
from rwkv_npu.board import hardware
from tests.boards import plant


def test_properties_of_a_board(tmp_path: Path) -> None:
    root = plant(tmp_path)
    assert hardware.soc(root) == "rk3588"
    assert hardware.model(root) == "Radxa ROCK 5B"
    assert hardware.kernel(root) == "6.1.43-15-rk2312"
    assert hardware.cpu_model(root) == "4 x Cortex-A76 + 4 x Cortex-A55"
    assert hardware.big_cores(root, among=range(8)) == [4, 5, 6, 7]
    assert hardware.driver_version(root) == "0.9.8"
    assert hardware.runtime_library(root) == root / "usr/lib/librknnrt.so"
    assert hardware.runtime_version(root / "usr/lib/librknnrt.so") == "2.3.2"
    build = hardware.runtime_build(root / "usr/lib/librknnrt.so")
    assert build == "2.3.2 (429f97ae6b@2025-04-09T09:09:27)"
    assert hardware.npu_nodes(root) == [root / "dev/dri/renderD129"]
    assert hardware.memory(root)["CmaFree"] == 8192 * 1024
    speeds = {clock.name: (clock.governor, clock.mhz, clock.max_mhz) for clock in hardware.clocks(root)}
    assert speeds == {
        "cpu0": ("performance", 1800, 1800),
        "cpu4": ("performance", 2400, 2400),
        "ddr": ("performance", 2112, 2112),
        "npu": ("rknpu_ondemand", 1000, 1000),
    }


def test_a_machine_that_shows_nothing_is_no_board(tmp_path: Path) -> None:
    assert hardware.soc(tmp_path) is hardware.model(tmp_path) is hardware.driver_version(tmp_path) is None
    assert hardware.runtime_library(tmp_path) is None
    assert hardware.clocks(tmp_path) == hardware.npu_nodes(tmp_path) == hardware.core_numbers(tmp_path) == []
    assert hardware.big_cores(tmp_path) == sorted(os.sched_getaffinity(0))
    assert hardware.memory(tmp_path) == {}


@pytest.mark.parametrize(
    ("compatible", "chip"),
    [
        (b"xunlong,orangepi-5\0rockchip,rk3588s\0", "rk3588"),
        (b"friendlyelec,nanopi-r5s\0rockchip,rk3568\0", "rk3568"),
        (b"raspberrypi,4-model-b\0brcm,bcm2711\0", None),
        (b"rockchip,px30\0", None),
    ],
)
def test_chips(tmp_path: Path, compatible: bytes, chip: str | None) -> None:
    assert hardware.soc(plant(tmp_path, {"proc/device-tree/compatible": compatible})) == chip


@pytest.mark.parametrize("content", [b"", b"a stripped library"])
def test_a_library_without_a_version_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "librknnrt.so").write_bytes(content)
    assert hardware.runtime_version(tmp_path / "librknnrt.so") is None


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (("2.3.2 (x)", "0.9.8"), ""),
        (("2.2.0", "0.9.8"), "librknnrt 2.2.0 is older than the recommended 2.3.0: if anything fails"),
        (("2.3.2", "0.9.8", "2.5.0"), "librknnrt 2.3.2 is older than the artifacts' compiler, 2.5.0: if"),
        (("2.5.0", "0.9.2"), "the NPU's driver 0.9.2 is older than the recommended 0.9.6: if anything fails"),
        ((None, None), ""),  # not shown to this user: the self-test decides
    ],
)
def test_outdated_warns_of_old_versions(versions: tuple[str | None, ...], expected: str) -> None:
    warning = hardware.outdated(*versions)
    assert warning.startswith(expected) and bool(warning) == bool(expected)


# -- large and small cores -------------------------------------------------------------------------------


def cores_of(root: Path, *, parts: str = "", capacities: str = "", mhz: str = "") -> Path:
    """A machine with a letter or number for each core, its kind; "" shows no kinds."""
    count = max(len(parts), len(capacities.split()), len(mhz.split()))
    lines = [f"processor : {n}\n" + (f"CPU part : {parts[n]}\n" if parts else "") for n in range(count)]
    files = {"proc/cpuinfo": "\n".join(lines)}
    for folder, values, unit in (("cpu_capacity", capacities, ""), ("cpufreq/cpuinfo_max_freq", mhz, "000")):
        for n, value in enumerate(values.split()):
            files[f"sys/devices/system/cpu/cpu{n}/{folder}"] = value + unit
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("shown", "big"),
    [
        ({"parts": "LLLLBBBB", "capacities": "530 530 530 530 1024 1024 1008 1008"}, [4, 5, 6, 7]),
        ({"parts": "LLLLBBBB", "mhz": "1800 1800 1800 1800 2256 2256 2400 2400"}, [4, 5, 6, 7]),
        ({"parts": "BBLL", "mhz": "2208 2208 2112 2112"}, [0, 1]),  # nearly the same clock, another kind
        ({"parts": "LLLL", "mhz": "1416 1416 1416 1416"}, [0, 1, 2, 3]),
        ({"parts": "LLBB"}, [0, 1, 2, 3]),
        ({"mhz": "5000 5200 3800 3800"}, [0, 1]),
        ({"mhz": "3000 3000"}, [0, 1]),
    ],
)
def test_the_fastest_kind_of_cores(tmp_path: Path, shown: dict[str, str], big: list[int]) -> None:
    root = cores_of(tmp_path, **shown)
    assert hardware.big_cores(root, among=hardware.core_numbers(root)) == big


def test_only_cores_that_may_be_used_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cores_of(tmp_path, parts="LLLLBBBB", capacities="530 530 530 530 1024 1024 1024 1024")
    for allowed, big in (({0, 5, 7}, [5, 7]), ({2, 1}, [1, 2]), ({6}, [6])):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert hardware.big_cores(root) == big


def test_threads_by_default_are_one_a_large_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "big_cores", lambda: [4, 5, 6])
    monkeypatch.setattr(hardware, "core_numbers", lambda: list(range(7)))
    assert ort._default_threads() == 3
    monkeypatch.setattr(hardware, "core_numbers", lambda: [4, 5, 6])
    assert ort._default_threads() == 0  # its own choice
