"""Measure the cost of converting and opening a model: time, memory, size.

    python bench/convert_and_open.py --size v7-0.4b --folder /tmp/bench [--save bench/results/NAME.json]

Creates a random checkpoint of an official size and converts it for the RK3588 (rows 1,64). Then opens the bundle in
fresh processes, one for each backend, and generates. Prints a table; each figure comes from one run. Peak memory is the
operating system's figure for the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rwkv_npu.bench.machine import describe

OPENINGS = [  # backend, the CPU's precision, prepacking of ONNX Runtime
    ("numpy", "fp16", True),
    ("ort", "fp16", True),
    ("ort", "fp16", False),
    ("ort", "fp32", True),
    ("ort", "fp32", False),
]
PROMPT, TOKENS = 128, 32


def main() -> int:
    if sys.argv[1:2] == ["--open"]:
        print(json.dumps(open_and_run(*sys.argv[2:])))
        return 0
    arguments = parse()
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{arguments.size}.pth"
    if not checkpoint.exists():
        run([sys.executable, "tools/make_checkpoint.py", str(checkpoint), "--size", arguments.size])
    command = f"python bench/convert_and_open.py --size {arguments.size} --folder FOLDER"
    results: dict[str, Any] = {"machine": describe(), "command": command, "size": arguments.size}
    bundles = {cpu: folder / f"{arguments.size}.{cpu}.rwkv" for cpu in ("fp16", "fp32")}
    convert = ["rwkv-npu", "convert", str(checkpoint), "--force", "-o"]
    rk3588 = ["--target", "rk3588", "--rows", "1,64"]
    results["convert_rk3588"] = run([*convert, str(bundles["fp16"]), *rk3588])
    results["convert_rk3588"]["bundle_bytes"] = folder_size(bundles["fp16"])
    results["convert_none"] = run([*convert, str(bundles["fp32"]), "--target", "none", "--cpu", "fp32"])
    results["convert_none"]["bundle_bytes"] = folder_size(bundles["fp32"])
    results["open"] = []
    for backend, cpu, prepack in OPENINGS:
        command = [sys.executable, __file__, "--open", str(bundles[cpu]), backend, str(int(prepack))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results["open"].append({"backend": backend, "cpu": cpu, "prepack": prepack, **found})
    print(table(results))
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="v7-0.4b", help="official size, as tools/make_checkpoint.py names it"
    )
    parser.add_argument("--folder", required=True, help="where checkpoint and bundles go, and stay")
    parser.add_argument("--save", help="write the figures to this JSON file")
    return parser.parse_args()


def run(command: list[str]) -> dict[str, Any]:
    """Run a command. Returns its seconds, and the peak resident bytes of the largest process in its tree."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": time.perf_counter() - begin, "largest_process_bytes": usage.ru_maxrss * 1024}


def open_and_run(bundle: str, backend: str, prepack: str) -> dict[str, Any]:
    """In this process: open the bundle, read a prompt, generate. Returns seconds and resident bytes of each stage."""
    import numpy as np

    import rwkv_npu
    from rwkv_npu.backends import ort

    if prepack == "0":
        ort.PREPACK = False
    before = anonymous_bytes()
    begin = time.perf_counter()
    model = rwkv_npu.load(bundle, backend=backend)
    loaded = time.perf_counter()
    opened_bytes = anonymous_bytes() - before
    _, state = model.forward([1])
    first = time.perf_counter()
    ids = np.random.default_rng(0).integers(1, model.spec.V, PROMPT)
    model.forward(ids)
    prefilled = time.perf_counter()
    for token in range(1, TOKENS + 1):
        _, state = model.forward([token], state, inplace=True)
    decoded = time.perf_counter()
    return {
        "open_s": loaded - begin,
        "first_token_s": first - begin,
        "prefill_tokens_per_s": PROMPT / (prefilled - first),
        "decode_tokens_per_s": TOKENS / (decoded - prefilled),
        "opened_anonymous_bytes": opened_bytes,
        "final_anonymous_bytes": anonymous_bytes(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def anonymous_bytes() -> int:
    """Resident memory of this process without mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(results: dict[str, Any]) -> str:
    gb = 1e9
    lines = []
    for name in ("convert_rk3588", "convert_none"):
        r = results[name]
        lines.append(
            f"{name}: {r['seconds']:.0f} s, largest process {r['largest_process_bytes'] / gb:.2f} GB, "
            f"bundle {r['bundle_bytes'] / gb:.2f} GB"
        )
    titles = "backend | CPU weights | prepack | open s | first token s | prefill t/s | decode t/s | peak GB | own GB"
    lines.append(f"| {titles} |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in results["open"]:
        lines.append(
            f"| {r['backend']} | {r['cpu']} | {'yes' if r['prepack'] else 'no'} | {r['open_s']:.2f} | "
            f"{r['first_token_s']:.2f} | {r['prefill_tokens_per_s']:.1f} | {r['decode_tokens_per_s']:.1f} | "
            f"{r['peak_rss_bytes'] / gb:.2f} | {r['final_anonymous_bytes'] / gb:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
