"""The folder that a conversion writes to: a bundle that is added to, or `OUT.partial`, which becomes OUT."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_npu.conversion.request import Request
from rwkv_npu.errors import BundleError, CheckpointError, UsageError
from rwkv_npu.formats.bundle import (
    HOST,
    INT8,
    MANIFEST,
    MARK,
    WEIGHTS,
    Manifest,
    check_plain,
    damaged_files,
    is_bundle,
    packed_file,
    read_manifest,
)
from rwkv_npu.formats.checkpoint import Checkpoint
from rwkv_npu.formats.files import locked, remove_within, write_atomically
from rwkv_npu.quant.cpu import PRECISIONS

# Errors of the disk, or of its permissions; any other OSError is a bug of ours.
_DISK = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

log = logging.getLogger("rwkv_npu")


class Notes:
    """Results of stages that are finished, kept in the file `conversion` of the folder until the bundle is.

    key: what the whole folder follows from; notes of another key are not used.
    """

    def __init__(self, folder: Path, key: str):
        self._path, self._key = folder / MARK, key
        self._stages: dict[str, list[Any]] = {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["key"] == key:
                self._stages = dict(found["stages"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def get(self, stage: str, follows_from: Any) -> Any:
        """The result of a stage, None where it is not known or follows from something else."""
        source, result = self._stages.get(stage, (None, None))
        return result if source == json.loads(json.dumps(follows_from)) else None

    def keep(self, stage: str, follows_from: Any, result: Any) -> None:
        """Note the result of a stage, at once. Both are JSON."""
        self._stages[stage] = [follows_from, result]
        self.write()

    def write(self) -> None:
        data = {"key": self._key, "stages": self._stages}
        write_atomically(self._path, json.dumps(data).encode())


def bundle_place(checkpoint: Path, out: str | os.PathLike[str] | None, adapter: Path | None = None) -> Path:
    """The path of a checkpoint's bundle: `out`, or in the current folder STEM.rwkv, or with an adapter
    STEM+ADAPTER.rwkv."""
    if out is not None:
        return Path(out)
    return Path("+".join(map(_stem, filter(None, (checkpoint, adapter)))) + ".rwkv")


def _stem(checkpoint: Path) -> str:
    """The name as given: a snapshot's file may be a link to one that is named by a hash."""
    path = checkpoint.absolute() if checkpoint.name not in ("", "..") else checkpoint.resolve()
    if path.name.endswith(".index.json"):  # of a sharded model: its folder has the better name
        path = path.parent
    return path.name if path.is_dir() else path.stem


def check_place(place: Path, checkpoint: Path) -> None:
    """Raises UsageError for an output that cannot be made, or whose replacement would remove what is needed."""
    if place.name in ("", ".."):
        raise UsageError(f"the output cannot be {place}: name a folder to make")
    holds = {"the checkpoint itself": checkpoint, "the current folder": Path.cwd()}
    with contextlib.suppress(RuntimeError):  # a user without a home
        holds["your home"] = Path.home()
    for what, path in holds.items():
        inside = path.resolve()
        if place.resolve() in (inside, *inside.parents):
            raise UsageError(f"the output {place} holds {what}: name another")


def existing(place: Path, checkpoint: Checkpoint, request: Request) -> Manifest | None:
    """The manifest of the bundle to add to, or None where one has to be made.

    Raises BundleError for anything else that is there: with `force` too, unless it is a bundle, whole or not.
    """
    if not (place.exists() or place.is_symlink()):
        return None
    if request.force:
        if not is_ours(place):
            raise BundleError(
                f"{place} exists and is no bundle: --force replaces bundles only, name another output"
            )
        return None
    if not is_bundle(place):
        raise BundleError(f"{place} exists and is no bundle: name another output")
    manifest = read_manifest(place)
    if manifest.fingerprint != checkpoint.fingerprint:
        raise other_weights(place)
    if manifest.outdated:
        raise BundleError(f"{place} is a bundle of format {manifest.format[0]}: give --force to make it anew")
    if request.cpu is not None and request.cpu not in PRECISIONS and manifest.cpu != request.cpu:
        raise BundleError(
            f"{place} holds {manifest.cpu} weights for the CPU, not {request.cpu}: give --cpu {manifest.cpu}, "
            "name another output, or give --force"
        )
    return manifest


