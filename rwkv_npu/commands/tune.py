"""`rwkv-npu tune`: the fastest plan for this machine, kept beside the bundle."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rwkv_npu.bundle import artifacts_digest
from rwkv_npu.commands.common import bundle_at, use_big_cores
from rwkv_npu.opening import Options, machine_key
from rwkv_npu.plan import USES, save_tuned
from rwkv_npu.tuning import Measured, tune


def run(arguments: argparse.Namespace) -> int:
    bundle = bundle_at(arguments.model)
    use_big_cores(arguments.threads)
    options = Options(arguments.threads, arguments.npu_cores)
    plan, found = tune(bundle, options, say=lambda line: print(line, file=sys.stderr))
    measured = {f"{m.fusion} {m.backend}": {f"{use}_ms": _ms(m, use) for use in USES} for m in found}
    machine = machine_key()
    kept = save_tuned(bundle.path, machine, artifacts_digest(bundle.manifest), plan, measured)
    facts = {
        "machine": machine,
        "plan": plan.text(),
        "fusion": plan.fusion,
        "measured": measured,
        "file": str(kept),
    }
    print(json.dumps(facts, indent=1) if arguments.json else _table(found, facts))
    return 0


def _ms(measured: Measured, use: str) -> float:
    return round(1e3 * measured.per_token(use), 3)


def _table(found: Sequence[Measured], facts: dict[str, Any]) -> str:
    lines = [f"{'fusion':<12}{'backend':<14}{'decode ms':>12}{'prefill ms':>12}   (a token)"]
    lines += [
        f"{m.fusion:<12}{m.backend:<14}{_ms(m, 'decode'):>12.2f}{_ms(m, 'prefill'):>12.2f}" for m in found
    ]
    lines += [f"plan         {facts['plan']}, {facts['fusion']} fusion", f"machine      {facts['machine']}"]
    return "\n".join([*lines, f"kept in      {facts['file']}"])
