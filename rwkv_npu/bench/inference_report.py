"""Rows of `rwkv-npu bench inference` as tables for people, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from rwkv_npu.bench.inference_record import PARTS, PREFILLS, Document, Row, by_model
from rwkv_npu.bench.report import ESTIMATE, machine_lines

TERMS = (*PARTS[:-1], "calls", PARTS[-1])  # `calls` only estimates have: measured, they are in the others
WARNING = (
    f"{ESTIMATE} An estimate, not a measurement; its terms are listed below. The compiler's table is optimistic: "
    "boards were seen to need two to three times as long where the DDR does not run at its full clock."
)


def table(document: Document) -> str:
    """Markdown: the machine, and for each model speeds, where the time goes, and the terms of the estimates."""
    reads = [row.read_gb_per_s for row in document.results if row.read_gb_per_s]
    seen = [f"memory read before each row: {min(reads):.0f} to {max(reads):.0f} GB/s"] if reads else []
    parts = [machine_lines(document.machine, document.command, [*seen, *document.notes])]
    if any(row.precision != row.weights for row in document.results):
        parts.append("`fp32 of fp16`: fp16 in the file, widened to fp32 when it is opened.")
    for rows in by_model(document.results):
        first = rows[0]
        parts.append(f"## {first.model}: RWKV-{first.generation}, {first.parameters / 1e6:.3g} M parameters")
        parts.append(_speeds(rows))
        parts += ["Milliseconds of a token:", _split(rows, "decode")]
        parts.append(f"Milliseconds of a prompt of {PREFILLS[0]} tokens and the first choice:")
        parts.append(_split(rows, f"prefill_{PREFILLS[0]}"))
        if any(row.estimated for row in rows):
            parts += [WARNING, "\n".join(f"- {terms(row)}" for row in rows if row.estimated)]
        if failed := [row for row in rows if row.failed]:
            parts.append("\n".join(f"- failed: {row.name}: {row.failed}" for row in failed))
        parts += [profile_table(row) for row in rows if row.profile]
    return "\n\n".join(parts)


def _speeds(rows: Sequence[Row]) -> str:
    head = ["backend", "device", "weights"]
    head += [f"read {count} t/s" for count in PREFILLS]
    head += ["write t/s", "p10 - p90", "runs", "first token ms", "load s", "peak GB", "own GB", "flags"]
    lines = []
    for row in rows:
        mark = ESTIMATE if row.estimated else ""
        spread = (
            f"{_figure(row.decode_tps_p10)} - {_figure(row.decode_tps_p90)}" if row.decode_tps_p10 else ""
        )
        short = f" of {row.decode_tokens}" if row.decode_tokens else ""
        lines.append(
            [
                _backend(row),
                row.device,
                row.precision,
                *(_marked(mark, getattr(row, f"prefill_{count}_tps")) for count in PREFILLS),
                _marked(mark, row.decode_tps),
                spread,
                f"{row.decode_repeats}{short}" if row.decode_repeats else "",
                _marked(mark, row.first_token_s, 1e3),
                _figure(row.load_s),
                _figure(row.peak_bytes, 1e-9),
                _figure(row.own_bytes, 1e-9),
                row.flags + (" failed" if row.failed else ""),
            ]
        )
    return _markdown(head, lines)


def _split(rows: Sequence[Row], what: str) -> str:
    """Milliseconds by part; for a token also calls, bytes and bandwidth."""
    a_token = what == "decode"
    head = ["backend", "device", "weights", *TERMS, "total"]
    head += ["calls", "MB", "GB/s", "of the best read"] if a_token else []
    lines = []
    for row in rows:
        parts: Mapping[str, float] = getattr(row, f"{what}_ms")
        if not parts:
            continue
        mark = ESTIMATE if row.estimated else ""
        line = [_backend(row), row.device, row.precision, *(_marked(mark, parts.get(term)) for term in TERMS)]
        line.append(_marked(mark, sum(parts.values())))
        if a_token:
            share = "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %"
            calls = "" if row.calls_per_token is None else f"{row.calls_per_token:g}"
            line += [calls, _figure(row.bytes_per_token, 1e-6), _marked(mark, row.gb_per_s), share]
        lines.append(line)
    return _markdown(head, lines)


def terms(row: Row) -> str:
    """How an estimate adds up, in words."""
    told = [f"{row.name}, {row.device}: {row.basis}."]
    for what, words in (
        ("decode", "a token"),
        *((f"prefill_{count}", f"{count} tokens") for count in PREFILLS),
    ):
        ms: Mapping[str, float] = getattr(row, f"{what}_ms")
        if not ms:
            continue
        sums = [f"projections {_figure(ms['projections'])}", f"head {_figure(ms['head'])}"]
        if calls := row.terms.get(f"{what}_calls"):
            sums.append(f"calls {_figure(ms['calls'])} ({calls} x {row.terms['call_overhead_us']:g} us)")
        if here := row.terms.get(f"{what}_host_ms_here"):
            factor = row.terms["host_factor"] or 0.0
            sums.append(f"CPU's share {_figure(here * factor)} ({_figure(here)} here x {factor:g})")
        told.append(f"{words[0].upper()}{words[1:]}: {' + '.join(sums)} = {_figure(sum(ms.values()))} ms.")
    return " ".join(told)


def profile_table(row: Row) -> str:
    """Where a token goes, by role of group and by function. Files from before bytes were counted have none."""
    roles = []
    for role, calls, ms, weights, *size in row.profile["roles"]:
        rate = size[0] / ms / 1e6 if ms and size else None
        share = f"{100 * rate / row.read_gb_per_s:.0f} %" if rate and row.read_gb_per_s else ""
        megabytes = _figure(size[0] * calls, 1e-6) if size else ""
        cells = [_figure(ms), _figure(calls * ms), _figure(weights / 1e6), megabytes, _figure(rate), share]
        roles.append([role, str(calls), *cells])
    functions = [[name, f"{calls:.1f}", _figure(ms)] for name, calls, ms in row.profile["functions"]]
    return "\n\n".join(
        [
            f"Profile of {row.name}, {row.profile['tokens']} tokens:",
            _markdown(
                [
                    "group",
                    "times",
                    "ms each",
                    "ms a token",
                    "M weights",
                    "MB a token",
                    "GB/s",
                    "of the read before",
                ],
                roles,
            ),
            "Own time of functions (Python's profiler makes small ones look slower):",
            _markdown(["function", "calls a token", "ms a token"], functions),
        ]
    )


def as_csv(rows: Iterable[Row]) -> str:
    """One line a row; what is nested has columns `outer.inner`; profiles are left out."""
    names = [name for field in fields(Row) for name in _columns(field.name)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        flat: dict[str, Any] = {}
        for name, value in asdict(row).items():
            if name == "terms":
                flat[name] = "; ".join(f"{key} {inner}" for key, inner in value.items())
            elif isinstance(value, dict):
                flat |= {f"{name}.{key}": inner for key, inner in value.items() if name != "profile"}
            else:
                flat[name] = value
        writer.writerow(flat)
    return text.getvalue()


def _columns(name: str) -> list[str]:
    if name == "profile":
        return []
    return [f"{name}.{term}" for term in TERMS] if name.endswith("_ms") else [name]


def _backend(row: Row) -> str:
    return row.backend + (" (estimate)" if row.estimated else "")


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def _marked(mark: str, value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else mark + _figure(value, factor)


def _figure(value: float | None, factor: float = 1.0) -> str:
    """Three or four digits that count, never as a power of ten."""
    if value is None:
        return ""
    value *= factor
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
