"""`rwkv-npu info`: describe a bundle, a checkpoint or an adapter. For a bundle, print its needs on a board too."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.board.hardware import version_numbers
from rwkv_npu.cli.common import add_board_report_flag, add_layout_flag, read_board_report, size
from rwkv_npu.cli.flags import as_flags

if TYPE_CHECKING:
    from rwkv_npu.formats.bundle import Bundle, Manifest
    from rwkv_npu.models.spec import Spec
    from rwkv_npu.runtime.rk3588 import Terms

PREFILL_TOKENS = 128


def add(commands: Any) -> None:
    p = commands.add_parser("info", help="describe a bundle or checkpoint", description="Describe a model.")
    p.add_argument("path", nargs="?", help="bundle or checkpoint (default: the demo model)")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.add_argument(
        "--check",
        action="store_true",
        help="check the hashes of a bundle's files, or that a checkpoint has no NaN or infinity",
    )
    add_layout_flag(p)
    add_board_report_flag(p)
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.formats.adapters import is_adapter
    from rwkv_npu.formats.bundle import is_bundle, open_bundle, verify_files
    from rwkv_npu.formats.checkpoint import check_finite, open_checkpoint
    from rwkv_npu.model import demo_model
    from rwkv_npu.text.tokenizer import find_or_explain

    path, terms = Path(arguments.path) if arguments.path else demo_model(), read_board_report(arguments)
    if is_bundle(path):
        bundle = open_bundle(path)
        if arguments.check:
            count = sum(1 for _ in verify_files(bundle))
            print(f"all {count} files are as they were written", file=sys.stderr)
        facts = _bundle_facts(bundle, terms)
    elif is_adapter(path):
        facts = _adapter_facts(path)
    else:
        checkpoint = open_checkpoint(path, arguments.layout)
        if arguments.check:
            check_finite(checkpoint)
            print(f"all {len(checkpoint.names)} tensors hold finite numbers", file=sys.stderr)
        tokenizer, no_text = find_or_explain(vocab_size=checkpoint.spec.V, beside=path)
        facts = {
            "path": str(path),
            "kind": "checkpoint",
            **_spec_facts(checkpoint.spec),
            "tokenizer": tokenizer.name if tokenizer else None,
            "chat_template": _chat_template(path, checkpoint.spec.V),
            "no_text": as_flags(no_text),
            "fingerprint": checkpoint.fingerprint,
        }
    table = _adapter_table if facts["kind"] == "adapter" else _table
    print(json.dumps(facts, indent=1) if arguments.json else table(facts))
    return 0


def _adapter_facts(path: Path) -> dict[str, Any]:
    from rwkv_npu.formats.adapters import open_adapter

    adapter = open_adapter(path)
    return {
        "path": str(path),
        "kind": "adapter",
        "method": adapter.kind,
        "ranks": sorted({target.rank for target in adapter.targets.values()}),
        "layers": adapter.layers,
        "targets": _leaves(adapter.targets),
        "replaced": _leaves(adapter.replaced),
        "alpha": adapter.config.get("lora_alpha"),
        "base": adapter.config.get("base_model_name_or_path"),
        "models": adapter.models(),
        "fingerprint": adapter.fingerprint,
    }


def _leaves(names: Iterable[str]) -> list[str]:
    """Tensor names without the prefix `blocks.LAYER.`, sorted, without duplicates."""
    return sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in names})


def _adapter_table(facts: dict[str, Any]) -> str:
    scaled = facts["method"] in ("LoRA", "DoRA")
    flag = " --adapter-scale X" if scaled and facts["alpha"] is None else ""
    alpha = (
        "alpha is not in the file; X is alpha / rank, usually 1 or 2" if flag else f"alpha {facts['alpha']}"
    )
    lines = [
        f"{facts['path']} (adapter)",
        f"  method       {facts['method']}, rank {', '.join(map(str, facts['ranks']))}",
        *([f"  scale        {alpha}"] if scaled else []),
        f"  changes      {', '.join(facts['targets'])}, up to layer {facts['layers']}",
        *([f"  replaces     {', '.join(facts['replaced'])}"] if facts["replaced"] else []),
        *([f"  base         {facts['base']!r:.100}"] if facts["base"] else []),
        f"  for          {', '.join(facts['models']) or 'none of the official models: their sizes differ'}",
        f"  next         rwkv-npu convert BASE --adapter {shlex.quote(facts['path'])}{flag}",
    ]
    return "\n".join(lines)


def _spec_facts(spec: Spec) -> dict[str, Any]:
    from rwkv_npu.models.spec import FUSIONS, groups

    calls = {fusion: len(groups(spec, fusion)) for fusion in FUSIONS}
    return {"spec": spec.to_json(), "parameters": spec.parameters, "calls_per_token": calls}


def _bundle_facts(bundle: Bundle, terms: Terms | None = None) -> dict[str, Any]:
    from rwkv_npu.runtime.weights import BundleSource

    manifest = bundle.manifest
    default = next((artifact.precision for artifact in BundleSource(bundle).artifacts()), None)
    total = sum(record.size for record in manifest.files.values())
    return {
        "path": str(bundle.path),
        "kind": "bundle",
        "exported": not manifest.cpu,  # True: exported without the fp16 weights
        **_spec_facts(manifest.spec),
        "checkpoint": manifest.checkpoint,
        "fingerprint": manifest.fingerprint,
        "adapter": manifest.adapter or None,
        "initial_state": manifest.initial_state or None,
        "tokenizer": manifest.tokenizer,
        "chat_template": _chat_template(bundle.path, manifest.spec.V),
        "fusion": manifest.fusion,
        "cpu": list(manifest.cpu_precisions),  # the default first
        "rounding": {name: asdict(one) for name, one in manifest.rounding.items()},
        "bytes_on_disk": total,
        "graph_error": max(manifest.graph_errors.values(), default=None),
        "npu_default": default,
        "artifacts": [_artifact_facts(manifest, *key, terms) for key in _kinds(manifest)],
    }


def _chat_template(path: Path, vocab_size: int) -> str:
    """The chat template of a model: `own` if the checkpoint came with one, else a family's."""
    from rwkv_npu.cli.serve import model_family
    from rwkv_npu.formats.huggingface import chat_template

    own = path.is_dir() and chat_template(path) is not None
    return "own" if own else model_family(str(path), vocab_size).name


