"""The checks of `rwkv-npu doctor`: findings about board, NPU, clocks and software, each with the command that mends it.

All files are read below a root folder (`rwkv_npu.board.hardware`). Nothing is changed, and the NPU is not opened.
"""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_npu.backends.memory import BUDGET_BYTES, plan_memory
from rwkv_npu.board import hardware
from rwkv_npu.board.hardware import ROOT, Clock, version_numbers
from rwkv_npu.board.npu import FILES
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.bundle import Artifact, Bundle
from rwkv_npu.toolkit import TARGETS, VERSIONS, status

OK, NOTE, BAD = "ok", "note", "bad"
LITE = "rknn-toolkit-lite2"
SMALL_CMA = 16 << 20
FEW_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One result. level: ok, note (harmless, but perhaps slow) or bad. mend: a command, or advice in words."""

    level: str
    what: str
    found: str
    mend: str = ""


def examine(root: Path = ROOT, bundle: Bundle | None = None) -> list[Finding]:
    """All findings, the most important first."""
    chip = hardware.soc(root)
    findings = list(_machine(root, chip))
    if chip is not None:
        findings += [*_driver(root), *_runtime(root), *_clocks(root), *_memory(root), _files()]
        if bundle is None:
            findings += _npu_memory(root)
    findings += [*_packages(chip), _numba(), *_toolkit()]
    if bundle is not None:
        findings += _bundle(root, chip, bundle)
    return findings


def _machine(root: Path, chip: str | None) -> Iterator[Finding]:
    numbers = hardware.core_numbers(root)
    cores = f"{hardware.cpu_model(root)}, {len(numbers)} cores"
    kernel = hardware.kernel(root) or platform.release()
    if chip is None:
        yield Finding(
            NOTE,
            "board",
            f"none: {cores}, kernel {kernel}",
            f"the NPU needs a board with a chip of {', '.join(TARGETS)}, the kernel's driver rknpu, and librknnrt.so "
            "in /usr/lib",
        )
        return
    level, mend = (OK, "") if chip in TARGETS else (BAD, f"rwkv_npu compiles for {', '.join(TARGETS)}")
    yield Finding(level, "board", f"{hardware.model(root) or 'unnamed'}, {chip}", mend)
    big = hardware.big_cores(root, among=numbers)
    told = ", ".join(map(str, big))
    large = "all alike" if big == numbers else f"large ones: {told}, which do the CPU's work"
    yield Finding(OK, "cores", f"{cores}; {large}")
    yield Finding(OK, "kernel", kernel)


def _driver(root: Path) -> Iterator[Finding]:
    version, nodes = hardware.driver_version(root), hardware.npu_nodes(root)
    image = "use an image with the vendor's kernel (5.10 or 6.1), which has the driver rknpu"
    if hardware.mainline_driver(root):
        yield Finding(
            BAD,
            "NPU driver",
            "rocket, the mainline kernel's: Rockchip's librknnrt cannot work with it",
            f"the CPU runs every model; for the NPU {image}",
        )
        return
    if version is None and not nodes:
        yield Finding(BAD, "NPU driver", "none", f"sudo modprobe rknpu; if there is none, {image}")
        return
    if version is None:
        yield Finding(
            NOTE,
            "NPU driver",
            "its version is shown to root only",
            "sudo cat /sys/kernel/debug/rknpu/version",
        )
    elif version_numbers(version) < version_numbers(hardware.OLDEST_DRIVER):
        yield Finding(NOTE, "NPU driver", version, f"{hardware.OLDEST_DRIVER} or later is advised: {image}")
    else:
        yield Finding(OK, "NPU driver", version)
    if not nodes:
        yield Finding(
            BAD,
            "NPU node",
            "neither /dev/dri/renderD129 nor /dev/rknpu",
            "sudo modprobe rknpu; in a container, start it with --device /dev/dri/renderD129",
        )
    for node in nodes:
        shown = f"/{node.relative_to(root)}"
        if hardware.may_use(node):
            yield Finding(OK, "NPU node", shown)
        else:
            yield Finding(
                BAD,
                "NPU node",
                f"{shown} is closed to this user",
                "sudo usermod -aG render,video $USER, and log in again",
            )


def _runtime(root: Path) -> Iterator[Finding]:
    library = hardware.runtime_library(root)
    if library is None:
        yield Finding(
            BAD,
            "librknnrt",
            "none in /usr/lib",
            "install your image's package of it, or copy librknnrt.so (in rknpu2/runtime of Rockchip's rknn-toolkit2 "
            "repository) to /usr/lib",
        )
        return
    version, shown = hardware.runtime_version(library), f"/{library.relative_to(root)}"
    if version is None:
        yield Finding(
            NOTE, "librknnrt", f"{shown}, version unknown", f"strings {shown} | grep 'librknnrt version'"
        )
    elif version_numbers(version) < version_numbers(hardware.OLDEST_RUNTIME):
        yield Finding(
            NOTE,
            "librknnrt",
            f"{version} ({shown})",
            f"{hardware.OLDEST_RUNTIME} or later is advised: older ones were seen to compute zeros; replace the file "
            "by a newer one",
        )
    else:
        yield Finding(OK, "librknnrt", f"{version} ({shown}), reads artifacts of toolkit {version} and older")


def _clocks(root: Path) -> Iterator[Finding]:
    found = hardware.clocks(root)
    for clock in found:
        yield _clock(clock, root)
    for name, shown in _HIDDEN.items():
        if all(clock.name != name for clock in found):
            look = f"sudo grep -i {name} /sys/kernel/debug/clk/clk_summary"
            yield Finding(NOTE, f"{name} clock", shown, look)


_HIDDEN = {
    "ddr": "not shown, this system has no DMC (/sys/class/devfreq/dmc): the memory keeps the clock that the bootloader "
    "has set. At 528 MHz writing text takes twice as long; then an image with a newer bootloader is needed",
    "npu": "not shown by this kernel",
}
_WHY = {
    "ddr": "writing text is bound by it: at 528 MHz it takes twice as long",
    "npu": "reading prompts is bound by it",
}


def _clock(clock: Clock, root: Path) -> Finding:
    what = f"{clock.name} clock"
    shown = f"{clock.mhz or '?'} of {clock.max_mhz or '?'} MHz, governor {clock.governor or 'unknown'}"
    below = bool(clock.mhz and clock.max_mhz and clock.mhz < clock.max_mhz)
    if clock.governor == "performance" and not below:
        return Finding(OK, what, shown)
    file = "scaling_governor" if clock.name.startswith("cpu") else "governor"
    path = f"/{clock.folder.relative_to(root)}/{file}"
    why = _WHY.get(clock.name, "the CPU's work is bound by it")
    bad = clock.name == "ddr" and below
    return Finding(BAD if bad else NOTE, what, f"{shown}: {why}", f"echo performance | sudo tee {path}")


def _memory(root: Path) -> Iterator[Finding]:
    memory = hardware.memory(root)
    if "MemTotal" in memory:
        free = memory.get("MemAvailable", 0)
        yield Finding(OK, "memory", f"{free / 1e9:.1f} of {memory['MemTotal'] / 1e9:.1f} GB free")
    if "CmaTotal" in memory:
        small = memory["CmaTotal"] < SMALL_CMA
        mend = (
            "without an IOMMU the NPU's memory comes from it: add cma=256M to the kernel's command line"
            if small
            else ""
        )
        yield Finding(
            NOTE if small else OK,
            "CMA",
            f"{memory.get('CmaFree', 0) / 1e6:.0f} of {memory['CmaTotal'] / 1e6:.0f} MB free",
            mend,
        )


def _npu_memory(root: Path) -> Iterator[Finding]:
    """Report the memory that the NPU can use. `_room` compares it with the needs of a bundle."""
    free = hardware.memory(root).get("MemAvailable")
    if free is not None:
        most = BUDGET_BYTES / 1e9
        shown = f"{min(free / 1e9, most):.1f} GB free for a model (a process can have {most:.1f})"
        yield Finding(OK, "NPU memory", shown)


def _files() -> Finding:
    """Check the hard limit of open files. Opening the NPU raises the soft limit to it.

    The driver needs a file descriptor for each buffer.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY or limit >= FEW_FILES:
        return Finding(OK, "open files", "enough")
    mend = f'echo "* hard nofile {FILES}" | sudo tee /etc/security/limits.d/npu.conf, and log in again'
    return Finding(NOTE, "open files", f"at most {limit}: large models may need more", mend)


