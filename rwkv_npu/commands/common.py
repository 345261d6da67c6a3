"""What several commands need: loading the model that the flags name, reading text, printing sizes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rwkv_npu.errors import UsageError
from rwkv_npu.model import Model, load


def load_model(arguments: argparse.Namespace, *, verbose: bool = False) -> Model:
    """The model of the flags that `cli._add_model` adds."""
    begin = time.perf_counter()
    if arguments.model is None:
        print("no --model given: using the demo model that ships with rwkv-npu", file=sys.stderr)
    model = load(
        arguments.model,
        backend=arguments.backend,
        precision=arguments.precision,
        fusion=arguments.fusion,
        plan=arguments.plan,
        tokenizer=arguments.tokenizer,
        threads=arguments.threads,
        npu_cores=arguments.npu_cores,
    )
    if verbose:
        spec, seconds = model.spec, time.perf_counter() - begin
        print(
            f"RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters, {model.describe()}, "
            f"opened in {seconds:.2f} s",
            file=sys.stderr,
        )
        print(f"backend: {model.reason}", file=sys.stderr)
    return model


def read_text(path: str) -> str:
    """A UTF-8 file, or stdin for `-`. Raises UsageError."""
    name = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def size(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
