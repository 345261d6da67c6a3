"""Read what a `.rknn` file says of itself, without the compiler.

Layout: "RKNN", 4 zero bytes, u64 file version, u64 body size, zeros up to byte 64, the body (a flatbuffer
with code and weights), u64 size of the trailer, the trailer (JSON). All little-endian. Compilers 2.2.0 to
2.5.0 write version 6.
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
    """What the file at `path` says of itself; the weights are not read.

    Keys: `file_version` (int), `version` (the compiler's), `targets` (list of platforms), `inputs` and
    `outputs` (lists of {"name", "shape"}, in the graph's order). Raises BundleError if it is not a whole
    `.rknn` file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_HEADER.size)
            if start[:4] != b"RKNN":
                raise BundleError(f"{path} is not an .rknn file")
            if len(start) < _HEADER.size:
                raise BundleError(f"{path} is cut off: it has {size} bytes")
            _, file_version, body = _HEADER.unpack(start)
            trailer = _HEADER.size + body
            if trailer + _LENGTH.size > size:
                raise BundleError(
                    f"{path} is cut off: {trailer} bytes and a trailer were written, {size} are there"
                )
            file.seek(trailer)
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if trailer + _LENGTH.size + length > size:
                raise BundleError(f"{path} is cut off within its trailer")
            text = file.read(length)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    try:
        return {"file_version": file_version, **_describe(json.loads(text))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} has a trailer that cannot be understood: {error!r}") from error


def _describe(trailer: dict[str, Any]) -> dict[str, Any]:
    tensors = {tensor["tensor_id"]: tensor for tensor in trailer["norm_tensor"]}
    found: dict[str, list[dict[str, Any]]] = {"input": [], "output": []}
    for link in sorted(trailer["graph"], key=lambda link: link["left_tensor_id"]):
        tensor = tensors[link["right_tensor_id"]]
        found[link["left"]].append({"name": str(tensor["url"]), "shape": [int(n) for n in tensor["size"]]})
    return {
        "version": str(trailer["version"]),
        "targets": [str(name) for name in trailer["target_platform"]],
        "inputs": found["input"],
        "outputs": found["output"],
    }