def is_ours(place: Path) -> bool:
    """Whether a bundle is at `place`, or what is left of one: damaged, of another version, or unfinished."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and {"format", "fingerprint", "checksum"} <= manifest.keys():
            return True
    except (OSError, ValueError, RecursionError):
        pass
    return _is_unfinished(place) or all((place / name).is_file() for name in (HOST, WEIGHTS))


def _is_unfinished(folder: Path) -> bool:
    """Whether `folder` holds a conversion that did not end."""
    try:
        with (folder / MARK).open(encoding="utf-8") as file:
            return file.read(32).startswith(('{"key": "rwkv_npu ', "rwkv_npu "))
    except (OSError, ValueError):
        return False


def other_weights(place: Path) -> BundleError:
    return BundleError(f"{place} was made from other weights: name another output, or give --force")


def stamp(place: Path) -> bytes | None:
    """The manifest at `place`, None where nothing is there: another one tells that somebody has written meanwhile."""
    try:
        return (place / MANIFEST).read_bytes()
    except OSError:
        return b"" if place.exists() or place.is_symlink() else None


@contextlib.contextmanager
def workspace(place: Path, key: str, *, adding: bool, before: bytes | None) -> Iterator[tuple[Path, Notes]]:
    """The folder to write to, and the notes in it: OUT itself when it is added to, else OUT.partial, which becomes OUT
    at the end.

    key: what all of the folder follows from; an unfinished conversion of another key is removed. before: OUT's `stamp`
    when it was looked at. Raises BundleError where it has another by now. OUT.partial stays whatever happens, but for
    a CheckpointError: no conversion of such weights will go on from it.
    """
    folder = place if adding else place.with_name(place.name + ".partial")
    try:
        with contextlib.ExitStack() as held:
            # Folders are locked, which stay when their files are replaced: OUT where it exists, and the partial.
            if place.is_dir():
                held.enter_context(locked(place))
            _check_unchanged(place, before)
            if not adding:
                _prepare_partial(folder, key, held)
            notes = Notes(folder, key)
            if not adding:
                notes.write()
            try:
                yield folder, notes
            except CheckpointError:
                if not adding:
                    shutil.rmtree(folder)
                raise
            if not adding:
                _check_unchanged(place, before)
                _replace(folder, place)
            (place / MARK).unlink(missing_ok=True)  # with the manifest there it means nothing
    except BlockingIOError:
        raise BundleError(
            f"another conversion is writing to {place}: wait for it, or name another output"
        ) from None
    except OSError as error:
        if error.errno not in _DISK:
            raise
        line = f"cannot write the bundle: {error.strerror or error} ({folder})"
        if not adding and (folder / MARK).is_file():
            line += "; what is done is kept there, and the same command goes on from it"
        raise BundleError(line) from error


def keep_if(notes: Notes, folder: Path, what: str, follows_from: Any, *patterns: str) -> None:
    """Remove the files that an interrupted conversion made from something else: all that match `patterns`."""
    if notes.get(what, follows_from) is None:
        for path in [path for pattern in patterns for path in folder.rglob(pattern)]:
            if path.is_file() and path != folder / MARK:
                path.unlink()
        notes.keep(what, follows_from, True)


def _check_unchanged(place: Path, before: bytes | None) -> None:
    if stamp(place) != before:
        raise BundleError(f"another conversion has written to {place} meanwhile: run the command again")


def _prepare_partial(folder: Path, key: str, held: contextlib.ExitStack) -> None:
    """Keep an interrupted conversion of this key, remove another's; lock the folder."""
    if _is_unfinished(folder):
        held.enter_context(locked(folder))
        check_plain(folder)
        if (folder / MARK).read_text(encoding="utf-8").startswith(f'{{"key": {json.dumps(key)},'):
            return
        shutil.rmtree(folder)
    elif folder.is_symlink() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BundleError(f"{folder} is in the way, and not from an interrupted conversion: move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # where folders cannot be made, such as /proc
        raise BundleError(f"cannot make {folder}: {error.strerror}") from error
    held.enter_context(locked(folder))


def _replace(folder: Path, place: Path) -> None:
    """Rename the finished folder to `place`; a bundle that is there is removed only after that."""
    if place.exists() or place.is_symlink():
        with tempfile.TemporaryDirectory(prefix=f"{place.name}.old-", dir=place.parent) as aside:
            old = Path(aside) / "old"
            os.replace(place, old)
            try:
                os.replace(folder, place)
            except BaseException:
                os.replace(old, place)
                raise
    else:
        os.replace(folder, place)


def drop_damaged(folder: Path, manifest: Manifest, request: Request, planned: set[str]) -> None:
    """Remove damaged files from the manifest, so that they are made again."""
    options = {
        a.path: f"--target {a.target} --precision {a.precision} --fusion {a.fusion}"
        for a in manifest.artifacts
        if a.path not in planned
    }
    cpu = request.cpu_precision
    options |= {packed_file(other): f"--cpu {other}" for other in manifest.packed if other != cpu}
    if manifest.int8 and not request.quantises:
        options[INT8] = f"--precision {' or '.join(manifest.int8)}"
    for name in list(damaged_files(folder, manifest)):
        again = f"convert with {options[name]} to have it again" if name in options else "it is made again"
        log.info(f"{name} is missing or damaged: {again}")
        remove_within(folder, name)
        del manifest.files[name]
        if name == INT8:
            stale = manifest.forget_int8()
            for option in dict.fromkeys(options[path] for path in stale if path in options):
                log.info(f"artifacts in its ranges go with it: convert with {option} to have them again")
    manifest.packed = [cpu for cpu in manifest.packed if packed_file(cpu) in manifest.files]
    manifest.artifacts = [artifact for artifact in manifest.artifacts if artifact.path in manifest.files]
