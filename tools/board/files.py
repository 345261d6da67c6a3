"""Writes files with the outer structure of a `.rknn`, for the stand-in. They need no compiler and hold no graph."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from rwkv_npu.models.spec import Group


def write_rknn(path: Path, group: Group, rows: int, payload: dict[str, str]) -> None:
    """A file whose trailer describes the group, with its inputs in the reverse order.

    payload: its custom string, by which FakeLite and the stand-in know what to compute.
    """
    text = json.dumps(payload).encode()
    body = struct.pack("<I", len(text)) + text + b"\0"
    ports = [("input", n, port) for n, port in enumerate(group.fixed_inputs(rows)[::-1])]
    ports += [("output", n, port) for n, port in enumerate(group.outputs)]
    trailer = {
        "version": "2.5.0",
        "target_platform": ["rk3588"],
        "norm_tensor": [
            {"tensor_id": n, "url": port.name, "size": [rows, port.width]}
            for n, (_, _, port) in enumerate(ports)
        ],
        "graph": [
            {"left": kind, "left_tensor_id": position, "right_tensor_id": n}
            for n, (kind, position, _) in enumerate(ports)
        ],
    }
    text = json.dumps(trailer).encode()
    path.write_bytes(
        struct.pack("<4s4xQQ40x", b"RKNN", 6, len(body)) + body + struct.pack("<Q", len(text)) + text
    )