def _packages(chip: str | None) -> Iterator[Finding]:
    yield Finding(OK, "Python", f"{platform.python_version()} on {platform.machine()}")
    if chip is None:
        return
    try:
        yield Finding(OK, LITE, importlib.metadata.version(LITE))
    except importlib.metadata.PackageNotFoundError:
        yield Finding(OK, LITE, "not installed, nor needed: librknnrt's own interface drives the NPU")


def _numba() -> Finding:
    """Check the backend numba, and whether it uses all that the processor has."""
    from rwkv_npu import kernels

    try:
        version = importlib.metadata.version("numba") if kernels.available() else None
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None:
        slower = "not installed: the CPU runs through ONNX Runtime, which is slower"
        return Finding(NOTE, "numba", slower, "in the clone of rwkv_npu: pip install '.[fast]'")
    from rwkv_npu.kernels import instruction_sets

    unset = "unset NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX"
    try:
        used, best = instruction_sets.current(), instruction_sets.best()
    except BackendError as error:
        return Finding(BAD, "numba", f"{version}: {error}", unset)
    found = f"{version}: the CPU runs compiled code, {instruction_sets.describe()}"
    if used is best:
        return Finding(OK, "numba", found)
    return Finding(NOTE, "numba", f"{found}, where this processor has {best.name}", unset)


