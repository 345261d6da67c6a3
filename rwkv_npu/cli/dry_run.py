"""`rwkv-npu convert --dry-run`: prints the forecast of a conversion, with the NPU's precisions side by side."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator

from rwkv_npu.backends.memory import BUDGET_BYTES, MAX_CONTEXTS
from rwkv_npu.cli.common import size
from rwkv_npu.conversion.converter import prepare
from rwkv_npu.conversion.forecast import TIMED, Forecast, Variant, forecast
from rwkv_npu.conversion.request import Request
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.estimate import explain

WIDTH, COLUMN = 80, 12  # characters of a line, and of a figure in it


def run(request: Request, as_json: bool, explained: bool) -> int:
    """Print what `request` would make. Raises RwkvNpuError where a conversion would, but for memory, which is in the
    table, and for the compiler, which a dry run does without."""
    prepared = prepare(request)
    there = prepared.manifest if prepared.adding else None
    # The projections that `mixed` has in int8, by a map or by the bundle; None where neither exists.
    chosen: Collection[str] | None = prepared.mapped
    if chosen is None and there and "mixed" in there.int8:
        chosen = there.int8["mixed"].projections
    found = forecast(prepared.checkpoint, prepared.request, chosen, there.artifacts if there else ())
    print(json.dumps(found.to_json(), indent=1) if as_json else table(found, explained=explained))
    return 0


def table(found: Forecast, *, explained: bool = False) -> str:
    """The forecast as text, 80 columns wide. explained: with every term of the estimates."""
    spec = found.spec
    title = f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters"
    if not found.variants:
        return "\n".join([f"{title}, for CPUs", "", *_bundle(found)])
    title += f", for the {found.target}: {found.fusion} fusion, {found.calls} calls a token"
    sections = [_artifacts(found), _memory(found), _speed(found), _bundle(found), _notes(found)]
    if explained and _has_speeds(found):
        sections.append(_wrapped(explain()))
    return "\n".join([title, *(line for section in sections for line in ("", *section))])


def _line(label: str, cells: Iterable[str]) -> str:
    figures = "".join(f"{cell:>{COLUMN}}" for cell in cells)
    return f"{label:<{WIDTH - len(figures)}}{figures}".rstrip()


def _each(found: Forecast, label: str, cell: Callable[[Variant], str]) -> str:
    return _line(label, map(cell, found.variants))


def _artifacts(found: Forecast) -> Iterator[str]:
    """A line for artifacts of a kind: consecutive layers of the same size."""
    sizes = [{(a.group, a.rows): v.files[a.path] for a in v.artifacts} for v in found.variants]
    kinds: dict[tuple[str, int, tuple[int | None, ...]], list[str]] = {}
    for group, rows in sorted(dict.fromkeys(key for some in sizes for key in some), key=lambda key: key[1]):
        role = group.rstrip("0123456789")
        kinds.setdefault((role, rows, tuple(some.get((group, rows)) for some in sizes)), []).append(group)
    yield _each(found, "bytes of each artifact", lambda variant: variant.precision)
    for (role, rows, bytes_), groups in kinds.items():
        first, last = (name.removeprefix(role) for name in (groups[0], groups[-1]))
        layers = first if first == last else f"{first}-{last}"
        yield _line(f"  {role}{layers}, rows {rows}", ("-" if one is None else size(one) for one in bytes_))


def _memory(found: Forecast) -> Iterator[str]:
    yield _each(found, "all of them", lambda variant: variant.precision)
    yield _each(found, "  weights in int8", lambda variant: f"{100 * variant.int8:.0f} %")
    yield _each(found, "  rows", lambda variant: ",".join(map(str, variant.rows)))
    yield _each(found, f"  contexts (of {MAX_CONTEXTS})", lambda variant: str(variant.memory.contexts))
    yield _each(found, f"  NPU memory (of {size(BUDGET_BYTES)})", lambda variant: size(variant.memory.total))
    yield _each(found, "  groups left to the CPU", lambda variant: str(len(variant.left) or "none"))
    yield _each(found, "    their weights", lambda variant: size(variant.left_bytes) if variant.left else "-")
    yield _each(found, "  CPU's memory beside it", lambda variant: size(variant.board_bytes))
    yield _each(found, "  .rknn files", lambda variant: size(sum(variant.files.values())))


def _has_speeds(found: Forecast) -> bool:
    return all(variant.speeds for variant in found.variants)


def _speed(found: Forecast) -> Iterator[str]:
    if not _has_speeds(found):
        yield f"no speed is estimated: no measurements of the {found.target} are known"
        return
    yield _each(found, "tokens per second, estimated", lambda variant: variant.precision)
    for tokens in TIMED:
        use = "written" if tokens == 1 else f"read, {tokens} at once"
        for dram in rk3588.DRAMS:
            speeds = [variant.speeds[dram][tokens] for variant in found.variants]
            yield _line(f"  {use}, {dram}", (_figure(central) for _, central, _ in speeds))
            yield _line("    from, to", (f"{_figure(slow)}-{_figure(fast)}" for slow, _, fast in speeds))


def _figure(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _bundle(found: Forecast) -> Iterator[str]:
    rest = sum(found.parts.values())
    if found.variants:
        yield _each(found, "bundle on disk", lambda variant: size(rest + sum(variant.files.values())))
    else:
        yield _line("bundle on disk", [size(rest)])
    yield from (_line(f"  {what}", [size(bytes_)]) for what, bytes_ in found.parts.items())


def _notes(found: Forecast) -> Iterator[str]:
    notes = ["Nothing was compiled or written. Sizes and memory are estimates."]
    if _has_speeds(found):
        notes[0] = (
            "Nothing was compiled, written or measured. All figures are estimates; speeds are those of one NPU core, "
            "with the CPU's part. --explain prints every term and its source."
        )
    notes += [_assumption(variant) for variant in found.variants if variant.assumed]
    notes += [_refusal(variant) for variant in found.variants if variant.left]
    yield from _wrapped(notes)


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(line, WIDTH, break_on_hyphens=False)


def _assumption(variant: Variant) -> str:
    return (
        f"{variant.precision}: {100 * variant.int8:.0f} % of the weights in int8 is an assumption; convert chooses "
        "them by the error that each adds."
    )


def _refusal(variant: Variant) -> str:
    there = variant.memory.contexts - len(variant.artifacts)
    already = f", {there} of the contexts being in the bundle already" if there else ""
    return (
        f"{variant.precision} does not fit, and convert refuses it: {variant.memory.arithmetic()}{already}. "
        f"The estimate has {variant.left[0]} to {variant.left[-1]} on the board's CPU."
    )
