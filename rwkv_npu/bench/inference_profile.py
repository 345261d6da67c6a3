"""Where a decoded token goes, finer than the parts of a row: by role of group, and by function of Python."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from rwkv_npu.graphs.trace import trace_group
from rwkv_npu.model import Model
from rwkv_npu.models.spec import Tensor, state_shapes, tensors
from rwkv_npu.quant.cpu import PRECISIONS, bits_of, packed_bytes

TOKENS = 32
FUNCTIONS = 14  # the most expensive ones


def profile(model: Model, held: str, decode: Callable[[int], None]) -> dict[str, Any]:
    """`decode(n)` chooses and reads n tokens.

    roles: [role, groups, ms a group, weights of a group, their bytes as `held`: a precision]; at the end the
    recurrence, with the state that it reads and writes. functions: [name, calls a token, own ms a token], under
    Python's profiler, which slows small functions down.
    """
    counters, spec = model.engine.counters, model.spec
    before, recurrence_s = dict(counters.run_s), counters.recurrence_s
    decode(TOKENS)
    seconds = {role: spent - before.get(role, 0.0) for role, spent in counters.run_s.items()}
    counts = Counter(group.role for group in model.engine.program.groups)
    elements, bytes_ = _weights(model, held)
    roles = [
        [role, count, seconds[role] / TOKENS / count * 1e3, elements[role] // count, bytes_[role] // count]
        for role, count in counts.items()
    ]
    state = sum(prod(shape) for name, shape in state_shapes(spec).items() if "shift" not in name)
    a_layer = (counters.recurrence_s - recurrence_s) / TOKENS / spec.L * 1e3
    roles.append(["recurrence", spec.L, a_layer, 0, 2 * 4 * state])
    return {"tokens": TOKENS, "roles": roles, "functions": _functions(decode)}


def _weights(model: Model, held: str) -> tuple[Counter[str], Counter[str]]:
    """Weights by role of group, all of its groups together, and their bytes."""
    program = model.engine.program
    known = {tensor.name: tensor for tensor in tensors(program.spec)}
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for group in program.groups:
        for constant in trace_group(program, group).projections.values():
            tensor = known[constant.name]
            parts = 1 if constant.index is None else tensor.used_shape[0]
            elements[group.role] += prod(tensor.used_shape) // parts
            sizes[group.role] += _bytes(tensor, held) // parts
    return elements, sizes


def _bytes(tensor: Tensor, held: str) -> int:
    if held in PRECISIONS:
        return packed_bytes(tensor, bits_of(held, tensor))
    return prod(tensor.shape) * (4 if held == "fp32" else 2)


def _functions(decode: Callable[[int], None]) -> list[list[Any]]:
    profiler = cProfile.Profile()
    profiler.runcall(decode, TOKENS)
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:FUNCTIONS]
    return [[_name(key), calls / TOKENS, own / TOKENS * 1e3] for key, (_, calls, own, _, _) in longest]


def _name(key: tuple[str, int, str]) -> str:
    file, line, function = key
    return function if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{line} {function}"
