"""A network on the NPU through librknnrt's own interface, with inputs and outputs in NPU memory that we allocate.

Inputs and outputs are fp16 arrays over this memory, so the runtime copies and converts nothing. RKNNLite cannot do
this: it copies every array. CPU caches are flushed here, for inputs before a run and for outputs after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref, c_uint64, sizeof
from typing import Any

import numpy as np

from rwkv_npu import kernels
from rwkv_npu.backends.rknn_api import (
    FLOAT16,
    FROM_DEVICE,
    IN_OUT_NUM,
    INPUT_ATTR,
    NATIVE_INPUT_ATTR,
    NATIVE_OUTPUT_ATTR,
    NC1HWC2,
    NO_FLUSH,
    OUTPUT_ATTR,
    PERF_RUN,
    SDK_VERSION,
    TO_DEVICE,
    InOutNum,
    Memory,
    Networks,
    PerfRun,
    PortAttr,
    SdkVersion,
    check,
)
from rwkv_npu.errors import BackendError
from rwkv_npu.models import maths
from rwkv_npu.models.spec import Group

LARGEST = 65504.0  # of fp16


class Refused(BackendError):
    """librknnrt refuses our memory for inputs or outputs. RKNNLite may still work."""


class Context:
    """A network on some cores. inputs, outputs: (M, width) fp16 arrays over NPU memory, by name.

    handle: made by rknn_init; the context owns it. mask: of the cores; 0 leaves the choice to the driver.
    """

    def __init__(self, library: Networks, handle: int, mask: int = 0):
        self._library, self._handle = library, handle
        self._memories: dict[int, list[Memory]] = {TO_DEVICE: [], FROM_DEVICE: []}
        self.inputs: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}
        try:
            if mask:
                check("rknn_set_core_mask", library.set_core_mask(handle, mask), "core mask")
            counts = self._query(IN_OUT_NUM, InOutNum())
            for index in range(counts.n_input):
                name, array = self._bind(INPUT_ATTR, NATIVE_INPUT_ATTR, index, TO_DEVICE)
                self.inputs[name] = array
            for index in range(counts.n_output):
                name, array = self._bind(OUTPUT_ATTR, NATIVE_OUTPUT_ATTR, index, FROM_DEVICE)
                self.outputs[name] = array
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, library: Networks, content: bytes, mask: int = 0) -> Context:
        """Open the content of a `.rknn` file. Raises BackendError, Refused."""
        handle = c_uint64()
        check("rknn_init", library.init(byref(handle), content, len(content), NO_FLUSH, None))
        return cls(library, handle.value, mask)

    def duplicate(self, mask: int) -> Context:
        """The same network on other cores: it shares the weights. Raises BackendError."""
        handle = c_uint64()
        check("rknn_dup_context", self._library.dup(byref(c_uint64(self._handle)), byref(handle)))
        return Context(self._library, handle.value, mask)

    def _bind(self, plain: int, native: int, index: int, direction: int) -> tuple[str, np.ndarray]:
        """Bind new memory to a port: its name, and an array over the memory.

        Native memory is used if it is row-major in fp16, because nothing is converted then. Otherwise the memory is
        row-major, and the runtime converts it from or to its own layout in each run.
        """
        attr = self._query(plain, PortAttr(index=index))
        own = self._query(native, PortAttr(index=index))
        name, rows, width, size = attr.name.decode(), attr.dims[0], attr.dims[1], 2 * attr.n_elems
        if attr.n_dims != 2:
            raise BackendError(f"port {name} has {attr.n_dims} dimensions instead of 2")
        same = own.n_dims == 2 and list(own.dims[:2]) == [rows, width] and own.size_with_stride in (0, size)
        if same and own.fmt != NC1HWC2 and own.type == FLOAT16:
            attr, attr.pass_through = own, 1
        attr.type, attr.size = FLOAT16, size
        memory = Memory(self._library, self._handle, size)
        self._memories[direction].append(memory)
        if code := self._library.set_io_mem(self._handle, memory.pointer, byref(attr)):
            raise Refused(f"rknn_set_io_mem of {name} returned {code}")
        return name, memory.bytes.view(np.float16).reshape(rows, width)

    def _query(self, command: int, structure: Any) -> Any:
        code = self._library.query(self._handle, command, byref(structure), sizeof(structure))
        check(f"rknn_query {command}", code)
        return structure

    def run(self) -> None:
        """Run the network on its inputs. Raises BackendError."""
        for memory in self._memories[TO_DEVICE]:
            memory.sync(TO_DEVICE)
        check("rknn_run", self._library.run(self._handle, None))
        for memory in self._memories[FROM_DEVICE]:
            memory.sync(FROM_DEVICE)

    def npu_seconds(self) -> float:
        """Seconds of the last run on the NPU, as the runtime reports them; 0 if it does not."""
        found = PerfRun()
        if self._library.query(self._handle, PERF_RUN, byref(found), sizeof(found)):
            return 0.0
        return max(0, found.run_duration) / 1e6

    def versions(self) -> tuple[str, str]:
        """Versions of librknnrt and of the driver."""
        found = self._query(SDK_VERSION, SdkVersion())
        return found.api_version.decode(errors="replace"), found.drv_version.decode(errors="replace")

    def close(self) -> None:
        for memories in self._memories.values():
            while memories:
                memories.pop().close()
        if self._handle:
            self._library.destroy(self._handle)
            self._handle = 0


class ContextRunner:
    """A group on a context. Inputs and outputs are fp16.

    kept: the inputs that were loaded last, in fp32 where fp16 cannot hold them. npu_seconds: of the last run.
    """

    def __init__(self, context: Context, group: Group, rows: int):
        self._context, self._group = context, group
        shapes = {name: array.shape for name, array in (context.inputs | context.outputs).items()}
        expected = {port.name: (rows, port.width) for port in (*group.fixed_inputs(rows), *group.outputs)}
        if shapes != expected:
            raise BackendError(f"librknnrt reports ports {shapes} of {group.name} instead of {expected}")
        unused = {port.name: np.zeros((rows, port.width), np.float32) for port in group.inputs}
        self.inputs = unused | context.inputs
        self.kept: dict[str, np.ndarray] = dict(self.inputs)
        self.npu_seconds = 0.0
        self._narrow = kernels.load("halves").narrow if kernels.available() else maths.narrow

    def load(self, inputs: Mapping[str, np.ndarray]) -> None:
        for name, source in inputs.items():
            target, rows = self.inputs[name], len(source)
            largest = self._narrow(source, target[:rows])
            if rows < len(target):  # padding repeats the last row, see `copy_rows`
                target[rows:] = target[rows - 1]
            self.kept[name] = target if largest <= LARGEST else np.array(source, np.float32)

    def run(self) -> Mapping[str, np.ndarray]:
        self._context.run()
        self.npu_seconds = self._context.npu_seconds()
        return self._context.outputs
