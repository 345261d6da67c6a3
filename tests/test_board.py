"""What is read of a board, from trees of files such as boards show."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_npu import board
from tests.boards import plant


def test_a_board_is_read(tmp_path: Path) -> None:
    root = plant(tmp_path)
    assert board.soc(root) == "rk3588"
    assert board.model(root) == "Radxa ROCK 5B"
    assert board.kernel(root) == "6.1.43-15-rk2312"
    assert board.cpu_model(root) == "4 x Cortex-A76 + 4 x Cortex-A55"
    assert board.big_cores(root) == [4, 5, 6, 7]
    assert board.driver_version(root) == "0.9.8"
    assert board.runtime_library(root) == root / "usr/lib/librknnrt.so"
    assert board.runtime_version(root / "usr/lib/librknnrt.so") == "2.3.2"
    build = board.runtime_build(root / "usr/lib/librknnrt.so")
    assert build == "2.3.2 (429f97ae6b@2025-04-09T09:09:27)"
    assert board.npu_nodes(root) == [root / "dev/dri/renderD129"]
    assert board.memory(root)["CmaFree"] == 8192 * 1024
    speeds = {clock.name: (clock.governor, clock.mhz, clock.max_mhz) for clock in board.clocks(root)}
    assert speeds == {
        "cpu0": ("performance", 1800, 1800),
        "cpu4": ("performance", 2400, 2400),
        "ddr": ("performance", 2112, 2112),
        "npu": ("rknpu_ondemand", 1000, 1000),
    }


def test_a_machine_that_shows_nothing_is_no_board(tmp_path: Path) -> None:
    assert board.soc(tmp_path) is board.model(tmp_path) is board.driver_version(tmp_path) is None
    assert board.runtime_library(tmp_path) is None
    assert board.clocks(tmp_path) == board.npu_nodes(tmp_path) == board.big_cores(tmp_path) == []
    assert board.memory(tmp_path) == {}


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
    assert board.soc(plant(tmp_path, {"proc/device-tree/compatible": compatible})) == chip


@pytest.mark.parametrize("content", [b"", b"a stripped library"])
def test_a_library_without_a_version_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "librknnrt.so").write_bytes(content)
    assert board.runtime_version(tmp_path / "librknnrt.so") is None
