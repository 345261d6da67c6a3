"""Read the metadata of a `.rknn` file, without the compiler.

Layout, all little-endian: "RKNN", 4 zero bytes, u64 file version, u64 body size, zeros up to byte 64, the body (a
flatbuffer of code and weights), u64 size of the trailer, the trailer (JSON). Compilers 2.2.0 to 2.5.0 write version 6.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from rwkv_npu.errors import BundleError

_HEADER = struct.Struct("<4s4xQQ40x")
_LENGTH = struct.Struct("<Q")


def rknn_info(path: str | Path) -> dict[str, Any]:
    """Read the metadata of the `.rknn` file at `path`. The weights are not read.

    Keys: `file_version` (int), `version` (the compiler's), `targets` (list of platforms), `inputs` and `outputs`
    (lists of {"name", "shape"}, in the graph's order). Raises BundleError if it is not a complete `.rknn` file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_HEADER.size)
            if start[:4] != b"RKNN":
                raise BundleError(f"{path} is not an .rknn file")
            if len(start) < _HEADER.size:
                raise BundleError(f"{path} is cut off: {size} bytes are less than a header")
            _, file_version, body = _HEADER.unpack(start)
            trailer = _HEADER.size + body
            if trailer + _LENGTH.size > size:
                raise BundleError(
                    f"{path} is cut off: its header promises {trailer} bytes and a trailer, it has {size} bytes"
                )
            file.seek(trailer)
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if trailer + _LENGTH.size + length > size:
                raise BundleError(f"{path} is cut off inside its trailer")
            text = file.read(length)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    try:
        return {"file_version": file_version, **_describe(json.loads(text))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} has an unreadable trailer: {error!r}") from error


def _describe(trailer: dict[str, Any]) -> dict[str, Any]:
    tensors = {tensor["tensor_id"]: tensor for tensor in trailer["norm_tensor"]}
    ports: dict[str, list[dict[str, Any]]] = {"input": [], "output": []}
    for link in sorted(trailer["graph"], key=lambda link: link["left_tensor_id"]):
        tensor = tensors[link["right_tensor_id"]]
        ports[link["left"]].append({"name": str(tensor["url"]), "shape": [int(n) for n in tensor["size"]]})
    return {
        "version": str(trailer["version"]),
        "targets": [str(name) for name in trailer["target_platform"]],
        "inputs": ports["input"],
        "outputs": ports["output"],
    }
