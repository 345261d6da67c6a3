"""`rwkv-npu models`: the official sizes, and the memory that each needs by precision."""

from __future__ import annotations

import argparse
import json
from math import prod
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import size

if TYPE_CHECKING:
    from rwkv_npu.models.spec import Spec

CPU, NPU = ("fp16", "int8", "int4"), ("fp16", "w8a8")
NOTES = """
In bytes, by precision. CPU: weights, embedding and vectors. NPU: weights of all
artifacts, each twice (for decoding and for prompts) where that fits, else once
(*), else - : a process has 3.76 GB of the NPU's memory on every supported chip,
and the board's own memory must hold it too. `rwkv-npu convert FILE --dry-run`
counts exactly. Releases are on Hugging Face under BlinkDL: rwkv-7-world,
rwkv7-g1, rwkv-6-world, rwkv-5-world, rwkv-4-world, rwkv-4-pile.
"""


def add(commands: Any) -> None:
    p = commands.add_parser(
        "models",
        help="list official sizes and the memory that each needs",
        description="List the sizes of the official releases, with the memory that each needs by precision.",
    )
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu.models.official import OFFICIAL, official_spec

    sizes = {name: _facts(official_spec(name)) for name in OFFICIAL}
    print(json.dumps(sizes, indent=1) if arguments.json else _table(sizes))
    return 0


def _facts(spec: Spec) -> dict[str, Any]:
    """Facts of one size, with its bytes by precision.

    copies: how many times the NPU holds each weight; 0 if the model does not fit.
    """
    from rwkv_npu.backends.memory import BUDGET_BYTES, MAX_CONTEXTS, matrix_bytes
    from rwkv_npu.models.spec import Kind, tensors
    from rwkv_npu.quant.cpu import bits_of, packed_bytes

    matrices = [t for t in tensors(spec) if t.kind.is_projection and not t.optional]
    rest = sum(
        (4 if t.kind is Kind.VECTOR else 2) * prod(t.shape) for t in tensors(spec) if not t.kind.is_projection
    )
    cpu = {"fp16": rest + sum(2 * prod(t.used_shape) for t in matrices)}
    for precision in ("int8", "int4"):
        cpu[precision] = rest + sum(packed_bytes(t, bits_of(precision, t)) for t in matrices)
    npu = {}
    for precision in NPU:
        layers = head = 0
        for tensor in matrices:
            *stack, k, n = tensor.used_shape
            # Low-rank matrices stay in fp16, as in `convert --precision w8a8`.
            bits = 8 if precision == "w8a8" and tensor.kind is Kind.LINEAR else 16
            taken = prod(stack) * matrix_bytes(k, n, bits)
            layers, head = (layers, taken) if tensor.name == "head.weight" else (layers + taken, head)
        copies = next(
            (
                times
                for times in (2, 1)
                if times * layers + head <= BUDGET_BYTES and times * (spec.L + 1) + 1 <= MAX_CONTEXTS
            ),
            0,
        )
        npu[precision] = {"bytes": max(copies, 1) * layers + head, "copies": copies}
    return {
        "generation": spec.generation,
        "parameters": spec.parameters,
        "L": spec.L,
        "D": spec.D,
        "cpu": cpu,
        "npu": npu,
    }


def _table(sizes: dict[str, dict[str, Any]]) -> str:
    columns = [f"CPU {name}" for name in CPU] + [f"NPU {name}" for name in NPU]
    lines = [f"{'size':<9}{'weights':>9}" + "".join(f"{column:>12}" for column in columns)]
    for name, facts in sizes.items():
        cells = [size(facts["cpu"][precision]) for precision in CPU]
        for precision in NPU:
            held = facts["npu"][precision]
            cells.append(f"{size(held['bytes'])}{' *'[held['copies'] == 1]}" if held["copies"] else "- ")
        lines.append(
            f"{name:<9}{facts['parameters'] / 1e6:>7.0f} M" + "".join(f"{cell:>12}" for cell in cells)
        )
    return "\n".join([*(line.rstrip() for line in lines), NOTES.rstrip()])