def _toolkit() -> Iterator[Finding]:
    working = [environment for environment in status() if environment.problem is None]
    install = "rwkv-npu toolkit install"
    if working:
        versions = ", ".join(environment.version for environment in working)
        yield Finding(
            OK, "compiler", f"{versions}: rwkv-npu convert compiles, and --backend rknn-sim simulates"
        )
    else:
        yield Finding(
            NOTE, "compiler", "not installed; converting and simulating need it, running does not", install
        )


def _bundle(root: Path, chip: str | None, bundle: Bundle) -> Iterator[Finding]:
    manifest = bundle.manifest
    target = chip or "rk3588"
    artifacts = [a for a in manifest.artifacts if a.target == target and a.fusion == manifest.fusion]
    again = f"rwkv-npu convert {shlex.quote(manifest.checkpoint)} -o {shlex.quote(str(bundle.path))}"
    if not manifest.cpu:  # an exported bundle cannot be extended
        again = f"export the whole bundle again, after rwkv-npu convert {shlex.quote(manifest.checkpoint)}"
    if not artifacts:
        others = ", ".join(sorted({a.target for a in manifest.artifacts}))
        shown = f"none for the {target}" + (f"; the bundle has some for: {others}" if others else "")
        yield Finding(BAD, "artifacts", shown, f"{again} --target {target}")
        return
    toolkit = max((artifact.toolkit for artifact in artifacts), key=version_numbers)
    rows = sorted({artifact.rows for artifact in artifacts})
    shown = f"{len(artifacts)} for the {target}, rows {', '.join(map(str, rows))}, by toolkit {toolkit or 'unknown'}"
    yield Finding(OK, "artifacts", shown)
    if chip is not None:
        yield from _fit(root, toolkit, again)
    yield _room(root, chip, bundle, artifacts, again)


def _fit(root: Path, toolkit: str, again: str) -> Iterator[Finding]:
    """Check that librknnrt is not older than the compiler of the artifacts: it cannot read newer ones."""
    library = hardware.runtime_library(root)
    runtime = hardware.runtime_version(library) if library else None
    if runtime is None or not toolkit:
        return
    if version_numbers(runtime) >= version_numbers(toolkit):
        yield Finding(OK, "versions", f"librknnrt {runtime} reads the artifacts of toolkit {toolkit}")
        return
    older = next(
        (version for version in VERSIONS if version_numbers(version) <= version_numbers(runtime)), None
    )
    yield Finding(
        BAD,
        "versions",
        f"librknnrt {runtime} cannot load this bundle: toolkit {toolkit} has compiled its artifacts, which need "
        f"librknnrt {toolkit} or later",
        f"on a PC: rwkv-npu toolkit install --version {older}; {again} --toolkit {older}"
        if older
        else f"replace librknnrt.so by version {VERSIONS[-1]} or later",
    )


def _room(root: Path, chip: str | None, bundle: Bundle, artifacts: list[Artifact], again: str) -> Finding:
    plan = plan_memory(bundle.manifest, artifacts)
    free = hardware.memory(root).get("MemAvailable") if chip else None
    if not plan.fits:
        return Finding(BAD, "NPU memory", plan.arithmetic(), f"{again} --rows 32")
    if free is not None and plan.total > free:
        shown = f"{plan.arithmetic()}; {free / 1e9:.2f} GB are free"
        return Finding(BAD, "NPU memory", shown, f"end other programs, or {again} --rows 32")
    shown = f"; {free / 1e9:.1f} GB are free" if free is not None else ""
    return Finding(OK, "NPU memory", plan.arithmetic() + shown)
