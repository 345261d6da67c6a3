"""Parse the compiler's output: the layer table with its cycle estimates, the planned memory, and errors.

Cycles are the compiler's own estimate for one core, and an optimistic one. Always label them as an estimate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STAMP = r"^D RKNN: \[[\d:.]+\] "
_ROW = re.compile(
    _STAMP + r"(?P<id>\d+)\s+(?P<op>\S+)\s+(?P<dtype>\S+)\s+(?P<target>CPU|NPU|GPU)"
    r"\s+(?P<inputs>\S+)\s+(?P<outputs>\S+)"
    r"\s+(?P<ddr>\d+)/(?P<npu>\d+)/(?P<total>\d+)\s+([\d.]+%\s+)?(?P<kilobytes>\d+)\s+(?P<name>.*\S)\s*$"
)
_MEMORY = re.compile(_STAMP + r"Total (Internal|Weight) Memory Size: ([\d.]+)(B|KB|MB|GB)?\s*$")
_UNITS = {None: 1, "B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}
# Prefixes of an error message that add nothing to it: Python's exception class, and ONNX Runtime's prefix.
_CLASS = re.compile(
    r"^(onnxruntime\.[\w.]+: )?(\[ONNXRuntimeError\] : \d+ : \w+ : )?((Value|Runtime|OS)Error: )?"
)
_NOISE = re.compile(r"rknn-toolkit2 version|={5,}|^Traceback|^\s+File |^\s+\^+\s*$|^During handling|^\s*$")


@dataclass(frozen=True)
class Layer:
    """One row of the compiler's layer table. Cycles of the NPU's clock; shapes as printed."""

    op: str
    dtype: str
    target: str
    inputs: str
    outputs: str
    ddr_cycles: int
    npu_cycles: int
    total_cycles: int
    kilobytes: int
    name: str


@dataclass(frozen=True)
class Cycles:
    """Sums over all layers: cycles of memory, of arithmetic, and of the larger of the two in each layer."""

    ddr: int
    npu: int
    total: int


def layers(log: str) -> tuple[Layer, ...]:
    """The rows of the first layer table in a verbose log. Empty if there is no table."""
    rows: list[Layer] = []
    _, _, after = log.partition("Network Layer Information Table")
    for line in after.splitlines():
        if match := _ROW.match(line):
            if rows and match["id"] == "0":
                break
            op, dtype, target, inputs, outputs = match.group("op", "dtype", "target", "inputs", "outputs")
            ddr, npu, total, kilobytes = map(int, match.group("ddr", "npu", "total", "kilobytes"))
            rows.append(Layer(op, dtype, target, inputs, outputs, ddr, npu, total, kilobytes, match["name"]))
    return tuple(rows)


def cycles(rows: tuple[Layer, ...]) -> Cycles:
    """Sum the cycles of a layer table."""
    return Cycles(
        sum(row.ddr_cycles for row in rows),
        sum(row.npu_cycles for row in rows),
        sum(row.total_cycles for row in rows),
    )


def cpu_fallback(rows: tuple[Layer, ...]) -> tuple[str, ...]:
    """Names of the layers that run on the board's CPU, except the graph's inputs and outputs."""
    return tuple(
        row.name for row in rows if row.target != "NPU" and row.op not in ("InputOperator", "OutputOperator")
    )


def memory(log: str) -> tuple[int, int]:
    """(internal, weight) bytes of NPU memory that the artifact needs. Zeros if the log does not print them."""
    sizes = {"Internal": 0, "Weight": 0}
    for line in log.splitlines():
        if match := _MEMORY.match(line):
            sizes[match[1]] = round(float(match[2]) * _UNITS[match[3]])
    return sizes["Internal"], sizes["Weight"]


def last_error(log: str, fallback: str) -> str:
    """One line: the last error in the compiler's log. `fallback` is added unless one text contains the other."""
    lines = [_COLOUR.sub("", line) for line in log.splitlines()]
    errors, block = [], False
    for line in lines:
        if line.startswith(("E ", "E RKNN")):
            block = True
            line = re.sub(r"^E (RKNN: )?(\[[\d:.]+\] )?", "", line)
        elif re.match(r"[DIW] ", line):
            block = False
        if block and not _NOISE.search(line) and not line.endswith("Traceback (most recent call last):"):
            errors.append(line.strip())
    errors = [_CLASS.sub("", line) for line in errors]
    reason = next((line for line in reversed(fallback.splitlines()) if not _NOISE.search(line)), fallback)
    reason = _CLASS.sub("", reason.strip())
    if not errors or errors[-1] in reason:
        return reason
    return errors[-1] if reason in errors[-1] else f"{errors[-1]} ({reason})"
