"""From a checkpoint to a bundle.

Everything is checked before anything is written. The bundle grows in `OUT.partial/`, where each file appears
whole: after Ctrl-C, a kill or a full disk the next conversion goes on with what is there. OUT itself appears by
one rename. A bundle of the same weights that is there already is added to.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rwkv_npu
from rwkv_npu.conversion import fp16_range
from rwkv_npu.conversion.artifacts import build_artifacts, plan_artifacts, verify_graphs
from rwkv_npu.conversion.calibration_ids import default_ids, read_ids
from rwkv_npu.conversion.quantise import LEAST, MAX_KL, quantise_bundle, sizes
from rwkv_npu.conversion.request import Request, Say, mapped_projections, parse_rows
from rwkv_npu.conversion.workspace import (
    bundle_place,
    check_place,
    drop_damaged,
    existing,
    other_weights,
    stamp,
    workspace,
)
from rwkv_npu.conversion.writer import (
    describe_groups,
    record_files,
    write_graphs,
    write_packed,
    write_tokenizer,
    write_weights,
)
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import MANIFEST, Artifact, Bundle, Manifest
from rwkv_npu.formats.checkpoint import Checkpoint, check_finite, open_checkpoint
from rwkv_npu.formats.files import remove_unlisted, write_atomically
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import default_scaling
from rwkv_npu.quant.cpu import PRECISIONS
from rwkv_npu.runtime.selftest import write_self_test
from rwkv_npu.runtime.weights import BundleSource, CheckpointSource
from rwkv_npu.text.tokenizer import Tokenizer, find_tokenizer
from rwkv_npu.toolkit import Environment, environment


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
    calibrate: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    precision_map: str | os.PathLike[str] | None = None,
    max_kl: float = MAX_KL,
    remedies: str = "all",
    layout: str | None = None,
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
    layout: of a checkpoint that can be read in two ways, blinkdl or web-rwkv; None tells it from the tensors.
    say: gets a line for each stage. Progress bars go to stderr when it is a terminal.
    Raises CheckpointError, BundleError, ToolkitError, TokenizerError or UsageError, each one line; before
    anything is written where the input is at fault.
    """
    request = Request(target, precision, fusion, parse_rows(rows), cpu, jobs, verify, force, max_kl, remedies)
    source = Path(checkpoint)
    opened = open_checkpoint(source, layout)
    override = None if tokenizer is None else os.fspath(tokenizer)
    words = find_tokenizer(vocab_size=opened.spec.V, beside=source, override=override)
    place = bundle_place(source, out)
    check_place(place, source)
    before = stamp(place)
    there = existing(place, opened, request)
    manifest = there or _new_manifest(opened, request)
    conversion = _Conversion(request, opened, manifest, there is not None, say)
    mapped = mapped_projections(precision_map, request, opened.spec)
    if max_kl != MAX_KL and (precision != "mixed" or mapped is not None):
        raise UsageError("--max-kl is for --precision mixed without a map: nothing else is chosen by it")
    compiler = environment.require(toolkit) if request.compiles else None
    if compiler:
        request.check_compiler(compiler)
    # What will be in int8 is not known yet, but by a map: whether as much as can be would fit is.
    most = sizes(opened.spec) if request.quantises else ()
    planned = conversion.plan(most if mapped is None else mapped)
    least = max([LEAST if request.quantises else 1, *(artifact.rows for artifact in planned)])
    files = [calibrate] if isinstance(calibrate, str | os.PathLike) else calibrate
    ids = read_ids([os.fspath(file) for file in files], words, opened.spec, say, at_least=least)
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    conversion.check_values(place)
    if request.calibrates:
        ids = conversion.keep_in_range(ids, words, least)
    with workspace(place, manifest, conversion.adding, before) as folder:
        drop_damaged(folder, manifest, request, {artifact.path for artifact in planned}, say)
        bundle = conversion.write_for_cpu(folder)
        if tokenizer is not None or not _has_tokenizer(manifest):
            manifest.tokenizer = write_tokenizer(folder, words)
            manifest.files.pop(manifest.tokenizer or "", None)
        if request.verify:
            say("verifying the graphs in ONNX Runtime")
            verify_graphs(bundle)
        if request.quantises:
            assert ids is not None, "int8 is calibrated"
            planned = conversion.plan(conversion.quantise(bundle, ids, mapped))
        if compiler:
            conversion.compile(bundle, planned, compiler)
        if request.verify:
            say(_errors(manifest, planned))
        _finish(bundle)
    return place


