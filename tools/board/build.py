"""Makes the emulated board, layer by layer, in the user's cache folder.

    wheel-KEY     this project's wheel, from the working tree
    debian-KEY    Debian's arm64 packages, unpacked
    wheels-KEY    the wheels for aarch64 that the project's wheel asks for, and RKNNLite; in fast/, numba and llvmlite
    lite-KEY      another version of RKNNLite
    standin-KEY   librknnrt.so, for this machine and for aarch64
    board-KEY     all of them together: root/, project/, bin/

KEY is a digest of a layer's inputs. A layer is made under another name and renamed when it is complete. After an
interruption only the unfinished layer is made again; downloads stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from email.parser import Parser
from pathlib import Path

from rwkv_npu.errors import RwkvNpuError
from rwkv_npu.formats.files import waited_for
from rwkv_npu.toolkit.environment import cache_dir
from tools.board.chip import chip_files, write_chip

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STANDIN = Path(__file__).resolve().parent / "standin"

QEMU = "qemu-aarch64-static"
CPU = "cortex-a76"  # the RK3588's large core, so that a wheel with newer instructions fails here too
PYTHON = "python3.11"
FAST = ("numba", "llvmlite")  # they compile for minutes under qemu, so only python-numba has them
DEBIAN = (PYTHON, "libstdc++6", "libgomp1")
LITE, LITE_VERSION = "rknn-toolkit-lite2", "2.5.0"  # the newest, as pip installs it on a board
PLATFORMS = (
    "manylinux2014",
    "manylinux_2_17",
    "manylinux_2_26",
    "manylinux_2_27",
    "manylinux_2_28",
    "manylinux_2_34",
)

# Programs, and the Debian packages that bring them.
PROGRAMS = {
    QEMU: ("qemu-user-static",),
    "gcc": ("gcc", "libc6-dev"),
    "aarch64-linux-gnu-gcc": ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"),
    "dpkg-deb": ("dpkg",),
}
COMPILERS = {"x86_64": "gcc", "aarch64": "aarch64-linux-gnu-gcc"}
FLAGS = (
    *("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread", "-O3"),
    *(
        "-fassociative-math",
        "-fno-signed-zeros",
        "-fno-trapping-math",
    ),  # sums may be reordered, and so vectorised
)

KEPT = 8  # layers of a kind: more than one working tree may use them

Say = Callable[[str], None]


class BoardError(RwkvNpuError):
    """The board cannot be made: one line that says what is missing."""


def folder() -> Path:
    return cache_dir() / "board"


def make(say: Say) -> Path:
    """Make whatever is missing and return the board's folder. Raises BoardError."""
    with _alone(say):
        _install_programs(say)
        wheel = _wheel(say)
        debian = _debian(say)
        wheels = _wheels(wheel, say)
        return _assemble(wheel, debian, wheels, _standin(say), say)


def make_standin(say: Say) -> Path:
    """Make the stand-in alone: the folder with x86_64/librknnrt.so and aarch64/librknnrt.so. Raises BoardError."""
    with _alone(say):
        _install_programs(say)
        return _standin(say)


def make_lite(version: str, say: Say) -> Path:
    """Another version of RKNNLite, alone: a folder for the front of the board's `sys.path`. Raises BoardError."""
    with _alone(say):
        return _install("lite", [f"{LITE}=={version}"], say, "--no-deps")


def _install_programs(say: Say) -> None:
    """Install missing programs, which needs root. Raises BoardError."""
    if platform.machine() != "x86_64":
        raise BoardError(f"the emulated board is made on x86-64, and this machine is {platform.machine()}")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    packages = [package for program in missing for package in PROGRAMS[program]]
    command = f"apt-get install {' '.join(packages)}"
    if os.geteuid() or shutil.which("apt-get") is None:
        raise BoardError(f"the emulated board needs {', '.join(missing)}: run, as root, {command}")
    say(f"installing {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-qq"], env=environment)
    _run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages], env=environment)


# -- layers ----------------------------------------------------------------------------------------------


def _wheel(say: Say) -> Path:
    """This project's wheel."""
    files = [REPOSITORY / "pyproject.toml", *sorted((REPOSITORY / "rwkv_npu").rglob("*"))]
    sources = [path for path in files if path.is_file() and "__pycache__" not in path.parts]

    def fill(place: Path) -> None:
        say("building this project's wheel")
        _pip("wheel", "--no-deps", "--wheel-dir", place, REPOSITORY)

    (wheel,) = _layer("wheel", _digest_files(sources), fill).glob("*.whl")
    return wheel


def _debian(say: Say) -> Path:
    def fill(place: Path) -> None:
        archives = _download_debian(say)
        say(f"unpacking {len(archives)} arm64 packages")
        for archive in archives:
            _run(["dpkg-deb", "-x", archive, place])

    return _layer("debian", _digest(*DEBIAN), fill)


def _download_debian(say: Say) -> list[Path]:
    """Download DEBIAN and its dependencies, from the host's apt sources, with package lists of this folder."""
    sources = [Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")]
    source = next((path for path in sources if path.exists() and path.stat().st_size), None)
    if source is None:
        raise BoardError("the emulated board needs apt's sources of Debian 12, and this machine has none")
    place = folder() / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "status").touch()  # nothing is installed there
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
        "Dir::Cache": place / "cache",
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": place / "state",
        "Dir::State::status": place / "status",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    say("downloading Debian's arm64 packages")
    _run([*apt, "update"])
    _run([*apt, "install", "-y", "--no-install-recommends", "--download-only", *DEBIAN])
    return sorted((place / "cache" / "archives").glob("*.deb"))


