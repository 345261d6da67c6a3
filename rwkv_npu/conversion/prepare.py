"""The first step of a conversion and of a dry run: check everything that can be checked quickly. Writes nothing."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import rwkv_npu
from rwkv_npu.conversion.artifacts import plan_artifacts
from rwkv_npu.conversion.calibration import read_ids
from rwkv_npu.conversion.request import Request, read_map
from rwkv_npu.conversion.rounding import NEEDS_TEXT
from rwkv_npu.conversion.workspace import bundle_path, check_out_path, existing_manifest, stamp
from rwkv_npu.conversion.writer import describe_groups
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.adapters import open_adapter
from rwkv_npu.formats.bundle import Artifact, Manifest
from rwkv_npu.formats.checkpoint import Checkpoint, open_checkpoint
from rwkv_npu.formats.tuned import set_initial_state
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import default_scaling
from rwkv_npu.text.tokenizer import Tokenizer, find_or_explain, find_tokenizer

log = logging.getLogger("rwkv_npu")


@dataclass(frozen=True)
class Prepared:
    """A request that was checked against the checkpoint, the output and the texts.

    request: with the CPU's precision filled in. cpu_given: the user named it. stamp: of the output, to detect that
    another process writes to it.
    manifest: of the existing bundle if `adding`, else a new one. mapped: the projections that a precision map puts in
    int8, None without a map. ids: of the user's texts, (M,), None without texts.
    """

    request: Request
    cpu_given: bool
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    out: Path
    stamp: bytes | None
    manifest: Manifest
    adding: bool
    mapped: list[str] | None
    ids: np.ndarray | None

    @property
    def compensates(self) -> bool:
        """True if GPTQ rounds the CPU's four bits. It needs a text: ids, or a vocabulary to encode one."""
        has_text = self.ids is not None or self.tokenizer is not None
        return self.request.cpu in ("int4", "auto") and self.request.reads_text and has_text

    def plan(self, int8: Collection[str]) -> list[Artifact]:
        """The artifacts of the request, with these projections in int8. Raises UsageError if they do not fit."""
        request, manifest = self.request, self.manifest
        if not request.compiles:
            return []
        program = Program(manifest.spec, request.fusion, manifest.scaling)
        return plan_artifacts(manifest, program, request.target, request.precision, request.rows, int8)


def prepare(request: Request) -> Prepared:
    """Check a request. Raises RwkvNpuError."""
    # 1. The checkpoint, with its adapter and tuned state.
    checkpoint = open_checkpoint(request.checkpoint, request.layout)
    adapter, initial_state = _fine_tune(checkpoint, request)
    spec = checkpoint.spec
    # 2. The tokenizer. A bundle can lack one.
    no_text = ""
    if request.tokenizer is None:
        tokenizer, no_text = find_or_explain(vocab_size=spec.V, beside=request.checkpoint)
    else:
        tokenizer = find_tokenizer(vocab_size=spec.V, override=request.tokenizer)
    # 3. The output.
    out = bundle_path(request.checkpoint, request.out, request.adapter)
    check_out_path(out, request.checkpoint)
    before = stamp(out)
    manifest = existing_manifest(out, checkpoint, request)
    adding = manifest is not None
    cpu = request.cpu or (manifest.cpu_precisions[0] if manifest else request.cpu_precision)
    given, request = request.cpu is not None, replace(request, cpu=cpu)
    # 4. The user's other files.
    mapped = None if request.precision_map is None else read_map(request.precision_map, spec)
    ids = read_ids(request.calibrate, tokenizer, spec) if request.reads_text else None
    if cpu == "auto" and given and ids is None and tokenizer is None:
        raise UsageError(NEEDS_TEXT)
    if no_text:
        log.info(no_text)
    if manifest is None:
        manifest = Manifest(
            spec=spec,
            fingerprint=checkpoint.fingerprint,
            checkpoint=checkpoint.path.name,
            fusion=request.fusion,
            cpu=request.storage,
            scaling=default_scaling(spec),
            tokenizer=None,
            stop_ids=checkpoint.stop_ids,
            made_by=f"rwkv_npu {rwkv_npu.__version__}",
            groups=describe_groups(spec),
        )
    manifest = replace(manifest, adapter=adapter, initial_state=initial_state)
    return Prepared(request, given, checkpoint, tokenizer, out, before, manifest, adding, mapped, ids)


def _fine_tune(checkpoint: Checkpoint, request: Request) -> tuple[dict[str, str], dict[str, str]]:
    """Merge the request's adapter and tuned state into the checkpoint. Returns their entries in the manifest."""
    adapter: dict[str, str] = {}
    initial_state: dict[str, str] = {}
    if request.adapter is not None:
        opened = open_adapter(request.adapter, request.adapter_init)
        base = checkpoint.fingerprint
        read_as = opened.apply(checkpoint, request.adapter_scale, request.adapter_blocks)
        adapter = {"file": request.adapter.name, "kind": opened.kind, "read_as": read_as}
        adapter |= {"fingerprint": opened.fingerprint, "base_fingerprint": base}
    if request.initial_state is not None:
        digest = set_initial_state(checkpoint, request.initial_state, request.layout)
        initial_state = {"file": request.initial_state.name, "fingerprint": digest}
    return adapter, initial_state
