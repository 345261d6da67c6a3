"""`rwkv-npu convert --dry-run`: what a conversion would make, its precisions side by side."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator

from rwkv_npu.backends.memory import BUDGET_BYTES, MAX_CONTEXTS
from rwkv_npu.cli.common import size
from rwkv_npu.conversion.converter import prepare
from rwkv_npu.conversion.forecast import PROMPT_TOKENS, RATES, Forecast, Variant, forecast
from rwkv_npu.conversion.request import Request
from rwkv_npu.runtime.estimate import CALL_OVERHEAD_US, Rate

WIDTH, COLUMN = 80, 12  # characters of a line, and of a figure in it


def run(request: Request, as_json: bool) -> int:
    """Print what `request` would make. Raises RwkvNpuError where a conversion would, but for memory, which is in the
    table, and for the compiler, which a dry run does without."""
    prepared = prepare(request)
    there = prepared.manifest if prepared.adding else None
    # The projections of `mixed` in int8: a map's, or the bundle's; None where there is neither.
    chosen: Collection[str] | None = prepared.mapped
    if chosen is None and there and "mixed" in there.int8:
        chosen = there.int8["mixed"].projections
    found = forecast(prepared.checkpoint, prepared.request, chosen, there.artifacts if there else ())
    print(json.dumps(found.to_json(), indent=1) if as_json else table(found))
    return 0


def table(found: Forecast) -> str:
    """For people, 80 columns wide."""
    spec = found.spec
    title = f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters"
    if not found.variants:
        return "\n".join([f"{title}, for CPUs", "", *_bundle(found)])
    title += f", for the {found.target}: {found.fusion} fusion, {found.calls} calls a token"
    sections = (_artifacts(found), _memory(found), _speed(found), _bundle(found), _notes(found))
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


def _speed(found: Forecast) -> Iterator[str]:
    if not all(variant.ms for variant in found.variants):
        yield f"no speed is estimated: the compiler's formula is not known for the {found.target}"
        return
    yield _each(found, "tokens per second, estimated", lambda variant: variant.precision)
    for place, (use, tokens) in enumerate(
        (("written", 1), (f"read, {PROMPT_TOKENS} at once", PROMPT_TOKENS))
    ):
        for rate in RATES:
            speeds = [1e3 * tokens / variant.ms[rate.label][place] for variant in found.variants]
            yield _line(f"  {use}: {_short(rate)}", (f"{speed:.1f}" for speed in speeds))


def _short(rate: Rate) -> str:
    return rate.label.removeprefix("1 core, ")


def _bundle(found: Forecast) -> Iterator[str]:
    rest = sum(found.parts.values())
    if found.variants:
        yield _each(found, "bundle on disk", lambda variant: size(rest + sum(variant.files.values())))
    else:
        yield _line("bundle on disk", [size(rest)])
    yield from (_line(f"  {what}", [size(bytes_)]) for what, bytes_ in found.parts.items())


def _notes(found: Forecast) -> Iterator[str]:
    notes = [
        "Nothing was compiled or written, and nothing measured: these are estimates for one core, with "
        f"{CALL_OVERHEAD_US / 1e3:.2f} ms a call. The CPU's share of a token (recurrence, norms of the heads, "
        "sampling) comes on top.",
        *(f"{_short(rate)}: {rate.source}." for rate in RATES),
        *(_assumption(variant) for variant in found.variants if variant.assumed),
        *(_refusal(variant) for variant in found.variants if variant.left),
    ]
    for note in notes:
        yield from textwrap.wrap(note, WIDTH, break_on_hyphens=False)


def _assumption(variant: Variant) -> str:
    return (
        f"{variant.precision}: that {100 * variant.int8:.0f} % of the weights are in int8 is an assumption; convert "
        "chooses them by what each costs."
    )


def _refusal(variant: Variant) -> str:
    there = variant.memory.contexts - len(variant.artifacts)
    already = f", {there} of the contexts being in the bundle already" if there else ""
    return (
        f"{variant.precision} does not fit, and convert refuses it: {variant.memory.arithmetic()}{already}. "
        f"The estimate has {variant.left[0]} to {variant.left[-1]} on the board's CPU."
    )
