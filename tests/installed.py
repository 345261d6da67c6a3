"""Environments away from the clone: Pythons that are found, and the packages that the wheel requires.

Packages are downloaded once for each Python and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

from rwkv_npu.formats.files import cache_dir, waited_for

ROOT = Path(__file__).resolve().parent.parent


def call(*command: object, **environment: str) -> str:
    """Stdout of a command that must succeed, run away from the clone, whose package Python would find first."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd="/",
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout[-1000:]}{ended.stderr[-2000:]}"
    return ended.stdout


def find_python(version: str) -> str | None:
    """An interpreter of this version: on PATH, or one of pyenv's. A shim of pyenv's may refuse to run."""
    on_path = shutil.which(f"python{version}")
    own = sys.executable if f"{sys.version_info[0]}.{sys.version_info[1]}" == version else None
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    for path in filter(None, [own, on_path, *map(str, pyenv)]):
        if subprocess.run([path, "-c", "import venv, ctypes"], capture_output=True).returncode == 0:
            return path
    return None


def environment(python: str, folder: Path, package: Path, packages: Path) -> Path:
    """A virtual environment with `package` installed, that finds its dependencies in the folder `packages`."""
    call(python, "-I", "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{packages}\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q")
    call(*pip, "--no-deps", "--no-build-isolation", "--disable-pip-version-check", package)
    return folder / "bin"


def dependencies(python: str, version: str, requirements: Sequence[str]) -> Path:
    """The folder with what the wheel requires, for one Python."""
    digest = hashlib.sha256("\n".join(sorted(requirements)).encode()).hexdigest()[:16]
    kept = cache_dir() / "dependencies" / f"{version}-{digest}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with waited_for(kept.with_suffix(".lock"), print, "another download"):
        if not kept.exists():
            partial = kept.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--target", partial)
            call(*pip, "--disable-pip-version-check", *requirements)
            partial.rename(kept)
    return kept


def metadata(wheel: Path) -> list[tuple[str, str]]:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).items()


def required(wheel: Path) -> list[str]:
    """What the wheel requires without extras."""
    return [value for name, value in metadata(wheel) if name == "Requires-Dist" and "extra ==" not in value]
