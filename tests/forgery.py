"""Bundles changed by somebody who also corrects every size, digest and checksum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.formats.bundle import MANIFEST, _checksum, record_file
from rwkv_npu.formats.safetensors import TensorFile, TensorPlan, write_tensors


def sign(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change the manifest, then make it agree with the files."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in manifest["files"]:
        record = record_file(bundle / name)
        manifest["files"][name] = {"size": record.size, "digest": record.digest}
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = _checksum(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def rewrite_tensors(bundle: Path, file: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Apply `change` to the tensors of a file (name -> array), write it, and correct the bundle's digests."""
    with TensorFile(bundle / file) as opened:
        arrays = {name: np.array(opened.array(name)) for name in opened.names}
    change(arrays)
    plans = [TensorPlan(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()]  # type: ignore[misc]
    write_tensors(bundle / file, plans)
    sign(bundle)
