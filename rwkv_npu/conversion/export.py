"""Export a bundle for one board: the artifacts of its chip in one precision, and the CPU's weights in one precision.

Files are copied as they are, and compared with their digests on the way. The exported bundle appears by one rename,
after its model has given the same logits as the bundle that it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

import rwkv_npu
from rwkv_npu.conversion.request import NO_TARGET
from rwkv_npu.conversion.workspace import check_out_path, is_ours, stamp, workspace
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.formats.bundle import (
    FORMAT,
    INT8,
    MANIFEST,
    WEIGHTS,
    Bundle,
    Manifest,
    graph_file,
    open_bundle,
    packed_file,
)
from rwkv_npu.formats.files import is_file, replacing, write_atomically
from rwkv_npu.progress import progress
from rwkv_npu.runtime.loading import CPU_BACKEND, Options, open_engine
from rwkv_npu.runtime.placement import Plan
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.toolkit import TARGETS

CHECKED_TOKENS = 8  # read by both bundles

log = logging.getLogger("rwkv_npu")


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str,
    precision: str | None = None,
    fusion: str | None = None,
    cpu: str | None = None,
    force: bool = False,
) -> Path:
    """Write the part of the bundle at `path` that a board with the chip `target` needs to `out`. Returns its path.

    target: a chip, or none for a bundle of the CPU's weights alone. precision, fusion: of the artifacts. cpu: precision
    of the CPU's weights; with int8 or int4 the fp16 weights are left out. None, of
    each of the three: the bundle's default.
    force: replace the bundle at `out`. Raises BundleError or UsageError, each one line.
    """
    bundle, out_path = open_bundle(path), Path(out)
    manifest = _selected(bundle, target, precision, fusion, cpu)
    check_out_path(out_path, bundle.path)
    if bundle.path.resolve() in out_path.resolve().parents:
        raise UsageError(f"the output {out_path} is inside the bundle {bundle.path}: give another path")
    before = stamp(out_path)
    if before is not None and not (force and is_ours(out_path)):
        raise BundleError(
            f"{out_path} exists and is not a bundle: give another output"
            if force or not is_ours(out_path)
            else f"{out_path} exists: give another output, or force=True"
        )
    files = {name: record.digest for name, record in manifest.files.items()}
    kind = [manifest.cpu, manifest.packed, sorted(files.items())]
    digest = hashlib.blake2b(repr(kind).encode(), digest_size=16).hexdigest()
    key = f"rwkv_npu {rwkv_npu.__version__} {FORMAT} export {digest}"
    with workspace(out_path, key, adding=False, before=before) as (folder, _):
        _copy(bundle, folder, manifest)
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
        try:
            _compare(bundle, open_bundle(folder))
        except BaseException:
            (folder / MANIFEST).unlink()  # a folder with a manifest counts as a finished bundle
            raise
    return out_path


def _selected(
    bundle: Bundle, target: str, precision: str | None, fusion: str | None, cpu: str | None
) -> Manifest:
    """The manifest of the exported bundle. Raises UsageError if the bundle lacks a requested part."""
    old = bundle.manifest
    if target not in (*TARGETS, NO_TARGET):
        raise UsageError(f"target {target!r} is unknown: use one of {', '.join((*TARGETS, NO_TARGET))}")
    extend = f"rwkv-npu convert {shlex.quote(old.checkpoint)} -o {shlex.quote(str(bundle.path))}"
    cpu, fusion = cpu or old.cpu_precisions[0], fusion or old.fusion
    if cpu not in old.cpu_precisions:
        raise UsageError(
            f"{bundle.path} has no {cpu} weights for the CPU, it has {', '.join(old.cpu_precisions)}: "
            f"{extend} --cpu {cpu} adds them"
        )
    # 1. Artifacts: of one chip, fusion and precision.
    artifacts = [] if target == NO_TARGET or old.outdated else old.artifacts
    fitting = [a for a in artifacts if (a.target, a.fusion) == (target, fusion)]
    has = sorted({a.precision for a in fitting}, key=lambda name: (name != old.npu_default, name))
    chosen = precision or (has[0] if has else "")
    artifacts = [a for a in fitting if a.precision == chosen]
    if target != NO_TARGET and not artifacts:
        kinds = sorted({f"{a.target} {a.precision}, {a.fusion} fusion" for a in old.artifacts})
        wanted = ", ".join(filter(None, (target, precision, f"{fusion} fusion")))
        raise UsageError(
            old.outdated
            or f"{bundle.path} has no artifacts for {wanted}. It has {'; '.join(kinds) or 'none'}: "
            f"{extend} --target {target} adds to it"
        )
    # 2. Files: leave out those of artifacts and weights that were not chosen.
    packed = [cpu] if cpu in old.packed else []
    left = {a.path for a in old.artifacts} - {a.path for a in artifacts}
    left.update(packed_file(name) for name in old.packed if name != cpu)
    if packed:
        left.update(
            {WEIGHTS, *(graph_file(f, g["name"]) for f, groups in old.groups.items() for g in groups)}
        )
    if packed or chosen not in old.int8:
        left.add(INT8)
    return replace(
        old,
        fusion=fusion,
        cpu="" if packed else old.cpu,
        packed=packed,
        cpu_default=cpu,
        npu_default=chosen,
        artifacts=artifacts,
        int8={name: int8 for name, int8 in old.int8.items() if name == chosen},
        sensitivity=[],
        rounding={name: one for name, one in old.rounding.items() if name == cpu},
        int8_key="" if packed else old.int8_key,
        graph_errors={} if packed else old.graph_errors,
        files={name: record for name, record in old.files.items() if name not in left},
    )


def _copy(bundle: Bundle, folder: Path, manifest: Manifest) -> None:
    """Copy the files of the manifest that `folder` lacks. Raises BundleError for a file that is damaged."""
    whole, total = (sum(record.size for record in m.files.values()) for m in (bundle.manifest, manifest))
    log.info(f"copying {total / 1e6:.1f} of the {whole / 1e6:.1f} MB of {bundle.path}")
    with progress("copy", "B", total=total) as bar:
        for name, record in manifest.files.items():
            path, digest = folder / name, hashlib.blake2b(digest_size=16)
            if is_file(path):  # from an interrupted export of the same files
                bar.update(record.size)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with (bundle.path / name).open("rb") as source, replacing(path) as aside:
                with aside.open("xb") as file:
                    while block := source.read(1 << 22):
                        digest.update(block)
                        file.write(block)
                        bar.update(len(block))
                    file.flush()
                    os.fsync(file.fileno())
                if digest.hexdigest() != record.digest:
                    raise BundleError(
                        f"{bundle.path / name} is damaged: copy the bundle again, or convert again"
                    )


def _compare(before: Bundle, after: Bundle) -> None:
    """Read a few tokens with both bundles on the CPU. Raises BundleError if their logits differ."""
    log.info("comparing its logits with those of the whole bundle")
    precision = after.manifest.cpu_precisions[0]
    tokens = np.random.default_rng(0).integers(1, after.spec.V, CHECKED_TOKENS)
    logits = []
    for bundle in (before, after):
        source = BundleSource(bundle, after.manifest.fusion, precision)
        with contextlib.closing(open_engine(source, Plan(CPU_BACKEND), Options())) as engine:
            logits.append(engine.forward(tokens)[0])
    if not np.array_equal(logits[0], logits[1]):
        raise BundleError(
            f"the exported bundle computes other logits than {before.path}: rwkv-npu info --check tells whether "
            "that is damaged"
        )
