"""Stores of states outside this process: a folder, or Redis. From them another server can continue a conversation.

Each state is an ordinary state file. Its name and its metadata hold its key (`cache.Checkpoint`). It is validated like
an upload, because other machines may write to the store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rwkv_npu.errors import RwkvNpuError, StateError, UsageError
from rwkv_npu.formats.files import UNFINISHED
from rwkv_npu.formats.state import State, load_untrusted_state, read_notes
from rwkv_npu.model import Model

KEY = re.compile(r"[0-9a-f]{32}")
PENDING = 32  # states that may wait to be written. More are dropped: their prompts can be read again
ABANDONED_S = 600  # age of an unfinished file whose writer was killed

# Redis removes states after LIFETIME_S, and earlier ones too if its maxmemory-policy says so.
LIFETIME_S = 7 * 24 * 3600
PATIENCE_S = 2.0  # limit of one request
PAUSE_S = 10.0  # no requests for this time after a failure: a dead Redis must not delay every prompt

log = logging.getLogger("rwkv_npu.serve")


class _Store:
    """A store of states (`cache.Store`). A thread writes them, so that no answer waits."""

    def __init__(self, model: Model):
        self._model = model
        self._queue: queue.Queue[tuple[str, State]] = queue.Queue(PENDING)
        threading.Thread(target=self._write_all, name="rwkv-npu states", daemon=True).start()

    def put(self, key: str, state: State) -> None:
        assert KEY.fullmatch(key), "keys are hashes made by the server, never a client's text"
        try:
            self._queue.put_nowait((key, state))
        except queue.Full:
            log.info("the store of states is too slow: a state was dropped")

    def flush(self) -> None:
        """Wait until all states are written."""
        self._queue.join()

    def _write(self, key: str, state: State) -> None:
        raise NotImplementedError

    def _write_all(self) -> None:
        while True:
            key, state = self._queue.get()
            try:
                self._write(key, state)
            except (RwkvNpuError, OSError) as error:
                log.warning("a state was not saved: %s", error)
            finally:
                self._queue.task_done()

    def _read(self, path: Path, key: str) -> State:
        """Read the state of a key. Raises StateError."""
        state = load_untrusted_state(path, self._model.spec, self._model.fingerprint)
        if read_notes(path).get("key") != key:
            raise StateError(f"state {path} was saved under another name")
        return state


class StateFolder(_Store):
    """States in a folder. Deletes the least recently used files first.

    budget: bytes. Several servers may share the folder.
    """

    def __init__(self, folder: Path, budget: int, model: Model):
        self._folder, self._budget = folder, budget
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError(13, "it cannot be written to")
            for path, status in _files(folder, f"*{UNFINISHED}"):
                if time.time() - status.st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"states cannot be kept in {folder}: {error.strerror}") from None
        super().__init__(model)

    def get(self, key: str) -> State | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            state = self._read(path, key)
            os.utime(path)
        except FileNotFoundError:  # another server has just deleted it
            return None
        except (RwkvNpuError, OSError) as error:
            log.warning("a cached state is unusable: %s", error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return state

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _write(self, key: str, state: State) -> None:
        path = self._path(key)
        if path.exists():
            return
        state.save(path, notes={"key": key})
        files = sorted(_files(self._folder, "*.safetensors"), key=lambda file: file[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        for old, status in files:
            if total <= self._budget:
                break
            old.unlink(missing_ok=True)
            total -= status.st_size


def _files(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of a folder with their sizes and times. Other servers may delete some meanwhile."""
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


class RedisStates(_Store):
    """States in Redis. Any failure acts like an empty store.

    url: redis:// or rediss://. It may hold a password, which no message shows.
    """

    def __init__(self, url: str, model: Model):
        try:
            import redis
        except ImportError:
            raise UsageError(
                "state_store=redis:// needs its client: pip install '.[redis]' in the clone"
            ) from None
        self._error: type[Exception] = redis.RedisError
        self._wait_until = 0.0
        where = urlsplit(url).hostname or "localhost"
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S
            )
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            raise UsageError(
                f"no Redis answers at {where} ({type(error).__name__}): check state_store="
            ) from None
        super().__init__(model)

    def get(self, key: str) -> State | None:
        data = self._ask("get", self._name(key))
        if data is None:
            return None
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / key
                path.write_bytes(data)
                return self._read(path, key)
        except RwkvNpuError as error:
            log.warning("a state from Redis is unusable: %s", str(error).replace(str(path), key))
            self._ask("delete", self._name(key))
        except OSError as error:  # the temporary folder is full or gone, and the state may be good
            log.warning("a state from Redis was not read: %s", error)
        return None

    def _write(self, key: str, state: State) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / key
            state.save(path, notes={"key": key})
            self._ask("set", self._name(key), path.read_bytes(), ex=LIFETIME_S, nx=True)

    def _name(self, key: str) -> str:
        return f"rwkv_npu:state:{key}"

    def _ask(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Send a command to Redis. Returns its answer; None after a failure, and for PAUSE_S after one."""
        if time.monotonic() < self._wait_until:
            return None
        try:
            return getattr(self._client, command)(*arguments, **options)
        except self._error as error:
            log.warning("Redis does not answer: %s", type(error).__name__)
            self._wait_until = time.monotonic() + PAUSE_S
            return None
