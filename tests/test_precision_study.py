"""The study of precisions in `bench/`: what it measures, that it goes on where it was, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.precision_study import __main__ as study
from rwkv_npu.conversion import calibration
from rwkv_npu.conversion.quantise import REMEDIES


def run(checkpoint: Path, out: Path, *options: str) -> dict[str, Any]:
    assert study.main([str(checkpoint), "-o", str(out), "--tokens", "96", *options]) == 0
    found: dict[str, Any] = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    return found


def test_a_row_for_each_remedy_in_numpy(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TOKENS", 512)
    found = run(checkpoint, tmp_path / "o")
    rows = found["rows"]
    assert len(rows) == len(REMEDIES) + 2 and all(name.startswith("numpy: ") for name in rows)
    everything = rows["numpy: w8a8, both"]
    assert rows["numpy: w8a8, no remedy"]["kl_mean"] > everything["kl_mean"] > 0
    assert (
        everything["int8"] == pytest.approx(rows["numpy: w8a8, smoothing"]["int8"])
        and everything["int8"] > 0.5
    )
    assert found["mixed"]["kl"] <= found["mixed"]["max_kl"]
    text = (tmp_path / "o.md").read_text(encoding="utf-8")
    assert text.count("| numpy: ") == len(rows) and f"| {found['mixed']['sensitivity'][0]['name']} |" in text

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(study, "evaluate", never)
    assert run(checkpoint, tmp_path / "o") == found


def test_what_is_there_may_be_of_another_study(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text('{"rows": {}}')
    with pytest.raises(SystemExit, match="belongs to another study"):
        run(checkpoint, tmp_path / "o")


@pytest.mark.compiler
def test_int8_by_the_compiler_alone_costs_more_than_fp16(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "BUNDLES", study.BUNDLES[:1])
    rows = run(checkpoint, tmp_path / "o", "--simulate")["rows"]
    alone = rows.pop("rknn-sim: w8a8 of all the graph, by the compiler")
    assert rows.keys() == {"rknn-sim: fp16"} and alone["int8"] == 1
    assert alone["kl_mean"] > 10 * rows["rknn-sim: fp16"]["kl_mean"] > 0
