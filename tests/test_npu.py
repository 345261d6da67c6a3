"""The lock of the NPU, the limit of open files, and the capture of prints."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_npu.board import npu
from rwkv_npu.board.npu import Lock
from rwkv_npu.errors import BackendError

HOLD = """
import sys, pathlib
from rwkv_npu.board.npu import Lock
Lock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_owner_is_named_and_a_killed_owner_blocks_nobody(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with holder(tmp_path) as process:
        with pytest.raises(BackendError, match=f"in use by process {process.pid}, .*use backend auto"):
            lock.acquire()
        process.send_signal(signal.SIGKILL)
    assert lock.path.read_text() == f"{process.pid}\n"  # stale
    lock.acquire()
    assert lock.path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_one_process_may_take_the_lock_several_times(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.acquire()
    lock.acquire()
    lock.release()
    other = Lock(tmp_path)
    with pytest.raises(BackendError, match=f"process {os.getpid()}"):
        other.acquire()
    lock.release()
    other.acquire()
    other.release()


def test_child_processes_do_not_hold_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.acquire()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        lock.release()
        Lock(tmp_path).acquire()
        assert child.poll() is None
        child.communicate(b"\n")


def test_any_user_may_take_the_lock_next(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        lock = Lock(tmp_path)
        lock.acquire()
        lock.release()
    finally:
        os.umask(mask)
    assert lock.path.stat().st_mode & 0o777 == 0o666


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot open the NPU's lock .*none/rwkv_npu.lock"):
        Lock(tmp_path / "none").acquire()


def test_the_folder_is_the_same_for_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RWKV_NPU_LOCKS")
    assert npu.lock_folder() in (Path("/run/lock"), Path("/tmp"))


def test_more_files_may_be_opened() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        wanted = npu.FILES if hard == resource.RLIM_INFINITY else min(hard, npu.FILES)
        assert npu.raise_file_limit() == wanted
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_prints_are_captured(capfd: pytest.CaptureFixture[str]) -> None:
    with npu.captured() as printed:
        os.write(1, b"raw, ")
        ctypes.CDLL(None).puts(b"from C, in a buffer")
        os.write(2, b"complaint\n")
    assert all(part in printed.text for part in ("raw, ", "from C, in a buffer", "complaint"))
    print("later")
    assert capfd.readouterr() == ("later\n", "")


def test_an_exception_passes_through_the_capture(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), npu.captured() as printed:
        os.write(2, b"before\n")
        1 / 0  # noqa: B018
    assert printed.text == "before\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
