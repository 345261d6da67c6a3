"""The studies of the CPU in `bench/`: they run, and print tables."""

from __future__ import annotations

from pathlib import Path

import pytest

import rwkv_npu
from bench import cpu_batches, cpu_start
from rwkv_npu.bench.machine import describe
from rwkv_npu.models.spec import tensors
from tests.tiny import write_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_model(folder / "m" / "model.pth")
    return rwkv_npu.convert(folder / "m" / "model.pth", folder / "tiny.rwkv", target="none", cpu="int4")


def test_batches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_batches, "TOKENS", 2)
    monkeypatch.setattr(cpu_batches, "ROUNDS", 1)
    results = {"machine": describe(), "command": "here", **cpu_batches.study(bundle)}
    assert results["rows"].keys() == {"int4", "fp16"}
    row = results["rows"]["int4"]
    assert row["tokens_per_s"][8] == pytest.approx(row["gain"][8] * row["tokens_per_s"][1])
    text = cpu_batches.table(results)
    assert "tiny.rwkv" in text and f"| int4 | {row['tokens_per_s'][1]:.1f} |" in text


def test_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_start, "ROUNDS", 1)
    results = {"machine": describe(), "command": "here", **cpu_start.study(bundle)}
    for row in results["rows"].values():
        assert 0 < row["first_token_s"] <= row["end_s"]
        assert set(row["stages_s"]) == set(cpu_start.STAGES) and min(row["stages_s"].values()) > 0
        assert row["peak_bytes"] >= row["own_bytes"] > row["weights_bytes"] > row["state_bytes"] > 0
    head, *_ = [line for line in cpu_start.table(results).splitlines() if line.startswith("| int4")]
    assert head.count("|") == 4 + len(cpu_start.STAGES) + 1


def test_copied_weights_are_released(tmp_path: Path) -> None:
    """Float weights are copied into packed form, and the pages of their file are released."""
    write_model(tmp_path / "m" / "model.pth", D=512, L=2, N=64)
    path = rwkv_npu.convert(tmp_path / "m" / "model.pth", tmp_path / "out", target="none", cpu="fp16")
    weights = str(path / "graphs/weights.safetensors")
    for backend, bounds in (("numba", (0.0, 0.3)), ("numpy", (0.9, 1.5))):
        with rwkv_npu.load(path, backend=backend) as model:
            model.forward([1, 2, 3])
            size = sum(tensor.nbytes for tensor in map(model.source.tensor, projections(model)))
            assert bounds[0] * size <= resident(weights) <= bounds[1] * size, backend


def projections(model: rwkv_npu.Model) -> list[str]:
    return [
        tensor.name for tensor in tensors(model.spec) if tensor.kind.is_projection and not tensor.optional
    ]


def resident(file: str) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found, counts = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                counts = line.rstrip().endswith(file)
            elif counts and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
    return found
