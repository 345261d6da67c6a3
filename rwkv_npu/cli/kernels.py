"""`rwkv-npu kernels build`: compile the kernels of the backend numba before they are needed."""

from __future__ import annotations

import argparse
from typing import Any

from rwkv_npu.errors import BackendError


def add(commands: Any) -> None:
    p = commands.add_parser(
        "kernels",
        help="compile kernels ahead of the first start",
        description="Compile the kernels of the backend numba for this processor, and keep them in the cache: "
        "the first folder of $RWKV_NPU_CACHE that can be written, or the user's cache folder.",
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="fill the cache")
    build.add_argument("-m", "--model", metavar="PATH", help="for this model (default: the demo model)")
    build.add_argument("--precision", help="precision of the weights, one that the bundle has")
    build.add_argument("--all", action="store_true", help="for all formats and generations")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from rwkv_npu import kernels

    if not kernels.available():
        raise BackendError("numba is not installed: in the clone of rwkv_npu, pip install '.[fast]'")
    from rwkv_npu.kernels import cache, compiler
    from rwkv_npu.kernels.build import every_kernel

    if arguments.all:
        compiler.prepare(every_kernel())
    else:
        import rwkv_npu

        with rwkv_npu.load(arguments.model, backend="numba", precision=arguments.precision) as model:
            for _ in model.generate([1], max_tokens=1):
                pass
    print(next(folder for folder in cache.folders() if any(folder.glob("*.*"))))
    return 0
