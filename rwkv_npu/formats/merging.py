"""The maths of adapters: a matrix W (out, in) with its change.

    LoRA    W + s B A               A (r, in), B (out, r); s = alpha / r, which RWKV-PEFT does not store
    PiSSA   W + B A - B0 A0         A0 and B0 are the initial values, in a file of their own
    DoRA    m V / |V|, row by row   V = W + s B A, m (out,)
    Bone, DiSHA and MiSS change blocks W[a, b] of (r, r); a counts along the outputs, b along the inputs:
      repeat  W[a, b] + D[a].T              D (r, out)
      in      W[a, b] + W[a, b] D[b] + D[b] D (in / r, r, r)
      out     W[a, b] + W[a, b] D[a] + D[a] D (out / r, r, r), or (out, r) in the oldest files

The formulas are those of RWKV-PEFT and PEFT. A weight is merged in fp32, whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LOW_RANK = "low rank"
BLOCKS = {"in": "RWKV-PEFT's merge_bone.py", "out": "its first versions", "repeat": "DiSHA"}

_ROWS = 1024  # merged at a time


@dataclass(frozen=True)
class Target:
    """The change of one matrix.

    module: its name in the adapter's file. transposed: True if BlinkDL's files have the matrix as (in, out).
    parts: lora_A, lora_B, lora_magnitude_vector, first_A, first_B; or block.
    """

    module: str
    transposed: bool
    parts: dict[str, np.ndarray]

    @property
    def rank(self) -> int:
        if "lora_A" in self.parts:
            return self.parts["lora_A"].shape[0]
        block = self.parts["block"].shape
        return min(block) if len(block) == 2 else block[-1]

    def readings(self, out: int, into: int) -> set[str]:
        """The ways to read the parts that fit a matrix (out, into): {LOW_RANK}, or some of BLOCKS."""
        if "lora_A" in self.parts:
            r = self.rank
            shapes = {"A": (r, into), "B": (out, r), "r": (out,)}
            return {LOW_RANK} if all(p.shape == shapes[n[-1]] for n, p in self.parts.items()) else set()
        block = self.parts["block"].shape
        found = {"repeat"} if len(block) == 2 and block[1] == out else set()
        r = block[-1]
        if r == 0 or out % r or into % r:
            return found
        if block == (into // r, r, r):
            found.add("in")
        if block in ((out // r, r, r), (out, r)):
            found.add("out")
        return found

    def produce(self, base: Callable[[], np.ndarray], reading: str, scale: float) -> np.ndarray:
        """Like `merged`. base: a function that returns the weight of the base model."""
        return self.merged(base(), reading, scale)

    def merged(self, stored: np.ndarray, reading: str, scale: float) -> np.ndarray:
        """The weight `stored` with this change, in fp32 and in the same shape."""
        weight = np.array(stored.T if self.transposed else stored, np.float32, order="C")
        step = -(-_ROWS // self.rank) * self.rank  # whole blocks
        for start in range(0, len(weight), step):
            rows = slice(start, min(start + step, len(weight)))
            weight[rows] = self._rows(weight[rows], rows, reading, scale)
        return weight.T if self.transposed else weight

    def _rows(self, weight: np.ndarray, rows: slice, reading: str, scale: float) -> np.ndarray:
        parts = {name: np.asarray(part, np.float32) for name, part in self.parts.items()}
        if reading == LOW_RANK:
            weight = weight + np.float32(scale) * (parts["lora_B"][rows] @ parts["lora_A"])
            if "first_A" in parts:
                weight -= parts["first_B"][rows] @ parts["first_A"]
            if "lora_magnitude_vector" in parts:
                norm = np.linalg.norm(weight, axis=1, keepdims=True)
                weight *= parts["lora_magnitude_vector"][rows, None] / norm
            return weight
        block, into = parts["block"], weight.shape[1]
        if reading == "repeat":  # the last block may be cut short
            return weight + np.tile(block[:, rows].T, -(-into // len(block)))[:, :into]
        r = block.shape[-1]
        blocks = weight.reshape(-1, r, into // r, r).swapaxes(1, 2)  # (a, b, r, r)
        if reading == "out":
            block = block.reshape(-1, 1, r, r)[rows.start // r : rows.stop // r]
        blocks = blocks + blocks @ block + block
        return blocks.swapaxes(1, 2).reshape(weight.shape)
