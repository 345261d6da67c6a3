"""Checkpoints of token sequences, and the states that are kept at them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.state import State
from rwkv_npu.serve.cache import NEAR, SPACING, Checkpoint, Checkpoints, StateCache, size_of
from rwkv_npu.serve.stores import RedisStates, StateFolder
from rwkv_npu.text.tokenizer import builtin
from tests.live import debian_program

WORLD = builtin("world")
CHAT = "User: Tell me a long story about the sea and its many fish, please\n\nAssistant: Once there was a fish.\n\n"


def checkpoints(identity: str = "model") -> Checkpoints:
    return Checkpoints(WORLD, identity, ["Assistant:"])


def test_checkpoints_stand_after_blank_lines_and_labels() -> None:
    ids = WORLD.encode(CHAT * 3)
    for one in checkpoints().of(ids):
        assert WORLD.decode(ids[: one.position]).endswith(("\n\n", "Assistant:"))
    assert len(checkpoints().of(ids)) >= 3


def test_a_long_text_has_checkpoints_whatever_it_says() -> None:
    ids = WORLD.encode("a, b; " * 800)
    assert [one.position for one in checkpoints().of(ids)] == list(range(SPACING, len(ids) + 1, SPACING))


@given(
    st.lists(st.sampled_from(["a", "\n\n", "Assistant:", " sea", "。", "\n"]), max_size=200),
    st.integers(0, 200),
)
def test_checkpoints_of_a_prefix_are_the_first_of_the_whole(parts: list[str], cut: int) -> None:
    ids = [token for part in parts for token in WORLD.encode(part)]
    whole, part = checkpoints().of(ids), checkpoints().of(ids[:cut])
    assert part == [one for one in whole if one.position <= cut]
    distances = np.diff([0, *(one.position for one in whole)])
    assert (distances >= NEAR).all() and (distances <= SPACING).all()


def test_keys_name_the_tokens_and_the_model() -> None:
    ids = WORLD.encode(CHAT * 2)
    (first, *_), (other, *_) = checkpoints().of(ids), checkpoints("other").of(ids)
    changed = checkpoints().of([ids[0] + 1, *ids[1:]])[0]
    assert len({first.key, other.key, changed.key}) == 3
    assert first.position == other.position == changed.position


# -- memory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> rwkv_npu.Model:
    return rwkv_npu.load(checkpoint, backend="numpy")


def state_after(model: rwkv_npu.Model, tokens: list[int]) -> State:
    return model.forward(tokens)[1]


def test_a_kept_state_is_a_copy_both_ways(model: rwkv_npu.Model) -> None:
    cache, state = StateCache(1 << 20), state_after(model, [1, 2])
    cache.keep("k", state)
    state.parts["att.shift"][:] = 0
    for _ in range(2):
        _, found = cache.find([Checkpoint(2, "k")])
        assert found is not None and np.abs(found.parts["att.shift"]).max() > 0
        found.parts["att.shift"][:] = 0


def test_the_least_recently_used_goes_first(model: rwkv_npu.Model) -> None:
    state = state_after(model, [1])
    cache = StateCache(2 * size_of(state))
    one, two, three = (Checkpoint(i, str(i)) for i in (1, 2, 3))
    for checkpoint in (one, two):
        cache.keep(checkpoint.key, state)
    assert cache.find([one])[0] == 1  # now two is the oldest
    cache.keep(three.key, state)
    assert [cache.position([checkpoint]) for checkpoint in (one, two, three)] == [1, 0, 3]
    assert cache.bytes == 2 * size_of(state) and len(cache) == 2


def test_a_state_larger_than_the_budget_is_not_kept(model: rwkv_npu.Model) -> None:
    cache = StateCache(10)
    cache.keep("k", state_after(model, [1]))
    assert cache.find([Checkpoint(1, "k")]) == (0, None) and cache.bytes == 0


# -- the folder

KEY = "0" * 31 + "a"


def test_a_folder_gives_states_back_after_a_restart(model: rwkv_npu.Model, tmp_path: Path) -> None:
    state = state_after(model, [1, 2, 3])
    folder = StateFolder(tmp_path / "states", 1 << 30, model)
    StateCache(0, [folder]).keep(KEY, state)
    folder.flush()
    restarted = StateCache(1 << 20, [StateFolder(tmp_path / "states", 1 << 30, model)])
    wanted = [Checkpoint(3, KEY), Checkpoint(9, "f" * 32)]
    assert restarted.find(wanted) == (0, None)
    restarted.fetch(wanted)
    position, found = restarted.find(wanted)
    assert position == 3 and found is not None and found.tokens_seen == 3
    for name, part in state.parts.items():
        np.testing.assert_array_equal(found.parts[name], part)


def test_a_damaged_file_is_not_used_and_goes(
    model: rwkv_npu.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StateFolder(tmp_path, 1 << 30, model)
    folder.put(KEY, state_after(model, [1]))
    folder.flush()
    file = tmp_path / f"{KEY}.safetensors"
    whole = file.read_bytes()
    other = state_after(model, [2])
    for damage in (
        lambda: file.write_bytes(whole[:100]),
        lambda: file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]),
        lambda: other.save(file, notes={"key": "f" * 32}),
    ):
        damage()
        assert folder.get(KEY) is None and not file.exists()
    for reason in ("is no state file", "is damaged", "under another name"):
        assert reason in caplog.text


def test_files_of_a_writer_that_was_killed_go(model: rwkv_npu.Model, tmp_path: Path) -> None:
    old, new = tmp_path / f"{KEY}.safetensors.1.writing", tmp_path / f"{KEY}.safetensors.2.writing"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    StateFolder(tmp_path, 1 << 30, model)
    assert not old.exists() and new.exists()  # the new one may be another server's


def test_the_folder_keeps_its_budget(model: rwkv_npu.Model, tmp_path: Path) -> None:
    state = state_after(model, [1])
    folder = StateFolder(tmp_path, 1 << 30, model)
    folder.put(KEY, state)
    folder.flush()
    size = (tmp_path / f"{KEY}.safetensors").stat().st_size
    os.utime(tmp_path / f"{KEY}.safetensors", (1, 1))
    small = StateFolder(tmp_path, 2 * size, model)
    for i in range(2):
        small.put(f"{i:032x}", state)
        small.flush()
    assert sorted(path.stem for path in tmp_path.iterdir()) == [f"{i:032x}" for i in range(2)]


# -- Redis


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """Debian's Redis on a free port, installed where that is allowed. `url` is its address."""
    pytest.importorskip("redis")
    program = debian_program("redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--save", "", "--dir", str(tmp_path_factory.mktemp("redis"))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    process.url = f"redis://127.0.0.1:{port}"  # type: ignore[attr-defined]
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


@pytest.mark.debian
def test_redis_gives_states_to_other_servers(
    redis_server: Any, model: rwkv_npu.Model, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_after(model, [1, 2, 3])
    one, other = RedisStates(redis_server.url, model), RedisStates(redis_server.url, model)
    assert other.get(KEY) is None
    one.put(KEY, state)
    one.flush()
    found = other.get(KEY)
    assert found is not None and found.tokens_seen == 3
    for name, part in state.parts.items():
        np.testing.assert_array_equal(found.parts[name], part)
    name = f"rwkv_npu:state:{KEY}"
    one._client.set(name, one._client.get(name)[:-4] + b"\0\0\0\1")
    assert other.get(KEY) is None and one._client.get(name) is None
    assert "a state from Redis is unusable" in caplog.text and "damaged" in caplog.text


@pytest.mark.debian
def test_a_redis_that_is_gone_acts_like_an_empty_store(
    redis_server: Any, model: rwkv_npu.Model, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisStates(redis_server.url, model)
    redis_server.kill()
    redis_server.wait()
    begin = time.monotonic()
    for _ in range(20):
        assert store.get(KEY) is None
        store.put(KEY, state_after(model, [1]))
    store.flush()
    assert time.monotonic() - begin < 5 and caplog.text.count("Redis does not answer") == 1
    with pytest.raises(UsageError, match="no Redis answers at 127.0.0.1") as caught:
        RedisStates(redis_server.url.replace("//", "//:secret@"), model)
    assert "secret" not in str(caught.value)


def test_without_a_temporary_folder_redis_acts_like_an_empty_store(
    model: rwkv_npu.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = Mock()
    client.get.return_value = b"a state"
    monkeypatch.setattr(pytest.importorskip("redis").Redis, "from_url", lambda *_, **__: client)
    store = RedisStates("redis://host", model)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert store.get(KEY) is None
    assert "a state from Redis was not read: " in caplog.text and not client.delete.called


def test_a_folder_that_cannot_be_is_refused(model: rwkv_npu.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="states cannot be kept in .*file"):
        StateFolder(tmp_path / "file", 1, model)
