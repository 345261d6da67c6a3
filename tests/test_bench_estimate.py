"""Estimates for an RK3588: terms, sums of terms with their ranges, and estimated rows beside measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.bench import inference, plot_inference, report
from rwkv_npu.bench.document import MEASURED_PARTS, Document, ModelRow
from rwkv_npu.bench.inference import Assumptions, estimates, open_subject
from rwkv_npu.cli import info
from rwkv_npu.formats.bundle import MANIFEST, read_manifest, record_file
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.official import official_spec
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Group, groups, tensors
from rwkv_npu.quant.cpu import PRECISIONS, bits_of, pack
from rwkv_npu.runtime import estimate, rk3588
from rwkv_npu.runtime.operators import count_operators
from rwkv_npu.runtime.rk3588 import TERMS
from rwkv_npu.runtime.schedule import schedule_ms
from rwkv_npu.runtime.weights import CheckpointSource
from tests.bench_inference import QUICK, L, artifacts, run_json
from tests.faulty import plain_engine
from tests.tiny import run_main, write_model

LP5, LP4X = rk3588.DRAMS


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose artifacts of both fusions are empty files. Nothing here opens them."""
    path = rwkv_npu.convert(checkpoint, tmp_path_factory.mktemp("bundle") / "tiny.rwkv", target="none")
    manifest = read_manifest(path)
    layer = artifacts(total=2_000_000, ddr=1_800_000, npu=40_000)
    parts = [
        replace(layer[0], group=group.name, fusion="projection", path=f"{group.name}.m{rows}", rows=rows)
        for group in groups(manifest.spec, "projection")
        for rows in ((1,) if group.role == "head" else (1, 64))
    ]
    manifest = replace(manifest, artifacts=[*layer, *(replace(a, precision="w8a8") for a in parts)])
    for artifact in manifest.artifacts:
        (path / artifact.path).parent.mkdir(parents=True, exist_ok=True)
        (path / artifact.path).write_bytes(b"")
        manifest.files[artifact.path] = record_file(path / artifact.path)
    (path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return path


# -- terms -----------------------------------------------------------------------------------------------


def test_every_term_has_a_range_and_a_source() -> None:
    for term in TERMS.values():
        assert 0 < term.low <= term.central <= term.high and term.unit
        assert len(term.source) > 10 and "shared" not in term.source, term.source
        times = [1 / term.at(b) if term.is_rate else term.at(b) for b in rk3588.BOUNDS]
        assert times == sorted(times), term.name
    text = estimate.explain()
    assert all(any(line.startswith(f"{name}: ") for line in text) for name in TERMS)


def test_a_measured_term_replaces_its_range() -> None:
    mine = TERMS.measured({"npu_call": 92.0}, "my board")
    assert {mine["npu_call"].at(bound) for bound in rk3588.BOUNDS} == {92.0}
    assert mine["npu_call"].source == "my board" and TERMS["npu_call"].central == 380
    assert mine["c_call"] == TERMS["c_call"]
    with pytest.raises(KeyError):
        TERMS.measured({"luck": 1.0}, "my board")


class FixedRows(NumpyBackend):
    def row_counts(self, group: Group) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) if group.role == "head" else (1, 16)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18, 32, 40])
def test_an_estimate_counts_the_calls_that_the_engine_makes(checkpoint: Path, tokens: int) -> None:
    source = CheckpointSource(open_checkpoint(checkpoint))
    engine = plain_engine(source, FixedRows(source))
    engine.forward([1] * tokens)
    found = estimate.on_npu(source.spec, artifacts(rows=(1, 16)), tokens, LP5)
    assert found.npu_calls == engine.counters.calls


@pytest.mark.parametrize("generation", GENERATIONS)
def test_operators_are_those_of_the_graph(tmp_path: Path, generation: str) -> None:
    """The counts equal the nodes that the tracer records besides products, and the elements that these write."""
    from rwkv_npu.graphs.trace import trace_group
    from rwkv_npu.models.network import Program

    spec = write_model(tmp_path / "m" / "model.pth", generation, L=3)
    for fusion in FUSIONS:
        program, counted = Program(spec, fusion), count_operators(spec, fusion, 64)
        for group in program.groups:
            nodes = [node.op_type for node in trace_group(program, group, rows=64).nodes]
            others = [op for op in nodes if op not in ("MatMul", "Identity")]
            assert counted[group.name].count == len(others), (fusion, group.name, nodes)
            assert counted[group.name].norm == spec.D * nodes.count("LayerNormalization")
            ports = [port.width for port in (*group.inputs, *group.outputs)]
            assert counted[group.name].ports == sum(ports)
    assert (
        count_operators(spec, "layer", 1)["mid.0"].count < count_operators(spec, "layer", 64)["mid.0"].count
    )


