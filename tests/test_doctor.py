"""The doctor on trees of files: a healthy board, and one for each thing that can be wrong."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rwkv_npu.board import hardware
from rwkv_npu.cli import diagnosis
from rwkv_npu.cli.diagnosis import BAD, NOTE, OK, Finding, examine
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.kernels import instruction_sets
from tests.boards import plant
from tests.fake_rknnlite import fake_bundle
from tests.tiny import run_main, write_model

DDR = "sys/class/devfreq/dmc"
POLICY = "sys/devices/system/cpu/cpufreq/policy4"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    spec = write_model(folder / "model.pth", "7")
    with pytest.MonkeyPatch.context() as patch:
        return fake_bundle(patch, folder / "model.pth", spec)


@pytest.fixture
def with_lite(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.3.2" if name == diagnosis.LITE else version(name)
    )


def found(root: Path, what: str, bundle: Path | None = None) -> Finding:
    matching = [f for f in examine(root, open_bundle(bundle) if bundle else None) if f.what == what]
    assert len(matching) == 1, what
    return matching[0]


def test_a_healthy_board_has_nothing_to_mend(tmp_path: Path, bundle: Path, with_lite: None) -> None:
    root = plant(
        tmp_path, {f"{DDR}.npu/governor": None, "sys/class/devfreq/fdab0000.npu/governor": "performance"}
    )
    findings = examine(root, open_bundle(bundle))
    troubles = [f for f in findings if f.level != OK and f.what not in ("compiler", "versions")]
    assert troubles == []
    assert {f.what: f.found for f in findings}["board"] == "Radxa ROCK 5B, rk3588"
    assert "large ones: 4, 5, 6, 7, which do the CPU's work" in found(root, "cores").found


@pytest.mark.parametrize(
    ("changes", "what", "level", "says", "mend"),
    [
        (
            {"proc/device-tree/compatible": b"rockchip,rk3399\0"},
            "board",
            BAD,
            "rk3399",
            "compiles for rk3588",
        ),
        ({"sys/module/rknpu/version": "0.8.2"}, "NPU driver", NOTE, "0.8.2", "0.9.6 or later"),
        (
            {"sys/module/rknpu/version": None},
            "NPU driver",
            NOTE,
            "root only",
            "sudo cat /sys/kernel/debug/rknpu",
        ),
        (
            {"sys/module/rknpu/version": None, "dev/dri/renderD129": None},
            "NPU driver",
            BAD,
            "none",
            "sudo modprobe rknpu",
        ),
        (
            {
                "sys/module/rknpu/version": None,
                "dev/dri/renderD129": None,
                "sys/class/accel/accel0/device/uevent": "DRIVER=rocket\n",
            },
            "NPU driver",
            BAD,
            "rocket, the mainline kernel's: Rockchip's librknnrt cannot work with it",
            "vendor's kernel",
        ),
        ({"dev/dri/renderD129": None}, "NPU node", BAD, "neither", "--device /dev/dri/renderD129"),
        ({"usr/lib/librknnrt.so": None}, "librknnrt", BAD, "none in /usr/lib", "copy librknnrt.so"),
        (
            {"usr/lib/librknnrt.so": b"librknnrt version: 2.2.0 (x)"},
            "librknnrt",
            NOTE,
            "2.2.0 (/usr/lib/librknnrt.so)",
            "compute zeros",
        ),
        (
            {"usr/lib/librknnrt.so": b"\x7fELF"},
            "librknnrt",
            NOTE,
            "version unknown",
            "strings /usr/lib/librknnrt.so",
        ),
        (
            {f"{DDR}/cur_freq": "528000000", f"{DDR}/governor": "dmc_ondemand"},
            "ddr clock",
            BAD,
            "528 of 2112 MHz, governor dmc_ondemand: writing text is bound by it",
            "echo performance | sudo tee /sys/class/devfreq/dmc/governor",
        ),
        (
            {f"{DDR}/cur_freq": None, f"{DDR}/governor": None, f"{DDR}/available_frequencies": None},
            "ddr clock",
            NOTE,
            "has no DMC (/sys/class/devfreq/dmc): the memory keeps the clock that the bootloader has set",
            "sudo grep -i ddr /sys/kernel/debug/clk/clk_summary",
        ),
        (
            {
                f"sys/class/devfreq/fdab0000.npu/{name}": None
                for name in ("cur_freq", "governor", "available_frequencies")
            },
            "npu clock",
            NOTE,
            "not shown by this kernel",
            "sudo grep -i npu /sys/kernel/debug/clk/clk_summary",
        ),
        (
            {"sys/class/devfreq/fdab0000.npu/cur_freq": "200000000"},
            "npu clock",
            NOTE,
            "200 of 1000 MHz",
            "sudo tee /sys/class/devfreq/fdab0000.npu/governor",
        ),
        (
            {f"{POLICY}/scaling_governor": "ondemand", f"{POLICY}/scaling_cur_freq": "408000"},
            "cpu4 clock",
            NOTE,
            "408 of 2400 MHz, governor ondemand",
            f"sudo tee /{POLICY}/scaling_governor",
        ),
        (
            {"proc/meminfo": "MemTotal: 8000000 kB\nCmaTotal: 4096 kB\nCmaFree: 0 kB\n"},
            "CMA",
            NOTE,
            "0 of 4 MB",
            "cma=256M",
        ),
    ],
)
def test_each_problem_has_its_remedy(
    tmp_path: Path, changes: dict[str, str | bytes | None], what: str, level: str, says: str, mend: str
) -> None:
    finding = found(plant(tmp_path, changes), what)
    assert finding.level == level and says in finding.found and mend in finding.mend


def test_a_node_that_this_user_may_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(hardware.os, "access", lambda path, mode: False)
    finding = found(plant(tmp_path), "NPU node")
    assert (finding.level, finding.found) == (BAD, "/dev/dri/renderD129 is closed to this user")
    assert "usermod -aG render" in finding.mend


def test_a_low_limit_of_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.resource, "getrlimit", lambda _: (1024, 1024))
    finding = found(plant(tmp_path), "open files")
    assert finding.level == NOTE and "at most 1024" in finding.found and "limits.d" in finding.mend


def test_rknnlite_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a Python that it has wheels for."""
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    finding = found(plant(tmp_path), diagnosis.LITE)
    assert (finding.level, finding.mend) == (OK, "") and "nor needed" in finding.found
    assert found(plant(tmp_path), "Python").level == OK