def _kinds(manifest: Manifest) -> list[tuple[str, str, str]]:
    return sorted({(a.target, a.precision, a.fusion) for a in manifest.artifacts})


def _artifact_facts(
    manifest: Manifest, target: str, precision: str, fusion: str, terms: Terms | None = None
) -> dict[str, Any]:
    from rwkv_npu.backends.memory import plan_memory
    from rwkv_npu.runtime.estimate import for_bundle
    from rwkv_npu.runtime.rk3588 import TERMS

    chosen = [
        a for a in manifest.artifacts if (a.target, a.precision, a.fusion) == (target, precision, fusion)
    ]
    memory = plan_memory(manifest, chosen)
    errors = [a.error for a in chosen if a.error is not None]
    int8 = manifest.int8.get(precision)
    estimates = {
        "token": for_bundle(manifest.spec, chosen, 1, terms=terms or TERMS),
        "prefill": for_bundle(manifest.spec, chosen, PREFILL_TOKENS, terms=terms or TERMS),
    }
    return {
        "target": target,
        "precision": precision,
        "fusion": fusion,
        "rows": sorted({a.rows for a in chosen if a.group != "head"}),
        "count": len(chosen),
        "bytes_on_disk": sum(manifest.files[a.path].size for a in chosen),
        "npu_bytes": memory.total,
        "left_on_cpu": sorted({f"{a.group}: {name}" for a in chosen for name in a.on_cpu}),
        "toolkit": sorted({a.toolkit for a in chosen}),
        "runtime": max((a.toolkit for a in chosen), key=version_numbers),
        "int8_share": int8.share if int8 else 0.0,
        "int8_kl": int8.kl if int8 else None,
        "worst_error": max(errors, default=None),
        "verified": len(errors),
        **{f"estimated_ms_per_{use}": one.total_ms if one else None for use, one in estimates.items()},
        **{
            f"estimated_ms_per_{use}_range": [one.low_ms, one.high_ms] if one else None
            for use, one in estimates.items()
        },
    }


def _table(facts: dict[str, Any]) -> str:
    spec = facts["spec"]
    ranks = ", ".join(f"{name} {rank}" for name, rank in spec["ranks"].items())
    calls = facts["calls_per_token"]
    lines = [
        f"{facts['path']} ({facts['kind']})",
        f"  model        RWKV-{spec['generation']}, {facts['parameters'] / 1e6:.1f} M parameters",
        f"  dimensions   D {spec['D']}, L {spec['L']}, H {spec['H']}, N {spec['N']}, F {spec['F']}, V {spec['V']}",
        *([f"  low ranks    {ranks}"] if ranks else []),
        f"  tokenizer    {facts['tokenizer'] or facts.get('no_text') or 'unknown: give --tokenizer FILE for text'}",
        f"  chat         template {facts['chat_template']}",
        f"  NPU calls    {calls['layer']} a token with layer fusion, {calls['projection']} with projection fusion",
    ]
    if facts["kind"] == "bundle":
        if found := facts["adapter"]:
            lines.append(f"  adapter      {found['file']}, {found['kind']}, {found['read_as']}")
            lines.append(
                f"               {found['fingerprint']} on the base model {found['base_fingerprint']}"
            )
        if found := facts["initial_state"]:
            lines.append(f"  begins with  {found['file']}, a tuned state, {found['fingerprint']}")
        lines.append(f"  on disk      {size(facts['bytes_on_disk'])}")
        lines.append(f"  CPU          weights in {_cpu(facts)}")
        if facts["graph_error"] is not None:
            lines.append(f"  graphs       verified against NumPy: worst error {facts['graph_error']:.1e}")
        for artifact in facts["artifacts"]:
            lines += _artifact_lines(artifact, _is_default(facts, artifact))
        if not facts["artifacts"]:
            advice = "exported for CPUs" if facts["exported"] else "convert with --target rk3588"
            lines.append(f"  NPU          no artifacts: {advice}")
    return "\n".join(lines)


