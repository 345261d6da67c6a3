"""States in a folder: a restarted server, or another one, continues old conversations.

Each file is an ordinary state file. Its name and its metadata have the key of its tokens. It is validated like an
upload, because other machines may write into the folder.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from pathlib import Path

from rwkv_npu.errors import RwkvNpuError, StateError, UsageError
from rwkv_npu.formats.files import UNFINISHED
from rwkv_npu.formats.state import State, load_untrusted_state, read_notes
from rwkv_npu.model import Model

KEY = re.compile(r"[0-9a-f]{32}")
ABANDONED_S = 600  # age of an unfinished file whose writer was killed
PENDING = 32  # states that may wait to be written. More are dropped: their prompts can be read again

log = logging.getLogger("rwkv_npu.serve")


class StateFolder:
    """A store of states in a folder (`cache.Store`). Deletes the least recently used files first.

    budget: bytes. A thread writes the files.
    """

    def __init__(self, folder: Path, budget: int, model: Model):
        self._folder, self._budget, self._model = folder, budget, model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError(13, "it cannot be written to")
            for path in folder.glob(f"*{UNFINISHED}"):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"states cannot be kept in {folder}: {error.strerror}") from None
        self._queue: queue.Queue[tuple[str, State] | None] = queue.Queue(PENDING)
        self._thread = threading.Thread(target=self._write_all, name="rwkv-npu states", daemon=True)
        self._thread.start()

    def get(self, key: str) -> State | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            state = load_untrusted_state(path, self._model.spec, self._model.fingerprint)
            if read_notes(path).get("key") != key:
                raise StateError(f"state {path} was saved under another name")
            os.utime(path)
        except (RwkvNpuError, OSError) as error:
            log.warning("a cached state is unusable: %s", error)
            path.unlink(missing_ok=True)
            return None
        return state

    def put(self, key: str, state: State) -> None:
        try:
            self._queue.put_nowait((key, state))
        except queue.Full:
            log.info("the folder of states is too slow: a state was dropped")

    def flush(self) -> None:
        """Wait until all states are written."""
        self._queue.join()

    def _path(self, key: str) -> Path:
        assert KEY.fullmatch(key), "keys are hashes made by the server, never a client's text"
        return self._folder / f"{key}.safetensors"

    def _write_all(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            try:
                path = self._path(item[0])
                if not path.exists():
                    item[1].save(path, notes={"key": item[0]})
                    self._trim()
            except (RwkvNpuError, OSError) as error:
                log.warning("a state was not saved: %s", error)
            finally:
                self._queue.task_done()

    def _trim(self) -> None:
        files = sorted(
            (path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob("*.safetensors")
        )
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._budget:
                break
            path.unlink(missing_ok=True)
            total -= size
