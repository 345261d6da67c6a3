"""Inputs beyond the ranges of calibration are reported once, and only where they are common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest

from rwkv_npu.backends.base import allocate_inputs
from rwkv_npu.backends.drift import ENOUGH, EVERY, Watched
from rwkv_npu.opening import _watched
from rwkv_npu.spec import Group, Port

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
            runner.inputs["y"][:] = 9 if call % (EVERY * 40) == EVERY - 1 else 1
            runner.run()
    assert watched.drift.beyond == pytest.approx(ENOUGH * 4 / 40, abs=1)
    assert watched.drift.looked == ENOUGH * 4


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


@pytest.mark.parametrize(
    ("name", "asked", "there", "watched"),
    [
        ("rknn-sim", None, "w8a8", True),
        ("rknn-sim", "mixed", "mixed", True),
        ("rknn", "w8a8", "w8a8", True),
        ("rknn-sim", None, "fp16", False),  # calibrated, and not used
        ("rknn-sim", "fp16", "fp16", False),
        ("rknn-matmul", "w8a8", "w8a8", False),  # chooses its ranges by each row
        ("numba", None, "w8a8", False),
    ],
)
def test_only_fixed_ranges_are_watched(name: str, asked: str | None, there: str, watched: bool) -> None:
    backend = Backend()
    backend.name = name
    source = SimpleNamespace(precision_on=lambda backend: asked or there, int8_inputs=lambda: RANGES)
    assert isinstance(_watched(backend, source), Watched) == watched  # type: ignore[arg-type]


def test_a_model_without_ranges_is_not_watched() -> None:
    backend = Backend()
    backend.name = "rknn-sim"
    source = SimpleNamespace(precision_on=lambda backend: "w8a8", int8_inputs=dict)
    assert _watched(backend, source) is backend  # type: ignore[arg-type]