@dataclass
class _Conversion:
    """What its stages share. `manifest`, of the bundle that is made or added to, learns what they do."""

    request: Request
    checkpoint: Checkpoint
    manifest: Manifest
    adding: bool
    say: Say

    def plan(self, int8: Collection[str]) -> list[Artifact]:
        """The artifacts that there have to be, with these projections in int8."""
        request, manifest = self.request, self.manifest
        if not request.compiles:
            return []
        program = Program(manifest.spec, request.fusion, manifest.scaling)
        return plan_artifacts(manifest, program, request.target, request.precision, request.rows, int8)

    def check_values(self, place: Path) -> None:
        """Read every value once. Raises CheckpointError for one that cannot be used, BundleError for weights other than
        those at `place`."""
        spec, request = self.checkpoint.spec, self.request
        self.say(f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters: checking every value")
        digest = check_finite(self.checkpoint, fp16=request.storage == "fp16" or request.compiles)
        if self.manifest.weights_digest not in ("", digest):
            raise other_weights(place)
        self.manifest.weights_digest = digest

    def keep_in_range(self, ids: np.ndarray | None, words: Tokenizer | None, least: int) -> np.ndarray:
        """Choose the scales of fp16 by what the model makes of `ids`, or of our own text, whose ids are returned."""
        unscaled = CheckpointSource(self.checkpoint)
        enough = fp16_range.TOKENS if ids is None else len(ids)
        ids = ids if ids is not None else default_ids(words, unscaled, self.say, at_least=least)
        fp16_range.keep_in_range(self.manifest, unscaled, ids[:enough], self.adding, self.say)
        return ids

    def write_for_cpu(self, folder: Path) -> Bundle:
        """What every machine can use: weights, in the CPU's precision too, graphs, and rows for a self-test."""
        source, manifest, cpu = CheckpointSource(self.checkpoint), self.manifest, self.request.cpu
        write_weights(folder, source, manifest.cpu, self.say)
        if cpu in PRECISIONS:
            write_packed(folder, source, cpu)
            manifest.packed = list(dict.fromkeys([*manifest.packed, cpu]))
        manifest.cpu_default = cpu
        bundle = Bundle(folder, manifest)
        write_graphs(bundle)
        write_self_test(bundle)
        return bundle

    def quantise(self, bundle: Bundle, ids: np.ndarray, mapped: Collection[str] | None) -> tuple[str, ...]:
        """Choose what is in int8, and return it. Artifacts for other chips that have another choice go: their precision
        is the same, and a bundle knows one choice for each."""
        request, manifest, say = self.request, self.manifest, self.say
        before = manifest.int8.get(request.precision)
        how = request.precision, request.max_kl, mapped, request.remedies
        chosen = quantise_bundle(bundle, ids, *how, say)
        if before is not None and before.projections != chosen:
            ours = request.target, request.fusion
            others = [
                a
                for a in manifest.artifacts
                if a.precision == request.precision and (a.target, a.fusion) != ours
            ]
            for target, fusion in sorted({(a.target, a.fusion) for a in others}):
                say(
                    f"what {request.precision} has in int8 is another choice now: the artifacts for {target}, {fusion} "
                    f"fusion, go; convert with --target {target} --precision {request.precision} --fusion {fusion} to "
                    "have them again"
                )
            manifest.artifacts = [a for a in manifest.artifacts if a not in others]
        return chosen

    def compile(self, bundle: Bundle, planned: list[Artifact], compiler: Environment) -> None:
        target, precision = self.request.target, self.request.precision
        self.say(f"{len(planned)} graphs for {target}, {precision}: compiling those not there yet")
        source = BundleSource(bundle, self.request.fusion)
        build_artifacts(source, planned, compiler, jobs=self.request.jobs, verify=self.request.verify)


def _finish(bundle: Bundle) -> None:
    """The manifest last: with it, what was noted on the way is no longer needed, nor what another conversion left that
    was interrupted."""
    record_files(bundle.path, bundle.manifest)
    write_atomically(bundle.path / MANIFEST, bundle.manifest.to_json().encode())
    remove_unlisted(bundle.path, ("rknn", "cpu", "calib", "graphs"), bundle.manifest.files)


def _errors(manifest: Manifest, planned: list[Artifact]) -> str:
    """What the verification found, a line a graph and artifact: the worst output's relative error."""
    paths = {artifact.path for artifact in planned}
    errors = {**manifest.graph_errors, **{a.path: a.error for a in manifest.artifacts if a.path in paths}}
    return "\n".join(f"  error {error:.1e}  {name}" for name, error in errors.items() if error is not None)


def _has_tokenizer(manifest: Manifest) -> bool:
    name = manifest.tokenizer
    return name is not None and (name.startswith("builtin:") or name in manifest.files)


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
