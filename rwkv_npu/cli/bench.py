"""`rwkv-npu bench ACTION`: results to stdout, progress and everything else to stderr."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from tqdm import tqdm

from rwkv_npu.bench import fit, matmul, plot, record, report, shapes
from rwkv_npu.bench.timing import Effort
from rwkv_npu.cli.common import use_big_cores
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.files import resume_file


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "matmul":
        return _matmul(arguments)
    use_big_cores(arguments.threads)  # as generate does
    module = importlib.import_module(f"rwkv_npu.bench.{arguments.action}")
    status: int = module.run(arguments)
    return status


def _matmul(arguments: argparse.Namespace) -> int:
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
    try:
        fit.check_installed()
    except UsageError:
        return False
    return True
