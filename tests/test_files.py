"""Files that only one process at a time may hold."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from rwkv_npu.formats.files import waited_for


def test_the_second_process_waits_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []

    def second() -> None:
        with waited_for(tmp_path / "lock", said.append, "the first"):
            said.append("second")

    thread = threading.Thread(target=second)
    with waited_for(tmp_path / "lock", said.append, "nobody"):
        thread.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        said.append("first")
    thread.join(30)
    assert said == ["waiting for the first", "first", "second"]