def summary(bundle: Bundle, then: str = "") -> str:
    """Describe a new bundle in a few lines. then: the command to suggest next (default: generate)."""
    facts = _bundle_facts(bundle)
    lines = [f"{facts['path']}: {size(facts['bytes_on_disk'])}", f"  CPU  weights in {_cpu(facts)}"]
    for artifact in facts["artifacts"]:
        mark = " (default)" if _is_default(facts, artifact) else ""
        lines.append(
            f"  NPU  {artifact['target']} {artifact['precision']}{mark}, {size(artifact['npu_bytes'])} of its memory, "
            f"{facts['calls_per_token'][artifact['fusion']]} calls a token, {_runtime(artifact)}"
        )
    path = shlex.quote(facts["path"])
    if facts["tokenizer"] is None:
        lines.append(
            "  no vocabulary is known for this model: give --tokenizer FILE, or token ids with --ids"
        )
        then = then or f"rwkv-npu generate -m {path} --ids -p 1,2,3"
    return "\n".join([*lines, "next: " + (then or f'rwkv-npu generate -m {path} -p "Hello"')])


def _cpu(facts: dict[str, Any]) -> str:
    default, *others = [_cpu_precision(facts, name) for name in facts["cpu"]]
    return ", ".join([f"{default} (default)", *others])


def _cpu_precision(facts: dict[str, Any], name: str) -> str:
    """A precision, and how its four bits were rounded."""
    rounding = facts["rounding"].get(name)
    if rounding is None:
        return f"{name} rounded to nearest" if name == "int4" else name
    words = f"{name} rounded by GPTQ on {rounding['tokens']} tokens"
    if name == "auto":
        kl = f"KL {rounding['kl']:.2g} (at most {rounding['max_kl']:g})"
        words += f" with {len(rounding['four_bits'])} matrices in int4, {kl}"
    return words


def _is_default(facts: dict[str, Any], artifact: dict[str, Any]) -> bool:
    return bool(artifact["precision"] == facts["npu_default"] and artifact["fusion"] == facts["fusion"])


def _artifact_lines(facts: dict[str, Any], default: bool) -> list[str]:
    rows = ", ".join(map(str, facts["rows"]))
    verified = f"worst error {facts['worst_error']:.1e}" if facts["verified"] else "not verified"
    left = "; ".join(facts["left_on_cpu"]) or "nothing"
    int8 = f"{100 * facts['int8_share']:.1f} % of the weights"
    if facts["int8_kl"] is not None:
        int8 += f", KL {facts['int8_kl']:.2g} nats a token (NumPy)"
    return [
        f"  NPU          {facts['target']} {facts['precision']}{' (default)' if default else ''}, {facts['fusion']} "
        f"fusion, rows {rows}",
        f"    artifacts  {facts['count']}, by toolkit {', '.join(facts['toolkit'])}; {_runtime(facts)}",
        f"    size       {size(facts['bytes_on_disk'])} on disk, {size(facts['npu_bytes'])} of NPU memory",
        f"    estimate   {_estimate(facts)}",
        f"    in int8    {int8}",
        f"    on the CPU {left}",
        f"    verified   {verified} ({facts['verified']} of {facts['count']} simulated)",
    ]


def _runtime(facts: dict[str, Any]) -> str:
    return f"needs librknnrt {facts['runtime'] or '(unknown)'} or later"


def _estimate(facts: dict[str, Any]) -> str:
    if facts["estimated_ms_per_token"] is None:
        return f"none: no measurements of the {facts['target']} are known"
    token, prefill = (
        "{} ms ({} to {})".format(
            *map(_figure, (facts[f"estimated_ms_per_{use}"], *facts[f"estimated_ms_per_{use}_range"]))
        )
        for use in ("token", "prefill")
    )
    return (
        f"{token} a token, {prefill} for {PREFILL_TOKENS}\n"
        "               (LPDDR5, CPU time included; not measured)"
    )


def _figure(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