def test_sequences_go_to_the_npu_where_it_is_faster(checkpoint: Path) -> None:
    """The CPU takes 0.1 ms for each sequence. The NPU takes the same time for any number of rows up to 64."""
    spec, some = open_checkpoint(checkpoint).spec, artifacts()
    layers = [artifact for artifact in some if artifact.group != "head"]
    rate = estimate.weights(spec)["projections"] / (rk3588.CPU_CORES * rk3588.CPU_HZ * 1e-4)
    terms = TERMS.measured({"prefill_int8": rate}, "a slow processor")
    npu = {n: estimate.on_npu(spec, layers, n, LP5, terms, host={}).total_ms for n in (2, 64)}
    expected = int(npu[64] // 0.1) + 1
    assert npu[2] == npu[64] and 2 < expected < 64
    assert estimate.sequences_for_npu(spec, some, "int8", LP5, terms) == expected
    assert (
        estimate.sequences_for_npu(spec, some, "int8") is None
    )  # a CPU as fast as it is, a model this small
    assert estimate.sequences_for_npu(spec, artifacts("rk3576"), "int8", LP5, terms) is None
    bare = [replace(artifact, cycles={}) for artifact in some]
    assert estimate.sequences_for_npu(spec, bare, "int8", LP5, terms) is None


def test_the_terms_of_one_core(checkpoint: Path) -> None:
    spec = open_checkpoint(checkpoint).spec
    host = {"recurrence": 0.5, "sampling": 0.25}
    some = artifacts(ddr=9000, npu=100)
    token = estimate.on_npu(spec, some, 1, LP5, host=host)
    read = 9000e-6 * rk3588.NPU_TABLE_GB_PER_S / 11.1
    counts = count_operators(spec, "layer", 1)
    operators = sum(found.count for found in counts.values()) * 3e-3
    elements = sum(found.ports for found in counts.values())
    assert token.ms == pytest.approx(
        {
            **host,
            "projections": 3 * read,
            "head": read,
            "calls": 4 * 0.380,
            "operators": operators,
            "io": elements * 1.17e-6,
        }
    )
    assert token.total_ms == pytest.approx(sum(token.ms.values()))
    assert token.low_ms < token.total_ms < token.high_ms
    assert token.speeds(1) == pytest.approx((1e3 / token.high_ms, 1e3 / token.total_ms, 1e3 / token.low_ms))
    slower = estimate.on_npu(spec, some, 1, LP4X, host=host)
    assert slower.ms["head"] == pytest.approx(token.ms["head"] * 11.1 / 8.7)
    # Of many rows arithmetic counts, and takes 2.4 times the table; a choice is not part of reading.
    prompt = estimate.on_npu(spec, artifacts(ddr=900, npu=100_000), 64, LP5, host=host)
    assert prompt.npu_calls == 3 + 1 and prompt.ms["projections"] == pytest.approx(3 * 0.24)
    assert prompt.speeds(64)[1] == pytest.approx(64e3 / (prompt.total_ms - 0.25))
    # Each of several sequences has logits and a sample.
    eight = estimate.on_npu(spec, some, 8, LP5, host=host, sequences=8)
    assert eight.npu_calls == 3 + 8 and eight.ms["head"] == pytest.approx(8 * token.ms["head"])
    assert eight.ms["sampling"] == 8 * 0.25


def test_chunks_of_a_prompt_overlap() -> None:
    """Three layers of 1 ms each on their own cores: n chunks take n + 2 ms. One core takes them one by one."""
    alone = [(0.0, 1.0, layer) for layer in range(3)]
    assert [schedule_ms([alone] * count) for count in (1, 2, 8)] == [3, 4, 10]
    assert schedule_ms([[(0.0, 1.0, 0)] * 3] * 4) == 12
    # The CPU bounds when it is busier. It waits only for the calls of the last chunk.
    assert schedule_ms([[(2.0, 1.0, layer) for layer in range(3)]] * 8) == 2 * 3 * 8 + 3


def test_the_schedule_agrees_with_measured_overlap() -> None:
    """Medians of bench/results/overlap: measured times are 1.00 to 1.08 times the schedule's."""
    path = next((Path(__file__).parents[1] / "bench" / "results").glob("overlap-*.json"))
    measured, spec = json.loads(path.read_text()), official_spec("v7-0.4b")
    count = measured["tokens"] // measured["rows"]
    term, ratios = TERMS["waves_over_schedule"], []
    for case in measured["cases"].values():
        waves = case["orders"]["waves"]
        cpu = waves["cpu_s"] / (count * spec.L)
        call = waves["busiest_s"] / (count * len(range(0, spec.L, 3)))
        ratios.append(waves["wall_s"] / schedule_ms([[(cpu, call, i % 3) for i in range(spec.L)]] * count))
    assert sorted(ratios) == pytest.approx([term.low, term.high], abs=0.01)


def test_a_prompt_of_several_chunks(checkpoint: Path) -> None:
    """Two chunks on three layers: fill and drain, contention for memory, and head and sampling after them."""
    spec, host = open_checkpoint(checkpoint).spec, {"recurrence": 0.6, "sampling": 0.25}
    some = artifacts(ddr=900, npu=10_000_000)
    one, two, eight = (estimate.on_npu(spec, some, 64 * count, LP5, host=host) for count in (1, 2, 8))
    assert two.npu_calls == 2 * 3 + 1 and two.ms["head"] == one.ms["head"] and two.ms["sampling"] == 0.25
    # A call of one layer takes about 24 ms, and 2/1.7 (two chunks) or 3/2.4 (eight) times as long beside others.
    assert one.total_ms == pytest.approx(3 * 24, rel=0.2)
    assert one.total_ms < two.total_ms < 2 * one.total_ms
    # The first two groups are of layer 0, so that core 0 is the busiest.
    assert eight.ms["projections"] == pytest.approx(8 * 2 * 24 * 3 / 2.4, rel=0.12)
    assert eight.low_ms < eight.total_ms < eight.high_ms


def test_operators_and_ports_of_many_rows_take_time_by_the_element() -> None:
    """About as much as published for a v7 layer of D = 2048 and 64 rows: 3 to 4 ms, and 3 ms of transposes."""
    (mid,) = {(c.count, c.norm, c.other, c.ports) for n, c in MID.items() if n == "mid.3"}
    assert mid[1] == 2 * 2048
    assert 2.5 < estimate.operators_ms(MID["mid.3"], 64, TERMS, "central") < 4
    transposes, io = estimate.port_ms(MID["mid.3"].ports, 64, TERMS, "central")
    assert 2 < transposes < 3.5 and 1.5 < io < 2.5
    assert estimate.port_ms(100, 1, TERMS, "central")[0] == 0


MID = count_operators(official_spec("v7-1.5b"), "layer", 64)


def test_estimates_agree_with_published_measurements() -> None:
    """RKLLM on three cores, RWKV-7 1.5B in w8a8: 13.8 tokens/s written; llama.cpp's CPU rates for larger models."""
    spec = official_spec("v7-1.5b")
    slow, central, fast = estimate.on_three_cores(spec, "w8a8", 1, LP5).speeds(1)
    assert slow < 13.8 < fast and central == pytest.approx(13.8, rel=0.15)
    slow, central, fast = estimate.on_cpu(official_spec("v7-2.9b"), "fp16", 1, LP5).speeds(1)
    assert slow < 3.62 < fast


def test_three_cores_read_faster_than_one_with_more_calls(checkpoint: Path) -> None:
    spec = official_spec("v7-1.5b")
    found = estimate.on_three_cores(spec, "w8a8", 1, LP5)
    assert found.npu_calls == 3 * spec.L + 1
    head = (spec.D + 8) * spec.V / (2.4 * 11.1e6)
    assert found.ms["head"] == pytest.approx(head) and found.ms["calls"] == pytest.approx(
        found.npu_calls * 0.12
    )
    assert estimate.on_three_cores(spec, "w8a8", 128, LP5).npu_calls == 2 * 3 * spec.L + 1
    assert (
        estimate.on_three_cores(spec, "fp16", 128, LP5).total_ms
        > estimate.on_three_cores(spec, "w8a8", 128, LP5).total_ms
    )


@pytest.mark.parametrize("generation", ["4", "6", "7"])
def test_the_weights_that_a_token_reads(tmp_path: Path, generation: str) -> None:
    spec = write_model(tmp_path / "model.pth", generation)
    opened = open_checkpoint(tmp_path / "model.pth")
    used = [t.name for t in tensors(spec) if t.kind.is_projection and not t.optional]
    count = estimate.weights(spec)
    assert sum(count.values()) == sum(opened.tensor(name).size for name in used)
    assert count["head"] == spec.V * spec.D
    one, many = (estimate.on_cpu(spec, "fp16", tokens, LP5) for tokens in (1, 1000))
    assert one.ms["head"] == many.ms["head"] == pytest.approx(2 * count["head"] / 25e6)
    assert many.ms["projections"] == pytest.approx(1000 * count["projections"] / (5.6 * 4 * 2.3e6))
    for precision in PRECISIONS:
        packed = 0
        for tensor in (t for t in tensors(spec) if t.name in used):
            *stack, k, n = tensor.used_shape
            packed += prod(stack) * pack(np.zeros((k, n)), bits_of(precision, tensor)).nbytes
        assert sum(estimate.weight_bytes(spec, precision).values()) == packed
    # The recurrence of one token is bound by its state, that of a prompt by arithmetic.
    assert one.ms["recurrence"] == pytest.approx(estimate.state_bytes(spec) / 25e6, rel=1.0)
    assert many.ms["recurrence"] > 100 * one.ms["recurrence"] / 8


# -- beside measured rows --------------------------------------------------------------------------------


def test_estimates_stand_beside_measured_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference, "measure_roofline", lambda threads: {"bandwidth_gb_per_s": 10.0 * threads})
    file, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    flags = ("-m", bundle, "--backends", "numpy", "--resume", file, *QUICK)
    rows = run_json(capsys, *flags, "--call-overhead-us", "50", "--host-factor", "2")["results"]
    measured, *guessed = rows
    assert [row["estimated"] for row in rows] == [False] + 2 * 7 * [True]
    assert measured["weights"] == measured["stored"] == "fp16" and not measured["basis"]
    here, there = guessed[:7], guessed[7:]
    assert [row["backend"] for row in here] == 3 * ["cpu"] + 2 * ["rknn"] + 2 * ["rknn-matmul"]
    assert {row["device"].rpartition(" ")[2] for row in here} == {LP5}
    for fast, slow in zip(here, there, strict=True):
        assert slow["device"].endswith(LP4X) and fast["decode_tps"] > slow["decode_tps"]
    # No two rows of one name: the partitioning is in it.
    names = [ModelRow(**row).name for row in rows]
    assert len(set(names)) == len(names) and {"rknn fp16 layer LPDDR5", "rknn w8a8 projection LPDDR5"} <= set(
        names
    )
    # The CPU's part is that of one measured row for all, so that precisions can be compared.
    host = 2 * sum(measured["decode_ms"][name] for name in ("recurrence", "sampling", "dispatch", "rest"))
    for row in here:
        assert sum(row["decode_ms"][name] for name in ("recurrence", "sampling", "rest")) == pytest.approx(
            host
        )
    one = here[3]
    read = 1.8 * rk3588.NPU_TABLE_GB_PER_S / 11.1
    assert one["decode_ms"]["projections"] == pytest.approx(3 * read)
    assert one["decode_ms"]["calls"] == pytest.approx(4 * 0.05) and one["calls_per_token"] == L + 2
    for row in guessed:
        assert row["basis"] and row["bandwidth_share"] is None and row["load_s"] is None
        assert sum(row["decode_ms"].values()) == pytest.approx(1e3 / row["decode_tps"])
        assert row["decode_tps_p10"] < row["decode_tps"] < row["decode_tps_p90"]
        assert row["prefill_512_tps"] and row["first_token_s"] > 128 / row["prefill_128_tps"]

    # The same file, shown again with the table's terms: nothing is measured anew.
    status, out, err = run_main(capsys, "bench", "inference", *flags, "--plot", picture)
    assert status == 0 and "reading" not in err
    assert Document.load(file, ModelRow).results[0] == ModelRow(**measured)
    rows_told = [line for line in out.splitlines() if line.startswith(("|rknn", "|cpu"))]
    assert len(rows_told) == 14 and all(line.count("~") == 3 for line in rows_told)
    assert not any("~" in line for line in out.splitlines() if line.startswith(("|numpy", "- numpy")))
    assert "~ An estimate, not a measurement" in out and "npu_read_lpddr5" not in out
    assert picture.read_bytes()[:4] == b"\x89PNG" and out.splitlines()[-1] == f"pictures: {picture}"
    status, out, _ = run_main(capsys, "bench", "inference", *flags, "--explain")
    assert all(name in out for name in TERMS) and "published board measurements" in out


