"""Files of the Hugging Face Hub, from a server on this machine: resumed, checked, and refused in one line."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import rwkv_npu
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.hub import parse
from tests.tiny import Run, error_line

NAME = "someone/some-model/sub/model.pth"


class Hub(ThreadingHTTPServer):
    """One file under any name, as the Hub serves it.

    status: of every answer that is not 200. cut: bytes after which a download breaks off. etag: None is the right one.
    mirror: the server that the file's location names. seen: methods, Range headers and tokens of the requests.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.code = content, 200, ""
        self.cut: int | None = None
        self.etag: str | None = None
        self.mirror: Hub | None = None
        self.seen: list[tuple[str, str | None, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, send: bool) -> None:
        hub = self.server
        hub.seen.append((self.command, self.headers.get("Range"), self.headers.get("Authorization")))
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = hub.content[begin:]
        if hub.status != 200:
            self.send_response(hub.status)
            self.send_header("X-Error-Code", hub.code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if hub.mirror:
            self.send_response(302)
            self.send_header("Location", f"{hub.mirror.url}{self.path}")
        else:
            self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hub.etag or hashlib.sha256(hub.content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(hub.content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0" if hub.mirror else str(len(body)))
        self.end_headers()
        if send and not hub.mirror:
            cut, hub.cut = hub.cut, None
            self.wfile.write(body[:cut])
            if cut is not None:
                hub.status, hub.code = 503, ""
                self.wfile.flush()
                self.connection.close()

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RWKV_NPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what is written at a time
    return tmp_path / "cache" / "hub" / "someone--some-model" / "sub"


@pytest.fixture
def hub(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(checkpoint.read_bytes())
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


def gets(hub: Hub) -> list[str | None]:
    return [span for method, span, _ in hub.seen if method == "GET"]


def test_a_file_is_downloaded_once_and_read_without_the_hub(hub: Hub, cache: Path, run: Run) -> None:
    assert run("pull", NAME)[:2] == (0, f"{cache / 'model.pth'}\n")
    assert (cache / "model.pth").read_bytes() == hub.content and gets(hub) == [None]
    assert run("pull", f"hf:{NAME}")[0] == 0 and gets(hub) == [
        None
    ]  # its hash was asked for, and is the same
    before = len(hub.seen)
    assert "RWKV-7" in run("info", f"hf:{NAME}")[1]
    assert rwkv_npu.load(f"hf:{NAME}", backend="numpy").spec.L == 2
    assert len(hub.seen) == before
    assert sorted(path.name for path in cache.iterdir()) == [".model.pth.etag", "model.pth"]


def test_a_new_file_on_the_hub_replaces_the_old(hub: Hub, cache: Path, run: Run) -> None:
    run("pull", NAME)
    hub.content = b"another"
    assert run("pull", NAME)[0] == 0 and (cache / "model.pth").read_bytes() == b"another"


def test_a_download_that_broke_off_goes_on(hub: Hub, cache: Path, run: Run) -> None:
    hub.cut = 1000
    assert "the same command continues" in error_line(run("pull", NAME))
    assert not (cache / "model.pth").exists()
    (part,) = cache.glob(".*.part")
    assert part.stat().st_size == 1000
    hub.status = 200
    assert run("pull", NAME)[0] == 0
    assert gets(hub)[-1] == "bytes=1000-" and (cache / "model.pth").read_bytes() == hub.content


def test_part_of_another_version_is_not_continued(hub: Hub, cache: Path, run: Run) -> None:
    hub.cut = 1000
    run("pull", NAME)
    hub.status, hub.content = 200, hub.content[::-1]
    assert run("pull", NAME)[0] == 0 and (cache / "model.pth").read_bytes() == hub.content


def test_a_wrong_hash_leaves_nothing(hub: Hub, cache: Path, run: Run) -> None:
    hub.etag = "0" * 64
    assert "arrived damaged" in error_line(run("pull", NAME))
    assert list(cache.iterdir()) == []


def test_a_small_file_has_the_hash_of_git(hub: Hub, cache: Path, run: Run) -> None:
    hub.etag = hashlib.sha1(b"blob %d\0" % len(hub.content) + hub.content).hexdigest()
    assert run("pull", NAME)[0] == 0
    hub.etag = "1" * 40
    assert "arrived damaged" in error_line(run("pull", NAME))
    assert (cache / "model.pth").read_bytes() == hub.content  # the good one is still there


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "", "refuses hf:someone/some-model/sub/model.pth (401): check the name"),
        (403, "GatedRepo", "set HF_TOKEN"),
        (404, "EntryNotFound", "someone/some-model has no file sub/model.pth"),
        (404, "RepoNotFound", "has no repository someone/some-model"),
        (404, "RevisionNotFound", "has no revision"),
        (418, "", "answers 418"),
    ],
)
def test_refusals_are_one_line(hub: Hub, cache: Path, run: Run, status: int, code: str, said: str) -> None:
    hub.status, hub.code = status, code
    assert said in error_line(run("pull", NAME))
    assert not cache.exists()


def test_without_a_connection(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = error_line(run("generate", "-m", f"hf:{NAME}", "-p", "a"))
    assert "cannot be reached" in line and str(cache / "model.pth") in line


def test_the_token_stays_with_the_hub(hub: Hub, cache: Path, run: Run) -> None:
    hub.mirror = mirror = Hub(hub.content)
    assert run("pull", NAME)[0] == 0
    assert {token for _, _, token in hub.seen} == {"Bearer hf_secret"}
    assert {token for _, _, token in mirror.seen} == {None}
    mirror.shutdown()
    mirror.server_close()


@pytest.mark.parametrize(
    "name", ["", "model.pth", "a/b", "a/b/../c", "a/b//c", "/a/b/c", "a/b/c\n", "a/b@../c"]
)
def test_names(name: str, run: Run) -> None:
    with pytest.raises(UsageError, match="names no file on the Hub"):
        parse(name)
    assert parse("hf:a/b@v1.0/c/d.pth").revision == "v1.0"
