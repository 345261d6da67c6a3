"""Where a decoded token goes, finer than the parts of a row: by role of group, and by function of Python."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from rwkv_npu.graphs import trace_group
from rwkv_npu.model import Model
from rwkv_npu.spec import tensors

TOKENS = 32
FUNCTIONS = 14  # the most expensive ones


def profile(model: Model, decode: Callable[[int], None]) -> dict[str, Any]:
    """`decode(n)` chooses and reads n tokens.

    roles: [role, calls a token, ms a call, weights that a call multiplies with]. functions: [name, calls a token, own
    ms a token], under Python's profiler, which slows small functions down.
    """
    counters = model.engine.counters
    before = dict(counters.run_s)
    decode(TOKENS)
    seconds = {role: spent - before.get(role, 0.0) for role, spent in counters.run_s.items()}
    groups = model.engine.program.groups
    calls = Counter(group.role for group in groups)
    elements = _elements(model)
    roles = [
        [role, count, seconds[role] / TOKENS / count * 1e3, elements[role] // count]
        for role, count in calls.items()
    ]
    return {"tokens": TOKENS, "roles": roles, "functions": _functions(decode)}


def _elements(model: Model) -> Counter[str]:
    """Weights by role of group, all of its groups together."""
    program = model.engine.program
    shapes = {tensor.name: tensor.used_shape for tensor in tensors(program.spec)}
    found: Counter[str] = Counter()
    for group in program.groups:
        for constant in trace_group(program, group).projections.values():
            shape = shapes[constant.name]
            found[group.role] += prod(shape[1:] if constant.index is not None else shape)
    return found


def _functions(decode: Callable[[int], None]) -> list[list[Any]]:
    profiler = cProfile.Profile()
    profiler.runcall(decode, TOKENS)
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:FUNCTIONS]
    return [[_name(key), calls / TOKENS, own / TOKENS * 1e3] for key, (_, calls, own, _, _) in longest]


def _name(key: tuple[str, int, str]) -> str:
    file, line, function = key
    return function if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{line} {function}"
