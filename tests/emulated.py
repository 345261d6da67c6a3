"""The emulated board for tests: commands run in it, what its stand-in was asked, and bundles for it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import rwkv_npu
from rwkv_npu.model import demo_model
from tools.board.calls import Call, read_calls
from tools.make_checkpoint import make_checkpoint

GENERATIONS = ("4", "5.2", "6", "7")
ROWS = "1,16"
SECONDS = 120  # that a command may take


@dataclass(frozen=True)
class EmulatedBoard:
    """`folder` is what tools/board makes, `socket` where the process listens that computes for the stand-in."""

    folder: Path
    socket: Path

    def command(self, *words: object) -> list[str]:
        """`rwkv-npu` or `python` in the board, with arguments."""
        program, *arguments = map(str, words)
        return [str(self.folder / "bin" / program), *arguments]

    def environment(
        self, *, faults: str = "", log: Path | None = None, null: bool = False, **more: str
    ) -> dict[str, str]:
        """`null`: nothing computes, every run returns at once."""
        stand_in = {"RKNN_STANDIN_FAULTS": faults, "RKNN_STANDIN_LOG": str(log or "")}
        stand_in |= {"RKNN_STANDIN_SOCKET": str(self.socket), "RKNN_STANDIN_NULL": "1" if null else ""}
        return {**os.environ, **stand_in, **more}

    def run(
        self,
        *words: object,
        faults: str = "",
        log: Path | None = None,
        null: bool = False,
        timeout: float = SECONDS,
        **more: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, with an empty stdin; `more` are environment variables."""
        return subprocess.run(
            self.command(*words),
            env=self.environment(faults=faults, log=log, null=null, **more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def calls(self, log: Path) -> list[Call]:
        return read_calls(log)


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
