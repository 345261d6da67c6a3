"""From a checkpoint to a bundle.

Everything is checked before anything is written. The bundle grows in `OUT.partial/`, where each file appears
whole: after Ctrl-C, a kill or a full disk the next conversion goes on with what is there. OUT itself appears by
one rename. A bundle of the same weights that is there already is added to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import rwkv_npu
from rwkv_npu import headroom, quantisation
from rwkv_npu.artifacts import build_artifacts, plan_artifacts, remove_notes
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
    write_packed,
    write_tokenizer,
    write_weights,
)
from rwkv_npu.calibration_ids import default_ids, read_ids
from rwkv_npu.checkpoint import Checkpoint, check_finite, open_checkpoint
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.files import locked, write_atomically
from rwkv_npu.int8 import PRECISIONS as INT8_PRECISIONS
from rwkv_npu.models.network import Program
from rwkv_npu.packing import PRECISIONS
from rwkv_npu.precision_map import read_map
from rwkv_npu.quantisation import MAX_KL, REMEDIES, quantise_bundle, sizes
from rwkv_npu.recording import write_self_test
from rwkv_npu.sources import BundleSource, CheckpointSource
from rwkv_npu.spec import Scaling, Spec, check_fusion
from rwkv_npu.tokenizer import find_tokenizer
from rwkv_npu.toolkit import TARGETS, environment
from rwkv_npu.verify import verify_graphs

Say = Callable[[str], None]

NO_TARGET = "none"  # graphs for the CPU only

# What artifacts can be in, and where a chip has another choice. bf16 builds for the RK3588; what a board makes of it is
# not known.
ARTIFACT_PRECISIONS = ("fp16", *INT8_PRECISIONS)
NPU_PRECISIONS = {"rk3588": ("fp16", "bf16", *INT8_PRECISIONS)}


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


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion. Raises UsageError for a value that does not exist."""

    target: str
    precision: str
    fusion: str
    rows: tuple[int, ...] | None  # None: auto
    cpu: str
    jobs: int | None
    verify: bool
    force: bool
    max_kl: float = MAX_KL
    remedies: str = "all"

    def __post_init__(self) -> None:
        check_fusion(self.fusion)
        known: list[tuple[str, str, Collection[str]]] = [
            ("CPU precision", self.cpu, (*STORAGE, *PRECISIONS)),
            ("target", self.target, (*TARGETS, NO_TARGET)),
            ("choice of remedies", self.remedies, REMEDIES),
        ]
        for what, value, values in known:
            if value not in values:
                raise UsageError(f"{what} {value!r} is unknown: use one of {', '.join(values)}")
        has = NPU_PRECISIONS.get(self.target, ARTIFACT_PRECISIONS)
        if self.precision not in has:
            raise UsageError(
                f"{self.target} has no precision {self.precision!r}: use one of {', '.join(has)}"
            )
        if not 0 < self.max_kl < float("inf"):
            raise UsageError(f"max_kl is {self.max_kl}: it must be more than 0")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs is {self.jobs}: it must be at least 1")

    @property
    def storage(self) -> str:
        """Precision of the weights that every backend can read; quantised ones are there beside them."""
        return "fp32" if self.cpu == "fp32" else "fp16"

    @property
    def compiles(self) -> bool:
        return self.target != NO_TARGET

    @property
    def quantises(self) -> bool:
        return self.precision in INT8_PRECISIONS


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
    cpu: str = "int8",
    force: bool = False,
    jobs: int | None = None,
    verify: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    toolkit: str | None = None,
    calibrate: Sequence[str | os.PathLike[str]] = (),
    precision_map: str | os.PathLike[str] | None = None,
    max_kl: float = MAX_KL,
    remedies: str = "all",
    say: Say = lambda line: None,
) -> Path:
    """Make a bundle of `checkpoint` and return its path; `out` defaults to ./STEM.rwkv.

    target: the chip whose `.rknn` files are built, or `none` for the CPU only.
    precision: of the artifacts: fp16; w8a8, every large matrix in int8 and all between them in fp16; mixed, as many of
        them in int8 as leave the KL divergence of the logits under `max_kl` nats a token; bf16, an experiment.
    precision_map: a JSON file that says for mixed which are (precision_map.py), instead of a measurement.
    rows: row counts of the artifacts, such as "1,64"; auto chooses by memory.
    cpu: precision in which the CPU multiplies: int8, int4, fp16 or fp32. Beside quantised weights there are those in
        fp16, which the other backends read.
    force: replace whatever is at `out`. jobs: builds at a time (None: as memory and cores allow).
    verify: compare every graph and artifact with NumPy and keep the errors in the manifest.
    toolkit: version of the compiler, such as "2.3.2" for a board with an older runtime; None: whichever is installed.
    calibrate: texts, or ids as `.json` or `.npy`, that the model reads to find the ranges of its numbers; none is the
        text that ships with the package. What is meant for the CPU alone needs none.
    remedies: against the error of int8: all, or for comparison none, ranges (chosen by error, not as wide as all that
        was seen) or smoothing (of channels that stand out).
    say: gets a line for each stage. Progress bars go to stderr when it is a terminal.
    Raises CheckpointError, BundleError, ToolkitError, TokenizerError or UsageError, each one line; before
    anything is written where the input is at fault.
    """
    request = Request(target, precision, fusion, parse_rows(rows), cpu, jobs, verify, force, max_kl, remedies)
    source = Path(checkpoint)
    opened = open_checkpoint(source)
    override = None if tokenizer is None else os.fspath(tokenizer)
    words = find_tokenizer(vocab_size=opened.spec.V, beside=source, override=override)
    place = bundle_place(source, out)
    _check_place(place, source)
    adding = _existing(place, opened, request)
    manifest = adding or _new_manifest(opened, request)
    mapped = mapped_projections(precision_map, request, opened.spec)
    compiler, planned = None, []
    chosen: Sequence[str] = ()
    if request.compiles:
        compiler = environment.require(toolkit)
        program = Program(manifest.spec, request.fusion, manifest.scaling)
        # What will be in int8 is not known yet: whether as much as can be would fit is.
        most = sizes(opened.spec) if request.quantises else ()
        planned = plan_artifacts(manifest, program, request.target, request.precision, request.rows, most)
    rows = max((artifact.rows for artifact in planned), default=1)
    ids = read_ids([os.fspath(file) for file in calibrate], words, opened.spec, say, at_least=rows)
    _check_values(opened, manifest, request, place, say)
    if request.compiles or request.quantises:
        unscaled = CheckpointSource(opened)
        enough = headroom.TOKENS if ids is None else len(ids)
        ids = ids if ids is not None else default_ids(words, unscaled, say, at_least=rows)
        headroom.keep_in_range(manifest, unscaled, ids[:enough], adding is not None, say)
    with _workspace(place, manifest, adding is not None) as folder:
        _drop_damaged(folder, manifest, {artifact.path for artifact in planned}, say)
        write_weights(folder, CheckpointSource(opened), manifest.cpu, say)
        if request.cpu in PRECISIONS:
            write_packed(folder, CheckpointSource(opened), request.cpu)
            manifest.packed = list(dict.fromkeys([*manifest.packed, request.cpu]))
        manifest.cpu_default = request.cpu
        bundle = Bundle(folder, manifest)
        write_graphs(bundle)
        write_self_test(bundle)
        if tokenizer is not None or not _has_tokenizer(manifest):
            manifest.tokenizer = write_tokenizer(folder, words)
            manifest.files.pop(manifest.tokenizer or "", None)
        if request.verify:
            say("verifying the graphs in ONNX Runtime")
            verify_graphs(bundle)
        if request.quantises:
            assert ids is not None, "int8 is calibrated"
            chosen = quantise_bundle(
                bundle, ids, request.precision, request.max_kl, mapped, request.remedies, say
            )
        if compiler:
            program = Program(manifest.spec, request.fusion, manifest.scaling)
            planned = plan_artifacts(
                manifest, program, request.target, request.precision, request.rows, chosen
            )
            say(
                f"{len(planned)} graphs for {request.target}, {request.precision}: compiling those not there yet"
            )
            compiled = BundleSource(bundle, request.fusion)
            build_artifacts(compiled, planned, compiler, jobs=request.jobs, verify=request.verify)
        if request.verify:
            say(_errors(manifest, planned))
        record_files(folder, manifest)
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
        remove_notes(folder)
        quantisation.remove_notes(folder)
    return place


