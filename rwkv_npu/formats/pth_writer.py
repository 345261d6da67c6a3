"""Writes `.pth` files as torch.save does, without torch. `pth.py` reads them."""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.formats.safetensors import TensorPlan


def write_pth(path: Path, plans: list[TensorPlan], folder: str | None = None) -> None:
    """Write a file like `torch.save({name: tensor})`, one chunk in memory at a time. folder: its name in the zip."""
    folder = folder or path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", pickle_plans(plans)), ("byteorder", b"little"), ("version", b"3\n")):
            _write_entry(archive, f"{folder}/{name}", len(data), [data])
        for key, plan in enumerate(plans):
            nbytes = math.prod(plan.shape) * np.dtype(plan.dtype).itemsize
            produced = plan.produce()
            chunks = [produced] if isinstance(produced, np.ndarray) else produced
            data_chunks = (np.ascontiguousarray(c, plan.dtype).tobytes() for c in chunks)
            _write_entry(archive, f"{folder}/data/{key}", nbytes, data_chunks)


def _write_entry(archive: zipfile.ZipFile, name: str, nbytes: int, chunks: Any) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = nbytes
    assert archive.fp is not None
    # An extra field, which readers skip, makes the data of an entry start on a multiple of 64.
    data_at = archive.fp.tell() + 30 + len(name.encode()) + 4
    filler = -data_at % 64
    info.extra = struct.pack("<HH", 0x4246, filler) + bytes(filler)
    with archive.open(info, "w") as entry:
        for chunk in chunks:
            entry.write(chunk)


_STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}


def pickle_plans(plans: list[TensorPlan]) -> bytes:
    """The pickle (protocol 2) of a dict of tensors, tensor i in storage "i"."""
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    out = [b"\x80\x02}("]
    for key, plan in enumerate(plans):
        strides = [math.prod(plan.shape[i + 1 :]) for i in range(len(plan.shape))]
        storage = f"ctorch\n{_STORAGES[np.dtype(plan.dtype).name]}\n".encode()
        count = _pickle_int(math.prod(plan.shape))
        out += [_pickle_text(plan.name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [_pickle_text("storage"), storage, _pickle_text(str(key)), _pickle_text("cpu"), count, b"tQ"]
        out += [_pickle_int(0), b"(", *map(_pickle_int, plan.shape), b"t(", *map(_pickle_int, strides), b"t"]
        out += [b"\x89", ordered_dict, b"tR"]
    return b"".join([*out, b"u."])


def _pickle_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _pickle_int(n: int) -> bytes:
    return b"J" + struct.pack("<i", n) if n < 2**31 else b"\x8a\x08" + struct.pack("<q", n)
