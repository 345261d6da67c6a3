"""The emulated board for tests: commands run in it, what its stand-in was asked, and bundles for it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import rwkv_npu
from rwkv_npu.model import demo_model
from tools.make_checkpoint import make_checkpoint

GENERATIONS = ("4", "5.2", "6", "7")
ROWS = "1,16"
SECONDS = 120  # that a command may take
FORKS = Path(__file__).with_name("forks.py")


class EmulatedBoard:
    """`folder` is what tools/board makes, `socket` where the process listens that computes for the stand-in."""

    def __init__(self, folder: Path, socket: Path):
        self._folder, self._socket = folder, socket
        self._forks: subprocess.Popen[str] | None = None

    def command(self, *words: object) -> list[str]:
        """`rwkv-npu` or `python` in the board, with arguments."""
        program, *arguments = map(str, words)
        return [str(self._folder / "bin" / program), *arguments]

    def variables(self, *, faults: str = "", log: Path | None = None) -> dict[str, str]:
        """Those of the environment that the stand-in looks at."""
        stand_in = {"FAULTS": faults, "LOG": str(log or ""), "SOCKET": str(self._socket)}
        return {f"RKNN_STANDIN_{name}": value for name, value in stand_in.items()}

    def run(
        self, *words: object, fresh: bool = False, timeout: float = SECONDS, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, with an empty stdin, `options` as of `variables`. `fresh`: started as a user starts it,
        not forked."""
        if not fresh:
            return self._fork([str(word) for word in words], self.variables(**options), timeout)
        return subprocess.run(
            self.command(*words),
            env={**os.environ, **self.variables(**options)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def _fork(
        self, words: list[str], variables: dict[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        if self._forks is None:
            self._forks = subprocess.Popen(
                self.command("python", FORKS), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._forks.stdin and self._forks.stdout
        with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:
            files = {name: str(Path(folder) / name) for name in ("out", "err")}
            request = {"words": words, "environment": variables, "seconds": seconds, **files}
            print(json.dumps(request), file=self._forks.stdin, flush=True)
            status = int(self._forks.stdout.readline())
            out, err = (Path(path).read_text() for path in files.values())
        return subprocess.CompletedProcess(words, status, out, err)

    def close(self) -> None:
        if self._forks is not None:
            self._forks.communicate()


def convert_for_board(folder: Path, generation: str) -> Path:
    """A bundle with artifacts of both fusions: of the demo model for 7, else of a random one of two layers."""
    checkpoint = demo_model()
    if generation != "7":
        checkpoint = folder / f"v{generation}.pth"
        make_checkpoint(checkpoint, generation=generation, D=128, L=2, N=64, V=256, seed=1)
    out = folder / f"v{generation}.rwkv"
    for fusion in ("layer", "projection"):
        rwkv_npu.convert(checkpoint, out, fusion=fusion, rows=ROWS)
    return out
