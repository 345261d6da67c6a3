"""Stand-ins for Rockchip's compiler: its output, fake programs, and a compiler for conversions."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_npu.conversion import artifacts, converter
from rwkv_npu.errors import ToolkitError
from rwkv_npu.toolkit import Cycles, Environment, Job

# Printed by rknn-toolkit2 2.5.0 (dates cut), a Transpose on the CPU put in.
LOG = """\
I rknn-toolkit2 version: 2.5.0
D RKNN: [03:01:29.251] >>>>>> start: rknn::RKNNModelRegCmdbuildPass
D RKNN: [03:01:29.252] --------------------------------------------------------------------------------
D RKNN: [03:01:29.252]                      Network Layer Information Table                            \x20
D RKNN: [03:01:29.252] --------------------------------------------------------------------------------
D RKNN: [03:01:29.252] ID   OpType         DataType Target InputShape                      OutputShape   \
Cycles(DDR/NPU/Total)    RW(KB)       FullName       \x20
D RKNN: [03:01:29.252] --------------------------------------------------------------------------------
D RKNN: [03:01:29.252] 0    InputOperator  FLOAT16  CPU    \\                               (1,768)       \
0/0/0                    0            InputOperator:x\x20
D RKNN: [03:01:29.252] 1    Reshape        FLOAT16  NPU    (1,768),(4)                     (1,768,1,1)   \
0/0/0                    1            Reshape:x_rs   \x20
D RKNN: [03:01:29.252] 2    ConvRelu       FLOAT16  NPU    (1,768,1,1),(3072,768,1,1)      (1,3072,1,1)  \
199809/73728/199809      4609         Conv:a#2       \x20
D RKNN: [03:01:29.252] 3    Transpose      FLOAT16  CPU    (1,3072,1,1)                    (1,1,1,3072)  \
0/0/0                    6            Transpose:c tp \x20
D RKNN: [03:01:29.252] 4    ConvAdd        FLOAT16  NPU    (1,1536,1,1),(768,1536,1,1),... (1,768,1,1)   \
100/36864/36864          2308         Conv:y#2_tile0_ConvAdd
D RKNN: [03:01:29.252] 5    OutputOperator FLOAT16  CPU    (1,768)                         \\             \
0/0/0                    1            OutputOperator:y
D RKNN: [03:01:29.284] Total Internal Memory Size: 16.5KB
D RKNN: [03:01:29.284] Total Weight Memory Size: 2MB
"""


def program(path: Path, body: str) -> Path:
    """An executable file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Compiler:
    """Writes files instead of compiling; `fail_at` ends it at that build."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.fail_at: int | None = None

    def __call__(
        self, environment: Environment, jobs: Sequence[Job], *, parallel: int | None
    ) -> Iterator[Any]:
        for job in jobs:
            if len(self.built) == self.fail_at:
                raise ToolkitError("the compiler gave up")
            job.write_graph()
            assert job.onnx_path.is_file()
            job.onnx_path.unlink()
            job.out_path.write_bytes(f"{environment.version} {job.out_path.name}".encode())
            self.built.append(job.out_path.name)
            yield (
                job,
                SimpleNamespace(
                    cycles=Cycles(1, 2, 3), cpu_fallback=(), version=environment.version, verify_outputs=None
                ),
            )


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler for conversions. Every version looks installed."""
    compiler = Compiler()
    monkeypatch.setattr(artifacts, "compile_many", compiler)
    monkeypatch.setattr(
        converter.environment,
        "require",
        lambda version: Environment(Path("python"), version or "2.3.2", False),
    )
    return compiler
