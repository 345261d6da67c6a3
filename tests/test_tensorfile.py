"""Safetensors reading and writing, against the safetensors library and against broken headers."""

import json
import os
import resource
import signal
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from rwkv_npu.errors import BundleError, CheckpointError
from rwkv_npu.formats.safetensors import ALIGNMENT, TensorFile, TensorPlan, write_tensors

ARRAYS = {
    "odd": np.arange(15, dtype=np.float32).reshape(3, 5),
    "half": np.linspace(-1, 1, 7, dtype=np.float16),
    "brain": np.arange(128).reshape(32, 4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.array(3.5, np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
    "ids": np.array([-1, 2**40], np.int64),
    "flags": np.array([True, False, True]),
}


def plans(arrays: dict[str, np.ndarray]) -> list[TensorPlan]:
    return [TensorPlan(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()]


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_round_trip_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    places = write_tensors(path, plans(ARRAYS), {"key": "value"})
    with TensorFile(path) as ours, safe_open(str(path), "pt") as theirs:
        assert set(ours.names) == set(ARRAYS) and "odd" in ours and "_pad.3" not in ours
        assert ours.metadata == theirs.metadata() == {"key": "value"}
        for name, expected in ARRAYS.items():
            array, entry = ours.array(name), ours.entry(name)
            assert array.dtype == expected.dtype and array.shape == expected.shape
            assert np.array_equal(array, expected)
            assert places[name] == (entry.offset, entry.nbytes)
            assert entry.offset % ALIGNMENT == 0
            assert np.array_equal(theirs.get_tensor(name).double().numpy(), expected.astype(np.float64))


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file({k: v for k, v in ARRAYS.items() if k != "brain"}, tmp_path / "x", {"a": "b"})
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata == {"a": "b"}
        for name in file.names:
            assert np.array_equal(file.array(name), ARRAYS[name])


def test_chunks_and_casts(tmp_path: Path) -> None:
    whole = np.arange(60.0).reshape(12, 5)
    tensors = [("t", np.float16, (12, 5), lambda: (whole[i : i + 5] for i in range(0, 12, 5)))]
    write_tensors(tmp_path / "x", tensors)
    assert np.array_equal(TensorFile(tmp_path / "x").array("t"), whole.astype(np.float16))


def test_arrays_are_views_that_outlive_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", plans(ARRAYS))
    file = TensorFile(tmp_path / "x")
    array = file.array("odd")
    assert not array.flags.writeable and not array.flags.owndata
    file.close()
    assert np.array_equal(array, ARRAYS["odd"])
    with pytest.raises(ValueError, match="closed"):
        file.array("odd")


def test_few_fillers(tmp_path: Path) -> None:
    arrays = {f"{i}.{n}": np.zeros(n, np.float32) for i in range(20) for n in (16, 64, 3)}
    write_tensors(tmp_path / "x", plans(arrays))
    with safe_open(str(tmp_path / "x"), "np") as theirs:
        assert len([name for name in theirs.keys() if name.startswith("_pad.")]) == 19  # noqa: SIM118
    assert len(TensorFile(tmp_path / "x").names) == 60


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    def broken() -> np.ndarray:
        raise RuntimeError("no")

    path = tmp_path / "x"
    with pytest.raises(RuntimeError):
        write_tensors(path, [TensorPlan("a", "f4", (2,), broken)])
    with pytest.raises(ValueError, match="4 bytes produced, 8 expected"):
        write_tensors(path, [("a", "f4", (2,), lambda: np.zeros(1))])
    assert not path.exists()
    for names in (["a", "a"], ["_pad.1"], ["__metadata__"]):
        with pytest.raises(ValueError):
            write_tensors(path, [(name, "f4", (2,), lambda: np.zeros(2)) for name in names])
    assert not path.exists()


def test_full_disk_is_an_oserror(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk."""
    path, big = tmp_path / "x", np.zeros(1 << 16, np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(OSError):
            write_tensors(path, [("a", "f4", big.shape, lambda: big)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not path.exists()


def test_only_regular_files_are_removed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError):  # a pipe cannot tell its position
            write_tensors(fifo, [("a", "f4", (2,), lambda: np.zeros(2))])
    finally:
        os.close(reader)
    assert fifo.exists()


BAD = {
    "no header": b"",
    "not JSON": b"{nope}",
    "not UTF-8": b'{"\xff": 1}',
    "not an object": b"[1, 2]",
    "nested": b"[" * 100_000,
    "duplicate": b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":1}',
    "metadata": {"__metadata__": {"a": 1}},
    "entry": {"x": 3},
    "lacking": {"x": {"dtype": "F32"}},
    "dtype": one("F99"),
    "dtype type": one([1]),
    "shape type": one(shape="ab"),
    "negative": one(shape=[-2, -1]),
    "float": one(shape=[2.0]),
    "bool": one("U8", [True], [0, 1]),
    "rank": one(shape=[1] * 9 + [2]),
    "huge": one(shape=[0, 2**70], offsets=[0, 0]),
    "digits": b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "size": one(shape=[3]),
    "offsets": one(offsets=[8, 0]),
    "one offset": one(offsets=[8]),
    "hole": one(offsets=[8, 16]),
    "beyond": one(shape=[2**40], offsets=[0, 2**42]),
    "surplus": {},
    "overlap": {**one(), "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
    "surrogate": {**one(), "\ud800\n": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
}


@pytest.mark.parametrize("header", BAD.values(), ids=BAD.keys())
def test_bad_headers(tmp_path: Path, header: Any) -> None:
    path = raw_file(tmp_path / "x", header, bytes(16))
    with pytest.raises(CheckpointError) as raised:
        TensorFile(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    str(raised.value).encode()
    with pytest.raises(BundleError):
        TensorFile(path, error=BundleError)


def test_bad_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"1234")
    (tmp_path / "long").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    for name in ("missing", ".", "fifo", "empty", "short", "long", "nul\0"):
        with pytest.raises(CheckpointError):
            TensorFile(tmp_path / name)
    write_tensors(tmp_path / "good", plans(ARRAYS))
    with pytest.raises(CheckpointError, match="no tensor 'nonsense'"):
        TensorFile(tmp_path / "good").array("nonsense")
    data = (tmp_path / "good").read_bytes()
    for size in range(0, len(data), 23):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            TensorFile(tmp_path / "cut")


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8"]) | HEADERS,
        "shape": st.lists(st.integers(-1, 2**65), max_size=10) | HEADERS,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=1, max_size=3) | HEADERS,
    }
)


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | HEADERS.map(lambda header: json.dumps(header).encode())
    | st.dictionaries(st.text(), ENTRIES, max_size=3).map(lambda header: json.dumps(header).encode())
)
@example(b"{}")
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = raw_file(tmp_path_factory.getbasetemp() / "any", header, bytes(8))
    try:
        with TensorFile(path) as file:
            assert all(file.array(name).shape == file.entry(name).shape for name in file.names)
    except CheckpointError as e:
        assert "\n" not in str(e)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    if not path.exists():
        write_tensors(path.with_suffix(".good"), plans(ARRAYS))
    data = bytearray(path.with_suffix(".good").read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        with TensorFile(path) as file:
            for name in file.names:
                file.array(name).tobytes()
    except CheckpointError as e:
        assert "\n" not in str(e)
