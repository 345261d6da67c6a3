"""`rwkv-npu bench inference`: what it measures adds up, estimates are marked, and little is lost when it fails."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu import estimate
from rwkv_npu.backends.numpy import NumpyBackend
from rwkv_npu.bench import inference_plot, inference_report, inference_study
from rwkv_npu.bench.inference_child import Case, Meter
from rwkv_npu.bench.inference_estimate import estimates
from rwkv_npu.bench.inference_record import PARTS, Document, Row, load
from rwkv_npu.bench.inference_study import open_subject
from rwkv_npu.bundle import MANIFEST, Artifact, read_manifest
from rwkv_npu.checkpoint import open_checkpoint
from rwkv_npu.engine import Engine
from rwkv_npu.estimate import Assumptions, Rate
from rwkv_npu.packing import PRECISIONS, bits_of, pack
from rwkv_npu.sources import CheckpointSource
from rwkv_npu.spec import Group, groups, tensors
from tests.tiny import command, one_line, run_main, write_model

L = 2
QUICK = ("-r", "1", "--seconds", "1")
PRECISE = 1e-9


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's tests measure it; a second each time is too much here."""
    monkeypatch.setattr(inference_study, "roofline", lambda threads: {"bandwidth_gb_per_s": 10.0 * threads})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    write_model(path, L=L)
    return path


def artifact(group: str, rows: int, target: str = "rk3588", **cycles: int) -> Artifact:
    cycles = {"ddr": 900, "npu": 300 * rows, "total": 1000 + 100 * rows} | cycles
    path = f"rknn/{target}/{group}.m{rows}.rknn"
    return Artifact(path, group, target, "fp16", "layer", rows, weight_bytes=5000, cycles=cycles)


