"""`rwkv-npu convert --dry-run`: print a forecast of a conversion, with the NPU's precisions side by side."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator

from rwkv_npu.backends.memory import BUDGET_BYTES, MAX_CONTEXTS
from rwkv_npu.cli.common import size
from rwkv_npu.conversion.forecast import BATCH, TIMED, Forecast, Variant, forecast
from rwkv_npu.conversion.prepare import prepare
from rwkv_npu.conversion.request import Request
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.estimate import explain
from rwkv_npu.runtime.rk3588 import TERMS, Terms

WIDTH, COLUMN = 80, 12  # characters of a line, and of a column of figures


def run(request: Request, as_json: bool, explained: bool, terms: Terms = TERMS) -> int:
    """Print the forecast of `request`. terms: the terms of the estimates.

    Raises RwkvNpuError where the conversion would, but does not need the compiler. A model that does not fit is
    reported in the table.
    """
    prepared = prepare(request)
    bundle = prepared.manifest if prepared.adding else None
    # Projections that `mixed` puts in int8, from a map or from the bundle. None if neither exists.
    int8: Collection[str] | None = prepared.mapped
    if int8 is None and bundle and "mixed" in bundle.int8:
        int8 = bundle.int8["mixed"].projections
    existing = bundle.artifacts if bundle else ()
    result = forecast(prepared.checkpoint, prepared.request, int8, existing, terms)
    print(json.dumps(result.to_json(), indent=1) if as_json else table(result, terms if explained else None))
    return 0


def table(result: Forecast, explained: Terms | None = None) -> str:
    """Format a forecast as text, 80 columns wide. explained: append these terms of the estimates."""
    spec = result.spec
    title = f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters"
    if not result.variants:
        return "\n".join([f"{title}, for CPUs", "", *_bundle(result)])
    title += f", for the {result.target}: {result.fusion} fusion, {result.calls} calls a token"
    sections = [_artifacts(result), _memory(result), _speed(result), _bundle(result), _notes(result)]
    if explained and _has_speeds(result):
        sections.append(_wrapped(explain(explained)))
    return "\n".join([title, *(line for section in sections for line in ("", *section))])


def _line(label: str, cells: Iterable[str]) -> str:
    figures = "".join(f"{cell:>{COLUMN}}" for cell in cells)
    return f"{label:<{WIDTH - len(figures)}}{figures}".rstrip()


def _each(result: Forecast, label: str, cell: Callable[[Variant], str]) -> str:
    return _line(label, map(cell, result.variants))


def _artifacts(result: Forecast) -> Iterator[str]:
    """One line for consecutive layers whose artifacts have the same size."""
    sizes = [{(a.group, a.rows): v.files[a.path] for a in v.artifacts} for v in result.variants]
    kinds: dict[tuple[str, int, tuple[int | None, ...]], list[str]] = {}
    for group, rows in sorted(dict.fromkeys(key for files in sizes for key in files), key=lambda key: key[1]):
        role = group.rstrip("0123456789")
        kinds.setdefault((role, rows, tuple(files.get((group, rows)) for files in sizes)), []).append(group)
    yield _each(result, "bytes of each artifact", lambda variant: variant.precision)
    for (role, rows, bytes_), groups in kinds.items():
        first, last = (name.removeprefix(role) for name in (groups[0], groups[-1]))
        layers = first if first == last else f"{first}-{last}"
        yield _line(f"  {role}{layers}, rows {rows}", ("-" if n is None else size(n) for n in bytes_))


def _memory(result: Forecast) -> Iterator[str]:
    yield _each(result, "all artifacts", lambda variant: variant.precision)
    yield _each(result, "  weights in int8", lambda variant: f"{100 * variant.int8:.0f} %")
    yield _each(result, "  rows", lambda variant: ",".join(map(str, variant.rows)))
    yield _each(result, f"  contexts (of {MAX_CONTEXTS})", lambda variant: str(variant.memory.contexts))
    yield _each(result, f"  NPU memory (of {size(BUDGET_BYTES)})", lambda variant: size(variant.memory.total))
    yield _each(result, "  groups left to the CPU", lambda variant: str(len(variant.left) or "none"))
    yield _each(
        result, "    their weights", lambda variant: size(variant.left_bytes) if variant.left else "-"
    )
    yield _each(result, "  CPU memory of the process", lambda variant: size(variant.board_bytes))
    yield _each(result, "  .rknn files", lambda variant: size(sum(variant.files.values())))


def _has_speeds(result: Forecast) -> bool:
    return all(variant.speeds for variant in result.variants)


def _speed(result: Forecast) -> Iterator[str]:
    if not _has_speeds(result):
        yield f"speed is not estimated: there are no measurements of the {result.target}"
        return
    yield _each(result, "tokens per second, estimated", lambda variant: variant.precision)
    for tokens in (*TIMED, None):
        use = {None: f"{BATCH} sequences", 1: "written"}.get(tokens, f"prompt of {tokens}")
        for dram in rk3588.DRAMS:
            speeds = [
                v.batch_speeds[dram] if tokens is None else v.speeds[dram][tokens] for v in result.variants
            ]
            yield _line(f"  {use}, {dram}", (_figure(central) for _, central, _ in speeds))
            yield _line("    from, to", (f"{_figure(slow)}-{_figure(fast)}" for slow, _, fast in speeds))


def _figure(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _bundle(result: Forecast) -> Iterator[str]:
    rest = sum(result.parts.values())
    if result.variants:
        yield _each(result, "bundle on disk", lambda variant: size(rest + sum(variant.files.values())))
    else:
        yield _line("bundle on disk", [size(rest)])
    yield from (_line(f"  {part}", [size(bytes_)]) for part, bytes_ in result.parts.items())


def _notes(result: Forecast) -> Iterator[str]:
    notes = ["Nothing was compiled or written. Sizes and memory are estimates."]
    if _has_speeds(result):
        notes[0] = (
            "Nothing was compiled, written or measured. All figures are estimates. Speeds "
            "include the CPU's work and contention for memory. Chunks of a prompt overlap on three NPU cores; all "
            "else runs on one core at a time. --explain prints every term and its source."
        )
    notes += [_assumption(variant) for variant in result.variants if variant.assumed]
    notes += [_refusal(variant) for variant in result.variants if variant.left]
    yield from _wrapped(notes)


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(line, WIDTH, break_on_hyphens=False)


def _assumption(variant: Variant) -> str:
    return (
        f"{variant.precision}: {100 * variant.int8:.0f} % of the weights in int8 is an assumption. A conversion "
        "chooses them by the error that each adds."
    )


def _refusal(variant: Variant) -> str:
    existing = variant.memory.contexts - len(variant.artifacts)
    in_bundle = f"; contexts in the bundle already: {existing}" if existing else ""
    return (
        f"{variant.precision} does not fit, and a conversion refuses it: {variant.memory.arithmetic()}{in_bundle}. "
        f"The estimate runs {variant.left[0]} to {variant.left[-1]} on the board's CPU."
    )
