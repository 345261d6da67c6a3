"""`bench board`: measures the terms of the estimates on a board, with a bundle, and writes a report.

    measure       times calls, cores, conversion, CPU kernels and whole passes
    fit           terms of `runtime.rk3588` from these times
    page          the report for people, in Markdown
    read_terms    the terms of a saved report, for the estimates of other commands

A term that the times do not determine is left out. The estimates then use its published value.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.backends.base import fill
from rwkv_npu.backends.rknn import RknnBackend
from rwkv_npu.backends.rknn_api import CHIP
from rwkv_npu.bench import machine
from rwkv_npu.board import hardware
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import Artifact, Bundle, open_bundle
from rwkv_npu.model import load
from rwkv_npu.models.spec import Spec
from rwkv_npu.runtime import estimate, rk3588
from rwkv_npu.runtime.loading import CPU_BACKEND
from rwkv_npu.runtime.operators import Operators, count_operators
from rwkv_npu.runtime.rk3588 import BOUNDS, CPU_CORES, CPU_HZ, DRAMS, TERMS, Terms
from rwkv_npu.runtime.weights import BundleSource

FORMAT, VERSION = "rwkv_npu board report", 1
SECONDS, CALLS = 2.0, 200  # limits of one item
WINDOWS = 4  # in which a rate is measured
PROMPTS, BATCHES, DECODED = (128, 512), (4, 8), 32
# Arithmetic limits a product that takes longer than this times the reading of its weights.
COMPUTE_BOUND = 1.05

Progress = Callable[[str], None]
Row = dict[str, Any]


# -- measuring -------------------------------------------------------------------------------------------


def measure(path: Path, progress: Progress = lambda step: None, threads: int | None = None) -> dict[str, Any]:
    """Measure a bundle on this board: returns the report. progress: called with the name of each step.

    Raises BackendError where the NPU cannot be used, and for a bundle without artifacts for this chip.
    """
    bundle = open_bundle(path)
    source = BundleSource(bundle)
    report: dict[str, Any] = {"format": FORMAT, "version": VERSION, "board": _facts(bundle, source)}
    backend = RknnBackend(source)
    with contextlib.closing(backend):
        progress("calls")
        report["calls"] = list(_calls(source, backend))
        report["board"] |= backend.versions()
        progress("cores")
        report["cores"], report["cores_refused"] = _cores(source, backend)
        progress("conversion")
        report["conversion_ns"] = _conversion_ns(source, backend)
    progress("CPU kernels")
    report["cpu"] = _cpu(path, source, threads)
    progress("prompts and tokens")
    report["passes"] = _passes(path, source, threads)
    measured = fit(source.spec, source.artifacts(), report)
    report["terms"] = {
        name: {"measured": value, **{bound: getattr(TERMS[name], bound) for bound in BOUNDS}, "unit": TERMS[name].unit}
        for name, value in measured.items()
    }  # fmt: skip
    return report


def _facts(bundle: Bundle, source: BundleSource) -> dict[str, Any]:
    spec, artifacts = bundle.spec, source.artifacts()
    first = artifacts[0] if artifacts else None
    model = f"RWKV-{spec.generation} {spec.parameters / 1e9:.2g}B, L {spec.L}, D {spec.D}"
    return {
        "chip": hardware.soc() or CHIP,  # without a board, RWKV_NPU_RKNNRT names a library
        "name": hardware.model(),
        "kernel": hardware.kernel(),
        **{name: value for name, value in machine.describe().items() if name not in ("board", "load_average")},
        "memory_clock_known": any(clock.name == "ddr" for clock in hardware.clocks()),
        "model": model,
        "precision": first.precision if first else None,
        "fusion": source.program.fusion,
        "cpu_precision": source.cpu_precision,
        "toolkit": first.toolkit if first else None,
    }  # fmt: skip


def _timed(work: Callable[[], object]) -> tuple[float, int]:
    """Median microseconds of `work`, and the number of calls, after some to warm up."""
    work()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or (len(times) < CALLS and time.perf_counter() < end):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times), len(times)


def _calls(source: BundleSource, backend: RknnBackend) -> Iterator[Row]:
    """One group of each kind at each of its row counts: the call's time, and the time that the NPU reports."""
    roles = {group.role: group for group in reversed(source.program.groups)}
    for group in reversed(list(roles.values())):
        for rows in backend.row_counts(group):
            runner = backend.open(group, rows)
            for array in runner.inputs.values():
                array[...] = 0.01
            reported: list[float] = []

            def run(runner: Any = runner, reported: list[float] = reported) -> None:
                runner.run()
                reported.append(getattr(runner, "npu_seconds", 0.0))

            us, count = _timed(run)
            npu_us = 1e6 * statistics.median(reported)
            yield {"group": group.name, "rows": rows, "us": us, "npu_us": npu_us, "calls": count}


