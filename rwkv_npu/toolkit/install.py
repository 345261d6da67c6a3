"""Create a private environment for Rockchip's compiler: about 600 MB, without torch and CUDA.

The environment is built beside its final path and renamed after a first import of the compiler. An interrupted or
failed installation leaves nothing that looks usable.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from rwkv_npu.errors import ToolkitError
from rwkv_npu.formats.files import cache_dir, waited_for
from rwkv_npu.toolkit.environment import (
    DEFAULT_VERSION,
    MACHINES,
    PYTHONS,
    Environment,
    Progress,
    check_version,
    find_private,
    private_dir,
)

# Everything that the compiler imports, installed with --no-deps: its own metadata requires torch, whose x86-64 wheels
# bring 5 GB of CUDA. These versions work with every supported compiler. Each was tested on Python 3.10, 3.11 and 3.12
# by building and simulating a graph.
PINS = {
    "numpy": "1.26.4",  # the last 1.x; the compiler's metadata requires 1.x
    "onnx": "1.18.0",  # 1.19 removed onnx.mapping, which the compiler imports
    "protobuf": "4.25.4",  # the upper limit in the compiler's metadata; 7 fails
    "typing-extensions": "4.12.2",  # imported by onnx 1.18
    "onnxruntime": "1.20.1",  # folds constants; the last version with wheels for 3.10 to 3.12 on glibc 2.27
    "scipy": "1.14.1",
    "opencv-python-headless": "4.10.0.84",  # the other opencv-python needs libGL on the machine
    "setuptools": "75.8.0",  # 82 removed pkg_resources, which the compiler imports
    "tqdm": "4.67.1",
    "packaging": "24.2",
}
ROOM = 1_200_000_000  # free bytes needed: 600 MB installed, and pip's downloads
SECONDS_TO_START = 60  # an interpreter that takes longer to answer is not used


def install(
    version: str = DEFAULT_VERSION,
    python: str | Path | None = None,
    progress: Progress | None = None,
) -> Environment:
    """Install `version` into the user's cache folder, unless it is installed already. Returns its environment.

    `python` is an interpreter (path or command) of version 3.10 to 3.12; None searches for one. `progress` receives
    one line of text at a time. Raises ToolkitError with one line that names the remedy. A failure or Ctrl-C leaves
    no unfinished environment behind.
    """
    log = progress or (lambda line: None)
    _check_machine(check_version(version))
    final = private_dir(version)
    partial = final.with_name(final.name + ".partial")
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        # A second installation waits here, and then finds the environment of the first.
        with waited_for(cache_dir() / "lock", log, "another installation to end"):
            if existing := find_private(version):
                log(f"rknn-toolkit2 {version} is already installed in {final}")
                return existing
            base = find_python(python)
            if (free := shutil.disk_usage(cache_dir()).free) < ROOM:
                need = f"{ROOM / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
                raise ToolkitError(
                    f"not enough disk space in {cache_dir()}: {need} (RWKV_NPU_CACHE sets another folder)"
                )
            shutil.rmtree(partial, ignore_errors=True)  # left by an installation that was killed
            try:
                _fill(partial, base, version, log)
                shutil.rmtree(final, ignore_errors=True)  # its Python is missing: `find_private` rejected it
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ToolkitError(f"cannot install in {cache_dir()}: {error.strerror or error}") from error
    log(f"rknn-toolkit2 {version} is installed in {final}")
    return Environment(final / "bin" / "python", version, private=True)


def find_python(wanted: str | Path | None = None) -> Path:
    """Find an interpreter that the compiler has wheels for: `wanted`, else the running one, else one on PATH.

    Raises ToolkitError if `wanted` is unsuitable, or nothing is found.
    """
    supported = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    if wanted is not None:
        path = shutil.which(str(wanted))
        if path is None:
            raise ToolkitError(f"python={wanted}: no such program")
        version = _python_version(path)
        if version is None:
            raise ToolkitError(f"python={wanted}: this is not a working CPython interpreter")
        if version not in PYTHONS:
            raise ToolkitError(f"python={wanted}: this is {version[0]}.{version[1]}; {supported} is needed")
        return Path(path)
    if sys.version_info[:2] in PYTHONS and sys.executable:
        return Path(sys.executable)
    names = [f"python{major}.{minor}" for major, minor in PYTHONS] + ["python3", "python"]
    for name in names:
        path = shutil.which(name)
        # PATH may hold a pyenv shim that refuses to run. Only an interpreter that runs counts.
        if path and _python_version(path) in PYTHONS:
            return Path(path)
    raise ToolkitError(
        f"Rockchip's compiler needs Python {supported}; this is {platform.python_version()} and none of"
        f" {', '.join(names[:3])} works on PATH: install one, or name it with python="
    )


def _python_version(python: str) -> tuple[int, int] | None:
    """(major, minor) of a CPython interpreter. None if it is not CPython or does not run."""
    code = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
    try:
        answer = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=SECONDS_TO_START, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    words = answer.stdout.split()
    if answer.returncode or len(words) != 3 or words[0] != "cpython":
        return None
    return int(words[1]), int(words[2])


def _check_machine(version: str) -> None:
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in MACHINES[version]:
        raise ToolkitError(
            f"Rockchip publishes rknn-toolkit2 {version} for Linux on {' and '.join(MACHINES[version])} only (this"
            f" is {system} on {machine}): convert there, in a container or virtual machine, and copy the bundle"
        )


def _fill(folder: Path, base: Path, version: str, log: Progress) -> None:
    """Create a virtual environment in `folder` and install the compiler in it."""
    log(f"creating an environment with {base}")
    pip = _make_venv(folder, base)
    temporary = folder / "tmp"
    temporary.mkdir()
    wanted = [f"{name}=={pin}" for name, pin in {**PINS, "rknn-toolkit2": version}.items()]
    # --no-compile: the import below compiles only the modules that are used.
    command = [*pip, "install", "--no-deps", "--no-compile", "--only-binary=:all:", "--retries=2", *wanted]
    # PIP_USER=0 overrides a pip.conf that installs elsewhere. TMPDIR is on the same disk and deleted with the folder.
    settings = {
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TMPDIR": str(temporary),
    }
    elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere} | settings
    code, lines = _run(command, environment, log)
    if code:
        raise ToolkitError(f"pip could not install rknn-toolkit2 {version}: {_pip_reason(lines)}")
    (site,) = folder.glob("lib/python3*/site-packages")
    shutil.copyfile(Path(__file__).with_name("stand_in_torch.py"), site / "torch.py")
    shutil.rmtree(temporary)
    for script in (folder / "bin").iterdir():  # scripts hold the folder's path before the rename
        if not script.name.startswith("python"):
            script.unlink()
    log("checking that it can be imported")
    code, lines = _run([str(folder / "bin" / "python"), "-I", "-c", "import rknn.api"], environment, log)
    if code:
        raise ToolkitError(f"rknn-toolkit2 {version} was installed but cannot be imported: {_last(lines)}")


def _make_venv(folder: Path, base: Path) -> list[str]:
    """Create the virtual environment. Returns the command of a pip that installs into it."""
    environment = dict(os.environ)
    make = [str(base), "-I", "-m", "venv"]
    code, lines = _run([*make, str(folder)], environment)
    if code == 0:
        return [str(folder / "bin" / "python"), "-I", "-m", "pip"]
    if "ensurepip" not in " ".join(lines):
        raise ToolkitError(f"{base} cannot make a virtual environment: {_last(lines)}")
    # Debian's Python without python3-venv can create the environment but has no pip for it.
    code, _ = _run([*make, "--clear", "--without-pip", str(folder)], environment)
    if code or importlib.util.find_spec("pip") is None:
        raise ToolkitError(
            f"{base} cannot make a virtual environment: `apt install python3-venv` adds what is missing"
        )
    return [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]


def _run(
    command: list[str], environment: dict[str, str], log: Progress | None = None
) -> tuple[int, list[str]]:
    """Run a command to its end and log pip's progress lines. Returns the exit status and all lines."""
    lines: list[str] = []
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if log and lines[-1].startswith(("Collecting", "Downloading", "Installing")):
                    log(lines[-1])
        except BaseException:
            process.kill()
            raise
    return process.returncode, lines


def _pip_reason(lines: list[str]) -> str:
    """pip's last error. Adds the cause if pip could not reach the package index."""
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = errors[-1] if errors else _last(lines)
    unreachable = any("Retrying" in line for line in lines)
    return f"{reason} (the package index cannot be reached)" if unreachable else reason


def _last(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if line), "it printed nothing")
