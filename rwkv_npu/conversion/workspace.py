"""The folder that a conversion writes to: an existing bundle, or `OUT.partial`, which is renamed to OUT at the end."""

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

# Errors of the disk or of its permissions. Any other OSError is a bug in this package.
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
    """Results of finished stages, in the file `conversion` of the folder until the bundle is finished.

    key: identifies the inputs of the whole folder. Notes with another key are ignored.
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
        """The result of a stage, None if it is unknown or followed from other inputs."""
        source, result = self._stages.get(stage, (None, None))
        return result if source == json.loads(json.dumps(follows_from)) else None

    def keep(self, stage: str, follows_from: Any, result: Any) -> None:
        """Save the result of a stage at once. Both arguments must be JSON."""
        self._stages[stage] = [follows_from, result]
        self.write()

    def write(self) -> None:
        data = {"key": self._key, "stages": self._stages}
        write_atomically(self._path, json.dumps(data).encode())


def bundle_path(checkpoint: Path, out: str | os.PathLike[str] | None, adapter: Path | None = None) -> Path:
    """The path of a checkpoint's bundle: `out`, or STEM.rwkv in the current folder (STEM+ADAPTER.rwkv)."""
    if out is not None:
        return Path(out)
    return Path("+".join(map(_stem, filter(None, (checkpoint, adapter)))) + ".rwkv")


def _stem(checkpoint: Path) -> str:
    """The checkpoint's name as given. Links are not followed: in the Hub's cache they lead to names like a hash."""
    path = checkpoint.absolute() if checkpoint.name not in ("", "..") else checkpoint.resolve()
    if path.name.endswith(".index.json"):  # a sharded model is better named by its folder
        path = path.parent
    return path.name if path.is_dir() else path.stem


def check_out_path(out: Path, checkpoint: Path) -> None:
    """Raises UsageError if the output cannot be created, or if replacing it would delete something needed."""
    if out.name in ("", ".."):
        raise UsageError(f"the output cannot be {out}: give the name of a folder to create")
    protected = {"the model itself": checkpoint, "the current folder": Path.cwd()}
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        protected["your home"] = Path.home()
    for name, path in protected.items():
        inside = path.resolve()
        if out.resolve() in (inside, *inside.parents):
            raise UsageError(f"the output {out} contains {name}: give another path")


def existing_manifest(out: Path, checkpoint: Checkpoint, request: Request) -> Manifest | None:
    """The manifest of the bundle to extend. None if a new bundle must be made.

    Raises BundleError if anything else exists at `out`. With `force`, a bundle may exist there, even a damaged one.
    """
    if not (out.exists() or out.is_symlink()):
        return None
    if request.force:
        if not is_ours(out):
            raise BundleError(
                f"{out} exists and is not a bundle: force=True replaces only bundles, give another output"
            )
        return None
    if not is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle: give another output")
    manifest = read_manifest(out)
    if manifest.fingerprint != checkpoint.fingerprint:
        raise other_weights(out)
    if not manifest.cpu:
        raise BundleError(
            f"{out} was exported for a board and cannot be extended: convert to another output, and export again"
        )
    if manifest.outdated:
        raise BundleError(
            f"{out} is a bundle of format {manifest.format[0]}: force=True replaces it by a new one"
        )
    if request.cpu is not None and request.cpu not in PRECISIONS and manifest.cpu != request.cpu:
        raise BundleError(
            f"{out} holds {manifest.cpu} weights for the CPU, not {request.cpu}: give cpu={manifest.cpu!r}, "
            "another output, or force=True"
        )
    return manifest