def _cores(source: BundleSource, backend: RknnBackend) -> tuple[dict[str, float], str]:
    """Calls a second of a layer by number of cores used at once, at the fewest rows; and why a core is refused.

    Several windows are measured in turns, and the best one counts: other work of the CPU only makes a rate smaller.
    """
    group = next(group for group in source.program.groups if group.role in ("mid", "ffn"))
    runners, refused = backend.on_each_core(group, min(backend.row_counts(group)))
    rates: dict[str, float] = {}
    for count in WINDOWS * list(range(1, len(runners) + 1)):
        done = [0] * count

        def work(number: int, end: float, done: list[int] = done) -> None:
            while time.perf_counter() < end:
                runners[number].run()
                done[number] += 1

        begin = time.perf_counter()
        each = [threading.Thread(target=work, args=(number, begin + SECONDS / 2)) for number in range(count)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
        rate = sum(done) / (time.perf_counter() - begin)
        rates[str(count)] = max(rate, rates.get(str(count), 0.0))
    return rates, refused


def _conversion_ns(source: BundleSource, backend: RknnBackend) -> float:
    """Nanoseconds to convert an element of inputs and outputs, at the most rows."""
    group = next(group for group in source.program.groups if group.role in ("mid", "ffn"))
    rows = max(backend.row_counts(group))
    runner = backend.open(group, rows)
    given = {port.name: np.full((rows, port.width), 0.5, np.float32) for port in group.inputs}
    outputs = runner.run()

    def convert() -> None:
        fill(runner, given)
        for array in outputs.values():
            array.astype(np.float32)

    elements = sum(array.size for array in (*given.values(), *outputs.values()))
    return 1e3 * _timed(convert)[0] / elements


def _cpu(path: Path, source: BundleSource, threads: int | None) -> dict[str, float]:
    """Seconds of the CPU kernels, by kind of work: of a token, and of each token of a prompt of 64."""
    with load(path, backend=CPU_BACKEND, precision=source.cpu_precision, threads=threads) as model:
        ids, state = [1 + i % (model.spec.V - 1) for i in range(64)], model.engine.new_state()
        model.forward(ids, state)
        counters = model.engine.counters
        found = {}
        for name, tokens in (("decode", [[token] for token in ids[:DECODED]]), ("prefill", [ids] * 3)):
            before = sum(s for role, s in counters.run_s.items() if role != "head"), counters.recurrence_s
            for piece in tokens:
                model.forward(piece, state)
            count = sum(map(len, tokens))
            products = sum(s for role, s in counters.run_s.items() if role != "head") - before[0]
            found[f"{name}_products_s"] = products / count
            found[f"{name}_recurrence_s"] = (counters.recurrence_s - before[1]) / count
    return found


def _passes(path: Path, source: BundleSource, threads: int | None) -> list[Row]:
    """Prompts, tokens and batches on the NPU, with estimates, and the deviation of the logits from the CPU's."""
    artifacts = source.artifacts()
    rows: list[Row] = []
    with (
        load(path, backend="rknn", threads=threads) as model,
        load(path, backend=CPU_BACKEND, threads=threads) as reference,
    ):
        ids = np.random.default_rng(0).integers(1, model.spec.V, max(PROMPTS)).tolist()
        expected = reference.forward(ids[: PROMPTS[0]])[0]

        def add(
            what: str, tokens: int, seconds: float, at_once: int, sequences: int = 1, **more: Any
        ) -> None:
            guess = estimate.on_npu(model.spec, artifacts, at_once, DRAMS[0], sequences=sequences)
            rows.append(
                {"what": what, "tokens_per_s": tokens / seconds, "estimate": guess.speeds(at_once)[1], **more}
            )

        for length in PROMPTS:
            begin = time.perf_counter()
            logits, state = model.forward(ids[:length])
            seconds = time.perf_counter() - begin
            error = float(np.abs(logits - expected).max() / expected.std()) if length == PROMPTS[0] else None
            add(f"prompt of {length}", length, seconds, length, error=error)
        begin = time.perf_counter()
        for token in ids[:DECODED]:
            _, state = model.forward([token], state, inplace=True)
        add("tokens", DECODED, time.perf_counter() - begin, 1)
        for batch in BATCHES:
            states = [state.copy() for _ in range(batch)]
            begin = time.perf_counter()
            for token in ids[:8]:
                model.engine.forward_batch([[token]] * batch, states, inplace=True)
            add(f"{batch} sequences", 8 * batch, time.perf_counter() - begin, batch, sequences=batch)
        rows[0]["faults"] = model.engine.counters.faults.calls
    return rows


# -- terms -----------------------------------------------------------------------------------------------


def fit(spec: Spec, artifacts: Sequence[Artifact], report: Mapping[str, Any]) -> dict[str, float]:
    """Values of terms by name, from the times of a report. Terms that the times do not determine are left out."""
    terms: dict[str, float] = {}
    known = {(a.group, a.rows): a for a in artifacts if a.cycles}
    rows = [
        (known[row["group"], row["rows"]], row)
        for row in report["calls"]
        if (row["group"], row["rows"]) in known
    ]
    counts = {(a.fusion, a.rows): count_operators(spec, a.fusion, a.rows) for a, _ in rows}
    found = [(a, counts[a.fusion, a.rows][a.group], row["us"], row["npu_us"] or row["us"]) for a, row in rows]
    # 1. One row: time without the small operators = call + bytes / rate.
    small = TERMS["small_operator"].central
    single = [
        (artifact, npu - operators.count * small)
        for artifact, operators, _, npu in found
        if artifact.rows == 1
    ]
    line = _line([a.cycles["ddr"] * rk3588.NPU_TABLE_GB_PER_S for a, _ in single], [us for _, us in single])
    if line is not None:
        call, us_per_byte = line
        terms["c_call"] = call
        terms |= {f"npu_read_{dram.lower()}": 1e-3 / us_per_byte for dram in DRAMS}
        terms["npu_call"] = call + statistics.median(us - npu for a, _, us, npu in found if a.rows == 1)
    # 2. Many rows: products over the compiler's table.
    shares = [_over_table(a, operators, npu, TERMS.measured(terms, "")) for a, operators, _, npu in found]
    if known_shares := [share for share in shares if share is not None]:
        terms["graph_over_table"] = statistics.median(known_shares)
    # 3. Cores and conversion.
    if (cores := report["cores"]).keys() >= {"1", "3"}:
        terms["npu_three_cores"] = cores["3"] / cores["1"]
    terms["port_element"] = report["conversion_ns"]
    # 4. The CPU's kernels.
    terms |= _cpu_terms(spec, report["cpu"], report["board"]["cpu_precision"])
    return {name: value for name, value in terms.items() if math.isfinite(value) and value > 0}


def _line(bytes_: Sequence[float], us: Sequence[float]) -> tuple[float, float] | None:
    """(microseconds of a call, microseconds a byte) by least squares; None if the sizes are too similar."""
    if len(bytes_) < 2 or max(bytes_) < 2 * min(bytes_):
        return None
    slope, call = np.polyfit(bytes_, us, 1, w=1 / np.array(us))
    return (float(call), float(slope)) if slope > 0 and call > 0 else None


def _over_table(artifact: Artifact, operators: Operators, us: float, terms: Terms) -> float | None:
    """Time of a graph's products over the compiler's table. None for few rows, or if memory bounds them."""
    if artifact.rows < 16 or not artifact.cycles["npu"]:
        return None
    beside = estimate.operators_ms(operators, artifact.rows, terms, "central")
    beside += estimate.port_ms(operators.ports, artifact.rows, terms, "central")[0]
    products = us - terms["c_call"].central - 1e3 * beside
    reading = 1e-3 * artifact.cycles["ddr"] * rk3588.NPU_TABLE_GB_PER_S / terms["npu_read_lpddr5"].central
    return products / (1e-3 * artifact.cycles["npu"]) if products > COMPUTE_BOUND * reading else None


def _cpu_terms(spec: Spec, cpu: Mapping[str, float], precision: str) -> dict[str, float]:
    name = "fp16" if precision == "fp32" else precision
    cycles = CPU_CORES * CPU_HZ
    rate = estimate.weight_bytes(spec, precision)["projections"] / cpu["decode_products_s"] / 1e9
    terms = {f"cpu_read_{dram.lower()}": rate for dram in DRAMS}
    terms[f"prefill_{name}"] = estimate.weights(spec)["projections"] / cpu["prefill_products_s"] / cycles
    recurrence = cpu["prefill_recurrence_s"] * cycles / spec.L
    if spec.generation == "4":
        return terms | {"recurrence_v4": recurrence / spec.A}
    version = "v7" if spec.generation in ("7", "7a") else "v56"
    return terms | {f"recurrence_{version}": recurrence / (spec.H * (spec.N / 64) ** 2)}


# -- the report ------------------------------------------------------------------------------------------


def page(report: Mapping[str, Any]) -> str:
    """A report in Markdown: the sentence to paste, terms, calls, passes, and the board's facts."""
    board = report["board"]
    lines = ["# Board report", "", sentence(report), "", "## Terms of the estimates", ""]
    lines += ["| term | measured | estimate | from, to | unit |", "|---|---|---|---|---|"]
    for name, term in report["terms"].items():
        own = f"{_figure(term['low'])}, {_figure(term['high'])}"
        lines.append(
            f"| {name} | {_figure(term['measured'])} | {_figure(term['central'])} | {own} | {term['unit']} |"
        )
    lines += ["", "## Calls", "", "| group | rows | call us | NPU us | calls |", "|---|---|---|---|---|"]
    for row in report["calls"]:
        lines.append(
            f"| {row['group']} | {row['rows']} | {row['us']:.0f} | {row['npu_us']:.0f} | {row['calls']} |"
        )
    lines += ["", "## Passes", "", "| what | t/s | estimate t/s |", "|---|---|---|"]
    for row in report["passes"]:
        lines.append(f"| {row['what']} | {_figure(row['tokens_per_s'])} | {_figure(row['estimate'])} |")
    cores = ", ".join(f"{count}: {_figure(rate)}" for count, rate in report["cores"].items())
    refused = f" More are refused: {report['cores_refused']}." if report["cores_refused"] else ""
    lines += ["", f"Calls a second by number of cores: {cores}.{refused}", "", "## Board", ""]
    lines += [f"- {name}: {value}" for name, value in board.items() if value is not None]
    return "\n".join(lines) + "\n"


def sentence(report: Mapping[str, Any]) -> str:
    """One sentence for an issue."""
    board, passes = report["board"], {row["what"]: row for row in report["passes"]}
    prompt, tokens = passes[f"prompt of {PROMPTS[0]}"], passes["tokens"]
    where = f"{board['name'] or board['chip']}, librknnrt {board['runtime']}, driver {board['driver']}"
    return (
        f"{where}: {board['model']} in {board['precision']} reads "
        f"{_figure(prompt['tokens_per_s'])} t/s (estimate {_figure(prompt['estimate'])}) and writes "
        f"{_figure(tokens['tokens_per_s'])} t/s (estimate {_figure(tokens['estimate'])}); logits deviate from the "
        f"CPU's by {prompt['error']:.2g} standard deviations."
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def read_terms(path: str | os.PathLike[str]) -> Terms:
    """The terms of the estimates, with those of a saved report in place of the published ones.

    Raises UsageError for a file that is not a report, is damaged, or is of another chip.
    """
    advice = "rwkv-npu bench board writes one"
    try:
        report = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the board report {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a board report: {advice}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise UsageError(f"{path} is not a board report: {advice}")
    if report.get("version") != VERSION:
        raise UsageError(
            f"{path} is a board report of version {report.get('version')!r}, not {VERSION}: {advice}"
        )
    try:
        chip, values = (
            report["board"]["chip"],
            {name: term["measured"] for name, term in report["terms"].items()},
        )
        runtime = report["board"]["runtime"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the board report {path} is damaged: {advice}") from error
    if chip != rk3588.NAME:
        raise UsageError(f"{path} is the report of an {chip}: estimates are for the {rk3588.NAME}")
    for name, value in values.items():
        good = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and value > 0
        )
        if name not in TERMS or not good:
            raise UsageError(f"the board report {path} is damaged at {str(name)[:40]!r}: {advice}")
    return TERMS.measured(values, f"measured on a board, librknnrt {str(runtime)[:60]}")
