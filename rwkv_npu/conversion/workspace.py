"""Where a conversion writes: a bundle that is added to, or a folder beside it that becomes one by a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rwkv_npu.conversion.request import Request, Say
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.formats.bundle import (
    FORMAT,
    INT8,
    MANIFEST,
    MARK,
    MATHS,
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

# What the disk, or its permissions, can do to us; any other OSError is a bug of ours.
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


def bundle_place(checkpoint: Path, out: str | os.PathLike[str] | None) -> Path:
    """Where the bundle of a checkpoint goes: `out`, or the current folder."""
    return Path(out) if out is not None else Path(f"{_stem(checkpoint)}.rwkv")


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
    holds = {"the checkpoint itself": checkpoint, "the current folder": Path.cwd(), "your home": Path.home()}
    for what, path in holds.items():
        inside = path.resolve()
        if place.resolve() in (inside, *inside.parents):
            raise UsageError(f"the output {place} holds {what}: name another")


def existing(place: Path, checkpoint: Checkpoint, request: Request) -> Manifest | None:
    """The manifest of the bundle to add to, or None where one has to be made. Raises BundleError."""
    if request.force or not (place.exists() or place.is_symlink()):
        return None
    if not is_bundle(place):
        raise BundleError(
            f"{place} exists and is no bundle: name another output, or give --force to replace it"
        )
    manifest = read_manifest(place)
    if manifest.fingerprint != checkpoint.fingerprint:
        raise other_weights(place)
    if request.cpu not in PRECISIONS and manifest.cpu != request.cpu:
        raise BundleError(
            f"{place} holds {manifest.cpu} weights for the CPU, not {request.cpu}: give --cpu {manifest.cpu}, "
            "name another output, or give --force"
        )
    return manifest


def other_weights(place: Path) -> BundleError:
    return BundleError(f"{place} was made from other weights: name another output, or give --force")


def stamp(place: Path) -> bytes | None:
    """What tells whether somebody else has written to `place` meanwhile: its manifest, None where nothing is there."""
    try:
        return (place / MANIFEST).read_bytes()
    except OSError:
        return b"" if place.exists() or place.is_symlink() else None


@contextlib.contextmanager
def workspace(place: Path, manifest: Manifest, adding: bool, before: bytes | None) -> Iterator[Path]:
    """The folder to write to: OUT itself when it is added to, else OUT.partial, which becomes OUT at the end.

    before: OUT's `stamp` when it was looked at. Raises BundleError where it has another by now.
    """
    folder = place if adding else place.with_name(place.name + ".partial")
    try:
        with contextlib.ExitStack() as held:
            # Folders, which stay when their files are replaced: that which is added to or replaced, and the partial.
            if place.is_dir():
                held.enter_context(locked(place))
            _check_unchanged(place, before)
            if not adding:
                _prepare_partial(folder, manifest, held)
            yield folder
            if not adding:
                _check_unchanged(place, before)
                _replace(folder, place)
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


def _check_unchanged(place: Path, before: bytes | None) -> None:
    if stamp(place) != before:
        raise BundleError(f"another conversion has written to {place} meanwhile: run the command again")


def _prepare_partial(folder: Path, manifest: Manifest, held: contextlib.ExitStack) -> None:
    """Keep what an interrupted conversion of the same weights left, remove what another left; lock the folder."""
    mark = folder / MARK
    key = f"{manifest.made_by} {FORMAT} {MATHS} {manifest.weights_digest} {manifest.cpu} {manifest.scaling}"
    if mark.is_file():
        held.enter_context(locked(folder))
        check_plain(folder)
        if mark.read_text(encoding="utf-8") == key:
            return
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise BundleError(f"{folder} is in the way, and not from an interrupted conversion: move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # where folders cannot be made, such as /proc
        raise BundleError(f"cannot make {folder}: {error.strerror}") from error
    held.enter_context(locked(folder))
    write_atomically(mark, key.encode())


def _replace(folder: Path, place: Path) -> None:
    """Put the finished folder in the place of whatever is there, which is removed only after that."""
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
    (place / MARK).unlink()  # with the manifest there it means nothing, should we be killed before this


def drop_damaged(folder: Path, manifest: Manifest, request: Request, planned: set[str], say: Say) -> None:
    """Forget what a bundle has lost, so that it can be made again."""
    options = {
        a.path: f"--target {a.target} --precision {a.precision} --fusion {a.fusion}"
        for a in manifest.artifacts
        if a.path not in planned
    }
    options |= {packed_file(cpu): f"--cpu {cpu}" for cpu in manifest.packed if cpu != request.cpu}
    if manifest.int8 and not request.quantises:
        options[INT8] = f"--precision {' or '.join(manifest.int8)}"
    for name in list(damaged_files(folder, manifest)):
        again = f"convert with {options[name]} to have it again" if name in options else "it is made again"
        say(f"{name} is missing or damaged: {again}")
        remove_within(folder, name)
        del manifest.files[name]
        if name == INT8:
            stale = manifest.forget_int8()
            for option in dict.fromkeys(options[path] for path in stale if path in options):
                say(f"artifacts in its ranges go with it: convert with {option} to have them again")
    manifest.packed = [cpu for cpu in manifest.packed if packed_file(cpu) in manifest.files]
    manifest.artifacts = [artifact for artifact in manifest.artifacts if artifact.path in manifest.files]
