"""The emulated board for tests: running commands in it, the log of its stand-in, and bundles for it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.backends.rknn import API
from rwkv_npu.backends.rknn import LITE as RKNNLITE
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.model import demo_model
from rwkv_npu.models.spec import FUSIONS, Group
from rwkv_npu.runtime.weights import BundleSource
from tools.make_checkpoint import make_checkpoint

GENERATIONS = ("4", "5.2", "6", "7")
ROWS = "1,16"
SECONDS = 120  # that a command may take
FORKS = Path(__file__).with_name("forks.py")


# Opens every artifact with RKNNLite, runs it on the inputs beside it, and keeps the outputs.
LITE = """
import sys, numpy as np
from pathlib import Path
from rknnlite.api import RKNNLite
for path in map(Path, sys.argv[1:]):
    lite = RKNNLite()
    assert lite.load_rknn(str(path)) == 0
    code = lite.init_runtime(core_mask=RKNNLite.NPU_CORE_0)
    if code:
        raise SystemExit(f"init {code}")
    inputs = np.load(path.with_suffix(".in.npz"))
    runtime = lite.rknn_runtime
    code = runtime.set_inputs([inputs[name] for name in inputs.files], None, None) or runtime.run(False)
    if code:
        raise SystemExit(f"run {code}")
    np.savez(path.with_suffix(".out.npz"), *runtime.get_outputs(False))
    lite.release()
print(lite.__class__.__name__)
"""


class EmulatedBoard:
    """folder: made by tools/board. socket: of the process that computes for the stand-in."""

    def __init__(self, folder: Path, socket: Path):
        self._folder, self._socket = folder, socket
        self._forks: subprocess.Popen[str] | None = None

    def command(self, *words: object) -> list[str]:
        """`rwkv-npu` or `python` in the board, with arguments."""
        program, *arguments = map(str, words)
        return [str(self._folder / "bin" / program), *arguments]

    def variables(
        self, *, faults: str = "", log: Path | None = None, socket: Path | None = None, lite: bool = False
    ) -> dict[str, str]:
        """Those of the environment that the stand-in looks at. `socket`: where another process computes. `lite`:
        RKNNLite drives the NPU."""
        stand_in = {"FAULTS": faults, "LOG": str(log or ""), "SOCKET": str(socket or self._socket)}
        return {f"RKNN_STANDIN_{name}": value for name, value in stand_in.items()} | {
            API: RKNNLITE if lite else ""
        }

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
    """A bundle with artifacts of both fusions: the demo model for generation 7, else a random model of two layers."""
    checkpoint = demo_model()
    if generation != "7":
        checkpoint = folder / f"v{generation}.pth"
        make_checkpoint(checkpoint, generation=generation, D=128, L=2, N=64, V=256, seed=1)
    out = folder / f"v{generation}.rwkv"
    for fusion in ("layer", "projection"):
        rwkv_npu.convert(checkpoint, out, fusion=fusion, rows=ROWS)
    return out


def run_artifacts(
    board: EmulatedBoard,
    folder: Path,
    bundle: Path,
    rows: int,
    precision: str = "fp16",
    fusions: Collection[str] = FUSIONS,
    **options: Any,
) -> Iterator[tuple[Group, list[np.ndarray], list[np.ndarray]]]:
    """Outputs of every group that has artifacts of this kind, for random inputs: (group, found, NumPy's)."""
    opened = open_bundle(bundle)
    files, expected = [], {}
    for artifact in opened.manifest.artifacts:
        if (artifact.rows, artifact.precision) != (rows, precision) or artifact.fusion not in fusions:
            continue
        source = BundleSource(opened, artifact.fusion, precision)
        group = next(group for group in source.program.groups if group.name == artifact.group)
        runner = NumpyBackend(source).open(group, rows)
        rng = np.random.default_rng(0)
        for array in runner.inputs.values():
            array[:] = rng.standard_normal(array.shape)
        file = folder / Path(artifact.path).name
        file.symlink_to(opened.path / artifact.path)
        given = {port.name: runner.inputs[port.name] for port in group.fixed_inputs(rows)}
        np.savez(file.with_suffix(".in.npz"), **given)
        outputs = runner.run()
        expected[file] = group, [outputs[port.name].copy() for port in group.outputs]
        files.append(file)
    result = board.run("python", "-c", LITE, *files, **options)
    assert result.returncode == 0, result.stderr[-2000:]
    for file in files:
        found = np.load(file.with_suffix(".out.npz"))
        yield expected[file][0], [found[name] for name in found.files], expected[file][1]
