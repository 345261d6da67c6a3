"""Read and check the fields of a JSON request. An error names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_npu.errors import UsageError

MANY_STOPS = 16
LONG_STOP = 256  # characters


class FieldError(UsageError):
    """An invalid or unsupported field. field: its name, which some clients show."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class Fields:
    """The JSON object of a request. A null field counts as absent, because clients send null for defaults."""

    def __init__(self, body: Any, where: str = ""):
        if not isinstance(body, Mapping):
            raise FieldError(where or "body", "it must be a JSON object")
        self._body, self._where = body, where

    @staticmethod
    def parse(data: bytes) -> Fields:
        """Parse a body. Raises FieldError if it is not a JSON object."""
        try:
            return Fields(json.loads(data))
        except (ValueError, RecursionError):
            raise FieldError("body", "it is not JSON") from None

    def has(self, name: str) -> bool:
        return self._body.get(name) is not None

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def error(self, name: str, message: str) -> FieldError:
        return FieldError(f"{self._where}{name}", message)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._body.get(name)
        if value is None:
            return default
        try:
            number = (
                float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            )
        except OverflowError:
            number = math.nan
        if not low <= number <= high:
            raise self.error(name, f"it must be a number from {low:g} to {high:g}")
        return number

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"it must be a whole number from {low} to {high}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._body.get(name, default)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(name, "it must be a string")
        return checked(value, self._where + name)

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise self.error(name, f"it must be one of {', '.join(choices)}")
        return value

    def objects(self, name: str) -> list[Fields]:
        value = self._body.get(name) or []
        if not isinstance(value, list):
            raise self.error(name, "it must be a list")
        return [Fields(item, f"{self._where}{name}[{i}].") for i, item in enumerate(value)]

    def object(self, name: str) -> Fields:
        return Fields(self._body.get(name) or {}, f"{self._where}{name}.")

    def stops(self, name: str) -> tuple[str, ...]:
        value = self._body.get(name) or []
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise self.error(name, "it must be a string or a list of strings")
        if len(stops) > MANY_STOPS or any(not 0 < len(stop) <= LONG_STOP for stop in stops):
            raise self.error(
                name, f"at most {MANY_STOPS} strings of 1 to {LONG_STOP} characters are supported"
            )
        return tuple(checked(stop, self._where + name) for stop in stops)

    def bias(self, name: str, V: int) -> dict[int, float]:
        """OpenAI's `logit_bias`: {"token id": a number from -100 to 100}."""
        fields = self.object(name)
        bias = {}
        for key in fields._body:
            if not (
                str(key).isascii() and str(key).isdigit() and int(str(key)[:9]) < V and len(str(key)) < 9
            ):
                raise self.error(name, f"{str(key)[:20]!r} is not a token id below {V}")
            bias[int(key)] = fields.number(key, 0.0, -100.0, 100.0)
        return bias


def checked(text: str, where: str) -> str:
    """Return `text`. Raises FieldError if it cannot be encoded as UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise FieldError(where, "it holds half of a surrogate pair, which is not valid text")
    return text
