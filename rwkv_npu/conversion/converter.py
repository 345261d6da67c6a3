"""Convert a checkpoint to a bundle.

Everything that can be checked quickly is checked before anything is written. The bundle grows in `OUT.partial/`. Each
file appears there complete, and each finished stage is noted, so that after Ctrl-C, a kill or a full disk the next
conversion continues there. OUT itself appears by one rename. An existing bundle of the same weights is extended.

`run` carries out the steps in order. Steps return values, and only this module changes the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.conversion import fp16_range, rounding
from rwkv_npu.conversion.artifacts import build_artifacts, is_current, slot, verify_graphs
from rwkv_npu.conversion.calibration import KEEP, Statistics, calibrate, default_ids
from rwkv_npu.conversion.prepare import Prepared, prepare
from rwkv_npu.conversion.quantise import (
    FEW,
    MAX_KL,
    choose_parameters,
    describe,
    known_parameters,
    parameters_key,
    select_projections,
    sizes,
    split_text,
)
from rwkv_npu.conversion.request import Request, parse_rows, parse_target
from rwkv_npu.conversion.workspace import Notes, delete_damaged, keep_if, other_weights, stamp, workspace
from rwkv_npu.conversion.writer import (
    record_files,
    write_graphs,
    write_tokenizer,
    write_weights,
)
from rwkv_npu.formats.bundle import (
    FORMAT,
    INT8,
    MANIFEST,
    MATHS,
    SELF_TEST,
    Artifact,
    Bundle,
    Int8Set,
    Manifest,
    Rounding,
    Sensitivity,
    packed_file,
)
from rwkv_npu.formats.checkpoint import check_finite
from rwkv_npu.formats.files import remove_unlisted, remove_within, write_atomically
from rwkv_npu.formats.huggingface import CHAT_TEMPLATE, chat_template
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Scaling
from rwkv_npu.progress import progress
from rwkv_npu.quant.cpu import PRECISIONS
from rwkv_npu.runtime.selftest import write_self_test
from rwkv_npu.runtime.weights import BundleSource, CheckpointSource
from rwkv_npu.toolkit import Environment, environment

STATISTICS = "calib/statistics.safetensors"  # deleted when the bundle is finished

log = logging.getLogger("rwkv_npu")


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    target: str = "rk3588",
    precision: str = "fp16",
    fusion: str = "layer",
    rows: str | int | Sequence[int] = "auto",
    cpu: str | None = None,
    force: bool = False,
    jobs: int | None = None,
    verify: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    toolkit: str | None = None,
    calibrate: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    precision_map: str | os.PathLike[str] | None = None,
    max_kl: float = MAX_KL,
    remedies: str = "all",
    layout: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    adapter_scale: float | None = None,
    adapter_init: str | os.PathLike[str] | None = None,
    adapter_blocks: str | None = None,
    initial_state: str | os.PathLike[str] | None = None,
) -> Path:
    """Convert `checkpoint` to a bundle and return its path. `out` defaults to ./STEM.rwkv.

    target: chip to compile `.rknn` files for, or `none` for the CPU only.
    precision: of the artifacts. fp16. w8a8: every large matrix in int8, the rest in fp16. mixed: as many large matrices
        in int8 as keep the KL divergence of the logits under `max_kl` nats a token. bf16: experimental.
    precision_map: a JSON file that names the int8 projections of mixed (request.py), instead of a measurement.
    rows: row counts of the artifacts, such as "1,64"; auto chooses by memory.
    cpu: precision of the CPU's products: int8, int4, fp16, fp32, or auto: int4 in as many matrices as `max_kl` allows,
        int8 in the others. Next to quantised weights the bundle holds fp16 weights, which other backends read. None:
        the existing bundle's precision, int8 for a new bundle.
    force: replace the bundle at `out`. jobs: parallel builds (None: as memory and cores allow).
    verify: compare every graph and artifact with NumPy and keep the errors in the manifest.
    toolkit: version of the compiler; None: 2.3.2. A board needs a librknnrt of this version or later.
    calibrate: texts, or ids as `.json` or `.npy`, to read for fp16 range scaling and int8. Default: the text in the
        package. int8, fp16 and fp32 on the CPU need no text. "none": int4 is rounded to nearest.
    remedies: against the error of int8: all, or for comparison none, ranges (calibration methods other than min-max) or
        smoothing (SmoothQuant).
    layout: of an ambiguous checkpoint, blinkdl or web-rwkv; None derives it from the tensors.
    adapter: of a fine-tuning, merged into the weights. adapter_scale: alpha / rank of a LoRA, if no file holds it.
        adapter_init: initial values of PiSSA. adapter_blocks: in or out, for a Bone whose shapes are ambiguous.
    initial_state: a tuned state from which every text of the bundle begins.
    Each stage is logged to the logger "rwkv_npu". Progress bars go to stderr if it is a terminal.
    Raises CheckpointError, BundleError, ToolkitError, TokenizerError or UsageError, each one line.
    """
    texts = [calibrate] if isinstance(calibrate, str | os.PathLike) else calibrate
    return run(
        Request(
            checkpoint=Path(checkpoint),
            out=None if out is None else Path(out),
            target=parse_target(target),
            precision=precision,
            fusion=fusion,
            rows=parse_rows(rows),
            cpu=cpu,
            force=force,
            jobs=jobs,
            verify=verify,
            tokenizer=None if tokenizer is None else os.fspath(tokenizer),
            toolkit=toolkit,
            layout=layout,
            calibrate=tuple(os.fspath(text) for text in texts),
            precision_map=None if precision_map is None else os.fspath(precision_map),
            max_kl=max_kl,
            remedies=remedies,
            adapter=None if adapter is None else Path(adapter),
            adapter_scale=adapter_scale,
            adapter_init=None if adapter_init is None else Path(adapter_init),
            adapter_blocks=adapter_blocks,
            initial_state=None if initial_state is None else Path(initial_state),
        )
    )


def run(request: Request) -> Path:
    """Carry out a conversion. See `convert`."""
    job = prepare(request)
    request, manifest = job.request, job.manifest
    compiler = None
    if request.compiles:
        compiler = environment.require(request.toolkit or environment.DEFAULT_VERSION)
        request.check_toolkit(compiler.version)
    # The int8 choice of mixed is not known yet. Refuse the request if not even the smallest possible choice fits.
    smallest = () if not request.quantises else sizes(manifest.spec) if job.mapped is None else job.mapped
    planned = job.plan(smallest)
    for note in job.checkpoint.notes:
        warnings.warn(note, stacklevel=3)
    key = f"{manifest.made_by} {FORMAT} {MATHS} {manifest.fingerprint} {manifest.cpu}"
    with workspace(job.out, key, adding=job.adding, before=job.stamp) as (folder, notes):
        # 1. Read and check every value of the checkpoint, and every file of an existing bundle.
        manifest.weights_digest = _check_values(job, notes)
        if not job.adding:
            keep_if(notes, folder, "weights", manifest.weights_digest, "*")
        damaged = delete_damaged(folder, manifest, request, {artifact.path for artifact in planned})
        manifest.forget(damaged)
        # 2. Write the weights.
        write_weights(folder, CheckpointSource(job.checkpoint), manifest.cpu)
        bundle = Bundle(folder, manifest)
        # 3. Read the text with the model, for fp16 range scaling, for int8, and for the CPU's four bits.
        reads = request.calibrates or job.compensates
        ids, text = _read_text(job, bundle, notes) if reads else (None, None)
        cpu = request.cpu_precision
        if cpu in PRECISIONS:
            rounded = _write_packed(job, bundle, ids, text, notes)
            manifest.packed = list(dict.fromkeys([*manifest.packed, cpu]))
            manifest.rounding = {name: one for name, one in manifest.rounding.items() if name != cpu}
            manifest.rounding |= {cpu: rounded} if rounded.text else {}
        manifest.cpu_default = cpu
        if text is not None and request.calibrates:
            spec, statistics = manifest.spec, text.statistics
            if not job.adding:
                manifest.scaling = fp16_range.choose_scaling(spec, statistics)
            measured = fp16_range.measure_range(
                spec, statistics, manifest.scaling, manifest.fusion, adding=job.adding
            )
            manifest.headroom = {**measured, "text": text.digest}
        if not job.adding:
            depend_on_scaling = ("*.onnx", SELF_TEST, "*.rknn", "*.rknn.json")
            keep_if(notes, folder, "graphs", str(manifest.scaling), *depend_on_scaling)
        # 4. Write the CPU's graphs, the golden vectors and the tokenizer.
        write_graphs(bundle)
        write_self_test(bundle)
        if request.tokenizer is not None or not _has_tokenizer(manifest):
            manifest.tokenizer = write_tokenizer(folder, job.tokenizer)
            manifest.files.pop(manifest.tokenizer or "", None)
        template = chat_template(request.checkpoint) if request.checkpoint.is_dir() else None
        if template is not None and not (folder / CHAT_TEMPLATE).exists():
            write_atomically(folder / CHAT_TEMPLATE, template.encode())
        if request.verify:
            log.info("verifying the graphs in ONNX Runtime")
            manifest.graph_errors |= verify_graphs(bundle)
        # 5. int8: choose parameters, then projections.
        if request.quantises:
            assert ids is not None, "int8 is calibrated"
            manifest.int8_key, manifest.sensitivity, int8 = _choose_int8(job, bundle, ids, text)
            replaced = manifest.int8.get(request.precision)
            manifest.int8[request.precision] = int8
            if replaced is not None and replaced.projections != int8.projections:
                manifest.artifacts = _without_other_choices(job, int8.projections)
            planned = job.plan(int8.projections)
        # 6. Compile the artifacts.
        if compiler:
            manifest.artifacts = _compile(job, bundle, planned, compiler)
            if manifest.npu_default not in {artifact.precision for artifact in manifest.artifacts}:
                manifest.npu_default = manifest.artifacts[0].precision
        if request.verify:
            log.info(_errors(manifest, planned))
        # 7. Write the manifest. Then delete the notes of the stages and leftovers of interrupted conversions.
        manifest.files = record_files(folder, manifest)
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
        remove_unlisted(folder, ("rknn", "cpu", "calib", "graphs"), manifest.files)
        with contextlib.suppress(OSError):  # it is missing, or holds the int8 parameters
            (folder / "calib").rmdir()
    if job.adding and not damaged and stamp(job.out) == job.stamp:
        log.info(f"nothing to do: {job.out} has all of it, and every file is whole")
    return job.out


def _check_values(job: Prepared, notes: Notes) -> str:
    """Read every value once. Returns the digest of all values.

    Raises CheckpointError for an unusable value, BundleError if the output holds other weights.
    """
    spec, request = job.checkpoint.spec, job.request
    fp16 = request.storage == "fp16" or request.compiles
    follows_from = [_file_stamps(job.checkpoint.path), fp16]
    digest = notes.get("checked", follows_from)
    if digest is None:
        log.info(f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters: checking every value")
        digest = check_finite(job.checkpoint, fp16=fp16)
        if job.manifest.weights_digest not in ("", digest):
            raise other_weights(job.out)
        notes.keep("checked", follows_from, digest)
    return str(digest)


def _file_stamps(path: Path) -> list[list[Any]]:
    """Names, sizes, times and inodes of a checkpoint's files. Equal stamps mean that the files have not changed."""
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() and path.suffix != ".json" else sorted(folder.iterdir())
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in stats]


