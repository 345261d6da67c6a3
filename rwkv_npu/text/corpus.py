"""Texts and token ids from files.

A file holds UTF-8 text or ids. Ids are a `.json` with a list of numbers, or a `.npy` with a row of integers. Callers
pass the model's tokenizer as a function `encode`.
"""

from __future__ import annotations

import importlib.resources
import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_npu.errors import UsageError, first_line
from rwkv_npu.formats.files import os_reason

Encode = Callable[[str], Sequence[int]]

IDS = (".json", ".npy")  # suffixes of files with ids
_MOST_AXES = 8
_BYTEWISE = 0.8  # tokens a byte; with more, the vocabulary encodes the text byte by byte


@dataclass(frozen=True)
class Tokens:
    """Ids (M,) int64, and the bytes of their text; None if the file holds ids only."""

    ids: np.ndarray
    bytes: int | None

    @property
    def bytewise(self) -> bool:
        """True if the vocabulary encodes nearly all of the text byte by byte."""
        return self.bytes is not None and len(self.ids) >= _BYTEWISE * self.bytes


def holds_ids(path: str) -> bool:
    """True for a file of ids, by its suffix. It needs no tokenizer."""
    return Path(path).suffix.lower() in IDS


def read_tokens(path: str, encode: Encode, *, raw: bool = False) -> Tokens:
    """The tokens of a file, or of stdin for `-`. raw: see `read_text`.

    Raises UsageError for a file that is empty or does not hold what its name says, and any error of `encode`.
    """
    if holds_ids(path):
        return Tokens(_read_ids(path), None)
    text = read_text(path, raw=raw)
    if "\0" in text:
        raise UsageError(f"{_name(path)} holds zero bytes: it is no text (ids come as .json or .npy)")
    if not text.strip():
        raise UsageError(f"{_name(path)} is empty: there is nothing to read")
    return Tokens(np.asarray(encode(text), np.int64), len(text.encode()))


def calibration_text(encode: Encode) -> Tokens:
    """The calibration text of the package: prose, code and many languages.

    Parts that the vocabulary encodes byte by byte are left out, because the model was not trained on them.
    """
    path = importlib.resources.files("rwkv_npu") / "data" / "calibration.txt"
    parts = [part + "\n\n" for part in path.read_text(encoding="utf-8").split("\n\n")]
    tokens = [Tokens(np.asarray(encode(part), np.int64), len(part.encode())) for part in parts]
    known = [part for part in tokens if not part.bytewise]
    if _bytes(known) < _bytes(tokens) / 2:  # the vocabulary encodes most parts byte by byte
        known = tokens
    return Tokens(np.concatenate([part.ids for part in known]), _bytes(known))


def held_out_text(encode: Encode) -> Tokens:
    """A text of the package that the demo model has not seen in its training."""
    held_out = importlib.resources.files("rwkv_npu") / "data" / "demo" / "heldout.txt"
    with importlib.resources.as_file(held_out) as file:
        return read_tokens(str(file), encode)


def _bytes(parts: list[Tokens]) -> int:
    return sum(part.bytes or 0 for part in parts)


def read_text(path: str, *, raw: bool = False) -> str:
    """Read a UTF-8 file, or stdin for `-`. Raises UsageError.

    A byte order mark is removed and line ends become newlines, with a warning: models were trained without them.
    raw: keep both.
    """
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{_name(path)} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}"
        ) from None
    return text if raw else _normalised(text, _name(path))


def _normalised(text: str, name: str) -> str:
    found = {"its byte order mark": text.startswith("\ufeff"), "carriage returns": "\r\n" in text}
    marks = [mark for mark, there in found.items() if there]
    if not marks:
        return text
    warnings.warn(f"{name} is read without {' and '.join(marks)} (raw=True keeps them)", stacklevel=3)
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read_ids(path: str) -> np.ndarray:
    """Read a file of ids as (M,) int64. Raises UsageError."""
    data = _read_bytes(path)
    try:
        ids = _parse_npy(data) if path.lower().endswith(".npy") else np.array(json.loads(data))
    except (ValueError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path} holds no token ids: {first_line(error)}") from error
    if ids.ndim != 1:
        raise UsageError(f"{path} holds no token ids: it takes one list of whole numbers")
    if not ids.size:
        raise UsageError(f"{path} is empty: there is nothing to read")
    if ids.dtype.kind not in "iu" or ids.max() > np.iinfo(np.int64).max:
        raise UsageError(f"{path} holds no token ids: its numbers are {ids.dtype}, and ids are whole numbers")
    return ids.astype(np.int64)


def _parse_npy(data: bytes) -> np.ndarray:
    """The array of a .npy file. Allocates no more than the file's size. Raises ValueError."""
    file, damaged = io.BytesIO(data), ValueError("it is no .npy file of numbers, as numpy.save writes it")
    try:
        major, _ = np.lib.format.read_magic(file)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[major]
        shape, _, dtype = read_header(file)
    except Exception:  # NumPy raises a dozen types for damaged headers
        raise damaged from None
    count, body = math.prod(shape), data[file.tell() :]
    if dtype.hasobject or dtype.itemsize == 0 or len(shape) > _MOST_AXES or min(shape, default=0) < 0:
        raise damaged
    if count * dtype.itemsize != len(body):
        raise ValueError(f"its header says {count * dtype.itemsize} bytes of numbers, but it has {len(body)}")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_bytes(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {_name(path)}: {os_reason(error)}") from error


def _name(path: str) -> str:
    return "stdin" if path == "-" else path