def test_info_and_bench_agree(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    kinds = [("fp16", "layer"), ("w8a8", "projection")]
    told = {kind: info._artifact_facts(manifest, "rk3588", *kind) for kind in kinds}
    rows = estimates(open_subject(bundle), [], Assumptions())
    for row in rows:
        if row.backend == "rknn" and row.device.endswith(LP5):
            facts = told[row.weights, row.fusion]
            assert facts["estimated_ms_per_token"] == pytest.approx(1e3 / row.decode_tps)
            low, high = facts["estimated_ms_per_token_range"]
            assert (1e3 / high, 1e3 / low) == pytest.approx((row.decode_tps_p10, row.decode_tps_p90))
    facts = next(iter(told.values()))
    assert "not measured" in info._estimate(facts)
    large = {"estimated_ms_per_prefill": 1234.5, "estimated_ms_per_prefill_range": [999.9, 4321.0]}
    assert "1234 ms (1000 to 4321) for 128" in info._estimate({**facts, **large})


@pytest.mark.parametrize("name", ["v7-0.1b", "v7-2.9b"])
def test_tables_fit_a_terminal(name: str) -> None:
    """At most 80 columns, for models of real sizes with both fusions and precisions."""
    spec = official_spec(name)
    kinds = [("w8a8", "projection"), ("fp16", "layer")]
    made = [
        replace(artifacts()[0], group=group.name, rows=rows, fusion=fusion, precision=precision)
        for precision, fusion in kinds
        for group in groups(spec, fusion)
        for rows in ((1,) if group.role == "head" else (1, 64))
    ]
    rows = estimates(inference.Subject(Path("x.rwkv"), spec, "f", made), [], Assumptions())
    for row in rows:
        row.finish(None)
    document = Document(ModelRow, {"cpu": "x"}, "rwkv-npu bench inference", rows)
    lines = report.model_table(document, explained=True).splitlines()
    assert len(rows) == 14 and max(map(len, lines)) <= 80
    # The ranges are in the table, and the sums add up.
    assert sum("LPDDR" in line and line.startswith("|") for line in lines) == 14


def test_other_chips_have_no_estimate(checkpoint: Path) -> None:
    subject = open_subject(checkpoint)
    assert estimates(replace(subject, artifacts=artifacts("rk3576")), [], Assumptions()) == []
    assert estimate.for_bundle(subject.spec, artifacts("rk3576"), 1) is None
    bare = replace(subject, artifacts=[replace(one, cycles={}) for one in artifacts()])
    assert estimate.for_bundle(subject.spec, bare.artifacts, 1) is None
    assert {row.backend for row in estimates(bare, [], Assumptions())} == {"cpu", "rknn-matmul"}


def test_estimates_are_hatched(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subject = replace(open_subject(checkpoint), artifacts=artifacts())
    ms = dict.fromkeys(MEASURED_PARTS, 1.0)
    row = subject.row("ort", weights="fp32", decode_ms=ms, prefill_128_ms=ms, prefill_512_ms=ms)
    row.update({"decode_tps": 166.0, "prefill_128_tps": 1000.0})
    failed = subject.row("torch", failed="no")
    rows = [row, failed, *estimates(subject, [row], Assumptions())]
    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    for suffix in ("png", "svg"):
        plot_inference.draw_inference(
            Document(ModelRow, {"cpu": "x", "cores": 2}, results=rows), tmp_path / f"x.{suffix}"
        )
        assert (tmp_path / f"x.{suffix}").stat().st_size > 1000
    monkeypatch.undo()
    for axes in shown[0].axes:
        labels = [label.get_text() for label in shown[0].axes[0].get_yticklabels()]
        assert ["estimate" in label for label in labels] == [False] + 6 * [True]
        assert any("fp16, layer (estimate)" in label for label in labels)
        for patch in axes.patches:
            place = round(patch.get_y() + patch.get_height() / 2)
            assert bool(patch.get_hatch()) == (place > 0)
        assert {round(p.get_y() + p.get_height() / 2) for p in axes.patches} == set(range(7))
        texts = [text.get_text().strip() for text in axes.texts if text.get_text().strip()[-1:].isdigit()]
        assert [text.startswith("~") for text in texts] == [False] + 6 * [True]
    for figure in shown:
        pyplot.close(figure)
