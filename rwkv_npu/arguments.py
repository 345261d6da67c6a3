"""Checks of the Python API's arguments. Each raises UsageError with the argument's name, its range and its value."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable
from typing import Any

from rwkv_npu.errors import UsageError


def shown(value: object) -> str:
    """A value in a message: at most 40 characters of its repr, or its type where it has none."""
    try:
        return f"{value!r:.40}"
    except Exception:  # Python writes no whole number of more than 4300 digits
        return f"a {type(value).__name__}"


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Check that `value` is a finite number, or with `whole` an integer, between `low` and `high`."""
    a_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    try:
        if a_number and low <= value <= high and (whole or math.isfinite(value)):
            return
    except OverflowError:  # a whole number that no float holds
        pass
    number = "a whole number" if whole else "a number"
    allowed = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
    raise UsageError(f"{name}={shown(value)}: it must be {number} {allowed}")


def check_path(name: str, value: object) -> None:
    """Check that `value` is a str, or a path object that is not of bytes."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise UsageError(f"{name} must be a path, not {shown(value)}")
    if not os.fspath(value):
        raise UsageError(f"{name}= is empty: give the name of a file or folder")


def check_text(name: str, value: object) -> None:
    """Check that `value` is a str."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a str, not {shown(value)}")


def check_ids(name: str, ids: Iterable[Any], V: int) -> list[int]:
    """Return token ids as a list of ints, each of 0 to V - 1."""
    try:
        found = list(ids)
    except TypeError:
        raise UsageError(f"{name} must be a sequence of ids, not {shown(ids)}") from None
    for token in found:
        a_number = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        if not a_number or not 0 <= token < V:
            raise UsageError(f"{name} holds {shown(token)}: ids of this model are 0 to {V - 1}")
    return [int(token) for token in found]
