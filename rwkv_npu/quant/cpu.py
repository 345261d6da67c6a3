"""Quantised matrices for the CPU: blocks of a column share a scale, and memory order is the order of multiplication.

A matrix (K, N), used as x @ W, is cut into strips of LANES columns. The rows of a strip follow each other, so that a
product reads memory from front to back. BLOCK rows of a column share a scale in bfloat16; float16 has too few exponents
for small numbers.

    W[k, n] = scale[k // BLOCK, n] * (q[k, n] - zero)

    int8    q in 1 .. 255, zero 128: 64 bytes hold 4 rows of a strip, the 4 numbers of a column side by side
    int4    q in 0 .. 15, zero 8:    64 bytes hold 8 rows, rows 0-3 in the low nibbles and 4-7 in the high ones

K is padded with zeros to whole blocks, N to whole panels of four strips.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from rwkv_npu.models.spec import Kind, Tensor

BLOCK = 64  # rows that share a scale
LANES = 16  # columns of a strip
PANEL = 64  # columns that a gemm kernel computes at once

SCALE = np.dtype(ml_dtypes.bfloat16)

PRECISIONS = ("int8", "int4", "auto")  # auto: 8 or 4 bits by measured sensitivity
ZERO = {8: 128, 4: 8}

# int4: scales to try for a block, relative to its largest value divided by 8. The one with the smallest squared error
# wins: clipping the few largest values is worth it if all others are rounded more finely.
_CANDIDATES = np.linspace(0.80, 1.16, 10, dtype=np.float32)
_CHUNK = 1 << 22  # elements to quantise at a time


def bits_of(precision: str, tensor: Tensor) -> int:
    """Bits of a projection at a precision. In an int4 model, projections that feed the state keep 8 bits.

    Every later token reads an error in the state again. r, k, v and the low-rank projections feed the state; the others
    hold three quarters of the weights. For `auto` this is the most bits that a projection may have.
    """
    feeds_state = tensor.kind is not Kind.LINEAR or any(
        tensor.name.endswith(f".att.{name}.weight") for name in ("receptance", "key", "value")
    )
    return 8 if precision != "int4" or feeds_state else 4


@dataclass(frozen=True)
class Packed:
    """A quantised matrix.

    data: (strips, bytes of a strip) uint8. scales: (strips, padded K // BLOCK, LANES) of SCALE. shape: (K, N) without
    padding.
    """

    data: np.ndarray
    scales: np.ndarray
    shape: tuple[int, int]

    @property
    def padded_k(self) -> int:
        return int(self.scales.shape[1]) * BLOCK

    @property
    def bits(self) -> int:
        return int(self.data.shape[1]) * 8 // (self.padded_k * LANES)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


def padded(k: int, n: int) -> tuple[int, int]:
    """K and N rounded up to whole blocks and panels."""
    return -(-k // BLOCK) * BLOCK, -(-n // PANEL) * PANEL


def packed_shapes(k: int, n: int, bits: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of `data` and `scales` for a matrix (K, N)."""
    k, n = padded(k, n)
    return (n // LANES, k * LANES * bits // 8), (n // LANES, k // BLOCK, LANES)


def packed_bytes(tensor: Tensor, bits: int) -> int:
    """Bytes of a packed projection, including its scales."""
    *stack, k, n = tensor.used_shape
    shapes = packed_shapes(k, n, bits)
    return prod(stack) * (prod(shapes[0]) + prod(shapes[1]) * SCALE.itemsize)


def pack(weight: np.ndarray, bits: int) -> Packed:
    """Quantise a matrix (K, N) of any float type to 4 or 8 bits."""
    K, N = weight.shape
    step = max(PANEL, _CHUNK // max(K, 1) // PANEL * PANEL)
    parts = [_pack_columns(weight[:, start : start + step], bits) for start in range(0, N, step)]
    data, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Packed(data, scales, (K, N))


def unpack(packed: Packed) -> np.ndarray:
    """The dequantised matrix, (K, N) fp32."""
    q = stored_numbers(packed).astype(np.float32) - ZERO[packed.bits]
    values = q.reshape(len(q), -1, BLOCK, LANES) * packed.scales[:, :, None, :].astype(np.float32)
    K, N = packed.shape
    return np.ascontiguousarray(values.transpose(1, 2, 0, 3).reshape(packed.padded_k, -1)[:K, :N])


def stored_numbers(packed: Packed) -> np.ndarray:
    """The numbers q of every strip, (strips, padded K, LANES) uint8."""
    rows = 4 * 8 // packed.bits
    q = packed.data.reshape(-1, packed.padded_k // rows, LANES, 4)
    halves = [q] if packed.bits == 8 else [q & 15, q >> 4]
    # (strips, k // rows, halves, LANES, 4) -> the 4 numbers of a column one below the other
    return np.stack(halves, 2).swapaxes(-1, -2).reshape(len(q), -1, LANES)


def pack_floats(weight: np.ndarray) -> np.ndarray:
    """Arrange a matrix (K, N) of any float type in strips: (strips, K, LANES) of the same type, N in whole panels."""
    K, N = weight.shape
    strips = np.zeros((padded(K, N)[1] // LANES, K, LANES), weight.dtype)
    # Moving a row of 16 lanes as one element is several times as fast as moving single numbers.
    lane = np.dtype((np.void, LANES * weight.itemsize))
    step = max(PANEL, _CHUNK // max(K, 1) // PANEL * PANEL)
    for start in range(0, N, step):
        columns = np.ascontiguousarray(weight[:, start : start + step])
        first, whole = start // LANES, columns.shape[1] // LANES
        lanes = np.ascontiguousarray(columns[:, : whole * LANES]).view(lane)
        strips[first : first + whole].view(lane)[..., 0] = lanes.T
        if N % LANES and start + step >= N:
            strips[first + whole, :, : N % LANES] = columns[:, whole * LANES :]
    return strips


def pack_numbers(q: np.ndarray, scales: np.ndarray, bits: int, shape: tuple[int, int]) -> Packed:
    """Pack q, numbers minus their zero (padded K, N), with scales (padded K // BLOCK, N) of SCALE."""
    (k, n), N = padded(*shape), shape[1]
    whole = np.full((k, n), ZERO[bits], np.uint8)
    whole[:, :N] = q + ZERO[bits]
    wide = np.zeros((k // BLOCK, n), SCALE)
    wide[:, :N] = scales
    rows = 4 * 8 // bits
    # (strips, k // rows, halves, 4, LANES) -> the 4 numbers of a column side by side
    numbers = whole.reshape(k // rows, rows // 4, 4, n // LANES, LANES).transpose(3, 0, 1, 4, 2)
    data = numbers[:, :, 0] if bits == 8 else numbers[:, :, 0] | numbers[:, :, 1] << 4
    by_strip = wide.reshape(k // BLOCK, n // LANES, LANES).swapaxes(0, 1)
    return Packed(
        np.ascontiguousarray(data).reshape(n // LANES, -1), np.ascontiguousarray(by_strip), (shape[0], N)
    )


def _pack_columns(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise some columns of a matrix. Returns data and scales."""
    (K, N), k = weight.shape, padded(*weight.shape)[0]
    whole = np.zeros((k, N), np.float32)
    whole[:K] = weight
    blocks = whole.reshape(k // BLOCK, BLOCK, N)
    scales = best_scales(blocks, bits)
    q = rounded(blocks * inverse_of(scales)[:, None], bits).reshape(k, N)
    packed = pack_numbers(q, scales.astype(SCALE), bits, (K, N))
    return packed.data, packed.scales


def best_scales(blocks: np.ndarray, bits: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Choose the scales of blocks (blocks, BLOCK, N). Returns (blocks, N) fp32 that SCALE holds exactly.

    importance: weights of the squared errors, of a shape that broadcasts to the blocks.
    """
    if bits == 8:
        return _rounded_up(np.abs(blocks).max(1) / np.float32(127)).astype(np.float32)
    # int4 has one more number below zero than above. The sign of the scale gives it to the largest value.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    best, least = np.zeros(extreme.shape, np.float32), np.full(extreme.shape, np.inf, np.float32)
    for candidate in _CANDIDATES:
        scales = (extreme * (candidate / -8)).astype(SCALE).astype(np.float32)
        error = np.square(rounded(blocks * inverse_of(scales)[:, None], bits) * scales[:, None] - blocks)
        total = (error if importance is None else error * importance).sum(1)
        better = total < least
        best[better], least[better] = scales[better], total[better]
    return best


def _rounded_up(positive: np.ndarray) -> np.ndarray:
    """Round fp32 up to SCALE, so that no number exceeds the largest q."""
    bits = positive.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> 16).astype(np.uint16).view(SCALE)


def rounded(multiples: np.ndarray, bits: int) -> np.ndarray:
    """Round to whole numbers in the range of q minus its zero."""
    low = -8 if bits == 4 else -127
    return np.clip(np.rint(multiples), low, -low - (bits == 4))


def inverse_of(scales: np.ndarray) -> np.ndarray:
    """1 / scales, 0 where a scale is 0."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
