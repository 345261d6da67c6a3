"""Small checkpoints to read, and to break."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_npu.errors import CheckpointError
from rwkv_npu.formats.checkpoint import open_checkpoint
from tools.make_checkpoint import make_checkpoint

SMALL: dict[str, Any] = {"D": 64, "L": 2, "N": 32, "V": 96}


def small(path: Path, generation: str, **options: Any) -> Path:
    make_checkpoint(path, generation=generation, **{**SMALL, **options})
    return path


def weights(path: Path, generation: str = "7", **options: Any) -> dict[str, torch.Tensor]:
    """A good checkpoint as a dict of tensors, to be broken."""
    return torch.load(small(path / f"good-{generation}.pth", generation, **options), weights_only=True)


def refused(path: Path, message: str = ".") -> str:
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(path)
    text = str(raised.value)
    assert "\n" not in text and str(path) in text and len(text) < 400
    text.encode()
    return text


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path