class _Text(NamedTuple):
    """A text that the model has read, and its activation statistics without any scaling."""

    digest: str
    statistics: Statistics

    @staticmethod
    def digest_of(ids: np.ndarray) -> str:
        return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _read_text(job: Prepared, bundle: Bundle, notes: Notes) -> tuple[np.ndarray, _Text | None]:
    """The ids of the text, and its statistics. These are None if the bundle has everything that is made from them."""
    request, manifest = job.request, job.manifest
    source = BundleSource(bundle, "layer", manifest.cpu)
    source.program = Program(manifest.spec, "layer", Scaling())
    ids = job.ids
    if ids is None:
        sampled = notes.get("sampled", manifest.weights_digest)
        ids = (
            default_ids(job.tokenizer, CheckpointSource(job.checkpoint))
            if sampled is None
            else np.array(sampled, np.int64)
        )
        if job.tokenizer is None and sampled is None:
            notes.keep("sampled", manifest.weights_digest, ids.tolist())
    moments: list[str] = []
    if job.compensates:
        cpu, wanted = request.cpu_precision, _wanted_rounding(job, ids)
        any_fits = job.adding and not job.cpu_given
        if rounding.existing(bundle, cpu, wanted, notes, any_fits=any_fits) is None:
            moments = rounding.candidates(manifest.spec, cpu)
    keep = KEEP if request.quantises else 2
    if request.quantises or moments:
        read = split_text(ids)[0]
    else:
        read = ids if job.ids is not None else ids[: fp16_range.TOKENS]
    text = _Text.digest_of(read)
    int8_known = known_parameters(bundle, parameters_key(bundle, ids, request.remedies)) is not None
    scaled = manifest.headroom.get("text") == text and (int8_known or not request.quantises)
    if not moments and (scaled or not request.calibrates):
        return ids, None
    follows_from = [manifest.weights_digest, manifest.cpu, text, keep, moments]
    path = bundle.path / STATISTICS
    if notes.get("statistics", follows_from) and path.is_file():
        return ids, _Text(text, Statistics.load(path, len(read)))
    log.info(f"reading {len(read)} tokens for activation statistics")
    if request.quantises and len(read) < FEW:
        log.info(
            f"{len(read)} tokens are few to choose int8 parameters: on other texts the error of int8 will be larger "
            "than measured here. Use thousands of tokens"
        )
    with progress("calibrate", "token", total=len(read)) as bar:
        statistics = calibrate(source, read, keep=keep, moments=moments, progress=bar.update)
    statistics.save(path)
    notes.keep("statistics", follows_from, True)
    return ids, _Text(text, statistics)