def artifacts(target: str = "rk3588", rows: tuple[int, ...] = (1, 64), **options: int) -> list[Artifact]:
    names = ["first", *(f"mid.{i}" for i in range(L - 1)), "last"]
    found = [artifact(name, count, target, **options) for name in names for count in rows]
    return [*found, artifact("head", 1, target, **options)]


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With artifacts in its manifest that nobody compiled: nothing here opens them."""
    path = rwkv_npu.convert(checkpoint, tmp_path_factory.mktemp("bundle") / "tiny.rwkv", target="none")
    manifest = replace(read_manifest(path), artifacts=artifacts(total=2_000_000, ddr=1_800_000, npu=40_000))
    (path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run_main(capsys, "bench", "inference", *arguments, "-o", "json")
    assert status == 0, err
    return json.loads(out)


# -- the engine's own counters -----------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["layer", "projection"])
def test_the_engine_counts_time_by_role(checkpoint: Path, fusion: str) -> None:
    begin = time.perf_counter()
    with rwkv_npu.load(checkpoint, backend="numpy", fusion=fusion) as model:
        model.forward([1, 2, 3])
        model.forward([4])
        counters, elapsed = model.engine.counters, time.perf_counter() - begin
    assert set(counters.run_s) == {group.role for group in groups(model.spec, fusion)}
    assert all(seconds > 0 for seconds in counters.run_s.values()) and counters.dispatch_s > 0
    assert sum(counters.run_s.values()) + counters.dispatch_s <= elapsed


@pytest.mark.parametrize("fusion", ["layer", "projection"])
def test_the_parts_of_a_token_add_up_and_change_nothing(checkpoint: Path, fusion: str) -> None:
    request = {"repeats": 1, "seconds": 1.0, "profile": False}
    with rwkv_npu.load(checkpoint, backend="numpy", fusion=fusion) as model:
        expected, _ = model.forward([1, 2, 3])
        case = Case(model, request, lambda message: None)
        logits, state = model.forward([1, 2, 3])
        assert np.array_equal(logits, expected)
        total, parts = case.timed(lambda: case.decode(logits, state, 5))
    assert state.tokens_seen == 8 and set(parts) == set(PARTS)
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(total, rel=PRECISE)


def test_a_meter_reads_what_its_engine_did(checkpoint: Path) -> None:
    with rwkv_npu.load(checkpoint, backend="numpy") as model:
        meter = Meter(model.engine)
        model.forward([1])
        first, second = meter.read(), meter.read()
        assert first == second and first["sampling"] == 0
        model.forward([1])
        assert all(
            meter.read()[name] > first[name] for name in ("projections", "head", "recurrence", "dispatch")
        )


# -- measured rows -----------------------------------------------------------------------------------------


def test_rows_hold_what_they_say(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    found = run_json(capsys, "-m", checkpoint, "--backends", "numpy,ort", *QUICK)
    assert found["machine"]["bandwidth_gb_per_s"] > 0 and found["machine"]["cpu"]
    assert str(checkpoint.parent) not in json.dumps(found)
    spec = open_checkpoint(checkpoint).spec
    head = spec.V * spec.D
    matrices = (
        4 * spec.A * spec.D + 2 * spec.F * spec.D + sum(2 * rank * spec.D for rank in spec.ranks.values())
    )
    unused = 2 * spec.ranks["v"] * spec.D  # layer 0 has nothing to mix its values with
    state = spec.L * (spec.H * spec.N**2 + 2 * spec.D)
    for row, backend in zip(found["results"], ("numpy", "ort"), strict=True):
        assert (row["backend"], row["weights"], row["fusion"]) == (backend, "fp32", "layer")
        assert not row["estimated"] and row["failed"] is None and "CPU" in row["device"]
        assert row["calls_per_token"] == L + 2
        assert row["bytes_per_token"] == 4 * (head + spec.L * matrices - unused) + 2 * 4 * state
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_token"] * row["decode_tps"] / 1e9)
        assert row["read_gb_per_s"] == found["machine"]["bandwidth_gb_per_s"]
        assert row["bandwidth_share"] == pytest.approx(
            row["gb_per_s"] / found["machine"]["bandwidth_gb_per_s"]
        )
        assert sum(row["decode_ms"].values()) == pytest.approx(1e3 / row["decode_tps"], rel=PRECISE)
        assert row["decode_tokens"] == 128 and row["decode_repeats"] == row["prefill_512_repeats"] == 1
        assert sum(row["prefill_128_ms"].values()) == pytest.approx(1e3 * row["first_token_s"], rel=PRECISE)
        assert 128 / row["prefill_128_tps"] < row["first_token_s"] < row["load_s"]
        assert row["peak_bytes"] > row["own_bytes"] > 1 << 20


def test_fusion_profile_and_csv(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    flags = ("-m", checkpoint, "--backends", "numpy", "--fusion", "projection", "--profile", *QUICK)
    status, out, _ = run_main(capsys, "bench", "inference", *flags, "-o", "csv")
    row = next(csv.DictReader(io.StringIO(out)))
    assert status == 0 and row["fusion"] == "projection" and float(row["calls_per_token"]) == 3 * L + 1
    assert float(row["decode_ms.recurrence"]) > 0 and row["estimated"] == "False"
    status, out, _ = run_main(capsys, "bench", "inference", *flags)
    assert status == 0 and "Profile of numpy fp32" in out and "maths.py" in out
    for role in ("att.in", "att.out", "ffn", "head"):
        assert f"\n| {role} |" in out


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise RuntimeError('broke\\nmore')", "broke"),
        ("os._exit(3)", "exited with status 3"),
        ("os.kill(os.getpid(), 9)", "lack of memory"),
        ("os.abort()", "ended by signal 6"),
    ],
)
def test_a_backend_that_fails_in_the_middle(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
    how: str,
    reason: str,
) -> None:
    """It breaks after it has read its first prompts: its row says so and keeps them, the others go on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '\"numpy\"' in sys.orig_argv[-1]:\n"
        "    import rwkv_npu.backends.numpy as module\n"
        "    run, calls = module.NumpyRunner.run, []\n"
        "    def breaks(self):\n"
        "        calls.append(1)\n"
        f"        if len(calls) > {5 * (L + 2)}: {how}\n"
        "        return run(self)\n"
        "    module.NumpyRunner.run = breaks\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run_json(capsys, "-m", checkpoint, "--backends", "numpy,ort", *QUICK)
    broken, other = found["results"]
    assert reason in broken["failed"] and "\n" not in broken["failed"]
    assert broken["load_s"] and broken["prefill_128_tps"] and not broken["decode_tps"]
    assert other["decode_tps"] and other["failed"] is None
    status, out, err = run_main(capsys, "bench", "inference", "-m", checkpoint, "--backends", "numpy", *QUICK)
    assert status == 1 and "failed: numpy" in out and "numpy failed" in err  # nothing else was asked for


