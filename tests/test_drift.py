"""Inputs beyond the ranges of calibration are reported once, and only where they are common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends.base import allocate_inputs
from rwkv_npu.backends.drift import ENOUGH, EVERY, Drift, Watched, WatchedRunner
from rwkv_npu.board import hardware
from rwkv_npu.formats.bundle import Bundle, open_bundle
from rwkv_npu.models.spec import Group, Port
from rwkv_npu.runtime.loading import _watched
from rwkv_npu.runtime.weights import BundleSource
from tests.fake_compiler import stand_in
from tests.tiny import V, write_model

MID = Group("mid", 0, (Port("y", 8), Port("x", 8)), (Port("x_out", 8),))
HEAD = Group("head", -1, (Port("x", 8),), (Port("logits", 8),))
RANGES = {"mid.0": {"y": 2.0, "x": 10.0}}


class Runner:
    def __init__(self, group: Group, rows: int):
        self.inputs, self.runs = allocate_inputs(group, rows, 1), 0

    def run(self) -> Mapping[str, np.ndarray]:
        self.runs += 1
        return {"x_out": self.inputs["x"]}


class Backend:
    name = "stand-in"
    closed = False

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return (1, 4)

    def open(self, group: Group, rows: int, batch: int = 1) -> Runner:
        return Runner(group, rows)

    def close(self) -> None:
        self.closed = True


def run(watched: Watched, group: Group, **values: float) -> list[str]:
    """The warnings of as many calls as it takes to look at enough of them."""
    runner = watched.open(group, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(EVERY * ENOUGH):
            for name, value in values.items():
                runner.inputs[name][1, 3] = value
            runner.run()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("value", [2.5, -2.5])
def test_it_is_said_once_with_what_to_do(value: float) -> None:
    watched = Watched(Backend(), RANGES)
    said = run(watched, MID, y=value)
    assert len(said) == 1 and "\n" not in said[0]
    assert "y of mid.0 reaches 2.5, calibrated to 2" in said[0] and "--calibrate" in said[0]
    assert run(watched, MID, y=value) == []


def test_what_calibration_saw_is_not_worth_a_word() -> None:
    assert run(Watched(Backend(), RANGES), MID, y=2.0, x=-10.0) == []


def test_a_peak_now_and_then_is_not_either() -> None:
    watched = Watched(Backend(), RANGES)
    runner = watched.open(MID, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in range(EVERY * ENOUGH * 4):
            runner.inputs["y"][:] = 9 if call % (EVERY * 40) == 0 else 1
            runner.run()
    assert watched.drift.beyond == pytest.approx(ENOUGH * 4 / 40, abs=1)
    assert watched.drift.looked == ENOUGH * 4


@pytest.mark.parametrize("rows", [(1,), (1, 4)])
@pytest.mark.parametrize("layers", [6, 11, 12, 24, 25, 29, 32, 37, 40, 61])
def test_every_group_has_its_turn(
    layers: int, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While tokens are decoded, in layer and in projection fusion: one call in EVERY is looked at, of each group as
    often, and hardly more of one token than of another: what is odd about one should not count many times."""
    looked: list[str] = []
    monkeypatch.setattr(Drift, "note", lambda self, group, ranges, inputs: looked.append(group))
    for number in (layers + 2, layers + 1):
        groups = [replace(MID, layer=layer) for layer in range(number)]
        watched = Watched(Backend(), {group.name: RANGES["mid.0"] for group in groups})
        runners = [{count: watched.open(group, count) for count in rows} for group in groups]
        each = []
        for _ in range(EVERY):
            looked.clear()
            for by_rows in runners:
                by_rows[1].run()
            each.append(list(looked))
        assert sorted(sum(each, [])) == sorted(group.name for group in groups)
        assert max(map(len, each)) - min(map(len, each)) <= 1


def test_groups_without_ranges_are_not_looked_at() -> None:
    watched = Watched(Backend(), RANGES)
    assert run(watched, HEAD, x=1e9) == [] and watched.drift.looked == 0


def test_inputs_that_calibration_saw_nothing_of_are_not_either() -> None:
    watched = Watched(Backend(), {"mid.0": {"y": 2.0, "x": 0.0}, "head": {"x": 0.0}})
    assert run(watched, MID, y=1.0, x=1e9) == [] and watched.drift.beyond == 0 < watched.drift.looked
    assert isinstance(watched.open(HEAD, 1), Runner)


def test_it_stands_for_its_backend() -> None:
    backend = Backend()
    watched = Watched(backend, RANGES)
    assert watched.name == "stand-in" and watched.row_counts(MID) == (1, 4)
    runner = watched.open(MID, 4)
    runner.inputs["x"][:] = 3
    assert (runner.run()["x_out"] == 3).all()
    watched.close()
    assert backend.closed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The head and one more projection in int8 for the RK3588, which has fp16 as well; fp16 for the RK3576."""
    folder = tmp_path_factory.mktemp("drift")
    write_model(folder / "model.pth", vocabulary=False)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(1, V, 200))
    (folder / "map.json").write_text('{"head": "w8a8", "blocks.0.att.output.weight": "w8a8"}')
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        for target, precision in (("rk3588", "mixed"), ("rk3588", "fp16"), ("rk3576", "fp16")):
            rwkv_npu.convert(
                folder / "model.pth",
                folder / "o",
                target=target,
                precision=precision,
                precision_map=folder / "map.json" if precision == "mixed" else None,
                rows=16,
                calibrate=[folder / "ids.npy"],
            )
    return open_bundle(folder / "o")


@pytest.mark.parametrize(
    ("name", "precision", "chip", "watched"),
    [
        ("rknn-sim", None, None, {"mid.0", "head"}),
        ("rknn-sim", "mixed", None, {"mid.0", "head"}),
        ("rknn-sim", "fp16", None, set()),  # calibrated, and not used
        ("rknn", None, "rk3588", {"mid.0", "head"}),
        ("rknn", None, "rk3576", set()),
        ("rknn-matmul", "w8a8", "rk3588", set()),  # chooses its ranges by each row
        ("numba", None, None, set()),
        ("numpy", "mixed", None, set()),
    ],
)
def test_only_groups_with_int8_are_watched(
    name: str,
    precision: str | None,
    chip: str | None,
    watched: set[str],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibration knows ranges of all groups, of those in fp16 as well."""
    assert bundle.manifest.int8_inputs.keys() > watched
    monkeypatch.setattr(hardware, "soc", lambda: chip)
    plain = Backend()
    plain.name = name
    source = BundleSource(bundle, precision=precision)
    backend = _watched(plain, source)
    opened = {group.name: backend.open(group, 1) for group in source.program.groups}
    assert {group for group, runner in opened.items() if isinstance(runner, WatchedRunner)} == watched
    assert watched or backend is plain