def _write_packed(
    job: Prepared, bundle: Bundle, ids: np.ndarray | None, text: _Text | None, notes: Notes
) -> Rounding:
    """Write the weights in the CPU's precision, unless the bundle has them as requested. Returns their rounding."""
    request, cpu = job.request, job.request.cpu_precision
    wanted = _wanted_rounding(job, ids)
    found = rounding.existing(bundle, cpu, wanted, notes, any_fits=job.adding and not job.cpu_given)
    if found is not None:
        return found
    _forget_files(bundle, {packed_file(cpu)})
    (bundle.path / packed_file(cpu)).unlink(missing_ok=True)
    if cpu == "int4" and not wanted.text:
        reason = "no vocabulary is known for this model" if request.reads_text else "no text is read"
        log.info(f"int4 is rounded to nearest: {reason}. A text rounds it better (calibrate=)")
    statistics = text.statistics if text is not None else None
    measured = None if ids is None else split_text(ids)[1]
    source = CheckpointSource(job.checkpoint)
    return rounding.write(bundle, source, cpu, wanted, statistics, measured, notes)


def _wanted_rounding(job: Prepared, ids: np.ndarray | None) -> Rounding:
    """The rounding that the request asks for. With `auto`, the projections are not chosen yet."""
    if not job.compensates or ids is None:
        return Rounding()
    read = split_text(ids)[0]
    max_kl = job.request.max_kl if job.request.cpu == "auto" else None
    return Rounding(text=_Text.digest_of(read), tokens=len(read), max_kl=max_kl)