def test_interrupted_and_gone_on_with(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    flags = ["bench", "inference", "-m", checkpoint, "--resume", file, "-o", "json", "-t", "1"]
    slow = command(*flags, "--backends", "ort,numpy", "-r", "100000", "--seconds", "1.5")
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "ort fp32" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    rows = json.loads(out)["results"]
    assert rows[0]["backend"] == "ort" and rows[0]["decode_tps"]
    assert [row["flags"].endswith("interrupted") for row in rows[1:]] in ([True], [])
    assert not [line for line in processes() if str(checkpoint) in line]

    again = subprocess.run(command(*flags, "--backends", "ort,numpy", *QUICK), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    kept, added = json.loads(again.stdout)["results"]
    for one in (kept, rows[0]):  # over the best read, which the second run measured again
        del one["bandwidth_share"]
    assert kept == rows[0] and added["backend"] == "numpy" and added["decode_tps"]
    assert [row.backend for row in load(file).results] == ["ort", "numpy"]


def test_an_interrupted_row_is_kept_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    def measure(row: Row, request: dict[str, Any]) -> Iterator[str]:
        yield "load"
        row.update({"load_s": 3.0, "flags": "busy"})
        raise KeyboardInterrupt

    monkeypatch.setattr(inference_study, "measure", measure)
    file = tmp_path / "rows.json"
    status, out, err = run_main(
        capsys, "bench", "inference", "-m", checkpoint, "--resume", file, "-o", "json"
    )
    assert status == 130 and str(file) in err
    assert [(row["load_s"], row["flags"]) for row in json.loads(out)["results"]] == [
        (3.0, "busy interrupted")
    ]
    assert load(file).results[0].load_s == 3.0


def test_rows_that_others_disturbed_are_measured_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    flags = iter(["busy", "", "busy", "interrupted", ""])
    measured = []

    def measure(row: Row, request: dict[str, Any]) -> Iterator[str]:
        measured.append(row.backend)
        yield "load"
        row.update({"load_s": float(len(measured)), "flags": next(flags)})

    monkeypatch.setattr(inference_study, "measure", measure)
    found = ("-m", checkpoint, "--backends", "ort,torch,numpy", "--resume", tmp_path / "rows.json")
    run_json(capsys, *found)
    assert measured == ["ort", "torch", "numpy"]
    run_json(capsys, *found)
    assert measured == ["ort", "torch", "numpy"]
    rows = run_json(capsys, *found, "--redo")["results"]
    assert measured == ["ort", "torch", "numpy", "ort", "numpy"]
    times = sorted((row["backend"], row["load_s"]) for row in rows)  # what was cut short replaces nothing
    assert times == [("numpy", 5.0), ("ort", 1.0), ("ort", 4.0), ("torch", 2.0)]


def processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backends", "abacus"], "abacus"),
        (["--backends", "rknn-sim"], "rknn-sim"),
        (["-r", "0"], "-r"),
        (["-t", "0"], "-t"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--call-overhead-us", "-1"], "--call-overhead-us"),
        (["--host-factor", "nan"], "--host-factor"),
        (["--host-factor", "0"], "--host-factor"),
        (["-m", "/no/such/model.pth"], "/no/such/model.pth"),
        (["--plot", "/no/such/folder/x.png"], "/no/such/folder"),
        (["--plot", "x.jpeg"], ".png"),
        (["--plot", "/proc/x.png"], "/proc"),
        (["--resume", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_nothing_is_measured_for_bad_flags(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(inference_study, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(inference_study, "roofline", lambda *_: pytest.fail("it was measured"))
    status, out, err = run_main(capsys, "bench", "inference", "-m", checkpoint, *flags)
    assert status == 1 and not out and one_line(err) and words in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "does not hold results"),
        ("{", "does not hold results"),
        ('{"format": 1, "machine": {}, "results": []}', "format 1"),
        (
            '{"format": "inference 1", "command": "", "machine": {"cpu": "Z80"}, "notes": [], "results": []}',
            "Z80",
        ),
    ],
)
def test_a_file_of_something_else_is_left_alone(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, content: str, words: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    status, _, err = run_main(capsys, "bench", "inference", "-m", checkpoint, "--resume", file)
    assert status == 1 and one_line(err) and words in err and file.read_text() == content


def test_rows_of_other_threads_are_not_mixed(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    run_json(capsys, "-m", checkpoint, "--backends", "numpy", "--resume", file, "-t", "1", *QUICK)
    status, _, err = run_main(capsys, "bench", "inference", "-m", checkpoint, "--resume", file, "-t", "3")
    assert status == 1 and one_line(err) and "1 threads, not 3" in err


# -- estimates ---------------------------------------------------------------------------------------------


class FixedRows(NumpyBackend):
    def row_counts(self, group: Group) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) if group.role == "head" else (1, 16)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18, 32, 40])
def test_an_estimate_counts_the_calls_that_the_engine_makes(checkpoint: Path, tokens: int) -> None:
    source = CheckpointSource(open_checkpoint(checkpoint))
    backend = FixedRows(source)
    engine = Engine(
        source.program, source.tensor, serve=lambda group, decode: backend, fingerprint="", initial={}
    )
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


def test_estimates_stand_beside_what_was_measured(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
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
    assert status == 0 and "reading" not in err and load(file).results[0] == Row(**measured)
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


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    row = Row(
        "m", "f", "7", 5, "ort", decode_ms={"head": 1.0}, terms={"cores": 3}, flags="busy", decode_tps=2.0
    )
    document = Document({"cpu": "x"}, "command", [row], ["a note"])
    document.save(tmp_path / "x.json")
    assert load(tmp_path / "x.json") == document
    assert "a note" in inference_report.table(document)
    with pytest.raises(KeyError):
        row.update({"speed": 1})


def test_memory_is_that_of_the_child(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    """A large parent does not show in its rows."""
    ballast = np.ones(60_000_000)
    row = run_json(capsys, "-m", checkpoint, "--backends", "numpy", *QUICK)["results"][0]
    assert row["peak_bytes"] < ballast.nbytes
