"""`bench board` on the native stand-in, whose clock's terms come back; and reports that are read by other commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_npu.backends.rknn_api import OVERRIDE
from rwkv_npu.bench import board
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.runtime.rk3588 import TERMS
from tests.native import computing, native_bundle, variables
from tests.tiny import Run, error_line
from tools.board.clock import table, times

CYCLES = {"first": 1_000_000, "mid": 4_000_000, "last": 2_000_000, "head": 3_000_000}  # to read the weights

BENCH = """
import sys
from rwkv_npu import cli
from rwkv_npu.bench import board
board.SECONDS = 0.2
sys.exit(cli.main(["bench", "board", *sys.argv[1:]]))
"""

# Times calls and cores, where nothing is computed: a busy machine then changes no time that the clock reports.
FIT = """
import json, sys
from pathlib import Path
from rwkv_npu.backends.rknn import RknnBackend
from rwkv_npu.bench import board
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.runtime.weights import BundleSource
board.SECONDS = 0.2
source = BundleSource(open_bundle(Path(sys.argv[1])))
backend = RknnBackend(source)
cores, refused = board._cores(source, backend)
cpu = dict.fromkeys([f"{use}_{part}_s" for use in ("decode", "prefill") for part in ("products", "recurrence")], 1.0)
report = {"calls": list(board._calls(source, backend)), "cores": cores, "conversion_ns": 2.0, "cpu": cpu}
print(json.dumps(board.fit(source.spec, source.artifacts(), report | {"board": {"cpu_precision": "fp16"}})))
backend.close()
"""

REPORT: dict[str, Any] = {
    "format": board.FORMAT,
    "version": board.VERSION,
    "board": {"chip": "rk3588", "runtime": "2.3.2", "driver": "0.9.8"},
    "terms": {"npu_read_lpddr5": {"measured": 5.5}, "graph_over_table": {"measured": 2.0}},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts with cycles that take milliseconds. Arithmetic takes longer than reading at 16 rows."""
    bundle = open_bundle(native_bundle(tmp_path_factory.mktemp("board")))
    changed = []
    for artifact in bundle.manifest.artifacts:
        ddr = CYCLES.get(artifact.group.split(".")[0], 500_000)
        npu = 2 * ddr if artifact.rows > 1 else 1
        changed.append(replace(artifact, cycles={"ddr": ddr, "npu": npu, "total": max(ddr, npu)}))
    bundle.manifest.artifacts = changed
    (bundle.path / "manifest.json").write_text(bundle.manifest.to_json())
    return bundle.path


@pytest.fixture
def clock(bundle: Path, tmp_path: Path) -> dict[str, str]:
    """Variables by which each call takes the time of the estimate."""
    opened = open_bundle(bundle)
    layers = [artifact for artifact in opened.manifest.artifacts if artifact.fusion == opened.manifest.fusion]
    (tmp_path / "times").write_text(table(times(opened.spec, layers)))
    return variables(clock=1, times=tmp_path / "times")


@pytest.mark.board
def test_the_clocks_terms_come_back(run_alone, bundle: Path, clock: dict[str, str]) -> None:
    measured = json.loads(run_alone(FIT, bundle, **clock, **variables(null=1)))
    assert measured["c_call"] == pytest.approx(TERMS["c_call"].central, abs=2)
    assert measured["npu_read_lpddr5"] == pytest.approx(TERMS["npu_read_lpddr5"].central, rel=0.01)
    assert measured["graph_over_table"] == pytest.approx(TERMS["graph_over_table"].central, rel=0.01)
    assert 1.5 < measured["npu_three_cores"] < 4 and measured["npu_call"] > measured["c_call"]


@pytest.mark.board
def test_a_complete_report(bundle: Path, clock: dict[str, str], stand_in: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    with computing(bundle) as socket:
        result = subprocess.run(
            [sys.executable, "-c", BENCH, "-m", str(bundle), "--out", str(out), "-t", "1"],
            env={**os.environ, OVERRIDE: str(stand_in), **clock, **variables(socket=socket)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 0, result.stderr[-2000:]
    report, page = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    found = {"port_element", "cpu_read_lpddr5", "prefill_fp16", "recurrence_v7", "npu_three_cores"}
    assert found <= report["terms"].keys()
    prompt = report["passes"][0]
    assert prompt["error"] < 0.05 and prompt["faults"] == 0
    assert all(row["tokens_per_s"] > 0 and row["estimate"] > 0 for row in report["passes"])
    assert "stand-in" in report["board"]["runtime"]  # so that nobody takes it for a board's
    assert result.stdout == page and board.sentence(report) in page
    terms = board.read_terms(out)
    assert all(terms[name].central == term["measured"] for name, term in report["terms"].items())


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(REPORT | changes))
    return path


def test_estimates_use_a_report(run: Run, whole: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Half of the rate at which weights are read: later tokens take longer. A term that is missing stays."""
    report = written(tmp_path)
    terms = board.read_terms(report)
    assert terms["npu_read_lpddr5"].low == terms["npu_read_lpddr5"].high == 5.5
    assert "measured on a board, librknnrt 2.3.2" in terms["npu_read_lpddr5"].source
    assert terms["c_call"] == TERMS["c_call"]
    found = {}
    for name, flags in (("published", []), ("measured", ["--board-report", report])):
        status, out, _ = run("convert", checkpoint, "--dry-run", "--json", *flags)
        assert status == 0
        found[name] = json.loads(out)["variants"][0]["speeds"]["LPDDR5"]["1"]
    assert found["measured"] != found["published"]
    assert run("info", whole, "--board-report", report)[0] == 0
    assert "--board-report is for --dry-run" in error_line(
        run("convert", checkpoint, "--board-report", report)
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a board report: rwkv-npu bench board writes one"),
        (b"[1]", "is not a board report"),
        (json.dumps(REPORT)[:-20].encode(), "is not a board report"),
        (json.dumps(REPORT | {"version": 9}).encode(), "of version 9, not 1"),
        (
            json.dumps(REPORT | {"board": {"chip": "rk3576", "runtime": "2"}}).encode(),
            "is the report of an rk3576",
        ),
        (json.dumps(REPORT | {"terms": 3}).encode(), "is damaged"),
        (json.dumps(REPORT | {"terms": {"c_call": {"measured": -1}}}).encode(), "is damaged at 'c_call'"),
        (json.dumps(REPORT | {"terms": {"speed": {"measured": 1}}}).encode(), "is damaged at 'speed'"),
        (None, "cannot read the board report"),
    ],
)
def test_a_damaged_or_foreign_report_is_one_line(
    run: Run, whole: Path, tmp_path: Path, content, said: str
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="report"):
        board.read_terms(path)
    assert said in error_line(run("info", whole, "--board-report", path))


def test_without_a_board_it_is_refused(
    run: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    out = tmp_path / "report.json"
    assert "rknn needs a board" in error_line(run("bench", "board", "-m", whole, "--out", out))
    assert not out.exists()