def _choose_int8(
    job: Prepared, bundle: Bundle, ids: np.ndarray, text: _Text | None
) -> tuple[str, list[Sensitivity], Int8Set]:
    """Choose int8 parameters and projections. Returns the parameters' key, their table, and the projections.

    Results of an earlier conversion are used if they depend on the same things.
    """
    request, manifest = job.request, job.manifest
    key = parameters_key(bundle, ids, request.remedies)
    before = manifest.int8.get(request.precision) if manifest.int8_key == key else None
    table = known_parameters(bundle, key)
    if table is None or manifest.int8_key not in ("", key):
        _forget_int8(bundle)
        assert text is not None, "_read_text returns a text if the parameters are unknown"
        samples_of = partial(fp16_range.scaled_samples, manifest.spec, text.statistics, manifest.scaling)
        table = choose_parameters(bundle, samples_of, request.remedies, key)
    mapped = job.mapped if request.precision == "mixed" else list(sizes(manifest.spec))
    max_kl = request.max_kl if mapped is None else None
    same = mapped is None or before is not None and set(before.projections) == set(mapped)
    int8 = before if before is not None and before.max_kl == max_kl and same else None
    if int8 is None:
        int8, table = select_projections(bundle, split_text(ids)[1], table, key, mapped, max_kl)
    log.info("\n".join(describe(request.precision, int8, table)))
    return key, table, int8


