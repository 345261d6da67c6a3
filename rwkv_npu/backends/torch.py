"""PyTorch on the CPU, in fp32: the formulas of the model over tensors (extra `torch`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.errors import BackendError
from rwkv_npu.models.maths import LAYER_NORM_EPS
from rwkv_npu.models.spec import Group

_PROCESS = os.getpid()  # the process that has torch's threads: a fork of it would wait for them for ever


class TorchMaths:
    """`maths.Maths` over torch tensors. A weight is converted to fp32 at its first use."""

    def __init__(self, source: Source, prefix: str = "", tensors: dict[str, torch.Tensor] | None = None):
        self._source, self._prefix = source, prefix
        self._tensors = {} if tensors is None else tensors

    def block(self, layer: int) -> TorchMaths:
        return TorchMaths(self._source, f"blocks.{layer}.", self._tensors)

    def vector(self, name: str) -> torch.Tensor:
        full = self._prefix + name
        if full not in self._tensors:
            array = self._source.weight(full)
            # Copied even if it is fp32 already: torch takes no read-only memory.
            self._tensors[full] = torch.from_numpy(array.astype(np.float32, order="K", copy=True))
        return self._tensors[full]

    def linear(self, x: torch.Tensor, name: str, index: int | None = None) -> torch.Tensor:
        weight = self.vector(name)
        return x @ (weight if index is None else weight[index])

    def layer_norm(self, x: torch.Tensor, name: str, eps: float = LAYER_NORM_EPS) -> torch.Tensor:
        weight, bias = self.vector(name + ".weight"), self.vector(name + ".bias")
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    def shift(self, h: torch.Tensor, previous: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if len(h) == 1:
            return previous
        return torch.where(mask != 0, torch.cat([previous[:1], h[:-1]]), previous)

    def row_matmul(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        rank = x.shape[1]
        return (x[:, None, :] @ s.reshape(-1, rank, rank))[:, 0]


class TorchRunner:
    def __init__(self, source: Source, maths: TorchMaths, group: Group, rows: int):
        self._source, self._maths, self._group = source, maths, group
        self.inputs = allocate_inputs(group, rows)
        self._tensors: dict[str, Any] = {name: torch.from_numpy(x) for name, x in self.inputs.items()}

    @torch.no_grad()
    def run(self) -> Mapping[str, np.ndarray]:
        if os.getpid() != _PROCESS:
            raise BackendError(
                "torch has no threads in a process that was forked after it was loaded: start the process with spawn, "
                "or take another backend"
            )
        outputs = self._source.evaluate(self._group, self._maths, dict(self._tensors))
        return {name: tensor.numpy() for name, tensor in outputs.items()}


class TorchBackend:
    name = "torch"

    def __init__(self, source: Source, *, threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self._source, self._maths = source, TorchMaths(source)

    def row_counts(self, group: Group) -> None:
        return None

    def open(self, group: Group, rows: int) -> TorchRunner:
        return TorchRunner(self._source, self._maths, group, rows)

    def close(self) -> None:
        self._maths = TorchMaths(self._source)
