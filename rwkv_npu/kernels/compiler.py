"""Compiles kernels to machine code and loads it.

A kernel is a function of int64 arguments (numbers and addresses) that returns nothing. Each kernel is compiled by
numba, or read from the cache, when its address is first needed: a model only pays for the kernels it uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import llvmlite.binding as llvm
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from rwkv_npu.kernels import cache, processor
from rwkv_npu.progress import progress

processor.configure()

# Options of functions that only kernels call: no wrappers for Python, which take a third of the time to compile.
PLAIN: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Callable[..., Any], **options: Any) -> Any:
    """Make a function that only kernels call. It is not compiled anew for each constant that a caller passes."""
    dispatcher = njit(**options, **PLAIN)(function)
    template = dispatcher.get_call_template

    def unliteral(arguments: Iterable[Any], keywords: Mapping[str, Any]) -> Any:
        return template([types.unliteral(argument) for argument in arguments], keywords)

    dispatcher.get_call_template = unliteral
    return dispatcher


KERNELS: dict[str, Kernel] = {}  # by name, of all modules that are loaded

_SYMBOL = "rwkv_npu_kernel"  # the function's name in its object file
_loading = threading.Lock()
_engines: list[Any] = []  # LLVM's engines: each owns the memory of a kernel's machine code


class Kernel:
    """A function of this package as machine code. options: those of numba's `cfunc`."""

    def __init__(self, function: Callable[..., None], *, name: str | None = None, **options: Any):
        self.function, self._options = function, options
        self.name = f"{function.__module__.rpartition('.')[2]}.{name or function.__name__}"
        self.arguments = len(inspect.signature(function).parameters)
        self._address = 0
        KERNELS[self.name] = self

    @property
    def address(self) -> int:
        """The address of the machine code, for other compiled code to call."""
        with _loading:
            if not self._address:
                code = cache.read(self.name)
                if code is None:
                    prepare([self])
                    code = cache.read(self.name)
                self._address = _load(self.compile() if code is None else code)
            return self._address

    @property
    def missing(self) -> bool:
        """True if the kernel has to be compiled."""
        return not self._address and cache.read(self.name) is None

    @functools.cached_property
    def ctypes(self) -> Any:
        """The kernel as a Python callable. It releases the GIL while it runs."""
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * self.arguments)(self.address)

    def compile(self) -> bytes:
        """Compile to machine code. This takes some seconds."""
        code: bytes = _target_machine().emit_object(self._module())
        return code

    def assembly(self) -> str:
        """Compile to assembly, for people to read."""
        return str(_target_machine().emit_assembly(self._module()))

    def _module(self) -> Any:
        """The optimised LLVM module, in which every function but the kernel itself is internal."""
        signature = types.void(*[types.int64] * self.arguments)
        with _without_engine():
            compiled = CFunc(self.function, (signature.args, signature.return_type), {}, self._options)
            compiled.compile()
        module = llvm.parse_assembly(compiled.inspect_llvm())
        for function in module.functions:
            if function.name == compiled.native_name:
                function.name = _SYMBOL
            elif not function.is_declaration:
                function.linkage = "internal"
        return module

    def keep(self, folder: Path, *, wait: bool = False) -> bool:
        """Compile the kernel into this folder of the cache, unless it is in the cache already.

        Returns False if another process is compiling it; `wait` waits for that process instead. Raises OSError.
        """
        if cache.read(self.name) is not None:
            return True
        with cache.lock(folder, self.name, wait=wait) as held:
            if held and cache.read(self.name) is None:
                cache.write(folder, self.name, self.compile())
            return held


def prepare(kernels: Iterable[Kernel]) -> None:
    """Compile the kernels that the cache lacks, in as many processes as there are cores.

    Each process compiles what no other has begun. So several programs that start at the same time share the work.
    """
    missing = [kernel for kernel in kernels if kernel.missing]
    if not missing:
        return
    folder = cache.writable_folder()
    count = f"{len(missing)} kernels" if len(missing) > 1 else "a kernel"
    print(f"compiling {count} for this processor: some seconds, this once", file=sys.stderr)
    command = [sys.executable, "-m", "rwkv_npu.kernels.build", *(kernel.name for kernel in missing)]
    root = str(Path(__file__).parent.parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "RWKV_NPU_CACHE": os.pathsep.join(cache.roots())}
    helpers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        for _ in range(min(len(missing), os.cpu_count() or 1) - 1)
    ]
    try:
        with progress("compiling kernels", "kernel", total=len(missing)) as bar:
            left = [kernel for kernel in missing if not kernel.keep(folder)]
            bar.update(len(missing) - len(left))
            for kernel in left:
                kernel.keep(folder, wait=True)
                bar.update()
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()


@contextlib.contextmanager
def _without_engine() -> Iterator[None]:
    """Keep numba from making machine code of every function that a kernel calls.

    numba hands each function to its execution engine, to be called from Python. A kernel needs only the LLVM code of
    these functions, which is part of its own module; without the rest, compilation takes three quarters of the time.

    numba has no option for this, so its methods that reach the engine are replaced while a kernel is compiled. A numba
    that has renamed one fails here at the first kernel, with an AttributeError of `mock.patch`. If it reaches the
    engine in another way, kernels only compile more slowly.
    """
    # What numba's own methods do: generate the code of a module; the same, and return the address of a function.
    library: dict[str, Any] = {
        "_finalize_specific": lambda library: None,
        "get_pointer_to_function": lambda library, name: library._ensure_finalized() or 0,
    }
    # Add a module to the engine; set a global of a module that the engine holds.
    codegen: dict[str, Any] = {
        "_add_module": lambda codegen, module: None,
        "set_env": lambda codegen, name, env: None,
    }
    cpu_target.target_context  # noqa: B018  made before the patch: numba's own runtime does need machine code
    with (
        global_compiler_lock,
        mock.patch.multiple(JITCodeLibrary, **library),
        mock.patch.multiple(JITCPUCodegen, **codegen),
    ):
        yield


def _target_machine() -> Any:
    """A new LLVM target machine with numba's settings. An engine that is given one owns it."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    relocation = "static" if target.name.startswith("x86") else "default"
    options = {"cpu": name, "features": features, "opt": 3, "reloc": relocation, "codemodel": "jitdefault"}
    return target.create_target_machine(**options, jit=True)


def _load(code: bytes) -> int:
    """Load machine code into memory and return its address."""
    if b"NRT_" in code or b"numba_" in code or b"PyErr_" in code:  # the code calls numba's own functions
        from numba.core.runtime import rtsys

        rtsys.initialize(cpu_target.target_context)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(_SYMBOL)
    assert address
    return address