def _forget_int8(bundle: Bundle) -> None:
    """Remove everything made with other int8 parameters: from the manifest first, in case of a kill."""
    stale = [artifact for artifact in bundle.manifest.artifacts if artifact.int8]
    if stale:
        lost = sorted({(a.target, a.precision, a.fusion) for a in stale})
        log.info(
            "removing int8 artifacts with other quantization parameters. To have them again, convert with "
            + ", ".join(f"target={t!r} precision={p!r} fusion={f!r}" for t, p, f in lost)
        )
    names = {INT8, *(artifact.path for artifact in stale)}
    _forget_files(bundle, names)
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # the folder may be missing
            remove_within(bundle.path, name)


def _forget_files(bundle: Bundle, names: Collection[str]) -> None:
    """Remove files from the manifest, in memory and on disk, before the files are replaced or deleted."""
    bundle.manifest.forget(names)
    if (bundle.path / MANIFEST).exists():
        write_atomically(bundle.path / MANIFEST, bundle.manifest.to_json().encode())


def _without_other_choices(job: Prepared, int8: Collection[str]) -> list[Artifact]:
    """The bundle's artifacts, except those of this precision with other int8 projections.

    A bundle has one choice for each precision, whatever the target, fusion and rows.
    """
    precision, artifacts = job.request.precision, job.manifest.artifacts
    others = [a for a in artifacts if a.precision != precision]
    planned = {
        slot(a): a.int8 for a in replace(job, manifest=replace(job.manifest, artifacts=others)).plan(int8)
    }
    removed = [a for a in artifacts if a.precision == precision and slot(a) not in planned]
    for target, fusion in sorted({(a.target, a.fusion) for a in removed}):
        rows = sorted({a.rows for a in removed if (a.target, a.fusion) == (target, fusion)})
        log.info(
            f"{precision} has other int8 projections now: removing the artifacts for {target}, {fusion} fusion, rows "
            f"{', '.join(map(str, rows))}. To have them again, convert with target={target!r} "
            f"precision={precision!r} fusion={fusion!r}"
        )
    return [a for a in artifacts if a.precision != precision or planned.get(slot(a)) == a.int8]


def _compile(job: Prepared, bundle: Bundle, planned: list[Artifact], compiler: Environment) -> list[Artifact]:
    """Compile the planned artifacts that are missing or not current. Returns all artifacts of the bundle."""
    request, manifest = job.request, job.manifest
    log.info(
        f"{len(planned)} graphs for {request.target}, {request.precision}: compiling those that are missing, with "
        f"rknn-toolkit2 {compiler.version}"
    )
    wanted = {slot(artifact): artifact for artifact in planned}

    def stale(artifact: Artifact) -> bool:
        target = wanted.get(slot(artifact))
        return target is not None and not is_current(artifact, target, compiler, request.verify)

    paths = {artifact.path for artifact in manifest.artifacts if stale(artifact)}
    twins = [a for a in manifest.artifacts if a.path in paths and slot(a) not in wanted]
    if paths:
        # A file that two precisions share keeps its path.
        shared_paths = {slot(artifact): artifact.path for artifact in manifest.artifacts}
        planned = [replace(a, path=shared_paths.get(slot(a), a.path)) for a in planned]
        _forget_files(bundle, paths)
    source = BundleSource(bundle, request.fusion)
    built = build_artifacts(source, planned, compiler, jobs=request.jobs, verify=request.verify)
    by_path = {artifact.path: artifact for artifact in built}
    shared = [replace(by_path[a.path], precision=a.precision) for a in twins if a.path in by_path]
    return [*manifest.artifacts, *built, *shared]


def _errors(manifest: Manifest, planned: list[Artifact]) -> str:
    """The verification errors of graphs and artifacts, one a line: the worst relative error of the outputs."""
    slots = set(map(slot, planned))
    artifacts = {a.path: a.error for a in manifest.artifacts if slot(a) in slots}
    errors = {**manifest.graph_errors, **artifacts}
    return "\n".join(f"  error {error:.1e}  {name}" for name, error in errors.items() if error is not None)


def _has_tokenizer(manifest: Manifest) -> bool:
    name = manifest.tokenizer
    return name is not None and (name.startswith("builtin:") or name in manifest.files)
