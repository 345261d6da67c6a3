"""The weights and groups of a model for backends and the engine, from a bundle or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.backends import COMPILED, MADE_PRECISIONS, NPU_BACKENDS, REFERENCES
from rwkv_npu.backends.memory import MemoryPlan, plan_memory
from rwkv_npu.board import hardware
from rwkv_npu.errors import BundleError
from rwkv_npu.formats.bundle import Artifact, Bundle
from rwkv_npu.formats.checkpoint import Checkpoint
from rwkv_npu.models.maths import Maths, NumpyMaths
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Group, Spec
from rwkv_npu.quant.cpu import Packed, unpack
from rwkv_npu.quant.npu import Int8Maths, Quantised

WIDENED = 4 << 30  # the most bytes of fp32 weights that `widened` keeps


class ModelSource:
    """The tensors and groups of a model. Subclasses read them from a bundle or a checkpoint.

    precision: the precision that the user requested; None for the default.
    """

    precision: str | None = None

    def __init__(self, program: Program, fingerprint: str):
        self.program, self.fingerprint = program, fingerprint

    @property
    def spec(self) -> Spec:
        return self.program.spec

    def evaluate(self, group: Group, f: Maths, x: dict[str, Any]) -> dict[str, Any]:
        return self.program.evaluate(group, f, x)

    def tensor(self, name: str) -> np.ndarray:
        raise KeyError(name)

    @property
    def cpu_precision(self) -> str:
        """The precision of products on the CPU."""
        return "fp32"

    def precision_on(self, backend: str) -> str | None:
        """The precision of the weights on a backend, None if the backend has no weights for this machine."""
        if backend in MADE_PRECISIONS:
            return self.precision or MADE_PRECISIONS[backend][0]
        return self.cpu_precision

    def packed(self, name: str, index: int | None = None) -> Packed | None:
        """A projection, or number `index` of a stack, quantised for the CPU; None if the CPU uses it unquantised."""
        return None

    def weight(self, name: str) -> np.ndarray:
        """A tensor in the requested precision: quantised weights are dequantised to fp32, others are as stored."""
        return self.tensor(name)

    def release(self, name: str) -> None:
        """Free the memory of a projection that will not be read again."""

    def unquantised(self) -> ModelSource:
        """The same model for the fallback of an NPU: with unquantised weights, if it has them."""
        return self

    def quantised(self, name: str) -> Quantised | None:
        """A projection in int8, as in the artifacts of the requested precision; None if it is not int8 in them."""
        return None

    def maths(self) -> NumpyMaths:
        """`maths.Maths` in NumPy, in the requested precision. Its int8 products are those of artifacts."""
        return NumpyMaths(self.weight)

    def has(self, name: str) -> bool:
        return False

    def onnx(self, group: Group) -> str | bytes:
        raise KeyError(group.name)

    def _traced(self, group: Group, dtype: type[np.floating] = np.float32) -> bytes:
        """The group's graph with its projections inside, in `dtype`."""
        from rwkv_npu.graphs.onnx import inline_model
        from rwkv_npu.graphs.trace import trace_group

        trace = trace_group(self.program, group)
        return inline_model(trace, group.name, self.tensor, dtype).SerializeToString()

    @property
    def outdated(self) -> str:
        """The reason why artifacts cannot be used (the bundle is too old), "" if they can."""
        return ""

    def artifacts(self) -> list[Artifact]:
        """The artifacts for this fusion, in the requested precision."""
        return []

    def initial_states(self) -> dict[int, np.ndarray]:
        """The tuned `time_state` (H, N, N) by layer, of the layers that have one."""
        names = {layer: f"blocks.{layer}.att.time_state" for layer in range(self.spec.L)}
        return {layer: self.tensor(name) for layer, name in names.items() if self.has(name)}


def widened(source: ModelSource) -> Callable[[str], np.ndarray]:
    """`source.tensor` for a reference that reads a model many times.

    Tensors are converted to fp32 once and cached, unless all of them would take more than WIDENED bytes.
    """
    if 4 * source.spec.parameters > WIDENED:
        return source.tensor
    return cache(lambda name: np.asarray(source.tensor(name), np.float32))


