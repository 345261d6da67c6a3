"""From a checkpoint to a bundle.

Everything is checked before anything is written. The bundle grows in `OUT.partial/`, where each file appears
whole: after Ctrl-C, a kill or a full disk the next conversion goes on with what is there. OUT itself appears by
one rename. A bundle of the same weights that is there already is added to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import rwkv_npu
from rwkv_npu.artifacts import build_artifacts, plan_artifacts
from rwkv_npu.bundle import (
    FORMAT,
    MANIFEST,
    MARK,
    MATHS,
    Artifact,
    Bundle,
    Manifest,
    damaged_files,
    is_bundle,
    read_manifest,
)
from rwkv_npu.bundle_writer import (
    STORAGE,
    describe_groups,
    record_files,
    write_graphs,
    write_tokenizer,
    write_weights,
)
from rwkv_npu.checkpoint import Checkpoint, check_finite, open_checkpoint
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.files import locked, write_atomically
from rwkv_npu.models.network import Program
from rwkv_npu.sources import BundleSource, CheckpointSource
from rwkv_npu.spec import FUSIONS, Scaling, Spec
from rwkv_npu.tokenizer import find_tokenizer
from rwkv_npu.toolkit import environment as toolkit
from rwkv_npu.toolkit.compiler import TARGETS, CompileOptions
from rwkv_npu.verify import verify_graphs

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion, checked. `target` None builds for the CPU only; `rows` None is auto."""

    target: str | None
    precision: str
    fusion: str
    rows: tuple[int, ...] | None
    cpu: str
    jobs: int | None
    verify: bool
    force: bool

    @staticmethod
    def of(
        target: str,
        precision: str,
        fusion: str,
        rows: str | int | Sequence[int],
        cpu: str,
        jobs: int | None,
        verify: bool,
        force: bool,
    ) -> Request:
        """Raises UsageError for a value that does not exist."""
        if fusion not in FUSIONS:
            raise UsageError(f"fusion {fusion!r} is unknown: use one of {', '.join(FUSIONS)}")
        if cpu not in STORAGE:
            raise UsageError(f"CPU precision {cpu!r} is unknown: use one of {', '.join(STORAGE)}")
        if target not in (*TARGETS, "none"):
            raise UsageError(f"target {target!r} is unknown: use one of {', '.join(TARGETS)}, none")
        if precision != "fp16":
            raise UsageError(f"precision {precision!r} is unknown: use fp16")
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs is {jobs}: it must be at least 1")
        chip = None if target == "none" else target
        if chip:
            CompileOptions(target=chip, precision=precision)
        return Request(chip, precision, fusion, parse_rows(rows), cpu, jobs, verify, force)


def parse_rows(rows: str | int | Sequence[int]) -> tuple[int, ...] | None:
    """`auto` -> None; "1,64", 64 or [1, 64] -> (1, 64). Raises UsageError outside 1 .. 1024."""
    if rows == "auto":
        return None
    parts = rows.split(",") if isinstance(rows, str) else [rows] if isinstance(rows, int) else rows
    try:
        counts = sorted({int(part) for part in parts})
    except (TypeError, ValueError):
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 1024:
        raise UsageError(f"rows {rows!r} makes no sense: write auto, or numbers from 1 to 1024 such as 1,64")
    return tuple(counts)


def default_scaling(spec: Spec) -> Scaling:
    """What keeps fp16 graphs of a generation in range: v4 to v6 were trained with a residual that grows."""
    return Scaling(ffn=4.0, residual_every=6 if spec.generation[0] in "456" else 0)


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    target: str = "rk3588",
    precision: str = "fp16",
    fusion: str = "layer",
    rows: str | int | Sequence[int] = "auto",
    cpu: str = "fp16",
    force: bool = False,
    jobs: int | None = None,
    verify: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Make a bundle of `checkpoint` and return its path; `out` defaults to ./STEM.rwkv.

    target: the chip whose `.rknn` files are built, or `none` for the CPU only.
    rows: row counts of the artifacts, such as "1,64"; auto chooses by memory.
    cpu: precision in which the CPU's backends find the weights, fp16 or fp32.
    force: replace whatever is at `out`. jobs: builds at a time (None: as memory and cores allow).
    verify: compare every graph and artifact with NumPy and keep the errors in the manifest.
    say: gets a line for each stage. Progress bars go to stderr when it is a terminal.
    Raises CheckpointError, BundleError, ToolkitError, TokenizerError or UsageError, each one line; before
    anything is written where the input is at fault.
    """
    request = Request.of(target, precision, fusion, rows, cpu, jobs, verify, force)
    opened = open_checkpoint(Path(checkpoint))
    words = find_tokenizer(
        vocab_size=opened.spec.V,
        beside=Path(checkpoint),
        override=None if tokenizer is None else os.fspath(tokenizer),
    )
    place = Path(out) if out is not None else Path(f"{_stem(Path(checkpoint))}.rwkv")
    _check_place(place, Path(checkpoint))
    adding = _existing(place, opened, request)
    spec = opened.spec
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    say(f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters: checking every value")
    check_finite(opened, fp16=request.cpu == "fp16" or request.target is not None)
    compiler = toolkit.require() if request.target else None
    manifest = adding or _new_manifest(opened, request)
    program = Program(manifest.spec, request.fusion, manifest.scaling)
    planned = []
    if request.target:
        planned = plan_artifacts(manifest, program, request.target, request.precision, request.rows)
    with _workspace(place, manifest, adding is not None) as folder:
        _drop_damaged(folder, manifest, say)
        write_weights(folder, CheckpointSource(opened), manifest.cpu, say)
        bundle = Bundle(folder, manifest)
        write_graphs(bundle)
        if tokenizer is not None or not _has_tokenizer(manifest):
            manifest.tokenizer = write_tokenizer(folder, words)
            manifest.files.pop(manifest.tokenizer or "", None)
        if request.verify:
            say("verifying the graphs in ONNX Runtime")
            verify_graphs(bundle)
        if compiler:
            say(
                f"{len(planned)} graphs for {request.target}, {request.precision}: compiling those that are not there"
            )
            source = BundleSource(bundle, request.fusion)
            build_artifacts(source, planned, compiler, jobs=request.jobs, verify=request.verify)
        if request.verify:
            say(_errors(manifest, planned))
        record_files(folder, manifest)
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
    return place


def _errors(manifest: Manifest, planned: list[Artifact]) -> str:
    """What the verification found, a line a graph and artifact: the worst output's relative error."""
    paths = {artifact.path for artifact in planned}
    errors = {**manifest.graph_errors, **{a.path: a.error for a in manifest.artifacts if a.path in paths}}
    return "\n".join(f"  error {error:.1e}  {name}" for name, error in errors.items() if error is not None)


