"""Measure the host's cost of an NPU call: dispatch and marshalling, with a stand-in library that returns at once.

    python -m bench.board_dispatch [--save bench/results/NAME]

On the emulated board: RKNNLite's own inference(), this project's `rknn`, and `rknn-matmul`; the last also natively on
this machine. The graph has the inputs and outputs of v7's group `mid`, everything between two recurrences; its
computation does not matter here. For the same work `rknn-matmul` runs the six large products of a layer.

Times under emulation are the emulator's. Only their ratios have a meaning: they show which kind of call is cheaper.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.saving import save
from rwkv_npu.backends.rknn_api import OVERRIDE
from rwkv_npu.bench.machine import describe
from rwkv_npu.graphs.onnx import IR_VERSION, OPSET
from rwkv_npu.models.official import official_spec
from rwkv_npu.models.spec import Group, groups
from rwkv_npu.toolkit import CompileOptions, compile_graph, require
from tools.board import build

MODELS = {768: "v7-0.1b", 1024: "v7-0.4b", 2048: "v7-1.5b"}
ROWS = (1, 64)
CHILD = Path(__file__).with_name("child.py")
WAYS = {
    "inference": "RKNNLite.inference()",
    "rknn": "`rknn`",
    "guard": "its guard, beside that",
    "rknn-matmul, 3 cores": "`rknn-matmul`, 3 cores",
    "rknn-matmul, 1 core": "`rknn-matmul`, 1 core",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.board_dispatch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--save", metavar="NAME", help="NAME.json and NAME.md")
    arguments = parser.parse_args()
    command = "python -m bench.board_dispatch"
    results: dict[str, Any] = {"machine": describe(), "command": command, "emulated": [], "native": []}
    board = build.make(lambda line: print(line, file=sys.stderr))
    library = build.make_standin(lambda line: print(line, file=sys.stderr)) / "x86_64" / "librknnrt.so"
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
        for name in MODELS.values():
            for M in ROWS:
                group = next(g for g in groups(official_spec(name), "layer") if g.role == "mid")
                artifact = compile_mid(group, M, Path(folder))
                request = {"model": name, "M": M, "artifact": str(artifact)}
                results["emulated"] += ask([board / "bin" / "python"], request)
                results["native"] += ask(
                    [sys.executable], {**request, "artifact": ""}, **{OVERRIDE: str(library)}
                )
    text = report(results)
    print(text)
    if arguments.save:
        save(arguments.save, results, text)
    return 0


def ask(python: list[Any], request: dict[str, Any], **variables: str) -> list[dict[str, Any]]:
    """Rows that child.py measures in its own process."""
    environment = {**os.environ, **variables, "RKNN_STANDIN_NULL": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [*map(str, python), str(CHILD), json.dumps(request)]
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return rows


def compile_mid(group: Group, M: int, folder: Path) -> Path:
    """Compile a .rknn with the inputs and outputs of a group that computes almost nothing."""
    from onnx import TensorProto, helper, numpy_helper

    def info(port: Any) -> Any:
        return helper.make_tensor_value_info(port.name, TensorProto.FLOAT, [M, port.width])

    nodes, constants, total = [], [], group.inputs[0].name
    for port in group.inputs[1:]:
        nodes.append(helper.make_node("Add", [total, port.name], [f"sum.{port.name}"]))
        total = f"sum.{port.name}"
    for number, port in enumerate(group.outputs, 1):
        constants.append(numpy_helper.from_array(np.array([number / 4], np.float32), f"factor.{number}"))
        nodes.append(helper.make_node("Mul", [total, f"factor.{number}"], [port.name]))
    ports = [*map(info, group.inputs)], [*map(info, group.outputs)]
    graph = helper.make_graph(nodes, "mid", *ports, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rwkv_npu")
    path = folder / f"mid.{group.inputs[0].width}.m{M}.onnx"
    path.write_bytes(model.SerializeToString())
    compile_graph(require(), path, path.with_suffix(".rknn"), CompileOptions())
    return path.with_suffix(".rknn")


def report(results: dict[str, Any]) -> str:
    facts = [
        f"- {key}: {value}"
        for key, value in {"command": f"`{results['command']}`", **results["machine"]}.items()
    ]
    lines = [*(__doc__ or "").strip().split("\n\n")[::2][:1], "", *facts]
    for where, title in (
        ("emulated", "On the emulated board: milliseconds of the emulator, good for ratios only"),
        ("native", "On this machine, with the stand-in built for it: milliseconds"),
    ):
        ways = [way for way in WAYS if any(row["way"] == way for row in results[where])]
        heads = [f"{WAYS[way]} ms" for way in ways]
        lines += ["", f"## {title}", "", "| D | rows | " + " | ".join(heads) + " | copied KB |"]
        lines += ["|" + "---|" * (len(ways) + 3)]
        for D in MODELS:
            for M in ROWS:
                rows = {row["way"]: row for row in results[where] if (row["D"], row["M"]) == (D, M)}
                times = [
                    f"{rows[way]['p10_s'] * 1e3:.3g} ({rows[way]['median_s'] * 1e3:.3g})" for way in ways
                ]
                copied = max(row["bytes"] for row in rows.values())
                lines.append(f"| {D} | {M} | {' | '.join(times)} | {copied / 1e3:.0f} |")
    lines += [
        "",
        "Tenth percentile of a layer's calls (and median), since the machine is a shared one: one call of `mid` "
        "through RKNNLite, inputs copied into the runner's arrays included; six products of `rknn-matmul`, "
        "operands converted. Copied: in and out, by what copies most.",
        "",
        "What follows: `rknn` costs no more than RKNNLite's own inference(), and looks at every code, so that it "
        "is the default. `rknn-matmul` converts on the CPU what RKNNLite leaves to librknnrt, whose share a "
        "stand-in does not show. The guard, a thread and a look at every output, takes 0.03 to 0.2 ms a call on "
        "this machine. Handing parts to other threads costs 0.04 to 0.2 ms a product here, so that a part has to "
        "have 1 MB of weights, over which a core of the NPU takes 0.1 ms: of these products (768, 768) is not "
        "shared out at all.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
