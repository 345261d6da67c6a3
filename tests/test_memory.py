"""NPU memory: sums, limits, and the row counts that are chosen by them."""

from __future__ import annotations

import pytest

from rwkv_npu.backends.memory import BUDGET_BYTES, MemoryPlan, check_room, plan_memory
from rwkv_npu.board import hardware
from rwkv_npu.conversion.artifacts import plan_artifacts
from rwkv_npu.conversion.writer import describe_groups
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.bundle import Manifest
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import Scaling, Spec, groups

SIZES = {
    "0.19B": Spec("7", 768, 12, 12, 64, 768, 3072, 65536, {"w": 64, "a": 64, "v": 32, "g": 128}),
    "0.45B": Spec("7", 1024, 24, 16, 64, 1024, 4096, 65536, {"w": 64, "a": 64, "v": 32, "g": 128}),
    "1.5B": Spec("7", 2048, 24, 32, 64, 2048, 8192, 65536, {"w": 96, "a": 96, "v": 64, "g": 256}),
    "2.9B": Spec("7", 2560, 32, 40, 64, 2560, 10240, 65536, {"w": 96, "a": 96, "v": 64, "g": 320}),
}


def manifest(spec: Spec) -> Manifest:
    return Manifest(spec, "f" * 32, "m.pth", "layer", "fp16", Scaling(), None, groups=describe_groups(spec))


def plan(size: str, rows: tuple[int, ...] | None = None):
    spec = SIZES[size]
    return plan_artifacts(manifest(spec), Program(spec, "layer"), "rk3588", "fp16", rows)


@pytest.mark.parametrize(("size", "rows"), [("0.19B", {1, 64}), ("0.45B", {1, 64}), ("1.5B", {32})])
def test_auto_loads_weights_twice_only_if_they_fit(size: str, rows: set[int]) -> None:
    artifacts = plan(size)
    assert {a.rows for a in artifacts if a.group != "head"} == rows
    assert [a.rows for a in artifacts if a.group == "head"] == [1]
    assert plan_memory(manifest(SIZES[size]), artifacts).total <= BUDGET_BYTES


def test_weights_are_counted_to_the_byte() -> None:
    spec = SIZES["0.45B"]
    D, F, V, R = spec.D, spec.F, spec.V, spec.ranks
    one_layer = 4 * D * D + 2 * D * F + 2 * D * (R["w"] + R["a"] + R["g"])
    expected = 2 * (spec.L * one_layer + (spec.L - 1) * 2 * D * R["v"] + V * D)
    artifacts = plan("0.45B", (1,))
    assert plan_memory(manifest(spec), artifacts).weights == expected
    twice = plan_memory(manifest(spec), plan("0.45B", (1, 64)))
    assert twice.weights == 2 * expected - 2 * V * D
    assert twice.contexts == 2 * (len(groups(spec, "layer")) - 1) + 1


def test_artifacts_that_do_not_fit_are_refused_with_the_sum() -> None:
    with pytest.raises(UsageError, match=r"rk3588 at fp16 with rows 32: 34 contexts .* GB .*target='none'"):
        plan("2.9B")
    with pytest.raises(UsageError, match="rows 1,64"):
        plan("1.5B", (1, 64))


def test_contexts_and_memory_are_counted_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(hardware, "memory", lambda: {"MemAvailable": 2 * gib})
    check_room(MemoryPlan(gib, gib, 150), "they", "use less")
    for too_much in (MemoryPlan(3 * gib, gib, 5), MemoryPlan(gib, 0, 151)):
        with pytest.raises(
            BackendError, match=r"they do not fit the NPU: \d+ contexts \(of 150\), .*; use less"
        ):
            check_room(too_much, "they", "use less")
    with pytest.raises(
        BackendError, match=r"free memory of 2\.15 GB: .* = 3\.22 GB .*; end other programs, or use"
    ):
        check_room(MemoryPlan(2 * gib, gib, 5), "they", "use less")
    monkeypatch.setattr(hardware, "memory", dict)
    check_room(MemoryPlan(2 * gib, gib, 5), "they", "use less")