@pytest.mark.parametrize(
    ("runtime", "level", "mend"),
    [
        ("2.5.0", OK, ""),
        ("2.3.2", BAD, "toolkit install --version 2.3.2; rwkv-npu convert model.pth"),
        ("2.2.1", BAD, "--toolkit 2.2.0"),
        ("1.5.2", BAD, "replace librknnrt.so by version 2.2.0 or later"),
    ],
)
def test_versions_are_compared_with_the_bundle(
    tmp_path: Path, bundle: Path, runtime: str, level: str, mend: str
) -> None:
    root = plant(tmp_path, {"usr/lib/librknnrt.so": f"librknnrt version: {runtime} (x)"})
    finding = found(root, "versions", bundle)
    assert finding.level == level and mend in finding.mend and runtime in finding.found
    assert ("cannot load this bundle" in finding.found) == (level == BAD)


def test_the_newest_artifact_decides_what_a_runtime_must_read(tmp_path: Path, bundle: Path) -> None:
    opened = open_bundle(bundle)
    first, *others = opened.manifest.artifacts
    opened.manifest.artifacts[:] = [replace(first, toolkit="2.2.0"), *others]  # the others are of 2.5.0
    (finding,) = (f for f in examine(plant(tmp_path), opened) if f.what == "versions")
    assert finding.level == BAD and "need librknnrt 2.5.0 or later" in finding.found


