"""What the chip is estimated to take: terms, rates, and estimates beside what was measured, always marked."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.bench import inference_plot, inference_study
from rwkv_npu.bench.inference_estimate import estimates
from rwkv_npu.bench.inference_record import PARTS, Document, Row
from rwkv_npu.bench.inference_study import open_subject
from rwkv_npu.formats.bundle import MANIFEST, read_manifest
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import Group, tensors
from rwkv_npu.quant.cpu import PRECISIONS, bits_of, pack
from rwkv_npu.runtime import estimate
from rwkv_npu.runtime.estimate import Assumptions, Rate
from rwkv_npu.runtime.weights import CheckpointSource
from tests.bench_inference import QUICK, L, artifacts, run_json
from tests.faulty import plain_engine
from tests.tiny import run_main, write_model


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With artifacts in its manifest that nobody compiled: nothing here opens them."""
    path = rwkv_npu.convert(checkpoint, tmp_path_factory.mktemp("bundle") / "tiny.rwkv", target="none")
    manifest = replace(read_manifest(path), artifacts=artifacts(total=2_000_000, ddr=1_800_000, npu=40_000))
    (path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return path


# -- terms -----------------------------------------------------------------------------------------------


class FixedRows(NumpyBackend):
    def row_counts(self, group: Group) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) if group.role == "head" else (1, 16)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18, 32, 40])
def test_an_estimate_counts_the_calls_that_the_engine_makes(checkpoint: Path, tokens: int) -> None:
    source = CheckpointSource(open_checkpoint(checkpoint))
    engine = plain_engine(source, FixedRows(source))
    engine.forward([1] * tokens)
    found = estimate.on_npu(source.spec, artifacts(rows=(1, 16)), tokens, estimate.TABLE, Assumptions(), {})
    assert found.npu_calls == engine.counters.calls


def test_the_terms_of_one_core(checkpoint: Path) -> None:
    spec = open_checkpoint(checkpoint).spec
    host = {"recurrence": 0.5, "sampling": 0.25}
    token = estimate.on_npu(spec, artifacts(), 1, estimate.TABLE, Assumptions(100.0, 3.0), host)
    assert token.ms == pytest.approx(
        {"projections": 3 * 1100e-6, "head": 1100e-6, "calls": 0.4, "recurrence": 1.5, "sampling": 0.75}
    )
    assert token.total_ms == pytest.approx(sum(token.ms.values()))
    prompt = estimate.on_npu(spec, artifacts(), 128, estimate.TABLE, Assumptions(100.0, 3.0), host)
    assert prompt.npu_calls == 2 * 3 + 1 and prompt.ms["projections"] == pytest.approx(2 * 3 * 7400e-6)
    assert estimate.estimate_ms(artifacts(), 128) == pytest.approx(2 * 3 * 7400e-6 + 1100e-6)
    assert estimate.estimate_ms(artifacts(), 65) == pytest.approx(3 * (7400e-6 + 1100e-6) + 1100e-6)


def test_the_rates_of_boards(checkpoint: Path) -> None:
    """Memory at the rate's bandwidth, products shared out: the slower of both counts."""
    spec = open_checkpoint(checkpoint).spec
    slow, three = Rate("", 1, estimate.TABLE_GB_PER_S / 10, ""), Rate("", 3, estimate.TABLE_GB_PER_S, "")
    some = artifacts(ddr=600, npu=1200)
    memory_bound = estimate.on_npu(spec, some, 1, slow, Assumptions(), {})
    assert memory_bound.ms["head"] == pytest.approx(6000e-6)
    assert memory_bound.npu_calls == L + 2
    divided = estimate.on_npu(spec, some, 1, three, Assumptions(), {})
    assert divided.ms["head"] == pytest.approx(600e-6)
    assert divided.npu_calls == 3 * L + 1  # a fused group cannot be split by N
    assert estimate.on_npu(spec, some, 128, three, Assumptions(), {}).npu_calls == 2 * 3 * L + 1


@pytest.mark.parametrize("generation", ["4", "6", "7"])
def test_the_weights_that_a_token_reads(tmp_path: Path, generation: str) -> None:
    spec = write_model(tmp_path / "model.pth", generation)
    opened = open_checkpoint(tmp_path / "model.pth")
    used = [t.name for t in tensors(spec) if t.kind.is_projection and not t.optional]
    count = estimate.weights(spec)
    assert sum(count.values()) == sum(opened.tensor(name).size for name in used)
    assert count["head"] == spec.V * spec.D
    one, many = (estimate.on_cpu(spec, "fp16", tokens, Assumptions(), {}) for tokens in (1, 1000))
    assert one.ms["head"] == many.ms["head"] == pytest.approx(2 * count["head"] / estimate.CPU_GB_PER_S / 1e6)
    assert many.ms["projections"] == pytest.approx(2000 * count["projections"] / estimate.CPU_GFLOPS / 1e6)
    for precision in PRECISIONS:
        packed = 0
        for tensor in (t for t in tensors(spec) if t.name in used):
            *stack, k, n = tensor.used_shape
            packed += prod(stack) * pack(np.zeros((k, n)), bits_of(precision, tensor)).nbytes
        assert sum(estimate.weight_bytes(spec, precision).values()) == packed