def is_ours(out: Path) -> bool:
    """True if `out` is a bundle or the remains of one: damaged, of another version, or unfinished."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and {"format", "fingerprint", "checksum"} <= manifest.keys():
            return True
    except (OSError, ValueError, RecursionError):
        pass
    return _is_unfinished(out) or all((out / name).is_file() for name in (HOST, WEIGHTS))


def _is_unfinished(folder: Path) -> bool:
    """True if `folder` holds an unfinished conversion."""
    try:
        with (folder / MARK).open(encoding="utf-8") as file:
            return file.read(32).startswith(('{"key": "rwkv_npu ', "rwkv_npu "))
    except (OSError, ValueError):
        return False


def other_weights(out: Path) -> BundleError:
    return BundleError(f"{out} was made from other weights: give another output, or force=True")


def stamp(out: Path) -> bytes | None:
    """The bytes of the manifest at `out`, None if `out` does not exist. If they change, somebody wrote to it."""
    try:
        return (out / MANIFEST).read_bytes()
    except OSError:
        return b"" if out.exists() or out.is_symlink() else None


@contextlib.contextmanager
def workspace(out: Path, key: str, *, adding: bool, before: bytes | None) -> Iterator[tuple[Path, Notes]]:
    """The folder to write to, and its notes: OUT if it is extended, else OUT.partial, which becomes OUT at the end.

    key: identifies the inputs of the folder. An unfinished conversion with another key is deleted. before: the `stamp`
    of OUT when it was checked. Raises BundleError if OUT has another stamp now.
    After an error, OUT.partial stays for the next conversion. Only a CheckpointError deletes it, because such weights
    cannot be converted.
    """
    folder = out if adding else out.with_name(out.name + ".partial")
    try:
        with contextlib.ExitStack() as held:
            # Lock OUT, if it exists, and the partial folder. A lock on a file would end when the file is replaced.
            if out.is_dir():
                held.enter_context(locked(out))
            _check_unchanged(out, before)
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
                _check_unchanged(out, before)
                _replace(folder, out)
            (out / MARK).unlink(missing_ok=True)  # the manifest marks the bundle as finished
    except BlockingIOError:
        raise BundleError(
            f"another conversion is writing to {out}: wait for it, or give another output"
        ) from None
    except OSError as error:
        if error.errno not in _DISK:
            raise
        line = f"cannot write the bundle: {error.strerror or error} ({folder})"
        if not adding and (folder / MARK).is_file():
            line += "; finished stages are kept there, and the same command continues"
        raise BundleError(line) from error


def keep_if(notes: Notes, folder: Path, what: str, follows_from: Any, *patterns: str) -> None:
    """Delete the files that match `patterns` if an interrupted conversion made them from other inputs."""
    if notes.get(what, follows_from) is None:
        for path in [path for pattern in patterns for path in folder.rglob(pattern)]:
            if path.is_file() and path != folder / MARK:
                path.unlink()
        notes.keep(what, follows_from, True)


def _check_unchanged(out: Path, before: bytes | None) -> None:
    if stamp(out) != before:
        raise BundleError(f"another conversion has written to {out}: run the command again")


def _prepare_partial(folder: Path, key: str, held: contextlib.ExitStack) -> None:
    """Lock the folder. Keep an interrupted conversion with this key, delete one with another key."""
    if _is_unfinished(folder):
        held.enter_context(locked(folder))
        check_plain(folder)
        if (folder / MARK).read_text(encoding="utf-8").startswith(f'{{"key": {json.dumps(key)},'):
            return
        shutil.rmtree(folder)
    elif folder.is_symlink() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BundleError(f"{folder} exists, but not from an interrupted conversion: move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # in a place where no folder can be made, such as /proc
        raise BundleError(f"cannot make {folder}: {error.strerror}") from error
    held.enter_context(locked(folder))


def _replace(folder: Path, out: Path) -> None:
    """Rename the finished folder to `out`. An existing bundle is deleted only after that."""
    if out.exists() or out.is_symlink():
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.old-", dir=out.parent) as aside:
            old = Path(aside) / "old"
            os.replace(out, old)
            try:
                os.replace(folder, out)
            except BaseException:
                os.replace(old, out)
                raise
    else:
        os.replace(folder, out)


def delete_damaged(folder: Path, manifest: Manifest, request: Request, planned: set[str]) -> set[str]:
    """Delete damaged files, and log how each is made again: by this conversion, or by another. Returns their names.

    planned: paths of the artifacts that this conversion makes.
    """
    options = {
        a.path: f"target={a.target!r} precision={a.precision!r} fusion={a.fusion!r}"
        for a in manifest.artifacts
        if a.path not in planned
    }
    cpu = request.cpu_precision
    options |= {packed_file(other): f"cpu={other!r}" for other in manifest.packed if other != cpu}
    if manifest.int8 and not request.quantises:
        options[INT8] = f"precision={' or '.join(map(repr, manifest.int8))}"
    damaged = list(damaged_files(folder, manifest))
    for name in damaged:
        again = (
            f"convert with {options[name]} to have it again" if name in options else "it will be made again"
        )
        log.info(f"{name} is missing or damaged: {again}")
        remove_within(folder, name)
    if INT8 in damaged:
        dependent = [artifact.path for artifact in manifest.artifacts if artifact.int8]
        for option in dict.fromkeys(options[path] for path in dependent if path in options):
            log.info(f"removing artifacts that depend on it: convert with {option} to have them again")
    return set(damaged)
