"""Runs of `rwkv-npu bench inference` on a tiny model, and invented artifacts of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rwkv_npu.formats.bundle import Artifact
from tests.tiny import run_main

L = 2

QUICK = ("-r", "1", "--seconds", "1")


def artifact(group: str, rows: int, target: str = "rk3588", **cycles: int) -> Artifact:
    cycles = {"ddr": 900, "npu": 300 * rows, "total": 1000 + 100 * rows} | cycles
    path = f"rknn/{target}/{group}.m{rows}.rknn"
    return Artifact(path, group, target, "fp16", "layer", rows, weight_bytes=5000, cycles=cycles)


def artifacts(target: str = "rk3588", rows: tuple[int, ...] = (1, 64), **options: int) -> list[Artifact]:
    names = ["first", *(f"mid.{i}" for i in range(L - 1)), "last"]
    found = [artifact(name, count, target, **options) for name in names for count in rows]
    return [*found, artifact("head", 1, target, **options)]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run_main(capsys, "bench", "inference", *arguments, "-o", "json")
    assert status == 0, err
    return json.loads(out)