# -- beside what was measured ----------------------------------------------------------------------------


def test_estimates_stand_beside_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference_study, "roofline", lambda threads: {"bandwidth_gb_per_s": 10.0 * threads})
    file, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    flags = ("-m", bundle, "--backends", "numpy", "--resume", file, *QUICK)
    rows = run_json(capsys, *flags, "--call-overhead-us", "50", "--host-factor", "2")["results"]
    measured, cpu, cpu_int8, cpu_int4, *npu = rows
    assert [row["estimated"] for row in rows] == [False] + 6 * [True]
    assert measured["weights"] == measured["stored"] == "fp16" and not measured["basis"]
    assert [row["weights"] for row in (cpu, cpu_int8, cpu_int4)] == ["fp16", "int8", "int4"]
    assert cpu["decode_tps"] < cpu_int8["decode_tps"] < cpu_int4["decode_tps"]
    assert cpu["device"].startswith("RK3588 CPU") and [row["terms"]["cores"] for row in npu] == [1, 1, 3]
    host = sum(measured["decode_ms"][name] for name in ("recurrence", "sampling", "dispatch", "rest"))
    one = npu[0]
    assert one["decode_ms"]["projections"] == pytest.approx(6.0) and one["decode_ms"][
        "head"
    ] == pytest.approx(2.0)
    assert one["decode_ms"]["calls"] == pytest.approx(4 * 0.05) and one["calls_per_token"] == L + 2
    assert one["terms"]["decode_host_ms_here"] == pytest.approx(host)
    assert 1e3 / one["decode_tps"] == pytest.approx(8.2 + 2 * host)
    assert npu[1]["decode_ms"]["head"] == pytest.approx(1.8 * estimate.TABLE_GB_PER_S / 10.9)
    for row in rows[1:]:
        assert row["basis"] and row["bandwidth_share"] is None and row["load_s"] is None
        assert sum(row["decode_ms"].values()) == pytest.approx(1e3 / row["decode_tps"])
        assert row["prefill_512_tps"] and row["first_token_s"] > 128 / row["prefill_128_tps"]

    # The same file, shown again with other assumptions: nothing is measured anew.
    status, out, err = run_main(
        capsys, "bench", "inference", *flags, "--host-factor", "20", "--plot", picture
    )
    assert status == 0 and "reading" not in err and Document.load(file).results[0] == Row(**measured)
    told = 0
    for line in out.splitlines():
        if line.startswith(("| rknn", "| cpu")):
            assert "(estimate)" in line and "~" in line
            told += 1
        elif line.startswith("| numpy"):
            assert "~" not in line and "estimate" not in line
    assert told == 3 * 6 and "two to three times as long" in out
    assert f"({4} x 270 us)" in out and "here x 20)" in out and "10.9 GB/s" in out and "30.9 GB/s" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_of_other_chips_only_the_table_is_known(checkpoint: Path) -> None:
    subject = open_subject(checkpoint)
    found = estimates(subject.spec, artifacts("rk3576"), [], Assumptions(), subject.row)
    assert [row.device for row in found] == ["RK3576 NPU, 1 core, compiler's table"]
    assert "nothing was measured" in found[0].basis and set(found[0].decode_ms) == {
        "projections",
        "head",
        "calls",
    }
    bare = [replace(one, cycles={}) for one in artifacts()]
    assert [row.backend for row in estimates(subject.spec, bare, [], Assumptions(), subject.row)] == 3 * [
        "cpu"
    ]


def test_what_is_estimated_is_hatched(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subject = open_subject(checkpoint)
    ms = dict.fromkeys(PARTS, 1.0)
    row = subject.row("ort", weights="fp32", decode_ms=ms, prefill_128_ms=ms, prefill_512_ms=ms)
    row.update({"decode_tps": 166.0, "prefill_128_tps": 1000.0})
    failed = subject.row("torch", failed="no")
    rows = [row, failed, *estimates(subject.spec, artifacts(), [row], Assumptions(), subject.row)]
    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    for suffix in ("png", "svg"):
        inference_plot.draw(Document({"cpu": "x", "cores": 2}, results=rows), tmp_path / f"x.{suffix}")
        assert (tmp_path / f"x.{suffix}").stat().st_size > 1000
    monkeypatch.undo()
    for axes in shown[0].axes:
        labels = [label.get_text() for label in shown[0].axes[0].get_yticklabels()]
        assert ["estimate" in label for label in labels] == [False] + 6 * [True]
        for patch in axes.patches:
            place = round(patch.get_y() + patch.get_height() / 2)
            assert bool(patch.get_hatch()) == (place > 0)
        assert {round(p.get_y() + p.get_height() / 2) for p in axes.patches} == set(range(7))
        texts = [text.get_text().strip() for text in axes.texts if text.get_text().strip()[-1:].isdigit()]
        assert [text.startswith("~") for text in texts] == [False] + 6 * [True]
    for figure in shown:
        pyplot.close(figure)
