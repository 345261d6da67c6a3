"""The NPU through its matmul interface: the NPU multiplies, and the CPU computes everything else in fp32.

The large projections of a group run on the NPU one by one, with either fusion. Low-rank matrices stay on the CPU, where
a product takes less time than a call to the NPU. No artifacts are needed: weights are packed once from the bundle, and
all row counts share them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.backends.memory import MAX_CONTEXTS, MemoryPlan, check_room
from rwkv_npu.backends.npu_matmul import Products, Weight, cut
from rwkv_npu.backends.rknn_api import CHIP, CORES, FP16, INT8, OVERRIDE, Kind, Library
from rwkv_npu.board import hardware
from rwkv_npu.board.npu import LOCK, captured, raise_file_limit
from rwkv_npu.errors import BackendError
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import Group, Spec, tensors
from rwkv_npu.models.spec import Kind as TensorKind

ROWS = (1, 64)  # rows of a call: for decoding, and for prompts
HEAD, HEAD_ROWS = "head.weight", (1,)
KINDS = {"fp16": FP16, "w8a8": INT8}
DEFAULT_PRECISION, DEFAULT_CORES = "fp16", "auto"


class MatmulSource(Source, Protocol):
    """Weights with an optional precision that the user requested."""

    precision: str | None


Multiply = Callable[[np.ndarray, Weight], np.ndarray]


class NpuMaths(NumpyMaths):
    """`maths.Maths` with large projections on the NPU.

    weight(name): the packed projection, or None for one that stays on the CPU. multiply: runs a product on the NPU.
    """

    def __init__(
        self,
        tensor: Callable[[str], np.ndarray],
        weight: Callable[[str], Weight | None],
        multiply: Multiply,
        prefix: str = "",
    ):
        super().__init__(tensor, prefix)
        self._tensor, self._packed, self._multiply = tensor, weight, multiply

    def block(self, layer: int) -> NpuMaths:
        return NpuMaths(self._tensor, self._packed, self._multiply, f"blocks.{layer}.")

    def linear(self, x: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
        weight = self._packed(self._prefix + name)
        return super().linear(x, name, index) if weight is None else self._multiply(x, weight)


class RknnMatmulRunner:
    def __init__(self, source: Source, maths: NpuMaths, group: Group, rows: int):
        self._source, self._maths, self._group = source, maths, group
        self.inputs = allocate_inputs(group, rows)

    def run(self) -> Mapping[str, np.ndarray]:
        return self._source.evaluate(self._group, self._maths, dict(self.inputs))


class RknnMatmulBackend:
    """Runs large projections on the NPU and the rest of each group on the CPU.

    cores: the NPU cores that columns are split over: `auto` for all three, or numbers such as "0,1".
    Raises BackendError for a missing chip or library, and for a model that does not fit.
    """

    name = "rknn-matmul"

    def __init__(self, source: MatmulSource, *, threads: int | None = None, cores: str = DEFAULT_CORES):
        _check_chip()
        kind = KINDS.get(source.precision or DEFAULT_PRECISION)
        if kind is None:
            raise BackendError(f"rknn-matmul computes in {' or '.join(KINDS)}, not in {source.precision}")
        masks, library = _masks(cores), Library()
        plan, own = _plan(source.spec, kind, len(masks), dynamic=library.create_dynamic is not None)
        check_room(plan, "the weights", "use precision w8a8, or backend auto")
        if warning := hardware.outdated(hardware.runtime_version(library.path), hardware.driver_version()):
            warnings.warn(warning, stacklevel=2)
        raise_file_limit()
        LOCK.acquire()
        self._source = source
        self._products: Products | None = Products(library, kind, masks, own=own)
        self._large, self._weights = set(_large(source.spec)), dict[str, Weight]()
        self._maths = NpuMaths(source.tensor, self._weight, self._products.multiply)
        self._packing = NpuMaths(source.tensor, self._weight, _no_product)

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return HEAD_ROWS if group.role == "head" else ROWS

    def queue(self, group: Group) -> int:
        return 0  # every product uses all cores

    def open(self, group: Group, rows: int) -> RknnMatmulRunner:
        if rows not in self.row_counts(group):
            raise BackendError(f"rknn-matmul runs {group.name} for {self.row_counts(group)} rows")
        with captured():  # librknnrt prints messages beside its codes
            self._source.evaluate(group, self._packing, dict(allocate_inputs(group, rows)))
        return RknnMatmulRunner(self._source, self._maths, group, rows)

    def close(self) -> None:
        if self._products is not None:
            self._products.close()
            self._products = None
            LOCK.release()

    def _weight(self, name: str) -> Weight | None:
        if name not in self._large:
            return None
        if name not in self._weights:
            assert self._products is not None
            self._weights[name] = self._products.weight(name, self._source.tensor(name), _rows(name))
        return self._weights[name]


def _no_product(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Takes the place of NPU products while weights are packed: the NPU must not run before its self-test."""
    return np.zeros((len(x), weight.cut.N), np.float32)


def _large(spec: Spec) -> dict[str, tuple[int, int]]:
    """Shapes (K, N) by name, of the projections that run on the NPU."""
    linear = [tensor for tensor in tensors(spec) if tensor.kind is TensorKind.LINEAR]
    return {tensor.name: (tensor.used_shape[0], tensor.used_shape[1]) for tensor in linear}


def _rows(name: str) -> tuple[int, ...]:
    return HEAD_ROWS if name == HEAD else ROWS


def _plan(spec: Spec, kind: Kind, cores: int, *, dynamic: bool) -> tuple[MemoryPlan, bool]:
    """NPU memory of the model, and True if each weight has its own contexts. If these are too many, weights share."""
    cuts = {name: cut(K, N, kind, cores) for name, (K, N) in _large(spec).items()}
    for own in (True, False):
        shapes = {
            (_rows(name), shape, name if own else "") for name, how in cuts.items() for shape in how.shapes
        }
        plan = MemoryPlan(
            weights=sum(kind.operand.itemsize * sum(how.depths) * sum(how.widths) for how in cuts.values()),
            buffers=sum(
                M * (K * kind.operand.itemsize + N * kind.sum.itemsize)
                for rows, (K, N, _), _ in shapes
                for M in rows
            ),
            contexts=sum(1 if dynamic else len(rows) for rows, _, _ in shapes),
        )
        if plan.contexts <= MAX_CONTEXTS:
            break
    return plan, own


def _check_chip() -> None:
    """Raises BackendError unless the chip is CHIP: others have other layouts. With OVERRIDE, any chip passes."""
    chip = hardware.soc()
    if chip != CHIP and OVERRIDE not in os.environ:
        found = f"is an {chip}: use backend rknn" if chip else "has no Rockchip NPU: use backend auto"
        raise BackendError(f"rknn-matmul needs an {CHIP}, and this machine {found}")


def _masks(cores: str) -> tuple[int, ...]:
    if cores == DEFAULT_CORES:
        return CORES
    numbers = cores.split(",")
    if not set(numbers) <= {"0", "1", "2"} or len(set(numbers)) != len(numbers):
        raise BackendError(f"NPU cores {cores!r} are unknown: use auto, or some of 0,1,2")
    return tuple(CORES[int(number)] for number in numbers)
