"""Conversions for the CPU, and what comes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu

IDS = [5, 6, 7, 101, 102, 150, 260, 9]


def convert(checkpoint: Path, out: Path, **options: Any) -> Path:
    return rwkv_npu.convert(checkpoint, out, **{"target": "none", **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def outputs(path: Path, **options: Any) -> np.ndarray:
    """Logits after a prompt, and after each of two tokens more."""
    with rwkv_npu.load(path, **options) as model:
        logits, state = model.forward(IDS[:6], all_logits=True)
        steps = []
        for token in IDS[6:]:
            step, state = model.forward([token], state)
            steps.append(step)
    return np.concatenate([logits, np.stack(steps)])
