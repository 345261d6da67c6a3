"""Matrix products on the NPU: x (M, K) fp32 times a weight packed in NPU memory, its columns split over the cores.

    MatmulContext  products of one shape (K, N) on one core
    Weight         a matrix, padded, cut into parts along K and N, and packed in the NPU's layout
    Products       opens contexts, packs weights, multiplies

Callers see no layouts, padding or types. If K is too wide for the NPU, it is cut into parts, whose products are added
in fp32. N is cut into one part for each core, and a thread drives each core.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_uint64
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np

from rwkv_npu.backends.rknn_api import (
    C_BLOCK,
    FROM_DEVICE,
    INT8,
    K_BLOCK,
    MAX_K,
    NATIVE,
    TO_DEVICE,
    IoAttr,
    Kind,
    Library,
    MatmulInfo,
    Memory,
    Shape,
    TensorAttr,
    check,
)
from rwkv_npu.quant.npu import spans

# The native layouts of A and C are made of 16-byte blocks: 8 fp16 or 16 int8 numbers in A, 4 fp32 or int32 sums in C.
# Copying a block as one element is several times faster than copying its numbers.
BLOCK = np.dtype(np.complex128)
# The smallest part, in bytes of weights, that gets a core of its own. An NPU core was seen to read 10 GB/s: 0.1 ms for
# this part. To start work in a thread takes 0.04 to 0.2 ms (bench/results/board-dispatch-*).
MIN_PART = 1 << 20
_LARGEST_INT8 = 127


@dataclass(frozen=True)
class Cut:
    """The parts of a matrix (K, N): their lengths along K and N, padded to the NPU's blocks."""

    K: int
    N: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(K, N, core number) of every part. Parts along K share the context of their core."""
        return [(depth, width, core) for depth in self.depths for core, width in enumerate(self.widths)]


def cut(K: int, N: int, kind: Kind, cores: int) -> Cut:
    """Cut a matrix: K if it is above MAX_K, and N over the cores, but into no parts smaller than MIN_PART."""
    depths = _equal_parts(K, K_BLOCK, ceil(K / MAX_K))
    most = depths[0] * N * kind.operand.itemsize // MIN_PART
    return Cut(K, N, depths, _equal_parts(N, kind.b_block, max(1, min(cores, most, N // kind.b_block))))


def _equal_parts(length: int, block: int, count: int) -> tuple[int, ...]:
    """Split a length into `count` whole numbers of blocks, as equal as possible."""
    blocks = ceil(length / block)
    return tuple(block * (blocks * (i + 1) // count - blocks * i // count) for i in range(count))


@dataclass
class _Buffers:
    """The buffers of a context for one M. a (M, K / a_block), c (M, N / 4): arrays of BLOCKs over the buffers."""

    handle: int
    shape: Shape
    attr: IoAttr
    a_memory: Memory
    c_memory: Memory
    a: np.ndarray
    c: np.ndarray


class MatmulContext:
    """Products (M, K) @ (K, N) for each M in `rows`, on one core.

    In librknnrt this is one context if it supports dynamic shapes, otherwise one for each M.
    """

    def __init__(self, library: Library, kind: Kind, rows: Sequence[int], K: int, N: int, core_mask: int):
        self._library, self._kind = library, kind
        self._handles: list[int] = []
        self._memories: list[Memory] = []
        self._buffers: dict[int, _Buffers] = {}  # by M
        self._ready: set[int] = set()  # every M whose buffers are bound to its handle
        self._bound: dict[int, Memory] = {}  # handle -> the B that is bound to it
        try:
            attrs = self._create(rows, K, N)
            for handle in self._handles:
                code = library.set_core_mask(handle, core_mask)
                check("rknn_matmul_set_core_mask", code, "choose other NPU cores")
            for number, M in enumerate(rows):
                handle = self._handles[0 if self.dynamic else number]
                self._buffers[M] = self._allocate(handle, M, K, N, attrs[number])
        except BaseException:
            self.close()
            raise

    def _create(self, rows: Sequence[int], K: int, N: int) -> ctypes.Array[IoAttr]:
        """Create the contexts of librknnrt. Returns the attributes of A, B and C for each M."""
        library = self._library
        info = MatmulInfo(K=K, N=N, type=self._kind.code, B_layout=NATIVE, AC_layout=NATIVE)
        attrs, handle = (IoAttr * len(rows))(), c_uint64()
        self.dynamic = False
        if len(rows) > 1 and library.create_dynamic is not None:
            info.M, shapes = max(rows), (Shape * len(rows))(*(Shape(M, K, N) for M in rows))
            self.dynamic = library.create_dynamic(byref(handle), byref(info), len(rows), shapes, attrs) == 0
        if self.dynamic:
            self._handles.append(handle.value)
        for number, M in enumerate(rows if not self.dynamic else ()):
            info.M = M
            check(
                f"rknn_matmul_create of {M}x{K}x{N}",
                library.create(byref(handle), byref(info), byref(attrs[number])),
            )
            self._handles.append(handle.value)
        return attrs

    def _allocate(self, handle: int, M: int, K: int, N: int, attr: IoAttr) -> _Buffers:
        a_memory, c_memory = self.memory(attr.A.size, handle), self.memory(attr.C.size, handle)
        a = a_memory.bytes.view(BLOCK).reshape(K // self._kind.a_block, M).T
        c = c_memory.bytes.view(BLOCK).reshape(N // C_BLOCK, M).T
        return _Buffers(handle, Shape(M, K, N), attr, a_memory, c_memory, a, c)

    def memory(self, size: int, handle: int | None = None) -> Memory:
        """Allocate a buffer, which lives as long as the context."""
        memory = Memory(self._library, self._handles[0] if handle is None else handle, size)
        self._memories.append(memory)
        return memory

    def multiply(self, a: np.ndarray, b: Memory) -> np.ndarray:
        """a (M, K) of the operand type times packed b -> (M, N / 4) BLOCKs of sums, valid until the next call."""
        buffers = self._buffers[len(a)]
        if len(a) not in self._ready:
            self._set_shape(buffers)
        if self._bound.get(buffers.handle) is not b:
            self._bind(buffers.handle, b, buffers.attr.B)
            self._bound[buffers.handle] = b
        buffers.a[...] = a.view(BLOCK)
        buffers.a_memory.sync(TO_DEVICE)
        check("rknn_matmul_run", self._library.run(buffers.handle))
        buffers.c_memory.sync(FROM_DEVICE)
        return buffers.c

    def _set_shape(self, buffers: _Buffers) -> None:
        """Set the M of the next products and bind its buffers, which librknnrt forgets when another M is set."""
        handle = buffers.handle
        if self.dynamic:
            self._ready.clear()
            check("rknn_matmul_set_dynamic_shape", self._library.set_shape(handle, byref(buffers.shape)))
        self._bind(handle, buffers.a_memory, buffers.attr.A)
        self._bind(handle, buffers.c_memory, buffers.attr.C)
        self._ready.add(buffers.shape.M)

    def _bind(self, handle: int, memory: Memory, attr: TensorAttr) -> None:
        check("rknn_matmul_set_io_mem", self._library.set_io_mem(handle, memory.pointer, byref(attr)))

    def close(self) -> None:
        while self._memories:
            self._memories.pop().close()
        while self._handles:
            self._library.destroy(self._handles.pop())


@dataclass
class Weight:
    """A packed matrix. parts[i][j]: context and memory of part i of K and part j of N. scale: (N,) fp32, int8 only."""

    cut: Cut
    parts: list[list[tuple[MatmulContext, Memory]]]
    scale: np.ndarray | None


class Products:
    """Contexts and weights of a model.

    cores: masks of the cores to use. own: True gives each weight contexts of its own, so that a weight is bound once.
    False shares a context among all weights of a shape, and a call binds its weight if another one is bound.
    """

    def __init__(self, library: Library, kind: Kind, cores: Sequence[int], *, own: bool):
        self._library, self._kind, self._cores, self._own = library, kind, tuple(cores), own
        self._contexts: dict[tuple[object, ...], MatmulContext] = {}
        self._lock = threading.Lock()  # one product at a time: contexts have one set of buffers
        # The calling thread drives the first core.
        self._threads = ThreadPoolExecutor(max(1, len(cores) - 1), "rknn-matmul")

    def weight(self, name: str, matrix: np.ndarray, rows: Sequence[int]) -> Weight:
        """Pack a matrix (K, N) of any float type for products with the given row counts.

        Raises BackendError if librknnrt has no more memory or contexts.
        """
        K, N = matrix.shape
        lengths = cut(K, N, self._kind, len(self._cores))
        scale = column_scale(matrix) if self._kind is INT8 else None
        parts: list[list[tuple[MatmulContext, Memory]]] = []
        for depth, k in zip(lengths.depths, _slices(lengths.depths), strict=True):
            parts.append([])
            for core, (width, n) in enumerate(zip(lengths.widths, _slices(lengths.widths), strict=True)):
                context = self._context(name, rows, depth, width, core)
                memory = context.memory(depth * width * self._kind.operand.itemsize)
                part_scale = None if scale is None else scale[n]
                pack(matrix[k, n], part_scale, memory.bytes.view(self._kind.operand), depth, self._kind)
                memory.sync(TO_DEVICE)
                parts[-1].append((context, memory))
        return Weight(lengths, parts, scale)

    def _context(self, name: str, rows: Sequence[int], K: int, N: int, core: int) -> MatmulContext:
        key = (tuple(rows), K, N, core, *([name] if self._own else []))
        if key not in self._contexts:
            self._contexts[key] = MatmulContext(self._library, self._kind, rows, K, N, self._cores[core])
        return self._contexts[key]

    def multiply(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        """x (M, K) fp32 times a weight -> (M, N) fp32, a new array. M is one of its row counts. Raises BackendError."""
        a, scale = (x, None) if weight.scale is None else quantized_rows(x)
        padding = sum(weight.cut.depths) - a.shape[1]
        if padding:
            a = np.pad(a, ((0, 0), (0, padding)))
        with np.errstate(over="ignore", invalid="ignore"):  # the fallback detects infinity and NaN
            a = np.ascontiguousarray(a, self._kind.operand)
        result = np.empty((len(x), sum(weight.cut.widths)), np.float32)
        with self._lock:
            for number, rows in enumerate(_slices(weight.cut.depths)):
                targets = [result[:, columns] for columns in _slices(weight.cut.widths)]
                self._on_all_cores(a[:, rows], weight.parts[number], targets, add=number > 0)
        result = result[:, : weight.cut.N]
        return result if weight.scale is None else result * (scale * weight.scale)

    def _on_all_cores(
        self, a: np.ndarray, parts: list[tuple[MatmulContext, Memory]], targets: list[np.ndarray], add: bool
    ) -> None:
        """Run `_on_one_core` for each part and its target at the same time."""
        first, *others = [
            partial(self._on_one_core, a, *part, target, add)
            for part, target in zip(parts, targets, strict=True)
        ]
        futures = [self._threads.submit(other) for other in others]
        try:
            first()
        finally:
            # Wait for all cores before the lock is released.
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def _on_one_core(
        self, a: np.ndarray, context: MatmulContext, b: Memory, target: np.ndarray, add: bool
    ) -> None:
        """Write a (M, K) times b to target (M, N) fp32, or add it."""
        c = context.multiply(a, b)
        direct = not add and self._kind.sum == target.dtype
        sums = target if direct else np.empty(target.shape, self._kind.sum)
        sums.view(BLOCK)[...] = c
        if add:
            target += sums
        elif not direct:
            target[...] = sums

    def close(self) -> None:
        self._threads.shutdown()
        while self._contexts:
            self._contexts.popitem()[1].close()


def _slices(widths: Sequence[int]) -> list[slice]:
    return [slice(*span) for span in spans(widths)]


def column_scale(matrix: np.ndarray) -> np.ndarray:
    """Scales of the columns of an int8 matrix: (K, N) -> (N,) fp32."""
    largest = np.maximum(matrix.max(axis=0), -matrix.min(axis=0)).astype(np.float32)
    return np.maximum(largest, np.float32(1e-30)) / np.float32(_LARGEST_INT8)


def quantized_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows to int8: (M, K) -> the int8 values as floats (M, K), and the scale of each row (M, 1)."""
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(_LARGEST_INT8)
    return np.rint(x / scale), scale


def pack(matrix: np.ndarray, scale: np.ndarray | None, target: np.ndarray, depth: int, kind: Kind) -> None:
    """Write a matrix (K, N), divided by the scales of its columns, to `target` in the native layout (N/n, K/32, n, 32).

    depth: K with its padding. One block of columns is packed at a time, which saves a second copy of the matrix.
    """
    n, (K, N) = kind.b_block, matrix.shape
    blocks = target.reshape(-1, depth // K_BLOCK, n, K_BLOCK)
    for number, block in enumerate(blocks):
        columns = slice(number * n, min((number + 1) * n, N))
        values = np.zeros((n, depth), np.float32)
        values[: columns.stop - columns.start, :K] = matrix[:, columns].T
        if scale is not None:
            values[: columns.stop - columns.start] /= scale[columns, None]
            np.rint(values, out=values)
        with np.errstate(over="ignore"):
            block[...] = values.reshape(n, -1, K_BLOCK).swapaxes(0, 1)
