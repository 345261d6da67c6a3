"""The structures that are handed to librknnrt: ctypes' layout against a C compiler's, on both machines."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from rwkv_npu.backends import rknn_api
from tools.board.build import COMPILERS, CPU, QEMU, STANDIN

pytestmark = pytest.mark.board

STRUCTURES = {
    "rknn_matmul_info": rknn_api.MatmulInfo,
    "rknn_matmul_tensor_attr": rknn_api.TensorAttr,
    "rknn_matmul_io_attr": rknn_api.IoAttr,
    "rknn_matmul_shape": rknn_api.Shape,
    "rknn_tensor_mem": rknn_api.TensorMem,
    "rknn_input_output_num": rknn_api.InOutNum,
    "rknn_tensor_attr": rknn_api.PortAttr,
    "rknn_sdk_version": rknn_api.SdkVersion,
    "rknn_perf_run": rknn_api.PerfRun,
}
# As the facts have them, of runtime 2.x: what both sides could get wrong together.
SIZES = {
    "rknn_matmul_info": 64,
    "rknn_matmul_tensor_attr": 332,
    "rknn_matmul_io_attr": 996,
    "rknn_matmul_shape": 12,
    "rknn_tensor_mem": 40,
    "rknn_tensor_attr": 376,
    "rknn_input": 32,
    "rknn_output": 24,
    "rknn_mem_size": 64,
    "rknn_input_output_num": 8,
    "rknn_sdk_version": 512,
    "rknn_perf_run": 8,
}


def compiled(tmp_path: Path, machine: str, expressions: list[str]) -> list[int]:
    """What C says that they are."""
    lines = "".join(f'printf("%zu\\n", {expression});' for expression in expressions)
    source = tmp_path / "abi.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "rknn_api.h"\nint main(void) {{ {lines} return 0; }}\n'
    )
    program = tmp_path / machine
    subprocess.run([COMPILERS[machine], "-static", f"-I{STANDIN}", source, "-o", program], check=True)
    emulator = [QEMU, "-cpu", CPU] if machine == "aarch64" else []
    output = subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


@pytest.mark.parametrize("machine", COMPILERS)
def test_layouts(stand_in: Path, tmp_path: Path, machine: str) -> None:
    expected: dict[str, int] = {f"sizeof({name})": size for name, size in SIZES.items()}
    for name, structure in STRUCTURES.items():
        assert ctypes.sizeof(structure) == SIZES[name]
        for field, *_ in structure._fields_:
            descriptor = getattr(structure, field)
            expected[f"offsetof({name}, {field})"] = descriptor.offset
            expected[f"sizeof((({name} *)0)->{field})"] = descriptor.size
    found = compiled(tmp_path, machine, list(expected))
    assert dict(zip(expected, found, strict=True)) == expected


def test_every_field_and_structure_is_compared() -> None:
    header = (STANDIN / "rknn_api.h").read_text()
    for name, structure in STRUCTURES.items():
        body = re.search(rf"typedef struct {{([^}}]*)}} {name};", header)
        assert body is not None
        declared = re.findall(r"\*?(\w+)(?:\[\w+\])?\s*[,;]", body[1])
        assert declared == [field for field, *_ in structure._fields_]
    ours = {value for value in vars(rknn_api).values() if isinstance(value, type(ctypes.Structure))}
    assert ours - {ctypes.Structure} == set(STRUCTURES.values())
