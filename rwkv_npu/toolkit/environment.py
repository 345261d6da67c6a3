"""Where Rockchip's compiler lives: the running interpreter, or a private environment in the cache folder.

rknn-toolkit2 pins old packages and asks for torch and, with it, gigabytes of CUDA. So it is not a dependency
of this package: `install` (in install.py) makes a virtual environment for it alone, and this module finds it.
Nothing here imports the compiler; it runs in a child process (worker.py).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rwkv_npu.board.hardware import numbers
from rwkv_npu.errors import ToolkitError
from rwkv_npu.formats.files import cache_dir

# A board's runtime (librknnrt.so) reads files of its own version and of older ones. The newest that is public is 2.3.2,
# so that conversions compile with it unless another version is asked for.
DEFAULT_VERSION = "2.3.2"
# Newest first.
VERSIONS = ("2.5.0", "2.3.2", "2.3.0", "2.2.0")
PYTHONS = ((3, 12), (3, 11), (3, 10))  # there is no wheel for 3.13
# The oldest that builds products in int8 into a graph in fp16: 2.3.0 finds no such product where a sum follows it, and
# 2.2.0 loses track of its own tensors.
OLDEST_INT8 = "2.3.2"
# Machines that Rockchip publishes wheels for, by version.
MACHINES = {version: ("x86_64", "aarch64") for version in VERSIONS} | {"2.2.0": ("x86_64",)}
# A caller's own interpreter works only below these versions, whatever rknn-toolkit2's metadata says.
CEILINGS = {"onnx": (1, 19), "setuptools": (82,), "protobuf": (7,)}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """An interpreter in which `rknn.api` can be imported.

    `private` is true for the environment that `install` made, which is then run isolated from the user's own
    packages and PYTHONPATH.
    """

    python: Path
    version: str
    private: bool

    @property
    def mixes_int8(self) -> bool:
        """Whether it builds products in int8 into a graph in fp16."""
        return numbers(self.version) >= numbers(OLDEST_INT8)

    def command(self, script: Path, *arguments: str) -> list[str]:
        """The command line that runs `script` in this environment."""
        return [str(self.python), *(["-I"] if self.private else []), str(script), *arguments]


@dataclass(frozen=True)
class Status:
    """One line of `toolkit status`: `size_bytes` is 0 if not private, `problem` None if it can be used."""

    version: str
    python: Path
    private: bool
    size_bytes: int
    problem: str | None


def private_dir(version: str) -> Path:
    """Where the private environment of `version` is, or would be."""
    return cache_dir() / f"toolkit-{version}"


def check_version(version: str) -> str:
    """Return `version`; ToolkitError if this package does not know how to install it."""
    if version not in VERSIONS:
        raise ToolkitError(f"rknn-toolkit2 {version} is not supported: choose one of {', '.join(VERSIONS)}")
    return version


def find(version: str | None = None) -> Environment | None:
    """The environment to compile with, or None: the running interpreter if the compiler works there, else a
    private one (the default version first, then the newest). With `version`, only that one."""
    here, problem = _running()
    if here is not None and problem is None and version in (None, here.version):
        return here
    for candidate in (DEFAULT_VERSION, *VERSIONS) if version is None else (version,):
        if found := find_private(candidate):
            return found
    return None


def find_private(version: str) -> Environment | None:
    """The private environment of `version` if it is installed and its interpreter still exists."""
    python = private_dir(version) / "bin" / "python"
    return Environment(python, version, private=True) if python.exists() else None


def require(version: str | None = None) -> Environment:
    """Like `find`, but raises ToolkitError with the command that installs what is missing."""
    if version is not None:
        check_version(version)
    if found := find(version):
        return found
    wanted = f" {version}" if version else ""
    option = f" --version {version}" if version and version != DEFAULT_VERSION else ""
    _, problem = _running()
    because = f" (the one in {sys.executable} cannot be used: {problem})" if problem else ""
    other = find()
    instead = (
        f", or choose the one that is there with --toolkit {other.version}: its files need librknnrt {other.version} "
        "or later on the board"
        if other
        else ""
    )
    raise ToolkitError(
        f"Rockchip's compiler, rknn-toolkit2{wanted}, is not installed{because}: run"
        f" `rwkv-npu toolkit install{option}`{instead}"
    )


def status() -> list[Status]:
    """What is installed: the running interpreter's compiler first, then the private environments."""
    here, problem = _running()
    rows = [Status(here.version, here.python, False, 0, problem)] if here else []
    for version in VERSIONS:
        folder = private_dir(version)
        if folder.is_dir():
            python = folder / "bin" / "python"
            problem = None if python.exists() else "its Python is gone: run `rwkv-npu toolkit install` again"
            rows.append(Status(version, python, True, _size(folder), problem))
    return rows


def remove(version: str | None = None) -> list[Path]:
    """Delete the private environment of `version`, or all, finished or not; returns what was deleted."""
    versions = VERSIONS if version is None else (check_version(version),)
    removed = []
    for folder in [private_dir(v) for v in versions]:
        # Renamed first, so that an interrupted removal does not look like an installed environment.
        partial = folder.with_name(folder.name + ".partial")
        try:
            if folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                folder.rename(partial)
            if partial.exists():
                shutil.rmtree(partial)
                removed.append(folder)
        except OSError as error:
            raise ToolkitError(f"cannot remove {folder}: {error.strerror or error}") from error
    return removed


def _running() -> tuple[Environment | None, str | None]:
    """The running interpreter if rknn-toolkit2 is installed in it, and why it cannot be used (or None).

    Looks at metadata only: importing the compiler takes a second and changes the process's logging.
    """
    try:
        version = importlib.metadata.version("rknn-toolkit2")
        if importlib.util.find_spec("rknn.api") is None:
            return None, None
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
        return None, None
    return Environment(Path(sys.executable), version, private=False), _conflict()


def _conflict() -> str | None:
    """Which package beside the caller's own rknn-toolkit2 breaks it, or None."""
    for name, ceiling in CEILINGS.items():
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is missing"
        numbers = tuple(int(part) for part in text.split(".")[: len(ceiling)] if part.isdigit())
        if numbers >= ceiling:
            return f"{name} {text} is too new for it"
    return None if importlib.util.find_spec("torch") else "torch is missing"


def _size(folder: Path) -> int:
    """Bytes on disk below `folder`, links not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_blocks * 512 for name in names)
    return total
