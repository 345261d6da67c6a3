"""Bundles that the native stand-in for librknnrt runs, and the process that computes for it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_rknnlite import fake_bundle
from tests.tiny import write_model
from tools.board.compute import Bundles, Server


def native_bundle(folder: Path) -> Path:
    """A bundle of a tiny RWKV-7 with artifacts of both fusions, without Rockchip's compiler."""
    spec = write_model(folder / "model.pth", "7")
    with pytest.MonkeyPatch.context() as patch:
        for fusion in ("layer", "projection"):
            made = fake_bundle(patch, folder / "model.pth", spec, fusion=fusion)
    return made


@contextlib.contextmanager
def computing(bundle: Path) -> Iterator[Path]:
    """The socket where the groups of a bundle are computed in fp16."""
    with tempfile.TemporaryDirectory(prefix="rwkv_npu-") as folder:  # a socket's name is short
        path = Path(folder) / "socket"
        with Server(path, Bundles([bundle])):
            yield path


def variables(**values: object) -> dict[str, str]:
    """Environment variables of the stand-in: `faults="zeros"` is RKNN_STANDIN_FAULTS."""
    return {f"RKNN_STANDIN_{name.upper()}": str(value) for name, value in values.items()}
