"""The one place that knows Rockchip's compiler, rknn-toolkit2, and its simulator.

    environment, install   where the compiler lives: the running interpreter, or a private environment
    compiler, schedule     one graph, or many within a bound on memory
    worker, child          the process that holds the compiler, from outside and from inside
    log, rknn_file         what the compiler prints and what its files say

It knows graphs as ONNX files with named inputs; what RWKV is, it does not know.
"""

from rwkv_npu.toolkit.compiler import TARGETS, CompileOptions, CompileResult, Simulator, compile_graph
from rwkv_npu.toolkit.environment import (
    DEFAULT_VERSION,
    OLDEST_INT8,
    VERSIONS,
    Environment,
    Status,
    find,
    remove,
    require,
    status,
)
from rwkv_npu.toolkit.log import Cycles, Layer
from rwkv_npu.toolkit.rknn_file import rknn_info
from rwkv_npu.toolkit.schedule import Job, available_memory, compile_many

__all__ = [
    "DEFAULT_VERSION",
    "OLDEST_INT8",
    "TARGETS",
    "VERSIONS",
    "CompileOptions",
    "CompileResult",
    "Cycles",
    "Environment",
    "Job",
    "Layer",
    "Simulator",
    "Status",
    "available_memory",
    "compile_graph",
    "compile_many",
    "find",
    "remove",
    "require",
    "rknn_info",
    "status",
]
