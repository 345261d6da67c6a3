"""Rockchip's compiler, rknn-toolkit2, and its simulator. No other room imports or runs them.

    environment, install   find or install the compiler: the running interpreter, or a private environment
    compiler, schedule     compile one graph, or many within a memory limit
    worker, child          the process that runs the compiler: the parent's side and the child's side
    log, rknn_file         parse the compiler's output and the metadata of its files

This room handles ONNX files with named inputs. It knows nothing of RWKV.
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
