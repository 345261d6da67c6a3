"""Files of the Hugging Face Hub: downloaded to the cache by huggingface_hub, resumed, and checked by their hash.

`hf:OWNER/NAME/FILE` names a file; `hf:OWNER/NAME@REVISION/FILE` that of a branch, tag or commit. A file that is in the
cache is used without asking the Hub.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rwkv_npu.errors import UsageError, first_line
from rwkv_npu.formats.files import cache_dir, is_file, locked, write_atomically
from rwkv_npu.progress import progress

PREFIX = "hf:"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@({_PART}))?/((?:{_PART}/)*{_PART})")
_CHUNK = 1 << 22  # bytes hashed together
_SHA256, _SHA1 = 64, 40  # hex digits of an ETag: of LFS files, and of the blobs of git


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub. revision: None is the main branch."""

    repo: str
    revision: str | None
    name: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}{f'@{self.revision}' if self.revision else ''}/{self.name}"

    @property
    def path(self) -> Path:
        """The path of the downloaded file."""
        folder = self.repo.replace("/", "--") + (f"@{self.revision}" if self.revision else "")
        return cache_dir() / "hub" / folder / self.name


def parse(name: str) -> HubFile:
    """Parse OWNER/NAME[@REVISION]/FILE, with or without `hf:`. Raises UsageError."""
    found = _NAME.fullmatch(name.removeprefix(PREFIX))
    if not found:
        raise UsageError(f"{name!r:.200} names no file on the Hub: write OWNER/NAME/FILE")
    return HubFile(found[1], found[2], found[3])


def resolve(name: str) -> str:
    """The path of a model. `hf:...` is downloaded to the cache, if it is not there; other names are paths already."""
    if not name.startswith(PREFIX):
        return name
    file = parse(name)
    return str(file.path if is_file(file.path) else pull(file))


def pull(file: HubFile) -> Path:
    """Download a file, unless the cache has the Hub's present version. Returns its path.

    An interrupted download continues. The hash that the Hub names is checked before the file appears.
    Raises UsageError if the Hub cannot be reached, refuses or lacks the file, or if it arrives damaged.
    """
    hub = _hub()
    path = file.path
    url, found = _ask(hub, file)
    etag = found.etag or ""
    tag = path.with_name(f".{path.name}.etag")
    if is_file(path) and is_file(tag) and tag.read_text() == etag:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{re.sub('[^0-9a-zA-Z]', '', etag)[:16]}.part")
    part.touch()
    try:
        with locked(part):
            if not is_file(part):  # another process has finished it in this moment
                return path
            _download(hub, file, url, found, part)
            _check(file, part, etag, found.size)
            with part.open("rb") as done:
                os.fsync(done.fileno())
            tag.unlink(missing_ok=True)
            os.replace(part, path)
            write_atomically(tag, etag.encode())
    except BlockingIOError:
        raise UsageError(f"another process is downloading {file}: wait for it") from None
    return path


def _hub() -> Any:
    try:
        import huggingface_hub.file_download
    except ImportError:
        raise UsageError("the Hub is reached by huggingface_hub: pip install huggingface_hub") from None
    huggingface_hub.utils.logging.set_verbosity_error()  # it warns of retries, and of errors that are raised here too
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _ask(hub: Any, file: HubFile) -> tuple[str, Any]:
    """URL and metadata of a file on the Hub: etag, size, location."""
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        url = hub.hf_hub_url(file.repo, file.name, revision=file.revision, endpoint=endpoint)
        return url, hub.get_hf_file_metadata(url)
    except Exception as error:  # its type depends on the version of huggingface_hub
        raise _refusal(hub, file, error) from error


def _refusal(hub: Any, file: HubFile, error: Exception) -> UsageError:
    errors = hub.errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, errors.GatedRepoError):
        return UsageError(
            f"the Hub refuses {file} ({status}): check the name; for a private or gated model set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(f"the Hub has no repository {file.repo}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{file.repo} has no revision {file.revision}")
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return UsageError(f"{file.repo} has no file {file.name}")
    if status is not None:
        return UsageError(f"the Hub answers {status} for {file}: try again later")
    return UsageError(
        f"the Hub cannot be reached for {file} ({type(error).__name__}: {first_line(error)[:100]}): try again when "
        f"there is a connection, or copy the file to {file.path}"
    )


def _download(hub: Any, file: HubFile, url: str, found: Any, part: Path) -> None:
    """Append to `part` what it lacks."""
    headers = hub.utils.build_hf_headers()
    if urlparse(found.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # the token is for the Hub, not for its mirrors
    size = part.stat().st_size
    if found.size is not None and size >= found.size:
        return
    try:
        with part.open("r+b") as target:
            target.seek(size)
            hub.file_download.http_get(
                found.location, target, resume_size=size, headers=headers, expected_size=found.size
            )
    except Exception as error:  # of the disk, or of the HTTP library
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"{part.parent} has no room for {file}: free some"
        else:
            reason = f"the download of {file} broke off ({first_line(error)[:100]})"
        done = part.stat().st_size
        raise UsageError(f"{reason}; {done} bytes are kept, and the same command continues") from error


def _check(file: HubFile, part: Path, etag: str, size: int | None) -> None:
    """Compare a download with its hash. Raises UsageError, and removes it, if it differs."""
    length = part.stat().st_size
    if re.fullmatch(rf"[0-9a-f]{{{_SHA256}}}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch(rf"[0-9a-f]{{{_SHA1}}}", etag):
        digest = hashlib.sha1(f"blob {length}\0".encode(), usedforsecurity=False)
    else:
        print(f"the Hub names no hash of {file}: its size alone was checked", file=sys.stderr)
        if length != size:
            part.unlink()
            raise UsageError(f"{file} arrived with {length} bytes instead of {size}: pull it again")
        return
    with part.open("rb") as data, progress("check", "B", total=length) as bar:
        while chunk := data.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != etag:
        part.unlink()
        raise UsageError(
            f"{file} arrived damaged: its hash is {digest.hexdigest()[:12]}..., the Hub has {etag[:12]}...; "
            "it was removed, pull it again"
        )
