"""Nothing is reported to anybody: no telemetry of ONNX Runtime, and no socket to another machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from rwkv_npu.toolkit.environment import require
from rwkv_npu.toolkit.worker import Worker

VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")
# ONNX Runtime reports nothing where one of these names a CI: the tests that it does when asked would fail there.
CI = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "TRAVIS", "JENKINS_URL", "BUILDKITE")
CI += ("CODEBUILD_BUILD_ID", "TEAMCITY_VERSION")
# Compiling for a new cache folder takes half a minute, and ONNX Runtime is what is tested.
WITHOUT_NUMBA = (
    "import sys; sys.modules['numba'] = None; from rwkv_npu.cli import main; sys.exit(main(sys.argv[1:]))"
)


def environment(home: Path, **variables: str) -> dict[str, str]:
    """A user's environment, with a home of its own and nothing set about telemetry but `variables`."""
    kept = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, *CI)}
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **variables}


def run(home: Path, *arguments: object, **variables: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA, *map(str, arguments)],
        env=environment(home, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode()


def telemetry(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if "Microsoft" in path.parts and path.is_file())


def test_onnx_runtime_keeps_no_events(checkpoint: Path, tmp_path: Path) -> None:
    command = ("generate", "-m", checkpoint, "--backend", "ort", "-p", "a", "-n", 2)
    run(tmp_path / "quiet", *command)
    assert telemetry(tmp_path / "quiet") == []
    # With telemetry on, because the user wants it, the same command leaves files: so this test can fail.
    run(tmp_path / "asked", *command, ORT_DISABLE_TELEMETRY="0")
    version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    assert "deviceid" in telemetry(tmp_path / "asked") or version < (1, 32)


def test_variables_are_set_only_where_the_user_has_not(tmp_path: Path) -> None:
    code = f"import os, rwkv_npu; print(*(os.environ[name] for name in {VARIABLES}))"
    for variables, expected in (({}, "1 1 0"), (dict.fromkeys(VARIABLES, "x"), "x x x")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(tmp_path, **variables),
            capture_output=True,
            text=True,
        )
        assert result.stdout.split() == expected.split(), result.stderr


@pytest.mark.compiler
def test_the_compiler_inherits_them() -> None:
    """The toolkit imports ONNX Runtime in a process that does not import rwkv_npu."""
    with Worker(require()) as worker:
        found = Path(f"/proc/{worker._process.pid}/environ").read_bytes().split(b"\0")
    assert {b"ORT_DISABLE_TELEMETRY=1", b"HF_HUB_DISABLE_TELEMETRY=1", b"RAY_USAGE_STATS_ENABLED=0"} <= set(
        found
    )


# -- sockets ---------------------------------------------------------------------------------------------

# Runs commands, one after the other; ONNX Runtime's first socket comes nine seconds after its import.
COMMANDS = """
import json, sys, time
sys.modules["numba"] = None
from rwkv_npu.cli import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
time.sleep(14)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_process_of_ours_opens_a_socket_to_another_machine(checkpoint: Path, tmp_path: Path) -> None:
    bundle = str(tmp_path / "model.rwkv")
    generate = ["generate", "-m", str(checkpoint), "--backend", "ort", "-p", "a", "-n", "2"]
    every = [
        ["convert", str(checkpoint), "-o", bundle, "--target", "none", "--verify"],
        generate,
        ["eval", "-m", bundle, "--backend", "ort", "--against-backend", "numpy", "-n", "32"],
        ["info", bundle, "--check"],
        ["doctor", "-m", bundle, "--json"],
        ["bench", "inference", "-m", bundle, "--backends", "ort", "--seconds", "0.1", "-r", "1"],
    ]
    # Both wait for ONNX Runtime's first socket, so they run side by side.
    quiet = traced(tmp_path / "quiet", every)
    asked = traced(tmp_path / "asked", [generate], ORT_DISABLE_TELEMETRY="0")
    assert sockets(tmp_path / "quiet", quiet) == []
    version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    assert sockets(tmp_path / "asked", asked) or version < (1, 32)


def traced(home: Path, commands: list[list[str]], **variables: str) -> subprocess.Popen[bytes]:
    """A process that runs these commands, with the sockets of it and its children written to `home`."""
    home.mkdir()
    strace = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=socket,connect", "-o", home / "strace")
    return subprocess.Popen(
        [*strace, sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=environment(home, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def sockets(home: Path, process: subprocess.Popen[bytes]) -> list[str]:
    """System calls by which the process, or a child of it, turned to another machine."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    # AF_UNIX and AF_NETLINK are sockets of this machine alone.
    log = (home / "strace").read_text().splitlines()
    return [line for line in log if re.search(r"AF_INET|AF_PACKET", line)]
