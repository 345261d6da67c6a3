"""Real `.rknn` files of every generation, and Rockchip's simulator against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.models.spec import FUSIONS, groups
from rwkv_npu.runtime.estimate import served_by
from rwkv_npu.toolkit import Environment, rknn_info
from tests.fp16 import check_logits, check_state, forced
from tools.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.compiler

GENERATIONS = ("4", "5.0", "5.1", "5.2", "6", "7", "7a")
FP16_ERROR = 3e-3  # relative, rms: what fp16 leaves of a group's worst output


@pytest.fixture(scope="module", params=GENERATIONS)
def bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toolkit_environment: Environment
):
    """A two-layer model of a generation with artifacts of both fusions, converted in two steps."""
    folder = tmp_path_factory.mktemp(f"v{request.param}")
    checkpoint = folder / "model.pth"
    make_checkpoint(checkpoint, generation=request.param, D=128, L=2, N=64, V=256, seed=1)
    for fusion in FUSIONS:
        rwkv_npu.convert(checkpoint, folder / "out.rwkv", fusion=fusion, rows="1,16", verify=True)
    return open_bundle(folder / "out.rwkv")


def test_every_artifact_is_there_runs_on_the_npu_and_agrees_with_numpy(bundle) -> None:
    manifest = bundle.manifest
    for fusion in FUSIONS:
        chosen = [a for a in manifest.artifacts if a.fusion == fusion]
        names = {(group.name, rows) for group in groups(bundle.spec, fusion) for rows in (1, 16)}
        assert {(a.group, a.rows) for a in chosen} == names - {("head", 16)}
    assert {a.path: a.on_cpu for a in manifest.artifacts if a.on_cpu} == {}
    assert {a.path: a.error for a in manifest.artifacts if not a.error or a.error > FP16_ERROR} == {}
    assert all(a.cycles["total"] > 0 and a.toolkit for a in manifest.artifacts)
    assert max(manifest.graph_errors.values()) < 1e-5


def test_metadata_of_an_artifact(bundle) -> None:
    artifact = bundle.manifest.artifacts[0]
    group = next(g for g in groups(bundle.spec, artifact.fusion) if g.name == artifact.group)
    info = rknn_info(bundle.path / artifact.path)
    assert "rk3588" in info["targets"]
    assert [port["name"] for port in info["outputs"]] == [port.name for port in group.outputs]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_simulator_follows_numpy_through_a_text(bundle, fusion: str) -> None:
    """A prompt in a call of 16 rows and one padded to 16 rows, then 64 tokens."""
    ids = np.random.default_rng(0).integers(1, bundle.spec.V, 20 + 64).tolist()
    expected, expected_state = forced(bundle.path, ids, 20, backend="numpy", fusion=fusion)
    found, state = forced(bundle.path, ids, 20, backend="rknn-sim", fusion=fusion)
    check_logits(found, expected)
    check_state(state, expected_state)


def test_converting_again_builds_nothing(bundle) -> None:
    before = {a.path: (bundle.path / a.path).stat().st_mtime_ns for a in bundle.manifest.artifacts}
    checkpoint = Path(bundle.path).parent / "model.pth"
    rwkv_npu.convert(checkpoint, bundle.path, rows="1,16")
    assert {path: (bundle.path / path).stat().st_mtime_ns for path in before} == before


def test_estimates_count_calls_and_rows(bundle) -> None:
    chosen = [a for a in bundle.manifest.artifacts if a.fusion == "layer"]
    one, sixteen = (sum(a.cycles["total"] for a in chosen if a.rows == rows) for rows in (1, 16))

    def cycles(tokens: int) -> int:
        return sum(times * artifact.cycles["total"] for artifact, times in served_by(chosen, tokens))

    assert cycles(1) == one and cycles(17) == sixteen + one  # sixteen, then one, then the head
