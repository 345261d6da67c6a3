"""Save the results of a study: STEM.json with all data, STEM.md as a table for readers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save(stem: str | Path, results: dict[str, Any], text: str) -> None:
    """Write STEM.json and STEM.md. Creates the folder if necessary."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(text + "\n", encoding="utf-8")


def bundle_study(
    module: str,
    description: str | None,
    study: Callable[[Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """The command line `python -m MODULE BUNDLE [--save STEM]`: `study` measures, `table` formats the results."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--save", metavar="STEM", help="write STEM.json and STEM.md")
    arguments = parser.parse_args()
    from rwkv_npu.bench.machine import describe

    results = {"machine": describe(), "command": f"python -m {module} {arguments.bundle.name}"}
    results |= study(arguments.bundle)
    if arguments.save:
        save(arguments.save, results, table(results))
    print(table(results))
    return 0