def test_a_board_shows_its_runtime_and_the_memory_of_the_npu(tmp_path: Path, bundle: Path) -> None:
    root = plant(tmp_path)
    shown = "2.3.2 (/usr/lib/librknnrt.so), reads artifacts of toolkit 2.3.2 and older"
    assert found(root, "librknnrt").found == shown
    assert found(root, "NPU memory").found == "3.8 GB free for a model (a process can have 3.8)"
    assert found(root, "NPU memory", bundle).found.endswith("of NPU memory (of 3.8); 12.3 GB are free")
    little = plant(tmp_path, {"proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 1048576 kB\n"})
    assert found(little, "NPU memory").found.startswith("1.1 GB free for a model")


def test_a_bundle_has_to_fit_the_chip_and_its_memory(tmp_path: Path, bundle: Path) -> None:
    other = plant(tmp_path / "other", {"proc/device-tree/compatible": b"rockchip,rk3576\0"})
    finding = found(other, "artifacts", bundle)
    assert (
        finding.level == BAD
        and "the bundle has some for: rk3588" in finding.found
        and "--target rk3576" in finding.mend
    )
    full = plant(tmp_path / "full", {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 8 kB\n"})
    finding = found(full, "NPU memory", bundle)
    assert finding.level == BAD and "0.00 GB are free" in finding.found and "--rows 32" in finding.mend
    assert found(plant(tmp_path / "good"), "NPU memory", bundle).level == OK


def test_a_pc_is_told_about_boards_and_the_simulator(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_main(capsys, "doctor", "-m", bundle)
    assert status == 0 and err == ""
    words = " ".join(out.split())
    assert re.search(r"note board none: .* needs a board with a chip of rk3588, .*rknpu.*librknnrt", words)
    assert "--backend rknn-sim computes what an NPU would" in words
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    status, out, _ = run_main(capsys, "doctor", "--json")
    levels = {finding["level"] for finding in json.loads(out)}
    assert status == 0 and levels <= {OK, NOTE}


def test_a_board_that_lacks_something_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
) -> None:
    root = plant(tmp_path, {"usr/lib/librknnrt.so": None})
    monkeypatch.setattr(
        "rwkv_npu.cli.diagnosis.examine", lambda root=root, bundle=None: examine(root, bundle)
    )
    monkeypatch.setattr(hardware, "soc", lambda root=None: "rk3588")
    status, out, _ = run_main(capsys, "doctor")
    assert status == 1 and re.search(r"BAD +librknnrt .*\n +-> install", out)


def test_numba_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found(plant(tmp_path), "numba")
    assert finding.level == OK and importlib.metadata.version("numba") in finding.found
    assert instruction_sets.describe() in finding.found

    config = importlib.import_module("numba.core.config")
    monkeypatch.setattr(config, "CPU_FEATURES", "+")
    finding = found(tmp_path, "numba")
    better = instruction_sets.best() is not instruction_sets.SETS[-1]
    assert finding.level == (NOTE if better else OK) and "int8 products: plain code" in finding.found
    monkeypatch.setattr(config, "CPU_FEATURES", "+a-feature-of-no-processor")
    finding = found(tmp_path, "numba")
    assert finding.level == BAD and "which this processor lacks" in finding.found

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    finding = found(tmp_path, "numba")
    assert finding.level == NOTE and "pip install '.[fast]'" in finding.mend


def test_a_board_prints_its_clocks_as_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = plant(tmp_path, {f"{POLICY}/scaling_governor": "ondemand", f"{POLICY}/scaling_cur_freq": "408000"})
    monkeypatch.setattr(
        "rwkv_npu.cli.diagnosis.examine", lambda root=root, bundle=None: examine(root, bundle)
    )
    _, out, _ = run_main(capsys, "doctor")
    assert re.search(r"^note cpu4 clock +408 of 2400 MHz, governor ondemand", out, re.M)
    # A command stays whole, so that it can be copied.
    assert re.search(rf"^ +-> echo performance \| sudo tee /{POLICY}/scaling_governor$", out, re.M)


def test_nothing_is_changed(tmp_path: Path, bundle: Path) -> None:
    root = plant(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    for path in before:
        if path.is_file():
            os.chmod(path, 0o444)
    examine(root, open_bundle(bundle))
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == before


def test_a_missing_bundle_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run_main(capsys, "doctor", "-m", tmp_path)
    assert status == 1 and "is no bundle" in err