def mapped_projections(
    precision_map: str | os.PathLike[str] | None, request: Request, spec: Spec
) -> list[str] | None:
    """What a map has in int8, None without one. Raises UsageError."""
    if precision_map is None:
        return None
    if request.precision != "mixed":
        raise UsageError(
            f"a precision map is for --precision mixed, not for {request.precision}: it says what is in int8"
        )
    return read_map(os.fspath(precision_map), spec, sizes(spec))


def _check_values(
    checkpoint: Checkpoint, manifest: Manifest, request: Request, place: Path, say: Say
) -> None:
    """Read every value once. Raises CheckpointError for one that cannot be used, BundleError for other weights."""
    spec = checkpoint.spec
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=3)
    say(f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters: checking every value")
    digest = check_finite(checkpoint, fp16=request.storage == "fp16" or request.compiles)
    if manifest.weights_digest not in ("", digest):
        raise _other_weights(place)
    manifest.weights_digest = digest


def _other_weights(place: Path) -> BundleError:
    return BundleError(f"{place} was made from other weights: name another output, or give --force")


def _errors(manifest: Manifest, planned: list[Artifact]) -> str:
    """What the verification found, a line a graph and artifact: the worst output's relative error."""
    paths = {artifact.path for artifact in planned}
    errors = {**manifest.graph_errors, **{a.path: a.error for a in manifest.artifacts if a.path in paths}}
    return "\n".join(f"  error {error:.1e}  {name}" for name, error in errors.items() if error is not None)


def bundle_place(checkpoint: Path, out: str | os.PathLike[str] | None) -> Path:
    """Where the bundle of a checkpoint goes: `out`, or the current folder."""
    return Path(out) if out is not None else Path(f"{_stem(checkpoint)}.rwkv")


def _stem(checkpoint: Path) -> str:
    resolved = checkpoint.resolve()
    if resolved.name.endswith(".index.json"):  # of a sharded model: its folder has the better name
        resolved = resolved.parent
    return resolved.name if resolved.is_dir() else resolved.stem


def _check_place(place: Path, checkpoint: Path) -> None:
    """Raises UsageError for an output that cannot be made, or whose replacement would remove what is needed."""
    if place.name in ("", ".."):
        raise UsageError(f"the output cannot be {place}: name a folder to make")
    holds = {"the checkpoint itself": checkpoint, "the current folder": Path.cwd(), "your home": Path.home()}
    for what, path in holds.items():
        inside = path.resolve()
        if place.resolve() in (inside, *inside.parents):
            raise UsageError(f"the output {place} holds {what}: name another")


def _drop_damaged(folder: Path, manifest: Manifest, planned: set[str], say: Say) -> None:
    """Forget what a bundle has lost, so that it can be made again."""
    others = {a.path: a for a in manifest.artifacts if a.path not in planned}
    for name in list(damaged_files(folder, manifest)):
        again = "it is made again"
        if name in others:
            again = (
                f"convert with --target {others[name].target} --fusion {others[name].fusion} to have it again"
            )
        say(f"{name} is missing or damaged: {again}")
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
        raise _other_weights(place)
    if request.cpu not in PRECISIONS and manifest.cpu != request.cpu:
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
        cpu=request.storage,
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
        if error.errno not in _DISK:
            raise
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # where folders cannot be made, such as /proc
        raise BundleError(f"cannot make {folder}: {error.strerror}") from error
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
    (place / MARK).unlink()  # with the manifest there it means nothing, should we be killed before this
