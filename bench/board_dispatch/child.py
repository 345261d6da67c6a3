"""Time calls in this process, on the board or on this machine: `python child.py REQUEST`, started by __main__.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from rwkv_npu.backends.base import Faults
from rwkv_npu.backends.fallback import Fallback, FallbackRunner
from rwkv_npu.backends.npu_matmul import Products
from rwkv_npu.backends.rknn_api import CORES, FP16, Library
from rwkv_npu.models.official import official_spec
from rwkv_npu.models.spec import Group, Port, groups

CALLS, WARM = 120, 12


def timed(call: Callable[[], object]) -> dict[str, float]:
    for _ in range(WARM):
        call()
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    low, middle, high = (float(value) for value in np.quantile(times, (0.1, 0.5, 0.9)))
    return {"p10_s": low, "median_s": middle, "p90_s": high, "calls": CALLS}


def networks(path: str, M: int) -> dict[str, dict[str, Any]]:
    """Time a context of RKNNLite: called through RKNNLite's `inference`, and through RknnRunner."""
    from rknnlite.api import RKNNLite

    from rwkv_npu.backends.rknn import RknnRunner
    from rwkv_npu.toolkit import rknn_info

    lite = RKNNLite()
    assert lite.load_rknn(path) == 0 and lite.init_runtime(core_mask=RKNNLite.NPU_CORE_0) == 0
    info = rknn_info(path)
    inputs, outputs = (
        tuple(Port(p["name"], p["shape"][1], p["shape"][0] < M) for p in info[key])
        for key in ("inputs", "outputs")
    )
    runner = RknnRunner(lite, Group("mid", 0, inputs, outputs), M, [port.name for port in inputs])
    given = {
        name: np.random.default_rng(0).standard_normal(a.shape, np.float32)
        for name, a in runner.inputs.items()
    }

    def ours() -> None:
        for name, array in given.items():
            runner.inputs[name][...] = array
        runner.run()

    moved = 4 * sum(array.size for array in given.values()) + 4 * M * sum(port.width for port in outputs)
    arrays = list(given.values())
    return {
        "inference": {**timed(lambda: lite.inference(arrays)), "bytes": moved},
        "rknn": {**timed(ours), "bytes": moved},
    }


def guard(group: Group, M: int) -> dict[str, Any]:
    """Time the fallback alone, around a call that costs nothing: a thread switch, and a check of every output."""
    rng = np.random.default_rng(0)
    outputs = {port.name: rng.standard_normal((M, port.width), np.float32) for port in group.outputs}
    npu = SimpleNamespace(
        name="rknn", close=lambda: None, queue=lambda group: 0, inputs={}, run=lambda: outputs
    )
    made = Fallback(cast(Any, npu), dict, lambda: cast(Any, npu), Faults())
    row = {**timed(FallbackRunner(made, group, M, cast(Any, npu)).run), "bytes": 0}
    made.close()
    return row


def products(D: int, F: int, M: int, cores: tuple[int, ...]) -> dict[str, Any]:
    """Time the large products of a layer: r, k, v and output (D, D), key (D, F), value (F, D)."""
    made = Products(Library(), FP16, cores, own=False)
    x = {K: np.random.default_rng(K).standard_normal((M, K), np.float32) for K in (D, F)}
    shapes = [(D, D)] * 4 + [(D, F), (F, D)]
    weights = [made.weight(str(i), np.zeros(shape, np.float16), (M,)) for i, shape in enumerate(shapes)]

    def layer() -> None:
        for (K, _), weight in zip(shapes, weights, strict=True):
            made.multiply(x[K], weight)

    row = {**timed(layer), "bytes": sum(M * (2 * K + 4 * N) for K, N in shapes)}
    made.close()
    return row


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    spec, M = official_spec(request["model"]), request["M"]
    D, F = spec.D, spec.F
    rows = networks(request["artifact"], M) if request["artifact"] else {}
    rows["guard"] = guard(next(g for g in groups(spec, "layer") if g.role == "mid"), M)
    rows["rknn-matmul, 3 cores"] = products(D, F, M, CORES)
    rows["rknn-matmul, 1 core"] = products(D, F, M, CORES[:1])
    return [{"way": way, "D": D, "M": M, **row} for way, row in rows.items()]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
