"""The systems to measure, the environments they run in, and the files they read.

Everything is created in one folder and kept. A second run creates what is missing, and the bundles again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.make_checkpoint import SIZES

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OURS, REFERENCE = "rwkv_npu", "rwkv fp32"

# Packages of each environment; llama-cpp-python is compiled on the machine, for its processor.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "ours": ("-e", f"{REPOSITORY}[fast,gguf]"),
    "torch": ("{torch}", "rwkv==0.8.32", "transformers==5.23.0", "numpy"),
    "llama": ("llama-cpp-python==0.3.36",),
}


class Limit(NamedTuple):
    """Keeps every system to one instruction set: variables of the workers, and options to compile llama.cpp with.

    ONNX Runtime chooses its kernels itself, so its rows are left out.
    """

    variables: dict[str, str]
    cmake: str


LIMITS = {
    "avx2": Limit(
        {
            "NUMBA_CPU_NAME": "haswell",
            "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt,+sse4.2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
        },
        "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF",
    ),
}


@dataclass(frozen=True)
class System:
    """One row of the tables.

    runtime: a name in worker.py. weights: precision of the matrices. generations: RWKV versions that it can run.
    tolerance: the largest difference from the reference's logits that this precision explains, in units of the logits'
        standard deviation. A larger difference means a wrong result.
    resident: bytes in memory for each parameter, to decide what fits. backend: of this project.
    """

    name: str
    runtime: str
    weights: str
    tolerance: float
    resident: float
    generations: tuple[str, ...] = ("4", "7")
    backend: str = "auto"

    @property
    def environment(self) -> str:
        return {"ours": "ours", "llama.cpp": "llama"}.get(self.runtime, "torch")


# If memory is short, the last ones are skipped first.
SYSTEMS = (
    System(f"{OURS} int4", "ours", "int4", 6.0, 1.0),
    System(f"{OURS} int8", "ours", "int8", 0.5, 1.5),
    System(f"{OURS} fp16", "ours", "fp16", 0.05, 2.5),
    System("llama.cpp F16", "llama.cpp", "F16", 0.05, 2.5, ("7",)),
    System("llama.cpp Q8_0", "llama.cpp", "Q8_0", 0.5, 1.6, ("7",)),
    System("llama.cpp Q5_1", "llama.cpp", "Q5_1", 3.0, 1.3, ("7",)),
    System("llama.cpp Q4_0", "llama.cpp", "Q4_0", 6.0, 1.4, ("7",)),
    System("rwkv bf16", "package", "bf16", 0.5, 3.0),
    System(REFERENCE, "package", "fp32", 0.001, 5.0),
    System("transformers fp32", "transformers", "fp32", 0.001, 5.0, ("4",)),
    System(f"{OURS} fp32", "ours", "fp32", 0.001, 4.5),
    System(f"{OURS} int4 ort", "ours", "int4", 6.0, 2.0, backend="ort"),
)


def chosen(names: Sequence[str], generation: str, limited: bool = False) -> list[System]:
    """Systems that know the generation and whose name contains one of `names` (all, if there are none).

    limited: only those that can be kept to an instruction set.
    """
    return [
        system
        for system in SYSTEMS
        if generation in system.generations
        and (not names or any(part in system.name for part in names))
        and not (limited and system.backend == "ort")
    ]


def fitting(
    systems: Sequence[System], parameters: int, available: int, reserve: int = 1 << 30
) -> list[System]:
    """The systems that fit in memory together. The last ones are skipped first."""
    kept, needed = [], reserve
    for system in systems:
        if needed + system.resident * parameters <= available:
            needed += int(system.resident * parameters)
            kept.append(system)
    return kept


def available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


# -- environments ------------------------------------------------------------------------------------------


@dataclass
class Workshop:
    """Environments and model files in a folder. `say` logs a line before each long step.

    limit: a name in LIMITS, or "" for all that the processor has.
    """

    folder: Path
    torch: str
    threads: int
    say: Callable[[str], None]
    limit: str = ""

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the workers."""
        return LIMITS[self.limit].variables if self.limit else {}

    def python(self, environment: str) -> Path:
        """The interpreter of an environment. Created if it is missing or holds other packages."""
        limited = self.limit if environment == "llama" else ""  # llama.cpp alone is compiled for it
        home = self.folder / "-".join(filter(None, (environment, limited)))
        python, stamp = home / "bin/python", home / "packages.txt"
        packages = [package.format(torch=self.torch) for package in ENVIRONMENTS[environment]]
        options = ["--no-binary", "llama-cpp-python", "--no-cache-dir"] if environment == "llama" else []
        cmake = {"CMAKE_ARGS": LIMITS[limited].cmake} if limited else {}
        if not stamp.exists() or stamp.read_text() != "\n".join(packages):
            self.say(f"creating the environment {home}: {' '.join(packages)}")
            run([sys.executable, "-m", "venv", str(home)])
            run([str(python), "-m", "pip", "install", "--quiet", *options, *packages], **cmake)
            stamp.write_text("\n".join(packages))
        return python

    def checkpoint(self, size: str, hf: bool = False) -> Path:
        path = self.folder / (f"{size}-hf" if hf else f"{size}.pth")
        # The rwkv package, with RWKV-4, rounds the embeddings of a bf16 file to bf16 whatever it computes in.
        dtype = "fp32" if size.startswith("v4") else "bf16"
        options = ["--size", size, "--dtype", dtype, *(["--hf"] if hf else [])]
        make = [REPOSITORY / "tools/make_checkpoint.py", path, *options]
        return self._made(path, "ours", make)

    def model(self, system: System, size: str) -> Path:
        """The file or folder that a system reads, created from the same random checkpoint."""
        if system.runtime == "package":
            return self.checkpoint(size)
        if system.runtime == "transformers":
            return self.checkpoint(size, hf=True)
        if system.runtime == "ours":
            return self._bundle(system, size)
        path = self.folder / f"{size}.{system.weights}.gguf"
        if system.weights == "F16":
            return self._made(
                path, "ours", ["-m", "rwkv_npu", "export", self.checkpoint(size), "--gguf", path]
            )
        source = self.folder / f"{size}.F16.gguf"
        self._made(source, "ours", ["-m", "rwkv_npu", "export", self.checkpoint(size), "--gguf", source])
        return self._made(path, "llama", [HERE / "quantise.py", source, path, system.weights, self.threads])

    def _bundle(self, system: System, size: str) -> Path:
        """Convert again on every run, because the present converter is measured."""
        path = self.folder / f"{size}.{system.weights}.rwkv"
        options = ["--target", "none", "--cpu", system.weights, "--force", "-o", path]
        if size in SIZES and system.weights == "int4":
            options += ["--calibrate", "none"]  # a text tells nothing about random weights
        self._run("ours", ["-m", "rwkv_npu", "convert", self.checkpoint(size), *options])
        return path

    def _made(self, path: Path, environment: str, command: Sequence[object]) -> Path:
        if not path.exists():
            self.say(f"creating {path}")
            self._run(environment, command)
        return path

    def _run(self, environment: str, command: Sequence[object]) -> None:
        run([str(self.python(environment)), *map(str, command)], cwd=REPOSITORY)


class Failed(Exception):
    """A system cannot take part. The message is one line."""


def run(command: Sequence[str], cwd: Path | None = None, **variables: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise Failed(f"{' '.join(command)}: {last}")


def size_on_disk(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
