"""Damaged and forged files for every reader, in child processes: a minute in `make test`, an hour in `make campaign`.

RWKV_FUZZ_SECONDS is the time for all kinds together, RWKV_FUZZ_SEED the first input. A campaign begins at an input of
its own each time; one that failed is put into SEEDS.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.target import KINDS

SECONDS = float(os.environ.get("RWKV_FUZZ_SECONDS", "60"))
FIRST = int(os.environ.get("RWKV_FUZZ_SEED", "0"))
SEEDS: dict[str, tuple[int, ...]] = {"bundles": (), "files": (64, 1986)}  # inputs that have failed before


def fuzz(kind: str, folder: Path, seed: int, count: int, seconds: float) -> list[int]:
    """Numbers of the inputs tried. Fails with the number and the traceback of one that broke a rule."""
    folder.mkdir()
    outside = folder.parent / "outside"
    outside.write_text("precious")
    command = [sys.executable, "-m", "tests.fuzz.target", kind, folder, seed, count, seconds]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=seconds + 300)
    tried = [int(line) for line in done.stdout.split()]
    assert done.returncode == 0, f"{kind} {tried[-1:]}: status {done.returncode}\n{done.stderr[-3000:]}"
    assert outside.read_text() == "precious" and sorted(os.listdir(folder.parent)) == [folder.name, "outside"]
    return tried


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_errors_come_out(kind: str, tmp_path: Path) -> None:
    for number in SEEDS[kind]:
        (tmp_path / str(number)).mkdir()
        fuzz(kind, tmp_path / str(number) / "files", number, 1, 60)
    (tmp_path / "new").mkdir()
    begin = time.monotonic()
    tried = fuzz(kind, tmp_path / "new" / "files", FIRST, 10**9, SECONDS / len(KINDS))
    print(f"{kind}: {len(tried)} inputs from {FIRST} in {time.monotonic() - begin:.0f} s")
    assert len(tried) > 20