class BundleSource(ModelSource):
    """A model in a bundle. precision: of its artifacts or of its CPU weights; None takes the bundle's defaults."""

    def __init__(self, bundle: Bundle, fusion: str | None = None, precision: str | None = None):
        manifest = bundle.manifest
        program = Program(manifest.spec, fusion or manifest.fusion, manifest.scaling)
        super().__init__(program, manifest.fingerprint)
        self.bundle, self.precision = bundle, precision
        on_cpu = manifest.cpu_precisions
        self._cpu_precision = precision if precision in on_cpu else on_cpu[0]
        self._quantised = self._cpu_precision in manifest.packed
        self._unpacked: dict[str, np.ndarray] = {}

    @property
    def cpu_precision(self) -> str:
        return self._cpu_precision

    def precision_on(self, backend: str) -> str | None:
        if backend in COMPILED:
            return next((artifact.precision for artifact in self._run_by(backend)), None)
        if backend in REFERENCES:
            # Of the references, only NumPy computes the int8 products of artifacts.
            unquantised = backend != "numpy" and self.precision in self.bundle.manifest.int8
            stored = self.bundle.manifest.cpu or self.cpu_precision
            return stored if unquantised else self.precision or stored
        return super().precision_on(backend)

    def tensor(self, name: str) -> np.ndarray:
        return self.bundle.tensor(name)

    def packed(self, name: str, index: int | None = None) -> Packed | None:
        return self.bundle.packed(self.cpu_precision, name, index) if self._quantised else None

    def weight(self, name: str) -> np.ndarray:
        wanted = self.precision or self.bundle.manifest.cpu or self.cpu_precision
        if wanted != self.cpu_precision or not (self._quantised and self.bundle.is_projection(name)):
            return self.tensor(name)
        if name not in self._unpacked:
            *stack, _, _ = self.bundle.shape(name)
            indices: list[int | None] = list(range(stack[0])) if stack else [None]
            matrices = [unpack(self.bundle.packed(self.cpu_precision, name, index)) for index in indices]
            self._unpacked[name] = np.stack(matrices) if stack else matrices[0]
        return self._unpacked[name]

    def release(self, name: str) -> None:
        self.bundle.release(name)

    def unquantised(self) -> ModelSource:
        manifest = self.bundle.manifest
        return BundleSource(self.bundle, self.program.fusion, manifest.cpu or manifest.cpu_precisions[0])

    def has(self, name: str) -> bool:
        return name in self.bundle

    @property
    def outdated(self) -> str:
        """The reason why the bundle's graphs and artifacts cannot be used (their ports are older), "" if they can."""
        return self.bundle.manifest.outdated

    def artifacts(self) -> list[Artifact]:
        """The artifacts for this fusion and precision, those of the bundle's default precision first."""
        manifest = self.bundle.manifest
        if self.outdated:
            return []
        artifacts = [a for a in manifest.artifacts if a.fusion == self.program.fusion]
        artifacts.sort(key=lambda artifact: artifact.precision != manifest.npu_default)
        return [a for a in artifacts if self.precision in (None, a.precision)]

    def _run_by(self, backend: str) -> list[Artifact]:
        """The artifacts that a backend runs: one target and precision. On a board the target is its chip."""
        if backend not in COMPILED:
            return []
        chip = hardware.soc() if backend in NPU_BACKENDS else None
        fitting = [a for a in self.artifacts() if chip in (None, a.target)]
        return [a for a in fitting if (a.target, a.precision) == (fitting[0].target, fitting[0].precision)]

    def artifact_path(self, artifact: Artifact) -> Path:
        return self.bundle.path / artifact.path

    def memory_plan(self, artifacts: list[Artifact]) -> MemoryPlan:
        return plan_memory(self.bundle.manifest, artifacts)

    def quantised(self, name: str) -> Quantised | None:
        int8 = self.bundle.manifest.int8.get(self.precision or "")
        return self.bundle.quantised(name) if int8 and name in int8.projections else None

    def maths(self) -> NumpyMaths:
        if self.precision not in self.bundle.manifest.int8:
            return super().maths()
        return Int8Maths(self.tensor, cache(self.quantised))

    def onnx(self, group: Group) -> str | bytes:
        if self._quantised:
            return self._quantised_onnx(group)
        if self.outdated:  # the bundle's graphs have other ports: trace the graph again
            return self._traced(group, np.float16)
        path = self.bundle.graph_path(self.program.fusion, group.name)
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle: convert the checkpoint again")
        return str(path)

    def _quantised_onnx(self, group: Group) -> bytes:
        from rwkv_npu.graphs.onnx import quantised_model
        from rwkv_npu.graphs.trace import Constant, trace_group

        def packed(constant: Constant) -> Packed:
            return self.bundle.packed(self.cpu_precision, constant.name, constant.index)

        trace = trace_group(self.program, group)
        return quantised_model(trace, group.name, self.tensor, packed).SerializeToString()


class CheckpointSource(ModelSource):
    """A model in a checkpoint, used without conversion. Graphs are built in memory, in fp32."""

    def __init__(self, checkpoint: Checkpoint, fusion: str | None = None, precision: str | None = None):
        super().__init__(Program(checkpoint.spec, fusion or "layer"), checkpoint.fingerprint)
        self.checkpoint, self.precision = checkpoint, precision
        self._vectors: dict[str, np.ndarray] = {}

    def tensor(self, name: str) -> np.ndarray:
        if name in self._vectors:
            return self._vectors[name]
        tensor = self.checkpoint.tensor(name)
        if tensor.ndim < 2:  # a new fp32 array, small, and read in every call: cached
            self._vectors[name] = tensor
        return tensor

    def has(self, name: str) -> bool:
        return name in self.checkpoint

    def onnx(self, group: Group) -> bytes:
        return self._traced(group)
