"""Compile or simulate one graph in a child process."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import ToolkitError, UsageError
from rwkv_npu.toolkit import log
from rwkv_npu.toolkit.environment import Environment
from rwkv_npu.toolkit.log import Cycles, Layer
from rwkv_npu.toolkit.worker import Worker

TARGETS = ("rk3588", "rk3576", "rk3562", "rk3566", "rk3568")
FLOATS = {"fp16": "float16", "bf16": "bfloat16"}
# Quantized precisions that the compiler accepts, by target (w: bits of weights, a: bits of activations).
QUANTIZED = {
    "rk3588": ("w8a8", "w16a16i_dfp"),
    "rk3576": ("w8a8", "w4a16", "w16a16i_dfp"),
    "rk3562": ("w8a8", "w8a16", "w16a16i_dfp"),
    "rk3566": ("w8a8",),
    "rk3568": ("w8a8",),
}


Span = tuple[float, float]  # the lowest and the highest value that int8 can represent


@dataclass(frozen=True)
class CompileOptions:
    """Options of one compilation.

    `input_shapes` fixes the shapes of a graph with symbolic dimensions. `custom_string` (at most 1023 bytes) is
    stored in the file. `calibration` is for the quantized precisions: one mapping of input name to array for each
    sample, in the shapes of the artifact. `int8` names the weights whose products run in int8 while the rest of the
    graph stays in fp16; it gives the spans of each product's input and output. In a column of such a weight, -128
    and 127 represent the lowest and the highest value.
    """

    target: str = "rk3588"
    precision: str = "fp16"
    optimization_level: int = 3
    custom_string: str | None = None
    input_shapes: Mapping[str, Sequence[int]] | None = None
    calibration: Sequence[Mapping[str, np.ndarray]] = ()
    quantized_algorithm: str = "normal"
    quantized_method: str = "channel"
    int8: Mapping[str, tuple[Span, Span]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target}: choose one of {', '.join(TARGETS)}")
        known = (*FLOATS, *QUANTIZED[self.target])
        if self.precision not in known:
            raise UsageError(f"{self.target} cannot run {self.precision}: choose one of {', '.join(known)}")
        if self.precision not in FLOATS and not self.calibration:
            raise UsageError(f"{self.precision} needs calibration rows")
        if self.int8 and self.precision != "fp16":
            raise UsageError(
                f"int8 products need precision fp16 for the rest of the graph, not {self.precision}"
            )
        if self.custom_string is not None and len(self.custom_string.encode()) > 1023:
            raise UsageError("custom_string is longer than 1023 bytes")

    def request(self) -> dict[str, Any]:
        """The options as the child's build request. All supported compiler versions accept every key."""
        config: dict[str, Any] = {
            "target_platform": self.target,
            "optimization_level": self.optimization_level,
            "float_dtype": FLOATS.get(self.precision, "float16"),
        }
        if self.custom_string is not None:
            config["custom_string"] = self.custom_string
        if self.int8:
            config["quantized_dtype"] = "w8a8"
        if self.precision not in FLOATS:
            config["quantized_dtype"] = self.precision
            config["quantized_algorithm"] = self.quantized_algorithm
            config["quantized_method"] = self.quantized_method
        shapes = {name: [int(n) for n in shape] for name, shape in (self.input_shapes or {}).items()}
        int8 = {name: {"input": input_, "output": output} for name, (input_, output) in self.int8.items()}
        return {"config": config, "input_shapes": shapes, "int8": int8}

    def arrays(self) -> dict[str, np.ndarray]:
        """The calibration rows as arrays of the child's build request, named "ROW/INPUT"."""
        used = () if self.precision in FLOATS else self.calibration
        return {f"{index}/{name}": array for index, row in enumerate(used) for name, array in row.items()}


