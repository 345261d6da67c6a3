"""Find Rockchip's compiler: in the running interpreter, or in a private environment in the cache folder.

rknn-toolkit2 pins old packages and requires torch, which brings gigabytes of CUDA. So it is not a dependency of this
package: `install` (install.py) creates a virtual environment for it, and this module finds that environment.
This module never imports the compiler, which runs in a child process (worker.py).
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

from rwkv_npu.errors import ToolkitError
from rwkv_npu.formats.files import cache_dir

# A board's runtime (librknnrt.so) reads files of its own version and of older ones. The newest public runtime is 2.3.2,
# so conversions compile with 2.3.2 by default.
DEFAULT_VERSION = "2.3.2"
# Newest first.
VERSIONS = ("2.5.0", "2.3.2", "2.3.0", "2.2.0")
PYTHONS = ((3, 12), (3, 11), (3, 10))  # Rockchip publishes no wheel for 3.13
# The oldest version that can build int8 products into an fp16 graph. 2.3.0 misses such a product if an addition follows
# it, and 2.2.0 fails on tensors that it created itself.
OLDEST_INT8 = "2.3.2"
# Machines with wheels from Rockchip, by version.
MACHINES = {version: ("x86_64", "aarch64") for version in VERSIONS} | {"2.2.0": ("x86_64",)}
# The first version of other packages with which the compiler fails. Its metadata allows them, so a user's own
# interpreter may have them.
CEILINGS = {"onnx": (1, 19), "setuptools": (82,), "protobuf": (7,)}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """An interpreter that can import `rknn.api`.

    `private` is true for an environment made by `install`. It runs isolated from the user's packages and PYTHONPATH.
    """

    python: Path
    version: str
    private: bool

    def command(self, script: Path, *arguments: str) -> list[str]:
        """The command line that runs `script` in this environment."""
        return [str(self.python), *(["-I"] if self.private else []), str(script), *arguments]


@dataclass(frozen=True)
class Status:
    """One line of `toolkit status`. `size_bytes` is 0 unless private; `problem` is None if the compiler is usable."""

    version: str
    python: Path
    private: bool
    size_bytes: int
    problem: str | None


def private_dir(version: str) -> Path:
    """The folder of the private environment of `version`, whether or not it exists."""
    return cache_dir() / f"toolkit-{version}"


def check_version(version: str) -> str:
    """Return `version`. Raises ToolkitError if this package cannot install it."""
    if version not in VERSIONS:
        raise ToolkitError(f"rknn-toolkit2 {version} is not supported: choose one of {', '.join(VERSIONS)}")
    return version


def find(version: str | None = None) -> Environment | None:
    """The environment to compile with, or None.

    Prefers the running interpreter if its compiler is usable, then a private environment: the default version first,
    then the newest. With `version`, only that version counts.
    """
    running, problem = _running()
    if running is not None and problem is None and version in (None, running.version):
        return running
    for candidate in (DEFAULT_VERSION, *VERSIONS) if version is None else (version,):
        if environment := find_private(candidate):
            return environment
    return None


def find_private(version: str) -> Environment | None:
    """The private environment of `version` if it is installed and its interpreter still exists."""
    python = private_dir(version) / "bin" / "python"
    return Environment(python, version, private=True) if python.exists() else None


def require(version: str | None = None) -> Environment:
    """Like `find`, but raises ToolkitError with the install command if there is none."""
    if version is not None:
        check_version(version)
    if environment := find(version):
        return environment
    wanted = f" {version}" if version else ""
    command = "rwkv-npu toolkit install"
    if version and version != DEFAULT_VERSION:
        command = f"rwkv-npu toolkit install --version {version}"
    _, problem = _running()
    because = f" (the one in {sys.executable} cannot be used: {problem})" if problem else ""
    other = find()
    instead = (
        f", or choose the one that is there with toolkit={other.version!r}: its files need librknnrt {other.version} "
        "or later on the board"
        if other
        else ""
    )
    raise ToolkitError(
        f"Rockchip's compiler, rknn-toolkit2{wanted}, is not installed{because}: run `{command}`{instead}"
    )


def status() -> list[Status]:
    """Installed compilers: the running interpreter's first, then the private environments."""
    running, problem = _running()
    rows = [Status(running.version, running.python, False, 0, problem)] if running else []
    for version in VERSIONS:
        folder = private_dir(version)
        if folder.is_dir():
            python = folder / "bin" / "python"
            problem = (
                None if python.exists() else "its Python is missing: run `rwkv-npu toolkit install` again"
            )
            rows.append(Status(version, python, True, _size(folder), problem))
    return rows


def remove(version: str | None = None) -> list[Path]:
    """Delete the private environment of `version`, or all of them, unfinished ones too. Returns deleted folders."""
    versions = VERSIONS if version is None else (check_version(version),)
    removed = []
    for folder in [private_dir(v) for v in versions]:
        # Rename first: after an interrupted removal, `find` must not see a half-deleted environment.
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
    """The running interpreter if it has rknn-toolkit2, and the reason why it is unusable (or None).

    Reads package metadata only: importing the compiler takes a second and changes the process's logging.
    """
    try:
        version = importlib.metadata.version("rknn-toolkit2")
        if importlib.util.find_spec("rknn.api") is None:
            return None, None
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
        return None, None
    return Environment(Path(sys.executable), version, private=False), _conflict()


def _conflict() -> str | None:
    """The first package in the running interpreter that breaks rknn-toolkit2, with the reason, or None."""
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
    """Bytes on disk below `folder`. Links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_blocks * 512 for name in names)
    return total
