"""The wheel and the sdist, installed away from the clone: on every Python that is found, and as a service has them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

from rwkv_npu.formats.files import cache_dir
from rwkv_npu.kernels import cache
from tests.installed import ROOT, call, dependencies, environment, find_python, metadata, required

pytestmark = pytest.mark.install

SERVICE = ROOT / "docs" / "service"
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
SENTENCE = ("generate", "-p", "Return the ", "-n", "8", "--temp", "0")

# Makes the root folder and all below it read-only, then becomes another program. Run by `unshare`.
READ_ONLY = """
import ctypes, os, sys
libc, attributes = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
if libc.syscall(442, -1, b"/", 0x8000, attributes, 32):  # mount_setattr, AT_RECURSIVE
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


class Built(NamedTuple):
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "-o", out, ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


def test_metadata_and_content(built: Built) -> None:
    fields = metadata(built.wheel)
    names = {name for name, _ in fields}
    assert {"Summary", "Author", "Keywords", "License-Expression", "License-File", "Requires-Python"} <= names
    classifiers = {value for name, value in fields if name == "Classifier"}
    assert {f"Programming Language :: Python :: {version}" for version in VERSIONS} <= classifiers
    assert not any(name in ("Project-URL", "Home-page") for name in names)  # there is no address to give yet
    with ZipFile(built.wheel) as archive:
        files = archive.namelist()
    assert all(name.startswith(("rwkv_npu/", "rwkv_npu-")) for name in files)
    assert {"rwkv_npu/py.typed", "rwkv_npu/data/demo/model.pth", "rwkv_npu/data/NOTICE.md"} <= set(files)
    with tarfile.open(built.sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"rwkv_npu", "tests", "tools", "docs", "bench", "README.md", "LICENSE", "Makefile"} <= top


@pytest.fixture(scope="module")
def expected(whole: Path) -> str:
    """The text of the clone's package, without numba, which the wheel does not require."""
    return call(sys.executable, "-m", "rwkv_npu", *SENTENCE, "-m", whole, "--backend", "ort")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_works_away_from_the_clone(
    version: str, built: Built, expected: str, whole: Path, tmp_path: Path
) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    place = environment(
        python, tmp_path / "env", built.wheel, dependencies(python, version, required(built.wheel))
    )
    out = tmp_path / "model.rwkv"
    demo = call(place / "python", "-c", "import rwkv_npu.model as m; print(m.demo_model())").strip()
    assert demo.startswith(str(tmp_path))
    assert call(place / "rwkv-npu", "convert", demo, "-o", out, "--target", "none") == f"{out}\n"
    assert call(place / "rwkv-npu", *SENTENCE, "-m", whole) == expected
    assert json.loads(call(place / "rwkv-npu", "info", "--json", out))["cpu"] == ["int8", "fp16"]


def test_the_sdist_installs(built: Built, tmp_path: Path) -> None:
    import hatchling

    packages = Path(hatchling.__file__).parent.parent
    place = environment(sys.executable, tmp_path / "env", built.sdist, packages)
    assert call(place / "rwkv-npu", "--version").startswith("rwkv-npu ")
    where = call(place / "python", "-c", "import rwkv_npu; print(rwkv_npu.__file__)")
    assert where.startswith(str(tmp_path))


# -- as a service ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the wheel. Its dependencies are those of the tests."""
    import numba

    packages = Path(numba.__file__).parent.parent
    return environment(sys.executable, tmp_path_factory.mktemp("service") / "env", built.wheel, packages)


@pytest.fixture(scope="module")
def kernels(service: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as an image ships it: `kernels build` fills it, beginning with what is compiled already."""
    shipped = tmp_path_factory.mktemp("shipped")
    with_name = shipped / "kernels" / cache.key()
    if (known := cache_dir() / "kernels" / cache.key()).is_dir():
        shutil.copytree(known, with_name)
    printed = call(service / "rwkv-npu", "kernels", "build", "-m", whole, RWKV_NPU_CACHE=str(shipped))
    assert printed == f"{with_name}\n"
    return shipped


@pytest.fixture(scope="module")
def read_only() -> list[str]:
    """The words that run a program with everything read-only. Skips where the kernel allows no namespaces."""
    words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", READ_ONLY]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("there is no unshare on this machine")
    tried = subprocess.run(
        [*words, shutil.which("touch"), str(ROOT / "touched")], capture_output=True, text=True
    )
    if "Read-only file system" not in tried.stderr:
        pytest.skip(f"this kernel makes no read-only root for us: {tried.stderr}")
    return words


def test_generate_under_a_read_only_root(
    service: Path, kernels: Path, read_only: list[str], whole: Path, tmp_path: Path
) -> None:
    command = [*read_only, service / "rwkv-npu", *SENTENCE, "-m", whole]
    shipped = {"RWKV_NPU_CACHE": f"/var/cache/rwkv_npu:{kernels}", "HOME": "/nonexistent"}
    assert call(*command, **shipped) == call(*command[len(read_only) :])
    # Without the kernels, nothing can be compiled there, and one line says what to do.
    shipped["RWKV_NPU_CACHE"] = str(tmp_path / "none")
    ended = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **shipped},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "kernels build" in ended.stderr.splitlines()[-1]


def test_serve_as_the_unit_has_it(
    service: Path, kernels: Path, read_only: list[str], whole: Path, tmp_path: Path
) -> None:
    unit = (SERVICE / "rwkv-npu.service").read_text()
    (program, *words) = re.search(r"^ExecStart=(.*)$", unit, re.M)[1].split()  # type: ignore[index]
    words[words.index("/srv/model.rwkv")] = str(whole)
    environment = {**os.environ, "RWKV_NPU_CACHE": f"/var/cache/rwkv_npu:{kernels}", "HOME": "/nonexistent"}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [*read_only, str(service / Path(program).name), *words, "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), (tmp_path / "log").read_text()
        assert json.load(urllib.request.urlopen(f"{url}/health"))["status"] == "ok"
        body = json.dumps({"prompt": "the ", "max_tokens": 3}).encode()
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        assert json.load(urllib.request.urlopen(asked))["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
        log.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_unit_is_one_that_systemd_reads(service: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine")
    unit = (SERVICE / "rwkv-npu.service").read_text()
    copy = tmp_path / "rwkv-npu.service"
    copy.write_text(unit.replace("/opt/rwkv-npu/bin", str(service)))
    call("systemd-analyze", "verify", copy)
    copy.write_text(unit.replace("ProtectHome=yes", "ProtectHome=maybe"))
    ended = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert "protect home" in ended.stderr  # it is read: a wrong line is noticed


def test_the_dockerfile_does_what_the_tests_did(built: Built) -> None:
    """Its instructions are known, its extras exist, and its command is the one above."""
    lines = (SERVICE / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in instructions} <= {"FROM", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    (extras,) = re.findall(r'"/src\[([\w,]+)\]"', "\n".join(lines))
    provided = {value for name, value in metadata(built.wheel) if name == "Provides-Extra"}
    assert set(extras.split(",")) == {"fast", "serve"} <= provided
    (variables,) = [rest for name, rest in instructions if name == "ENV"]
    assert variables == "RWKV_NPU_CACHE=/var/cache/rwkv_npu:/opt/rwkv_npu"
