"""Code that several commands share: the flags that name a model, loading it, printing sizes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_npu.board import hardware
from rwkv_npu.cli.flags import as_flags
from rwkv_npu.errors import UsageError

if TYPE_CHECKING:
    from rwkv_npu.formats.bundle import Bundle
    from rwkv_npu.model import Model
    from rwkv_npu.runtime.rk3588 import Terms

BACKENDS = ("auto", "numpy", "ort", "numba", "torch", "rknn-sim", "rknn", "rknn-matmul")
BACKENDS_HELP = f"backend of the matrix products: {', '.join(BACKENDS)} (default: auto)"
NPU_CORES = ("auto", "0", "1", "2", "0,1", "0,1,2")
NPU_CORES_HELP = "cores of the NPU: auto (default), 0, 1, 2, or several as 0,1,2"


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that choose a model, its backends and its precision."""
    p.add_argument("-m", "--model", metavar="PATH", help="bundle or checkpoint (default: the demo model)")
    p.add_argument("--backend", default="auto", metavar="NAME", choices=BACKENDS, help=BACKENDS_HELP)
    p.add_argument("--precision", help="precision of the weights, one that the bundle has (info lists them)")
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    p.add_argument(
        "--plan", metavar="PLAN", help="a backend for each use or group, such as prefill=rknn,decode=numba"
    )
    p.add_argument("--npu-cores", default="auto", metavar="CORES", choices=NPU_CORES, help=NPU_CORES_HELP)
    p.add_argument("--tokenizer", metavar="FILE", help="vocabulary file (or world, pile)")
    add_layout_flag(p)
    p.add_argument(
        "-t", "--threads", type=int, metavar="N", help="threads on the CPU (default: one a large core)"
    )


def add_layout_flag(p: argparse.ArgumentParser) -> None:
    layout = (
        "layout of a checkpoint or tuned state that can be read in two ways: blinkdl, or web-rwkv (.st files)"
    )
    p.add_argument("--layout", choices=("blinkdl", "web-rwkv"), help=layout)


def add_adapter_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that say how to read an adapter."""
    p.add_argument(
        "--adapter-scale", type=float, metavar="X", help="alpha / rank of a LoRA whose file does not hold it"
    )
    p.add_argument(
        "--adapter-init", metavar="FILE", help="initial values of PiSSA (default: init_pissa.pth beside it)"
    )
    p.add_argument(
        "--adapter-blocks", choices=("in", "out", "repeat"), help="blocks of Bone, where shapes do not tell"
    )


def use_big_cores(threads: int | None) -> str:
    """Keep this process and its children on the large cores of a machine that has small ones too.

    Threads that share a product wait for the slowest thread. Returns a line for -v. Does nothing and returns "" if all
    cores are alike, or if the user asks for more threads than there are large cores.
    """
    big = hardware.big_cores()
    if (
        not hasattr(os, "sched_setaffinity")
        or len(big) == len(hardware.usable_cores())
        or (threads or 0) > len(big)
    ):
        return ""
    for thread in os.listdir("/proc/self/task"):  # NumPy has started some threads already
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), big)
    return f"on the large cores, {', '.join(map(str, big))}"


def bundle_at(path: str) -> Bundle:
    """Open the bundle at `path`. Raises UsageError if there is no bundle, BundleError if it is damaged."""
    from rwkv_npu.formats.bundle import is_bundle, open_bundle

    if not is_bundle(Path(path)):
        raise UsageError(f"{path} is no bundle: rwkv-npu convert makes one")
    return open_bundle(Path(path))


def load_model(arguments: argparse.Namespace, *, verbose: bool = False) -> Model:
    """Load the model that the flags of `add_model_flags` name."""
    from rwkv_npu.model import load

    begin = time.perf_counter()
    cores = use_big_cores(arguments.threads)
    if arguments.model is None:
        print("no --model given: using the demo model that ships with rwkv-npu", file=sys.stderr)
    model = load(
        arguments.model,
        backend=arguments.backend,
        precision=arguments.precision,
        fusion=arguments.fusion,
        plan=arguments.plan,
        tokenizer=arguments.tokenizer,
        threads=arguments.threads,
        npu_cores=arguments.npu_cores,
        layout=arguments.layout,
    )
    if verbose:
        spec, seconds = model.spec, time.perf_counter() - begin
        print(
            f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters, {model.precision} weights, "
            f"{model.describe()}, opened in {seconds:.2f} s",
            file=sys.stderr,
        )
        print(as_flags(f"backend: {model.reason}"), file=sys.stderr)
        if "numba" in model.describe():
            from rwkv_npu.kernels import instruction_sets

            print(instruction_sets.describe(), file=sys.stderr)
        if cores:
            print(f"threads: {cores}", file=sys.stderr)
    return model


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(as_flags(record.getMessage()), file=sys.stderr)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print the package's log to stderr: a line for each stage of long work."""
    logger, handler = logging.getLogger("rwkv_npu"), _Stderr()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def size(count: float) -> str:
    """Format a number of bytes: 1.50 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def add_board_report_flag(p: argparse.ArgumentParser, use: str = "") -> None:
    p.add_argument(
        "--board-report",
        metavar="FILE",
        help=f"{use}use the terms that rwkv-npu bench board measured, for the estimates of speed",
    )


def read_board_report(arguments: argparse.Namespace) -> Terms:
    """The terms of the estimates: the published ones, or those of --board-report. Raises UsageError."""
    if arguments.board_report is None:
        from rwkv_npu.runtime.rk3588 import TERMS

        return TERMS
    from rwkv_npu.bench.board import read_terms

    return read_terms(arguments.board_report)
