"""`rwkv-npu bench ACTION`: print results on stdout, progress and messages on stderr."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import add_board_report_flag, read_board_report, use_big_cores
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.files import resume_file, write_atomically

if TYPE_CHECKING:
    from rwkv_npu.bench import inference, matmul
    from rwkv_npu.bench.analysis import Fit
    from rwkv_npu.bench.document import Document, ProductRow


def add(commands: Any) -> None:
    p = commands.add_parser("bench", help="measure this machine, and compare it with the NPU")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_bench_matmul(actions)
    _add_bench_inference(actions)
    _add_bench_board(actions)
    p.set_defaults(run=run)


def _add_bench_matmul(actions: Any) -> None:
    p = actions.add_parser(
        "matmul",
        help="time matrix products",
        description="Time C (M, N) = A (M, K) @ B (K, N), B constant, with every backend. On a PC the rknn and "
        "rk3588-cpu rows are estimates for an RK3588. They are marked and have a range. Published board measurements "
        "are listed too.",
    )
    what = "what to multiply (default: --sizes 128:4096:128)"
    p.add_argument("--sizes", metavar="LIST", help=f"{what}: M = K = N, such as 256,512 or FIRST:LAST:STEP")
    p.add_argument("--shapes", metavar="LIST", help="MxKxN, joined by commas")
    p.add_argument(
        "--model", metavar="MODEL", help="projections of a bundle or of an official size such as v7-1.5b"
    )
    p.add_argument(
        "--backends",
        metavar="LIST",
        help="backends: numpy, torch, ort, rk3588-cpu, rknn (default: these), tinygrad (CPU and OpenCL), rknn-matmul",
    )
    p.add_argument(
        "--dtypes",
        metavar="LIST",
        help="types of the numbers: fp32, fp16, bf16, int8, int4 (default: each backend's own)",
    )
    p.add_argument(
        "-r",
        "--repeats",
        type=int,
        metavar="N",
        help="minimal number of runs (default: 7, and more until the median is known precisely)",
    )
    p.add_argument("-t", "--threads", type=int, metavar="N", help="(default: one a core)")
    _add_rows(p)
    p.add_argument("--fit", action="store_true", help="fit time against N with Minuit, and print the log")
    p.add_argument(
        "--plot",
        metavar="FILE",
        help="draw FILE-time.png, FILE-roofline.png, FILE-bars.png and FILE-fit.png for FILE.png (or .svg)",
    )
    p.add_argument("--bars", metavar="LIST", help="sizes in the bar chart (default: 512,1024,2048,4096)")


def _add_bench_inference(actions: Any) -> None:
    p = actions.add_parser(
        "inference",
        help="time a model on every backend",
        description="Time prompts of 128 and 512 tokens and the generation of 128 tokens, on each backend in its own "
        "process. For a bundle with artifacts, the RK3588's NPU and CPU are estimated too; estimates are marked.",
    )
    which = "bundle or checkpoint (default: the demo model); repeatable"
    p.add_argument("-m", "--model", action="append", metavar="PATH", help=which)
    p.add_argument("--backends", metavar="LIST", help="backends: numba, ort, torch, numpy (default: these)")
    p.add_argument(
        "-r",
        "--repeats",
        type=int,
        metavar="N",
        help="runs of each stage (default: 5, fewer if --seconds end)",
    )
    limit = "limit of each stage; slow backends generate fewer tokens (default: 30)"
    p.add_argument("--seconds", type=float, metavar="S", help=limit)
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of CPU backends")
    p.add_argument(
        "--call-overhead-us",
        type=float,
        metavar="US",
        help="estimates: microseconds of an NPU call (default: 380, range 324 to 438)",
    )
    p.add_argument(
        "--host-factor",
        type=float,
        metavar="X",
        help="estimates: use X times the times measured here for recurrence, sampling and Python (default: a table)",
    )
    p.add_argument(
        "--profile", action="store_true", help="profile the time of a token by group and by function"
    )
    add_board_report_flag(p, "estimates: ")
    _add_rows(p)
    p.add_argument("--plot", metavar="FILE", help="draw the comparison; FILE ends in .png or .svg")


def _add_bench_board(actions: Any) -> None:
    p = actions.add_parser(
        "board",
        help="measure a board in five minutes, for the estimates",
        description="Measure calls of the NPU, its cores, conversion, the CPU's kernels, prompts, tokens and batches "
        "on a board. Print a report with each term of the estimates beside its measurement. info, convert --dry-run "
        "and bench inference read the JSON file with --board-report.",
    )
    p.add_argument(
        "-m", "--model", required=True, metavar="BUNDLE", help="bundle with artifacts for this board"
    )
    p.add_argument(
        "-o",
        "--out",
        default="board-report.json",
        metavar="FILE",
        help="JSON; the page is FILE with .md (default: %(default)s)",
    )
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of CPU backends")


def _add_rows(p: argparse.ArgumentParser) -> None:
    """Add the flags for output and resuming, which both benchmarks share."""
    p.add_argument("-o", "--output", default="md", choices=("md", "json", "csv"), help="(default: md)")
    p.add_argument(
        "--resume",
        metavar="FILE",
        help="keep every row in this JSON file, and measure only what it does not hold",
    )
    p.add_argument("--explain", action="store_true", help="print every term of the estimates and its source")
    p.add_argument(
        "--redo", action="store_true", help="with --resume: measure rows flagged busy or throttled again"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "matmul":
        return _matmul(arguments)
    use_big_cores(arguments.threads)  # as generate does
    return _board(arguments) if arguments.action == "board" else _inference(arguments)


# -- matmul ----------------------------------------------------------------------------------------------


def _matmul(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rwkv_npu.bench import analysis, matmul, plot_matmul, products

    picture = Path(arguments.plot) if arguments.plot else None
    file = resume_file(arguments.resume)
    bars = [m for m, _, _ in products.parse_sizes(arguments.bars, "--bars")] if arguments.bars else []
    if picture:
        plot_matmul.check_matmul(picture)
    if arguments.fit:
        analysis.check_installed()
    sweep = matmul.Sweep(_matmul_settings(arguments, file))
    interrupted = False
    try:
        with tqdm(total=sweep.total, desc="matmul", unit="size", leave=False, disable=None) as bar:
            for series, count, row in sweep.run():
                bar.set_postfix_str(f"{series.name}{f' N {row.n}' if row else ''}")
                bar.update(count)
    except KeyboardInterrupt:
        interrupted = True
        _log(_kept(f"{len(sweep.document.results)} rows were measured", file))
    if not sweep.document.results and not interrupted:
        raise BackendError("nothing was measured: none of these backends can run here")
    fits = _print_matmul(sweep.document, arguments)
    if picture:
        if not fits and _can_fit():
            fits = analysis.fit_all(sweep.document.results)
        _print_pictures(plot_matmul.draw_matmul(sweep.document, picture, fits, bars), arguments.output)
    failed = all(row.failed for row in sweep.document.results)
    return 130 if interrupted else int(failed)


def _matmul_settings(arguments: argparse.Namespace, file: Path | None) -> matmul.Settings:
    from rwkv_npu.bench import matmul, products

    chosen = [flag for flag in ("sizes", "shapes", "model") if getattr(arguments, flag)]
    if len(chosen) > 1:
        raise UsageError(f"give one of {' and '.join(f'--{flag}' for flag in chosen)}, not both")
    if arguments.model:
        wanted = products.model_shapes(arguments.model)
    elif arguments.shapes:
        wanted = products.parse_shapes(arguments.shapes)
    else:
        wanted = products.parse_sizes(arguments.sizes or products.DEFAULT_SIZES)
    optional = {}
    if arguments.threads is not None:
        optional["threads"] = arguments.threads
    repeats = arguments.repeats
    return matmul.Settings(
        shapes=wanted,
        backends=_split(arguments.backends) or matmul.DEFAULT_BACKENDS,
        dtypes=_split(arguments.dtypes),
        effort=products.Effort() if repeats is None else products.Effort(repeats=repeats),
        file=file,
        redo=arguments.redo,
        command=_matmul_command(arguments),
        log=_log,
        **optional,
    )


def _matmul_command(arguments: argparse.Namespace) -> str:
    """The command line, without file names. The document records it."""
    flags = {name: getattr(arguments, name) for name in ("sizes", "shapes", "model", "backends", "dtypes")}
    flags |= {"repeats": arguments.repeats, "threads": arguments.threads}
    given = [f"--{name} {value}" for name, value in flags.items() if value is not None]
    return " ".join(["rwkv-npu bench matmul", *given])


def _print_matmul(document: Document[ProductRow], arguments: argparse.Namespace) -> list[Fit]:
    """Print rows and fits. Returns the fits of --fit."""
    from rwkv_npu.bench import analysis, report

    rows = document.results
    fits = analysis.fit_all(rows) if arguments.fit else []
    if arguments.fit and not fits:
        _log(f"nothing to fit: a series needs {analysis.FEWEST} square sizes")
    if arguments.output == "json":
        extra = {"fits": [fit.to_json() for fit in fits]} if fits else {}
        print(document.to_json(**extra), end="")
    elif arguments.output == "csv":
        print(report.product_csv(rows), end="")
    else:
        print(report.product_table(document, explained=arguments.explain))
    if fits and arguments.output == "md":
        print(f"\n{report.fit_log(fits)}")
    elif fits:
        print(report.fit_log(fits), file=sys.stderr)
    return fits


def _can_fit() -> bool:
    from rwkv_npu.bench import analysis

    try:
        analysis.check_installed()
    except UsageError:
        return False
    return True


# -- inference -------------------------------------------------------------------------------------------


def _inference(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rwkv_npu.bench import plot, plot_inference, report
    from rwkv_npu.bench.inference import Study

    picture = Path(arguments.plot) if arguments.plot else None
    if picture:
        plot.check(picture)
    settings = _inference_settings(arguments)
    study = Study(settings)
    interrupted = False
    try:
        with tqdm(total=study.total, desc="inference", unit="stage", leave=False, disable=None) as bar:
            for work, done in study.run():
                bar.set_postfix_str(work)
                bar.update(done)
    except KeyboardInterrupt:
        interrupted = True
        _log(_kept("the measured rows are kept", settings.file))
    study.add_estimates()
    document = study.document
    if arguments.output == "json":
        print(document.to_json(), end="")
    elif arguments.output == "csv":
        print(report.model_csv(document.results), end="")
    else:
        print(report.model_table(document, explained=arguments.explain))
    if picture and any(row.decode_tps for row in document.results):
        _print_pictures(plot_inference.draw_inference(document, picture), arguments.output)
    if interrupted:
        return 130
    measured = [row for row in document.results if not row.estimated]
    return 1 if measured and all(row.failed for row in measured) else 0


def _inference_settings(arguments: argparse.Namespace) -> inference.Settings:
    from rwkv_npu.bench import inference
    from rwkv_npu.model import demo_model

    if not arguments.model:
        print("no --model given: using the demo model that ships with rwkv-npu", file=sys.stderr)
    given = {
        "repeats": arguments.repeats,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
        "fusion": arguments.fusion,
        "file": resume_file(arguments.resume),
    }
    return inference.Settings(
        models=[Path(path) for path in arguments.model or [demo_model()]],
        backends=_split(arguments.backends) or inference.DEFAULT_BACKENDS,
        assumptions=inference.Assumptions(
            arguments.call_overhead_us, arguments.host_factor, read_board_report(arguments)
        ),
        profile=arguments.profile,
        redo=arguments.redo,
        command=_inference_command(arguments),
        log=_log,
        **{name: value for name, value in given.items() if value is not None},
    )


def _inference_command(arguments: argparse.Namespace) -> str:
    """The command line, with file names in place of paths. The document records it."""
    words = [
        "rwkv-npu bench inference",
        *(f"-m {shlex.quote(Path(path).name)}" for path in arguments.model or ()),
    ]
    for name in ("backends", "repeats", "seconds", "threads", "fusion", "call_overhead_us", "host_factor"):
        if (value := getattr(arguments, name)) is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    if arguments.board_report:
        words.append(f"--board-report {shlex.quote(Path(arguments.board_report).name)}")
    return " ".join([*words, *(["--profile"] if arguments.profile else [])])


# -- board -----------------------------------------------------------------------------------------------


def _board(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rwkv_npu.bench import board

    file = Path(arguments.out)
    resume_file(arguments.out)  # checked before minutes of measuring
    with tqdm(desc="board", unit="step", leave=False, disable=None) as bar:

        def progress(step: str) -> None:
            bar.set_postfix_str(step)
            bar.update()

        report = board.measure(Path(arguments.model), progress, arguments.threads)
    page = board.page(report)
    write_atomically(file, json.dumps(report, indent=1).encode())
    write_atomically(file.with_suffix(".md"), page.encode())
    print(page, end="")
    _log(f"saved to {file} and {file.with_suffix('.md')}: attach both to an issue")
    return 0


# -- all --------------------------------------------------------------------------------------------------


def _log(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"rwkv-npu: {line}", file=sys.stderr)


def _split(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _kept(what: str, file: Path | None) -> str:
    where = f", {file} holds them: the same command continues" if file else ""
    return f"interrupted; {what}{where}"


def _print_pictures(paths: Sequence[Path], output: str) -> None:
    """Print the paths of the pictures: after a table on stdout, but on stderr if stdout holds JSON or CSV."""
    line = f"pictures: {' '.join(map(str, paths))}" if paths else "no pictures: no row has a time"
    if output == "md":
        print(f"\n{line}")
    else:
        _log(line)
