"""`rwkv-npu bench inference`: parts add up to the whole, and a failure loses few results."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.bench import inference, report
from rwkv_npu.bench.document import MEASURED_PARTS, Document, ModelRow
from rwkv_npu.bench.measure import Case, facts
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.models.spec import groups
from tests.bench_inference import QUICK, L, run_json
from tests.tiny import command, one_line, run_main

PRECISE = 1e-9


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """No roofline is measured here: it takes a second, and the sweep's tests cover it."""
    monkeypatch.setattr(inference, "measure_roofline", lambda threads: {"bandwidth_gb_per_s": 10.0 * threads})


# -- the engine's own counters ---------------------------------------------------------------------------


def test_rows_of_an_npu_have_the_precision_of_its_artifacts(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"blocks.0.ffn.key.weight": "w8a8"}))
    np.save(tmp_path / "ids.npy", np.arange(1, 200) % 60)
    options = {"precision_map": tmp_path / "map.json", "calibrate": [tmp_path / "ids.npy"]}
    bundle = rwkv_npu.convert(checkpoint, tmp_path / "out.rwkv", target="none", precision="mixed", **options)  # type: ignore[arg-type]
    with rwkv_npu.load(bundle, backend="numpy", precision="mixed") as model:
        spec = model.spec
        monkeypatch.setattr(type(model.source), "precision_on", lambda source, backend: "mixed")
        row = facts(model, "rknn")
        monkeypatch.setattr(type(model.source), "precision_on", lambda source, backend: "fp16")
        fp16 = facts(model, "rknn")
    assert row["weights"] == row["stored"] == "mixed" and fp16["weights"] == "fp16"
    assert fp16["bytes_per_token"] - row["bytes_per_token"] == spec.D * spec.F


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
    assert state.tokens_seen == 8 and set(parts) == set(MEASURED_PARTS)
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(total, rel=PRECISE)


def test_parts_of_a_case_read_the_engines_counters(checkpoint: Path) -> None:
    with rwkv_npu.load(checkpoint, backend="numpy") as model:
        case = Case(model, {}, lambda message: None)
        model.forward([1])
        first, second = case.parts(), case.parts()
        assert first == second and first["sampling"] == 0
        model.forward([1])
        assert all(
            case.parts()[name] > first[name] for name in ("projections", "head", "recurrence", "dispatch")
        )


# -- measured rows ---------------------------------------------------------------------------------------


def test_row_fields_are_consistent(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
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
        assert 8 <= row["decode_tokens"] <= 128 and row["decode_repeats"] == row["prefill_512_repeats"] == 1
        assert sum(row["prefill_128_ms"].values()) == pytest.approx(1e3 * row["first_token_s"], rel=PRECISE)
        assert 128 / row["prefill_128_tps"] < row["first_token_s"] < row["load_s"]
        assert row["peak_bytes"] > row["own_bytes"] > 1 << 20


def test_memory_is_that_of_the_child(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    """Memory of the parent does not count in the rows."""
    ballast = np.ones(60_000_000)
    row = run_json(capsys, "-m", checkpoint, "--backends", "numpy", *QUICK)["results"][0]
    assert row["peak_bytes"] < ballast.nbytes


def test_fusion_profile_and_csv(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    flags = ("-m", checkpoint, "--backends", "numpy", "--fusion", "projection", "--profile", *QUICK)
    status, out, _ = run_main(capsys, "bench", "inference", *flags, "-o", "csv")
    row = next(csv.DictReader(io.StringIO(out)))
    assert status == 0 and row["fusion"] == "projection" and float(row["calls_per_token"]) == 3 * L + 1
    assert float(row["decode_ms.recurrence"]) > 0 and row["estimated"] == "False"
    status, out, _ = run_main(capsys, "bench", "inference", *flags)
    assert status == 0 and "Profile of numpy fp32" in out and re.search(r"\n\|\w+/\w+\.py:\d+ ", out)
    for role in ("att.in", "att.out", "ffn", "head"):
        assert f"\n|{role} " in out


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
    """A backend that breaks after its first prompts: its row keeps these and the reason; other rows are measured."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.orig_argv[-1].startswith('numpy '):\n"
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


def test_an_interrupted_benchmark_resumes(checkpoint: Path, tmp_path: Path) -> None:
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
    assert [row.backend for row in Document.load(file, ModelRow).results] == ["ort", "numpy"]


def processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_an_interrupted_row_is_kept_and_flagged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    def measure(row: ModelRow, request: dict[str, Any]) -> Iterator[str]:
        yield "load"
        row.update({"load_s": 3.0, "flags": "busy"})
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "measure", measure)
    file = tmp_path / "rows.json"
    status, out, err = run_main(
        capsys, "bench", "inference", "-m", checkpoint, "--resume", file, "-o", "json"
    )
    assert status == 130 and str(file) in err
    assert [(row["load_s"], row["flags"]) for row in json.loads(out)["results"]] == [
        (3.0, "busy interrupted")
    ]
    assert Document.load(file, ModelRow).results[0].load_s == 3.0


def test_redo_measures_disturbed_rows_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    flags = iter(["busy", "", "busy", "interrupted", ""])
    measured = []

    def measure(row: ModelRow, request: dict[str, Any]) -> Iterator[str]:
        measured.append(row.backend)
        yield "load"
        row.update({"load_s": float(len(measured)), "flags": next(flags)})

    monkeypatch.setattr(inference, "measure", measure)
    found = ("-m", checkpoint, "--backends", "ort,torch,numpy", "--resume", tmp_path / "rows.json")
    run_json(capsys, *found)
    assert measured == ["ort", "torch", "numpy"]
    run_json(capsys, *found)
    assert measured == ["ort", "torch", "numpy"]
    rows = run_json(capsys, *found, "--redo")["results"]
    assert measured == ["ort", "torch", "numpy", "ort", "numpy"]
    times = sorted((row["backend"], row["load_s"]) for row in rows)  # what was cut short replaces nothing
    assert times == [("numpy", 5.0), ("ort", 1.0), ("ort", 4.0), ("torch", 2.0)]


def test_a_saved_document_loads_unchanged(tmp_path: Path) -> None:
    row = ModelRow("m", "f", "7", 5, "ort", decode_ms={"head": 1.0}, flags="busy", decode_tps=2.0)
    document = Document(ModelRow, {"cpu": "x"}, "command", [row], ["a note"])
    document.save(tmp_path / "x.json")
    assert Document.load(tmp_path / "x.json", ModelRow) == document
    assert "a note" in report.model_table(document)
    with pytest.raises(KeyError):
        row.update({"speed": 1})


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Rows of earlier versions have `terms`. Fields that this version does not know are ignored."""
    row = {"model": "m", "fingerprint": "f", "generation": "7", "parameters": 5, "backend": "rknn"}
    row |= {"device": "RK3588 NPU, 1 core, compiler's table", "estimated": True, "terms": {"cores": 1}}
    old = {"format": "inference 1", "command": "c", "machine": {"cpu": "x"}, "notes": [], "results": [row]}
    (tmp_path / "x.json").write_text(json.dumps(old))
    (found,) = Document.load(tmp_path / "x.json", ModelRow).results
    assert found.estimated and found.backend == "rknn" and not hasattr(found, "terms")


# -- what is refused -------------------------------------------------------------------------------------


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
    monkeypatch.setattr(inference, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(inference, "measure_roofline", lambda *_: pytest.fail("it was measured"))
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
def test_a_file_of_another_format_is_refused_and_kept(
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
