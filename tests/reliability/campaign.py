"""The campaign of reliability: commands ended at 20 points each, and long runs. `make campaign` runs it.

    python -m tests.reliability.campaign FILE.json

Every result is a row of FILE, with its date; the file names the machine. The same command goes on where it was.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_npu import __version__
from rwkv_npu.bench import machine
from rwkv_npu.formats.files import write_atomically
from tests.reliability.long import RUNS
from tests.reliability.strike import COMMANDS, WAYS

POINTS = [round((i + 0.5) / 20, 3) for i in range(20)]
SIZES = {"tokens": 20_000, "cycles": 2_000, "threads": 500, "models": 2_000, "forked": 100, "spawned": 10}
EXTRA = (("forked", "torch"), ("forked", "ort"), ("cycles", "ort"), ("threads", "ort"))  # run, other backend


def lines(module: str, *words: object) -> Iterator[dict[str, Any]]:
    """Rows that a child process prints. Raises SystemExit with its error if it fails."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", module, str(words[0]), folder, *map(str, words[1:])]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child:
            assert child.stdout
            yield from map(json.loads, child.stdout)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(map(str, words))} failed:\n{errors.read()[-3000:]}")


def main(path: str) -> None:
    file = Path(path)
    if not file.exists():
        facts = {
            key: machine.describe()[key] for key in ("cpu", "instruction_set", "cores", "memory_gb", "system")
        }
        document: dict[str, Any] = {"version": __version__, "machine": facts, "rows": []}
    else:
        document = json.loads(file.read_text())
    rows = document["rows"]

    def add(row: dict[str, Any]) -> None:
        rows.append({**row, "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()})
        write_atomically(file, json.dumps(document, indent=1).encode() + b"\n")
        print(json.dumps(row), flush=True)

    for run, backend in (*((run, "numba") for run in RUNS), *EXTRA):
        if not any(row.get("run") == run and row["backend"] == backend for row in rows):
            size = SIZES[run] if backend == "numba" else SIZES[run] // 10
            for row in lines("tests.reliability.long", run, size, backend):
                add(row)
    for command in COMMANDS:
        done = [row["point"] for row in rows if row.get("command") == command]
        missing = [point for point in POINTS if done.count(point) < len(WAYS)]
        if missing:
            for row in lines("tests.reliability.strike", command, ",".join(map(str, missing)), "all"):
                if not any(
                    all(old.get(key) == row[key] for key in ("command", "way", "point")) for old in rows
                ):
                    add(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
