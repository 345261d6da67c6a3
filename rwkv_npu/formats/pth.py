"""Reads the tensors of a `.pth` file as views of the mapped file, without torch and without running pickled code.

`torch.save` writes a zip with uncompressed entries: `X/data.pkl`, a pickle of the dict of tensors, and `X/data/KEY`,
the bytes of each storage. The pickle is not loaded. pickletools decodes its opcodes and this module interprets them.
The few callables that tensors need are replaced by functions of this module; any other callable is refused.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_npu.errors import CheckpointError, first_line
from rwkv_npu.formats.safetensors import BFLOAT16, map_file

_MAX_PICKLE = 8 << 20  # bytes; a 7B model has 0.3 MB
_MAX_ENTRIES = 200_000
_MAX_INDEX = 2**48
_MAX_RANK = 8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")

_STORAGE_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Invalid(ValueError):
    """An error in the file. The caller adds the file's name to the message."""


class _Global(NamedTuple):
    """A Python name in the pickle. It is never imported."""

    module: str
    name: str


_MARK = object()


def read_pth(path: Path) -> dict[str, Any]:
    """Read the dict in a `.pth`: name -> read-only array (a view of the mapped file), or plain value.

    Raises CheckpointError, with one line, for any error in the file.
    """
    data = map_file(path)
    try:
        records = _records(data)
        folder = _folder(records)
        if data[slice(*records.get(f"{folder}/byteorder", (0, 0)))] == b"big":
            raise _Invalid("it was written on a big-endian machine; save it again on a little-endian one")
        start, stop = records[f"{folder}/data.pkl"]
        if stop - start > _MAX_PICKLE:
            raise _Invalid("its pickle is larger than that of any model")
        whole = np.frombuffer(data, np.uint8)
        storages = {
            name[len(folder) + 6 :]: whole[slice(*place)]
            for name, place in records.items()
            if name.startswith(f"{folder}/data/")
        }
        return _state_dict(_Interpreter(storages).run(data[start:stop]))
    except _Invalid as e:
        raise CheckpointError(f"{path}: {e}") from None


# -- the zip ---------------------------------------------------------------------------------------------


