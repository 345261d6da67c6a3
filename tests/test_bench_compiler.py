"""`rwkv-npu bench matmul`: the rows of Rockchip's compiler on a PC, which are estimates."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import pytest

from rwkv_npu import toolkit
from rwkv_npu.bench.child import Failed
from rwkv_npu.bench.document import ProductRow
from rwkv_npu.bench.matmul import EstimatedNpu, Series
from tests.tiny import run_main

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("toolkit_environment")]


@pytest.fixture(autouse=True)
def same_compiler(toolkit_environment: toolkit.Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_npu.bench.matmul.require", lambda: toolkit_environment)


def row(dtype: str, *shape: int) -> ProductRow:
    m, k, n = shape
    return EstimatedNpu(Series("rknn", dtype, estimated=True)).row((m, k, n))


def model_seconds(m: int, k: int, n: int, rate: int, size: int) -> float:
    """The compiler's cost model with the terms of boards: arithmetic at 1 ns a cycle and 2.4 times as long from 16 rows
    on, or memory at 11.1 GB/s; a call of 150 us, 2 ns an element converted and, of several rows, 1.6 ns transposed."""
    arithmetic = ceil(m / 16) * 16 * k * n / rate * (2.4 if m >= 16 else 1)
    memory = size * (m * k + k * n + m * n) / 11.1
    elements = m * (k + n)
    return (max(arithmetic, memory) + 150_000 + elements * (2 + 1.6 * (m > 1))) * 1e-9


@pytest.mark.parametrize(
    ("dtype", "rate", "size", "worst"),
    [("fp16", 512, 2, 1e-3), ("bf16", 512, 2, 1e-2), ("int8", 1024, 1, 5e-2)],
)
def test_an_estimate_has_time_range_error_and_tiles(dtype: str, rate: int, size: int, worst: float) -> None:
    found = row(dtype, 256, 256, 256)
    assert found.estimated and "estimate" in found.device and found.series.endswith("(estimate)")
    assert found.time_s == pytest.approx(model_seconds(256, 256, 256, rate, size), rel=0.02)
    assert found.time_p10_s is not None and found.time_p90_s is not None
    assert found.time_p10_s < found.time_s < found.time_p90_s
    assert found.max_rel_error is not None and 1e-5 < found.max_rel_error < worst
    assert (found.repeats, found.npu_ops, found.flags) == (0, 1, "")
    assert found.versions == f"rknn-toolkit2 {toolkit.DEFAULT_VERSION}" and found.threads is None


def test_one_row_is_bound_by_memory() -> None:
    found = row("fp16", 1, 768, 768)
    assert found.time_s == pytest.approx(model_seconds(1, 768, 768, 512, 2), rel=0.02)
    assert found.time_s == pytest.approx(106e-6 + 150e-6 + 3e-6, rel=0.02)


def test_wide_sums_are_cut_into_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest compiler cuts them; 2.3.2 does not."""
    newest = toolkit.find(toolkit.VERSIONS[0])
    if newest is None:
        pytest.skip(f"rwkv-npu toolkit install --version {toolkit.VERSIONS[0]} installs it")
    assert row("fp16", 16, 2048, 64).npu_ops == 1
    monkeypatch.setattr("rwkv_npu.bench.matmul.require", lambda: newest)
    assert row("fp16", 16, 2048, 64).npu_ops != 1


def test_layers_on_the_cpu_are_flagged() -> None:
    assert row("fp16", 16, 63, 63).flags == "cpu-fallback"


def test_a_product_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_npu.bench.backends.plain_graph", lambda problem: b"no graph")
    with pytest.raises(Failed, match="cannot be compiled for rk3588"):
        row("fp16", 16, 16, 16)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["bench", "matmul", "--sizes", "32,64", "--backends", "rknn", "--resume", tmp_path / "rows.json"]
    status, out, _ = run_main(capsys, *common, "-o", "json")
    assert status == 0 and [found["estimated"] for found in json.loads(out)["results"]] == [True, True]
    status, out, _ = run_main(capsys, *common)
    assert status == 0 and "### rknn fp16 (estimate)" in out and "~ An estimate, not a measurement" in out
    assert "\n|32" in out and "\n|64" in out
