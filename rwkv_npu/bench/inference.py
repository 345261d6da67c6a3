"""`rwkv-npu bench inference`: how fast a model reads and writes here, and what the NPU would buy.

The command. inference_study.py finds the rows (inference_child.py measures, estimate.py adds up what is estimated),
inference_record.py keeps them, inference_report.py and inference_plot.py show them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from rwkv_npu.bench import inference_plot, inference_report
from rwkv_npu.bench.inference_record import Document
from rwkv_npu.bench.inference_study import DEFAULT_BACKENDS, Settings, Study
from rwkv_npu.formats.files import resume_file
from rwkv_npu.model import demo_model
from rwkv_npu.runtime import estimate


def run(arguments: argparse.Namespace) -> int:
    """Measure what the flags name; the table goes to stdout."""
    picture = Path(arguments.plot) if arguments.plot else None
    if picture:
        inference_plot.check(picture)
    settings = _settings(arguments)
    study = Study(settings)
    interrupted = False
    try:
        with tqdm(total=study.total, desc="inference", unit="stage", leave=False, disable=None) as bar:
            for what, done in study.run():
                bar.set_postfix_str(what)
                bar.update(done)
    except KeyboardInterrupt:
        interrupted = True
        where = f", {settings.file} holds it: the same command goes on from there" if settings.file else ""
        print(f"rwkv-npu: interrupted; what was measured is kept{where}", file=sys.stderr)
    study.add_estimates()
    _print(study.document, arguments.output)
    if picture and any(row.decode_tps for row in study.document.results):
        inference_plot.draw(study.document, picture)
    if interrupted:
        return 130
    measured = [row for row in study.document.results if not row.estimated]
    return 1 if measured and all(row.failed for row in measured) else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    if not arguments.model:
        print("no --model given: using the demo model that ships with rwkv-npu", file=sys.stderr)
    given = {
        "repeats": arguments.repeats,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
        "fusion": arguments.fusion,
        "file": resume_file(arguments.resume),
    }
    overhead, factor = arguments.call_overhead_us, arguments.host_factor
    return Settings(
        models=[Path(path) for path in arguments.model or [demo_model()]],
        backends=_split(arguments.backends) or DEFAULT_BACKENDS,
        assumptions=estimate.Assumptions(
            estimate.CALL_OVERHEAD_US if overhead is None else overhead,
            estimate.HOST_FACTOR if factor is None else factor,
        ),
        profile=arguments.profile,
        redo=arguments.redo,
        command=_command(arguments),
        say=lambda line: tqdm.write(f"rwkv-npu: {line}", file=sys.stderr),
        **{name: value for name, value in given.items() if value is not None},
    )


def _split(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _command(arguments: argparse.Namespace) -> str:
    """What was asked to be measured, as a command line; of files only the names."""
    words = ["rwkv-npu bench inference", *(f"-m {Path(path).name}" for path in arguments.model or ())]
    for name in ("backends", "repeats", "seconds", "threads", "fusion", "call_overhead_us", "host_factor"):
        if (value := getattr(arguments, name)) is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*words, *(["--profile"] if arguments.profile else [])])


def _print(document: Document, output: str) -> None:
    if output == "json":
        print(document.to_json(), end="")
    elif output == "csv":
        print(inference_report.as_csv(document.results), end="")
    else:
        print(inference_report.table(document))