def _records(data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """The range (start, stop) of each entry's bytes in the file, by name."""
    try:
        with zipfile.ZipFile(_Reader(data)) as archive:
            infos = archive.infolist()
    except Exception as e:  # zipfile raises a dozen types for damaged files
        raise _Invalid(
            f"it is not a complete zip file ({first_line(e)}); was the download interrupted?"
        ) from None
    if len(infos) > _MAX_ENTRIES:
        raise _Invalid("it has more entries than any model")
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.filename in records:
            raise _Invalid(f"it holds two entries named {info.filename!r:.80}")
        records[info.filename] = _place(data, info)
    return records


def _place(data: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    entry = f"its entry {info.filename!r:.80}"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise _Invalid(f"{entry} is compressed or encrypted; save the checkpoint again with torch.save")
    if not 0 <= info.header_offset <= len(data) - _LOCAL_HEADER.size:
        raise _Invalid(f"{entry} lies outside of the file")
    fields = _LOCAL_HEADER.unpack_from(data, info.header_offset)
    if fields[0] != b"PK\x03\x04":
        raise _Invalid(f"{entry} has no header where the directory says")
    start = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
    stop = start + info.file_size
    if info.compress_size != info.file_size or stop > len(data):
        raise _Invalid(f"{entry} does not fit in the file; was the download interrupted?")
    return start, stop


class _Reader(io.RawIOBase):
    """A file object over a mapped file, for zipfile."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, len(self._data))[whence]
        if position < 0:
            raise OSError("seek before the start")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        stop = len(self._data) if size < 0 else min(self._position + size, len(self._data))
        result = self._data[self._position : stop]
        self._position = max(stop, self._position)
        return result


def _folder(records: dict[str, tuple[int, int]]) -> str:
    folders = [name[: -len("/data.pkl")] for name in records if name.endswith("/data.pkl")]
    if len(folders) != 1 or "/" in folders[0]:
        raise _Invalid("it is a zip file, but not one that torch.save wrote")
    if f"{folders[0]}/constants.pkl" in records:
        raise _Invalid("it is a TorchScript program, not a checkpoint")
    return folders[0]


# -- the pickle ------------------------------------------------------------------------------------------


class _Interpreter:
    """A stack machine for the pickle opcodes of a dict of tensors."""

    def __init__(self, storages: dict[str, np.ndarray]) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except _Invalid:
            raise
        except Exception as e:  # a damaged pickle can cause any error
            raise _Invalid(f"its pickle is damaged ({type(e).__name__})") from None
        raise _Invalid("its pickle does not end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise _Invalid("its pickle is damaged")
            stack.append(_Global(module, attribute))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in _ON_MARK:
            self._on_mark(name)
        elif name in ("SETITEM", "APPEND"):
            items = self._pop(2 if name == "SETITEM" else 1)
            self._extend(items)
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            self._pop(1)  # the attributes of an OrderedDict, such as the `_metadata` of a state dict
            if not isinstance(stack[-1], dict):
                raise _Invalid("its pickle sets the state of an object; only plain dicts of tensors are read")
        elif name == "NEWOBJ":
            _refuse_training(self._pop(2)[0])
            raise _Invalid("its pickle uses NEWOBJ; only plain dicts of tensors are read")
        elif name not in ("PROTO", "FRAME"):
            raise _Invalid(f"its pickle uses {name}; only plain dicts of tensors are read")

    def _pop(self, n: int) -> list[Any]:
        items = self._stack[len(self._stack) - n :]
        if len(items) != n or any(item is _MARK for item in items):
            raise _Invalid("its pickle is damaged")
        del self._stack[-n:]
        return items

    def _on_mark(self, name: str) -> None:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise _Invalid("its pickle is damaged")
        items = stack[at + 1 :]
        del stack[at:]
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(items)
        elif name == "DICT":
            stack.append({})
            self._extend(items)
        else:
            self._extend(items)

    def _extend(self, items: list[Any]) -> None:
        """Add items to the dict or list on top of the stack."""
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, dict) and len(items) % 2 == 0:
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, str):
                    raise _Invalid("its pickle has a dict with keys that are no names")
                target[key] = value
        else:
            raise _Invalid("its pickle is damaged")

    def _storage(self, identity: Any) -> np.ndarray:
        """The flat array of a persistent id: ("storage", class, key, device, number of elements)."""
        match identity:
            case ("storage", _Global() as kind, str(key), str(), int(count)) if 0 <= count < _MAX_INDEX:
                pass
            case _:
                raise _Invalid("its pickle refers to something that is not a tensor's storage")
        if kind.module not in ("torch", "torch.storage") or kind.name not in _STORAGE_DTYPES:
            raise _Invalid(f"it holds tensors of the unsupported type {'.'.join(kind)!r:.80}")
        dtype = _STORAGE_DTYPES[kind.name]
        if key not in self._storages:
            raise _Invalid(f"its entry data/{key!r:.80} is missing")
        data, nbytes = self._storages[key], count * dtype.itemsize
        if len(data) < nbytes:
            raise _Invalid(f"its entry data/{key!r:.80} has {len(data)} bytes; {nbytes} are referred to")
        return data[:nbytes].view(dtype)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING".split()
)
_ON_MARK = frozenset(["TUPLE", "LIST", "DICT", "SETITEMS", "APPENDS"])


# -- the callables ---------------------------------------------------------------------------------------


def _call(function: Any, arguments: Any) -> Any:
    known = _CALLABLES.get(function) if isinstance(function, _Global) else None
    if known is None or not isinstance(arguments, tuple):
        what = ".".join(function) if isinstance(function, _Global) else type(function).__name__
        _refuse_training(function)
        raise _Invalid(
            f"its pickle would call {what!r:.80}, which is not part of plain weights: refused. "
            "Save only the weights: torch.save(model.state_dict(), path)"
        )
    return known(*arguments)


def _refuse_training(function: Any) -> None:
    """Raises _Invalid for an object of a training framework, which saves more than weights."""
    if isinstance(function, _Global) and function.module.split(".")[0] in _TRAINERS:
        raise _Invalid(
            f"it is a training checkpoint ({'.'.join(function):.80}), which holds more than weights: load it where it "
            'was made, and torch.save its ["state_dict"]'
        )


def _ordered_dict(*items: Any) -> dict[str, Any]:
    if items:
        raise _Invalid("its pickle builds a dict in an unknown way")
    return {}


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> np.ndarray:
    """A strided view of a storage. Offset and strides are in elements, as in torch."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or not _indices((offset,)):
        raise _Invalid("its pickle describes a tensor that makes no sense")
    if not (_indices(shape) and _indices(stride) and len(stride) == len(shape) <= _MAX_RANK):
        raise _Invalid("its pickle describes a tensor that makes no sense")
    if math.prod(shape) == 0:
        return np.empty(tuple(min(n, 1) for n in shape), storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= len(storage) or math.prod(shape) > len(storage):
        raise _Invalid(f"a tensor of shape {shape} reaches beyond its storage of {len(storage)} elements")
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, offset * size, tuple(step * size for step in stride))


def _indices(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and 0 <= n < _MAX_INDEX for n in values)


_CALLABLES: dict[_Global, Callable[..., Any]] = {
    _Global("collections", "OrderedDict"): _ordered_dict,
    _Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Global("torch._utils", "_rebuild_parameter"): _parameter,
}

_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "deepspeed")
_WRAPPERS = ("model", "state_dict", "module")


def _state_dict(value: Any) -> dict[str, Any]:
    """The dict of weights: the pickled dict itself, or an inner dict under one of _WRAPPERS."""
    for key in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not any(isinstance(v, np.ndarray) for v in value.values()):
        raise _Invalid("it holds no tensors")
    return value