def _stem(checkpoint: Path) -> str:
    resolved = checkpoint.resolve()
    if resolved.name.endswith(".index.json"):  # of a sharded model: its folder has the better name
        resolved = resolved.parent
    return resolved.name if resolved.is_dir() else resolved.stem


def _check_place(place: Path, checkpoint: Path) -> None:
    """Raises UsageError for an output that cannot be made, or whose replacement would remove the checkpoint."""
    if place.name in ("", ".."):
        raise UsageError(f"the output cannot be {place}: name a folder to make")
    source = checkpoint.resolve()
    if place.resolve() in (source, *source.parents):
        raise UsageError(f"the output {place} holds the checkpoint itself: name another")


def _drop_damaged(folder: Path, manifest: Manifest, say: Say) -> None:
    """Forget what a bundle has lost, so that it is made again."""
    for name in list(damaged_files(folder, manifest)):
        say(f"{name} is missing or damaged: it is made again")
        (folder / name).unlink(missing_ok=True)
        del manifest.files[name]
    manifest.artifacts = [artifact for artifact in manifest.artifacts if artifact.path in manifest.files]


def _has_tokenizer(manifest: Manifest) -> bool:
    name = manifest.tokenizer
    return name is not None and (name.startswith("builtin:") or name in manifest.files)


def _existing(place: Path, checkpoint: Checkpoint, request: Request) -> Manifest | None:
    """The manifest of the bundle to add to, or None where one has to be made. Raises BundleError."""
    if request.force or not (place.exists() or place.is_symlink()):
        return None
    if not is_bundle(place):
        raise BundleError(
            f"{place} exists and is no bundle: name another output, or give --force to replace it"
        )
    manifest = read_manifest(place)
    if manifest.fingerprint != checkpoint.fingerprint:
        raise BundleError(f"{place} was made from other weights: name another output, or give --force")
    if manifest.cpu != request.cpu:
        raise BundleError(
            f"{place} holds {manifest.cpu} weights for the CPU, not {request.cpu}: give --cpu {manifest.cpu}, "
            "name another output, or give --force"
        )
    return manifest


def _new_manifest(checkpoint: Checkpoint, request: Request) -> Manifest:
    return Manifest(
        spec=checkpoint.spec,
        fingerprint=checkpoint.fingerprint,
        checkpoint=checkpoint.path.name,
        fusion=request.fusion,
        cpu=request.cpu,
        scaling=default_scaling(checkpoint.spec),
        tokenizer=None,
        made_by=f"rwkv_npu {rwkv_npu.__version__}",
        groups=describe_groups(checkpoint.spec),
    )


@contextlib.contextmanager
def _workspace(place: Path, manifest: Manifest, adding: bool) -> Iterator[Path]:
    """The folder to write to: OUT itself when it is added to, else OUT.partial, which becomes OUT at the end."""
    folder = place if adding else place.with_name(place.name + ".partial")
    try:
        with contextlib.ExitStack() as held:
            if adding:
                held.enter_context(locked(folder / MANIFEST))
            else:
                _prepare_partial(folder, manifest, held)
            yield folder
            if not adding:
                _replace(folder, place)
    except BlockingIOError:
        raise BundleError(
            f"another conversion is writing to {place}: wait for it, or name another output"
        ) from None
    except OSError as error:
        line = f"cannot write the bundle: {error.strerror or error} ({folder})"
        if not adding and (folder / MARK).is_file():
            line += "; what is done is kept there, and the same command goes on from it"
        raise BundleError(line) from error


def _prepare_partial(folder: Path, manifest: Manifest, held: contextlib.ExitStack) -> None:
    """Keep what an interrupted conversion of the same weights left, remove what another left; lock the folder."""
    mark = folder / MARK
    key = f"{manifest.made_by} {FORMAT} {MATHS} {manifest.fingerprint} {manifest.cpu} {manifest.scaling}"
    if mark.is_file():
        held.enter_context(locked(mark))
        if mark.read_text(encoding="utf-8") == key:
            return
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise BundleError(f"{folder} is in the way, and not from an interrupted conversion: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, key.encode())
    held.enter_context(locked(mark))


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
    (place / MARK).unlink()