@dataclass(frozen=True)
class CompileResult:
    """An artifact and the compiler's report on it.

    `cycles` is the compiler's estimate for one core, None if it prints none. `cpu_fallback` names the layers that
    run on the board's CPU. `npu_weight_bytes` and `npu_internal_bytes` are the artifact's use of NPU memory.
    """

    path: Path
    size: int
    version: str
    seconds: float
    peak_rss_bytes: int
    cycles: Cycles | None
    layers: tuple[Layer, ...]
    cpu_fallback: tuple[str, ...]
    npu_weight_bytes: int
    npu_internal_bytes: int
    verify_outputs: dict[str, np.ndarray] | None = None


def compile_graph(
    environment: Environment,
    onnx_path: str | Path,
    out_path: str | Path,
    options: CompileOptions | None = None,
    verify_inputs: Mapping[str, np.ndarray] | None = None,
    *,
    worker: Worker | None = None,
) -> CompileResult:
    """Compile `onnx_path` to `out_path`. An existing file is replaced atomically; the folder must exist.

    With `verify_inputs`, arrays by input name, the same build is also run in the simulator: `verify_outputs` holds
    its outputs by name, as float32. `worker` is the process to compile in, which must have been started for the
    folder of `out_path`; by default a new one. Raises ToolkitError with the compiler's own reason. `out_path` is
    then unchanged, unless only the simulator failed.
    """
    options = options or CompileOptions()
    out = Path(out_path).absolute()
    begin = time.monotonic()
    with contextlib.nullcontext(worker) if worker else Worker(environment, out.parent) as worker:
        built = _build(worker, Path(onnx_path), out, options)
        text, outputs, peak = worker.log(), None, built["peak_rss_bytes"]
        if verify_inputs is not None:
            simulated, outputs = _run(worker, built["inputs"], verify_inputs)
            peak = max(peak, simulated["peak_rss_bytes"])
    rows = log.layers(text)
    cycles = log.cycles(rows)
    internal, weights = log.memory(text)
    return CompileResult(
        path=out,
        size=out.stat().st_size,
        version=environment.version,
        seconds=time.monotonic() - begin,
        peak_rss_bytes=peak,
        cycles=cycles if cycles.total else None,
        layers=rows,
        cpu_fallback=log.cpu_fallback(rows),
        npu_weight_bytes=weights,
        npu_internal_bytes=internal,
        verify_outputs=outputs,
    )


class Simulator:
    """Rockchip's simulator for one graph. Several may run at the same time, each in its own process.

    The simulator cannot load a `.rknn`, so the ONNX graph is built again. Pass the options of the artifact.
    `inputs` and `outputs` are the names in the graph's order. Raises ToolkitError if the graph cannot be built.
    """

    def __init__(
        self, environment: Environment, onnx_path: str | Path, options: CompileOptions | None = None
    ) -> None:
        self._worker = Worker(environment)
        self._closing = weakref.finalize(self, self._worker.close)
        try:
            built = _build(self._worker, Path(onnx_path), None, options or CompileOptions())
        except BaseException:
            self.close()
            raise
        self.inputs = tuple(built["inputs"])
        self.outputs = tuple(built["outputs"])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once: arrays by input name, in the shapes of the build -> float32 outputs by name."""
        return _run(self._worker, self.inputs, inputs)[1]

    def close(self) -> None:
        """End the process. May be called again."""
        self._closing()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _build(worker: Worker, onnx_path: Path, out: Path | None, options: CompileOptions) -> dict[str, Any]:
    if not onnx_path.is_file():
        raise ToolkitError(f"no such graph: {onnx_path}")
    request = {
        "action": "build",
        "onnx": str(onnx_path.absolute()),
        "out": str(out) if out else None,
        "options": options.request(),
        "verbose": out is not None,  # prints the layer table
    }
    try:
        return worker.request(request, options.arrays())[0]
    except ToolkitError as error:
        raise ToolkitError(f"{onnx_path.name} cannot be compiled for {options.target}: {error}") from None


def _run(
    worker: Worker, names: Sequence[str], inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if set(names) != set(inputs):
        raise ToolkitError(
            f"the graph's inputs are {', '.join(names)}, but got {', '.join(inputs) or 'none'}"
        )
    return worker.request({"action": "run"}, inputs)
