"""`rwkv-npu bench ACTION`: results to stdout, progress and everything else to stderr."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import use_big_cores
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.files import resume_file

if TYPE_CHECKING:
    from rwkv_npu.bench import matmul, record


def add(commands: Any) -> None:
    p = commands.add_parser("bench", help="measure this machine, and compare it with the NPU")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_bench_matmul(actions)
    _add_bench_inference(actions)
    p.set_defaults(run=run)


def _add_bench_matmul(actions: Any) -> None:
    p = actions.add_parser(
        "matmul",
        help="time matrix products",
        description="Time C (M, N) = A (M, K) @ B (K, N), B constant, on everything that multiplies here. On a PC the "
        "rknn rows are estimates by Rockchip's compiler, and are marked so.",
    )
    what = "what to multiply (default: --sizes 128:4096:128)"
    p.add_argument("--sizes", metavar="LIST", help=f"{what}: M = K = N, such as 256,512 or FIRST:LAST:STEP")
    p.add_argument("--shapes", metavar="LIST", help="MxKxN, joined by commas")
    p.add_argument(
        "--model", metavar="MODEL", help="a bundle's projections, or an official size's, such as v7-1.5b"
    )
    p.add_argument(
        "--backends",
        metavar="LIST",
        help="of numpy, torch, ort, rknn (default: these), tinygrad (CPU and OpenCL), rknn-matmul",
    )
    p.add_argument(
        "--dtypes", metavar="LIST", help="of fp32, fp16, bf16, int8, int4 (default: each backend's own)"
    )
    p.add_argument(
        "-r",
        "--repeats",
        type=int,
        metavar="N",
        help="runs at least (default: 7, and until the spread is known)",
    )
    p.add_argument("-t", "--threads", type=int, metavar="N", help="(default: one a core)")
    _add_rows(p)
    p.add_argument("--fit", action="store_true", help="fit time against N with Minuit, and print the log")
    p.add_argument(
        "--plot", metavar="FILE", help="draw FILE-time, -roofline, -bars and -fit; FILE ends in .png or .svg"
    )
    p.add_argument("--bars", metavar="LIST", help="sizes in the bar chart (default: 512,1024,2048,4096)")


def _add_bench_inference(actions: Any) -> None:
    p = actions.add_parser(
        "inference",
        help="time a model on every backend",
        description="Time prompts of 128 and 512 tokens, then 128 tokens written, on each backend in a process of its "
        "own. For a bundle with artifacts the RK3588's NPU and CPU are estimated beside it, and marked so.",
    )
    which = "bundle or checkpoint (default: the demo model); repeatable"
    p.add_argument("-m", "--model", action="append", metavar="PATH", help=which)
    p.add_argument("--backends", metavar="LIST", help="of numba, ort, torch, numpy (default: these)")
    p.add_argument(
        "-r", "--repeats", type=int, metavar="N", help="runs of each (default: 5, as far as --seconds go)"
    )
    limit = "of each stage; slow backends write fewer tokens (default: 30)"
    p.add_argument("--seconds", type=float, metavar="S", help=limit)
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of the CPU's backends")
    p.add_argument(
        "--call-overhead-us",
        type=float,
        metavar="US",
        help="estimates: what a call to the NPU costs (default: 270)",
    )
    p.add_argument(
        "--host-factor",
        type=float,
        metavar="X",
        help="estimates: how much slower the board's CPU is (default: 4)",
    )
    p.add_argument("--profile", action="store_true", help="where a token goes, by group and by function")
    _add_rows(p)
    p.add_argument("--plot", metavar="FILE", help="draw the comparison; FILE ends in .png or .svg")


def _add_rows(p: argparse.ArgumentParser) -> None:
    """What becomes of the rows of a benchmark."""
    p.add_argument("-o", "--output", default="md", choices=("md", "json", "csv"), help="(default: md)")
    p.add_argument(
        "--resume",
        metavar="FILE",
        help="keep every row in this JSON file, and measure only what it does not hold",
    )
    p.add_argument(
        "--redo", action="store_true", help="with --resume: measure rows flagged busy or throttled again"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "matmul":
        return _matmul(arguments)
    use_big_cores(arguments.threads)  # as generate does
    module = importlib.import_module(f"rwkv_npu.bench.{arguments.action}")
    status: int = module.run(arguments)
    return status


def _matmul(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rwkv_npu.bench import fit, matmul, plot, shapes

    picture = Path(arguments.plot) if arguments.plot else None
    file = resume_file(arguments.resume)
    bars = [m for m, _, _ in shapes.parse_sizes(arguments.bars, "--bars")] if arguments.bars else []
    if picture:
        plot.check(picture)
    if arguments.fit:
        fit.check_installed()
    settings = _settings(arguments, file)
    sweep = matmul.Sweep(settings)
    interrupted = False
    try:
        with tqdm(total=sweep.total, desc="matmul", unit="size", leave=False, disable=None) as bar:
            for series, count, row in sweep.run():
                bar.set_postfix_str(f"{series.name}{f' N {row.n}' if row else ''}")
                bar.update(count)
    except KeyboardInterrupt:
        interrupted = True
        print(_kept(sweep.document, file), file=sys.stderr)
    if not sweep.document.results and not interrupted:
        raise BackendError("nothing was measured: none of these backends can run here")
    _print(sweep.document, arguments, picture, bars)
    failed = all(row.failed for row in sweep.document.results)
    return 130 if interrupted else int(failed)


def _settings(arguments: argparse.Namespace, file: Path | None) -> matmul.Settings:
    from tqdm import tqdm

    from rwkv_npu.bench import matmul, shapes
    from rwkv_npu.bench.timing import Effort

    chosen = [flag for flag in ("sizes", "shapes", "model") if getattr(arguments, flag)]
    if len(chosen) > 1:
        raise UsageError(f"give one of {' and '.join(f'--{flag}' for flag in chosen)}, not both")
    if arguments.model:
        wanted = shapes.model_shapes(arguments.model)
    elif arguments.shapes:
        wanted = shapes.parse_shapes(arguments.shapes)
    else:
        wanted = shapes.parse_sizes(arguments.sizes or shapes.DEFAULT_SIZES)
    optional = {}
    if arguments.threads is not None:
        optional["threads"] = arguments.threads
    return matmul.Settings(
        shapes=wanted,
        backends=_split(arguments.backends) or matmul.DEFAULT_BACKENDS,
        dtypes=_split(arguments.dtypes),
        effort=Effort() if arguments.repeats is None else Effort(repeats=arguments.repeats),
        file=file,
        redo=arguments.redo,
        command=_command(arguments),
        say=lambda line: tqdm.write(f"rwkv-npu: {line}", file=sys.stderr),
        **optional,
    )


def _split(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _command(arguments: argparse.Namespace) -> str:
    """What was asked to be measured, as a command line; files are left out."""
    flags = {name: getattr(arguments, name) for name in ("sizes", "shapes", "model", "backends", "dtypes")}
    flags |= {"repeats": arguments.repeats, "threads": arguments.threads}
    given = [f"--{name} {value}" for name, value in flags.items() if value is not None]
    return " ".join(["rwkv-npu bench matmul", *given])


def _kept(document: record.Document, file: Path | None) -> str:
    where = f", {file} holds them: the same command goes on from there" if file else ""
    return f"rwkv-npu: interrupted; {len(document.results)} rows were measured{where}"


def _print(
    document: record.Document, arguments: argparse.Namespace, picture: Path | None, bars: list[int]
) -> None:
    from rwkv_npu.bench import fit, plot, report

    rows = document.results
    fits = fit.fit_all(rows) if arguments.fit else []
    if arguments.fit and not fits:
        print(f"rwkv-npu: nothing to fit: a series needs {fit.FEWEST} square sizes", file=sys.stderr)
    if arguments.output == "json":
        more = {"fits": [one.to_json() for one in fits]} if fits else {}
        print(document.to_json(**more), end="")
    elif arguments.output == "csv":
        print(report.as_csv(rows), end="")
    else:
        print(report.table(document))
    if fits:
        log = report.fit_log(fits)
        if arguments.output == "md":
            print(f"\n{log}")
        else:
            print(log, file=sys.stderr)
    if picture:
        if arguments.fit or not _can_fit():
            drawn = fits
        else:
            drawn = fit.fit_all(rows)
        for path in plot.draw(document, picture, drawn, bars):
            print(f"rwkv-npu: {path}", file=sys.stderr)


def _can_fit() -> bool:
    from rwkv_npu.bench import fit

    try:
        fit.check_installed()
    except UsageError:
        return False
    return True
