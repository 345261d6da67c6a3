"""How wide a matrix may be for the NPU: wider ones are cut into parts, whose products are added up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil

# At more than one row Rockchip's compiler leaves the transposes of wider matrices to the board's CPU.
NPU_WIDTH = 8192
# K of a product in int8: wider ones the compiler cuts by itself for the RK3588, into parts with names and ranges of its
# own.
INT8_WIDTH = 3072


def cut(width: int, widest: int) -> list[int]:
    """The widths of as few equal parts as are no wider than `widest`, in steps of 32."""
    step = ceil(width / ceil(width / widest) / 32) * 32
    return [min(step, width - start) for start in range(0, width, step)]


def int8_parts(K: int) -> list[int]:
    """The widths in which a product in int8 goes through its K, for any number of rows."""
    return [part for wide in cut(K, NPU_WIDTH) for part in cut(wide, INT8_WIDTH)]


def spans(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Where parts of `widths`, side by side, begin and end."""
    return [(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]