def _wheels(wheel: Path, say: Say) -> Path:
    """The requirements of the project's wheel, RKNNLite, and the extra `fast` in a folder of its own."""
    wanted = [*_requirements(wheel), *_requirements(wheel, "fast"), f"{LITE}=={LITE_VERSION}"]
    return _install("wheels", wanted, say, apart=FAST)


def _install(kind: str, wanted: Sequence[str], say: Say, *options: str, apart: Sequence[str] = ()) -> Path:
    """A layer of wheels for aarch64, unpacked. The packages `apart` go to its folder fast/."""

    def fill(place: Path) -> None:
        say(f"downloading aarch64 wheels: {', '.join(wanted)}")
        platforms = [f"--platform={name}_aarch64" for name in PLATFORMS]
        version = PYTHON.removeprefix("python")
        target = ["--python-version", version, "--implementation", "cp", "--only-binary=:all:"]
        _pip("install", "--target", place, *target, *platforms, *options, *wanted)
        (place / "fast").mkdir()
        for name in apart:
            for path in list(place.glob(f"{name}*")):
                path.rename(place / "fast" / path.name)

    return _layer(kind, _digest(PYTHON, *options, *wanted, *apart), fill)


def _requirements(wheel: Path, extra: str | None = None) -> list[str]:
    """The requirements of a wheel: those without an extra, or those of one extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    lines = metadata.get_all("Requires-Dist", [])
    if extra is None:
        return [line for line in lines if "extra ==" not in line]
    return [line.partition(";")[0].strip() for line in lines if f"extra == '{extra}'" in line]


def _standin(say: Say) -> Path:
    sources = sorted(STANDIN.glob("*.c"))

    def fill(place: Path) -> None:
        say("compiling the stand-in for librknnrt.so")
        for machine, compiler in COMPILERS.items():
            (place / machine).mkdir()
            _run([compiler, *FLAGS, "-o", place / machine / "librknnrt.so", *sources, "-lm"])

    return _layer("standin", _digest(*FLAGS, _digest_files(sorted(STANDIN.iterdir()))), fill)


def _assemble(wheel: Path, debian: Path, wheels: Path, libraries: Path, say: Say) -> Path:
    layers = [path.name for path in (wheel.parent, debian, wheels, libraries)]
    chip = [f"{name}={content}" for name, content in chip_files().items()]

    def fill(place: Path) -> None:
        say("assembling the board")
        root, final = place / "root", folder() / place.name.removesuffix(".partial")
        _run(["cp", "-al", debian, root])  # hard links: the packages' files are never written
        write_chip(root)
        shutil.copyfile(libraries / "aarch64" / "librknnrt.so", root / "usr/lib/librknnrt.so")
        _pip("install", "--no-deps", "--no-compile", "--target", place / "project", wheel)
        _write_programs(place / "bin", final, wheels)

    return _layer("board", _digest(*layers, *chip, _digest_files([Path(__file__).resolve()])), fill)


def _write_programs(place: Path, board: Path, wheels: Path) -> None:
    """Write bin/python, bin/python-numba (which has the extra `fast`) and bin/rwkv-npu.

    They are scripts for the host, so Python can start itself by `sys.executable`.
    """

    def python(name: str, *more: Path) -> str:
        root, path = board / "root", ":".join(map(str, (board / "project", wheels, *more)))
        environment = f'-E PYTHONHOME="{root}/usr" -E PYTHONPATH="{path}${{PYTHONPATH:+:$PYTHONPATH}}"'
        command = f'{QEMU} -cpu {CPU} -0 "{board}/bin/{name}" -L "{root}" {environment}'
        return f'exec {command} "{root}/usr/bin/{PYTHON}" "$@"'

    scripts = {
        "python": python("python"),
        "python-numba": python("python-numba", wheels / "fast"),
        "rwkv-npu": f'exec "{board}/bin/python" -m rwkv_npu "$@"',
    }
    place.mkdir()
    for name, line in scripts.items():
        (place / name).write_text(f"#!/bin/sh\n{line}\n")
        (place / name).chmod(0o755)


# -- how layers are made ---------------------------------------------------------------------------------


def _layer(kind: str, key: str, fill: Callable[[Path], None]) -> Path:
    """The layer's folder, filled if it is not there."""
    final = folder() / f"{kind}-{key}"
    if final.is_dir():
        os.utime(final)  # the least recently used layer is removed first
        return final
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    fill(partial)
    partial.rename(final)
    for old in sorted(folder().glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@contextlib.contextmanager
def _alone(say: Say) -> Iterator[None]:
    folder().mkdir(parents=True, exist_ok=True)
    with waited_for(folder() / "lock", say, "another process that makes the board"):
        yield


def _pip(*arguments: str | Path) -> None:
    _run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
    """Run a command. Raises BoardError with its last error line."""
    texts = [os.fspath(word) for word in command]
    result = subprocess.run(
        texts, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
        said = (errors or lines or ["it said nothing"])[-1].strip()
        raise BoardError(f"making the emulated board failed at `{' '.join(texts[:4])} ...`: {said}")


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=6).hexdigest()


def _digest_files(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for path in paths:
        digest.update(f"{path.relative_to(REPOSITORY)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
