"""Files of text and of ids: what is read, and what is said of those that hold something else."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.errors import UsageError
from rwkv_npu.text.corpus import Tokens, calibration_text, holds_ids, read_tokens


def by_character(text: str) -> list[int]:
    return [ord(character) for character in text]


def no_tokenizer(text: str) -> list[int]:
    raise AssertionError("ids need no tokenizer")


@pytest.fixture
def file(tmp_path: Path):
    def write(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_a_text(file) -> None:
    tokens = read_tokens(file("t.txt", "für\n"), by_character)
    assert tokens.ids.tolist() == by_character("für\n") and tokens.bytes == 5


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1))
def test_ids_come_back(tmp_path_factory: pytest.TempPathFactory, ids: list[int]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    (folder / "ids.json").write_text(json.dumps(ids))
    np.save(folder / "ids.npy", np.array(ids))
    for name in ("ids.json", "ids.npy"):
        tokens = read_tokens(str(folder / name), no_tokenizer)
        assert tokens.ids.tolist() == ids and tokens.ids.dtype == np.int64 and tokens.bytes is None


def test_names_tell_ids_from_text() -> None:
    assert [holds_ids(name) for name in ("a.json", "a.NPY", "a.txt", "-", "npy")] == [
        True,
        True,
        *[False] * 3,
    ]


def test_bytewise() -> None:
    assert Tokens(np.zeros(90, np.int64), 100).bytewise
    assert not Tokens(np.zeros(40, np.int64), 100).bytewise
    assert not Tokens(np.zeros(40, np.int64), None).bytewise


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.txt", b"", "is empty"),
        ("t.txt", b" \n\n", "is empty"),
        ("t.txt", b"PK\x03\x04\x00\x00", "zero bytes"),
        ("t.txt", b"\x7fELF\xff", "is not UTF-8 text: byte 0xff at 4"),
        ("t.json", b"", "holds no token ids"),
        ("t.json", b"[]", "is empty"),
        ("t.json", b"{}", "one list of whole numbers"),
        ("t.json", b"7", "one list of whole numbers"),
        ("t.json", b"[[1], [2]]", "one list of whole numbers"),
        ("t.json", b"[1, [2]]", "holds no token ids"),
        ("t.json", b"[1.5]", "its numbers are float64"),
        ("t.json", b'["a"]', "ids are whole numbers"),
        ("t.json", b"[1, 99999999999999999999]", "its numbers are object"),
        ("t.json", b"[18446744073709551615]", "ids are whole numbers"),
        ("t.json", b"[" * 100_000, "holds no token ids"),
        ("t.json", b"\xff\xfe", "holds no token ids"),
        ("t.npy", b"", "holds no token ids"),
        ("t.npy", b"not an array at all", "holds no token ids"),
    ],
)
def test_what_is_neither(file, name: str, content: bytes, said: str) -> None:
    path = file(name, content)
    with pytest.raises(UsageError, match=said) as raised:
        read_tokens(path, by_character)
    line = str(raised.value)
    assert path in line and "\n" not in line and len(line) < 400


def test_arrays_that_are_no_ids(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    for array in (np.zeros((2, 2), np.int64), np.zeros(3), np.array([{}], object)):
        np.save(path, array)
        with pytest.raises(UsageError, match="holds no token ids"):
            read_tokens(str(path), by_character)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("t.txt", "t.json", "t.npy"):
        with pytest.raises(UsageError, match="cannot read .*No such file"):
            read_tokens(str(tmp_path / name), by_character)


def test_the_default_text_leaves_out_languages_of_single_bytes() -> None:
    def latin(text: str) -> list[int]:  # half a token a byte, and one for each byte of other scripts
        return [0] * (len(text) // 2 if text.isascii() else len(text.encode()))

    everything, known = calibration_text(lambda text: [0] * len(text.split())), calibration_text(latin)
    assert everything.bytes > 100_000
    assert calibration_text(lambda text: list(text.encode())).bytes == everything.bytes
    assert 0.7 * everything.bytes < known.bytes < everything.bytes - 3000


def test_the_default_text_is_not_what_eval_reads() -> None:
    texts = [
        (importlib.resources.files("rwkv_npu") / "data" / name).read_text(encoding="utf-8")
        for name in ("calibration.txt", "demo/heldout.txt")
    ]
    lines, held_out = ({line for line in text.splitlines() if len(line) > 60} for text in texts)
    assert lines and held_out and not lines & held_out


def test_the_default_text_stays_the_same() -> None:
    """Published figures of int8 were measured with it: another text is a decision, with all of them measured anew."""
    text = (importlib.resources.files("rwkv_npu") / "data" / "calibration.txt").read_bytes()
    assert (
        hashlib.sha256(text).hexdigest() == "fe69f57888d5a164744be6e17917a37dec2bbacc698c246a7cb29e8784bbbb72"
    )


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2147483648,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': 'x', }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,",
        "(" * 5000,
        "",
    ],
)
def test_a_damaged_npy_file_is_refused_and_allocates_nothing(file, header: str) -> None:
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)
    with pytest.raises(UsageError, match="holds no token ids") as raised:
        read_tokens(file("ids.npy", data), no_tokenizer)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("data", [b"PK\x03\x04" + bytes(40), b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x09\x00"])
def test_a_file_that_is_not_npy_is_refused(file, data: bytes) -> None:
    with pytest.raises(UsageError, match="holds no token ids"):
        read_tokens(file("ids.npy", data), no_tokenizer)


def test_ids_of_any_length_and_depth_are_refused_in_one_line(file) -> None:
    for content in (f"[{10**400}]", "[" + "9" * 20 + "]", "[" * 100000):
        with pytest.raises(UsageError, match="holds no token ids") as raised:
            read_tokens(file("ids.json", content), no_tokenizer)
        assert len(str(raised.value)) < 400
