"""RWKV-7 in PyTorch for training the demo model: official names and shapes, differentiable, batched.

This module knows no text and no files. Only the recurrence has two forms: `chunked` reads whole sequences, for
training. `stepwise` reads token after token, for sampling and as the reference for `chunked`.

Letters: B batch, T tokens, D embedding, H heads, N head size, F ffn size, V vocabulary, C tokens of a chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 32  # 1 / decay leaves fp32's range near 146 tokens
GROUP_NORM_EPS = 64e-5
SLOWEST_RATE = math.exp(-0.5)  # decay = exp(-SLOWEST_RATE * sigmoid(.)): never below 0.545


@dataclass(frozen=True)
class Size:
    vocabulary: int
    embedding: int = 192
    layers: int = 4
    ffn: int = 768
    head: int = 64
    decay_rank: int = 32
    rate_rank: int = 32
    value_rank: int = 32
    gate_rank: int = 64


class LayerState(NamedTuple):
    att_shift: Tensor  # (B, D)
    wkv: Tensor  # (B, H, N, N) as [value, key]
    ffn_shift: Tensor  # (B, D)


Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def stepwise(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S = S diag(w) - (S kappa)(kappa a)^T + v k^T; y = S r. All (B,T,H,N), state (B,H,N,N) -> y, state."""
    outputs = []
    for t in range(r.shape[1]):
        removed = (state @ kappa[:, t, :, :, None]) @ (kappa[:, t] * a[:, t])[:, :, None, :]
        written = v[:, t, :, :, None] @ k[:, t, :, None, :]
        state = state * log_w[:, t, :, None, :].exp() - removed + written
        outputs.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1), state


def chunked(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as `stepwise`, a chunk at a time. Only one (N,N) product a chunk is sequential.

    Within a chunk, with g = cumprod(w), alpha = -g/w kappa, beta = kappa a / g, and U the values that the
    removals write: U = (I - tril(alpha beta^T, -1))^-1 (alpha S^T + tril(alpha k^T, -1) V). This is affine
    in S^T, and so are the outputs and the next state.
    """
    batch, length, heads, size = r.shape
    count = -(-length // CHUNK)

    def cut(x: Tensor) -> Tensor:  # (B,T,H,N) -> (B,H,count,C,N); zeros after the end do not change S
        x = F.pad(x, (0, 0, 0, 0, 0, count * CHUNK - length))
        return x.view(batch, count, CHUNK, heads, size).permute(0, 3, 1, 2, 4)

    r, log_w, k, v, kappa, a = (cut(x) for x in (r, log_w, k, v, kappa, a))
    log_g = log_w.cumsum(dim=3)
    growth = (-log_g).exp()
    alpha, beta = -kappa * (log_g - log_w).exp(), kappa * a * growth
    k, r = k * growth, r * log_g.exp()
    decay = log_g[:, :, :, -1, :, None].exp()  # (B,H,count,N,1)

    system = (alpha @ beta.mT).tril(-1)
    sources = torch.cat([alpha, (alpha @ k.mT).tril(-1) @ v], dim=-1)
    # unitriangular: the diagonal is taken as ones
    solved = torch.linalg.solve_triangular(-system, sources, upper=False, unitriangular=True)
    by_state, constant = solved.split(size, dim=-1)  # U = by_state S^T + constant
    read = (r @ beta.mT).tril()
    out_by_state = r + read @ by_state
    out_constant = read @ constant + (r @ k.mT).tril() @ v
    next_by_state = decay * (beta.mT @ by_state)
    next_constant = decay * (beta.mT @ constant + k.mT @ v)

    transposed = state.mT  # [key, value]
    before = []
    for chunk in range(count):
        before.append(transposed)
        change = next_by_state[:, :, chunk] @ transposed
        transposed = decay[:, :, chunk] * transposed + change + next_constant[:, :, chunk]
    y = out_by_state @ torch.stack(before, dim=2) + out_constant
    y = y.permute(0, 2, 3, 1, 4).reshape(batch, count * CHUNK, heads, size)
    return y[:, :length], transposed.mT


class Projection(nn.Module):
    """x W^T, optionally in bf16 while training. CPUs with bf16 multiply eight times as fast in it."""

    def __init__(self, inputs: int, outputs: int, bound: float):
        super().__init__()
        self.in_bf16 = False
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_bf16 and self.training:
            return F.linear(x.bfloat16(), self.weight.bfloat16()).float()
        return F.linear(x, self.weight)


def _shifted(x: Tensor, previous: Tensor) -> Tensor:
    return torch.cat([previous[:, None], x[:, :-1]], dim=1)


def _low_rank(inputs: int, rank: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    second = torch.empty(rank, outputs)
    nn.init.orthogonal_(second, gain=0.1)
    return nn.Parameter(torch.zeros(inputs, rank)), nn.Parameter(second)


class TimeMix(nn.Module):
    def __init__(self, size: Size, layer: int):
        super().__init__()
        self.size, self.layer = size, layer
        width, heads = size.embedding, size.embedding // size.head
        depth = layer / max(1, size.layers - 1)  # 0 .. 1
        channel = torch.arange(width).view(1, 1, width) / width

        def mix(power: float) -> nn.Parameter:
            return nn.Parameter(1 - channel ** (power * (1 - layer / size.layers)))

        self.x_r, self.x_w, self.x_k = mix(0.2), mix(0.9), mix(0.7)
        self.x_v, self.x_a, self.x_g = mix(0.7), mix(0.9), mix(0.2)
        ramp = (torch.arange(width) / (width - 1)).view(1, 1, width) ** (0.85 + math.sqrt(depth))
        self.w0 = nn.Parameter(-6.5 + 5 * ramp)
        self.w1, self.w2 = _low_rank(width, size.decay_rank, width)
        self.a0 = nn.Parameter(torch.zeros(1, 1, width))
        self.a1, self.a2 = _low_rank(width, size.rate_rank, width)
        if layer > 0:
            self.v0 = nn.Parameter(torch.full((1, 1, width), 1.0))
            self.v1, self.v2 = _low_rank(width, size.value_rank, width)
        self.g1, self.g2 = _low_rank(width, size.gate_rank, width)
        with torch.no_grad():
            self.g2.mul_(10)  # the gate starts near sigmoid(0) times an orthogonal matrix, not near zero
        self.k_k = nn.Parameter(torch.full((1, 1, width), 0.85))
        self.k_a = nn.Parameter(torch.ones(1, 1, width))
        self.r_k = nn.Parameter(torch.zeros(heads, size.head))
        self.receptance = Projection(width, width, 0.5 / math.sqrt(width))
        self.key = Projection(width, width, 0.05 / math.sqrt(width))
        self.value = Projection(width, width, 0.5 / math.sqrt(width))
        self.output = Projection(width, width, 0.0)
        self.ln_x = nn.GroupNorm(heads, width, eps=GROUP_NORM_EPS)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / size.layers) ** 0.7)

    def forward(
        self, x: Tensor, v_first: Tensor | None, shift: Tensor, wkv: Tensor, recurrence: Recurrence
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,T,D), layer 0's values -> output (B,T,D), layer 0's values, next wkv."""
        batch, length, width = x.shape
        heads = (batch, length, width // self.size.head, self.size.head)
        delta = _shifted(x, shift) - x
        m_r, m_w, m_k = x + delta * self.x_r, x + delta * self.x_w, x + delta * self.x_k
        m_v, m_a, m_g = x + delta * self.x_v, x + delta * self.x_a, x + delta * self.x_g
        r, k, v = self.receptance(m_r), self.key(m_k), self.value(m_v)
        log_w = -SLOWEST_RATE * torch.sigmoid(self.w0 + torch.tanh(m_w @ self.w1) @ self.w2)
        a = torch.sigmoid(self.a0 + m_a @ self.a1 @ self.a2)
        g = torch.sigmoid(m_g @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + m_v @ self.v1 @ self.v2)
        kappa = F.normalize((k * self.k_k).view(heads), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, by_head = r.view(heads), k.view(heads), v.view(heads)
        y, wkv = recurrence(r, log_w.view(heads), k, by_head, kappa, a.view(heads), wkv)
        y = self.ln_x(y.reshape(batch * length, width)).view(heads)
        y = y + (r * k * self.r_k).sum(dim=-1, keepdim=True) * by_head
        return self.output(y.reshape(batch, length, width) * g), v_first, wkv


class ChannelMix(nn.Module):
    def __init__(self, size: Size, layer: int):
        super().__init__()
        channel = torch.arange(size.embedding).view(1, 1, size.embedding) / size.embedding
        self.x_k = nn.Parameter(1 - channel ** ((1 - layer / size.layers) ** 4))
        self.key = Projection(size.embedding, size.ffn, 0.5 / math.sqrt(size.embedding))
        self.value = Projection(size.ffn, size.embedding, 0.0)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.value(torch.relu(self.key(x + (_shifted(x, shift) - x) * self.x_k)) ** 2)


class Block(nn.Module):
    def __init__(self, size: Size, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(size.embedding)
        self.ln1 = nn.LayerNorm(size.embedding)
        self.ln2 = nn.LayerNorm(size.embedding)
        self.att = TimeMix(size, layer)
        self.ffn = ChannelMix(size, layer)


class DemoModel(nn.Module):
    """`state_dict()` has the names and shapes of an official RWKV-7 checkpoint."""

    def __init__(self, size: Size, dropout: float = 0.0):
        super().__init__()
        self.size, self.dropout = size, dropout
        self.emb = nn.Embedding(size.vocabulary, size.embedding)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # LN0 brings it to unit size
        self.blocks = nn.ModuleList(Block(size, layer) for layer in range(size.layers))
        self.ln_out = nn.LayerNorm(size.embedding)
        self.head = Projection(size.embedding, size.vocabulary, 0.5 / math.sqrt(size.embedding))

    def multiply_in_bf16(self, wanted: bool) -> None:
        """Choose whether training multiplies by the large matrices in bf16. Evaluation never does."""
        for module in self.modules():
            if isinstance(module, Projection):
                module.in_bf16 = wanted

    def new_state(self, batch: int) -> list[LayerState]:
        size = self.size
        device = self.emb.weight.device
        shift = torch.zeros(batch, size.embedding, device=device)
        wkv = torch.zeros(batch, size.embedding // size.head, size.head, size.head, device=device)
        return [LayerState(shift, wkv, shift) for _ in range(size.layers)]

    def forward(
        self, tokens: Tensor, state: list[LayerState] | None = None, recurrence: Recurrence = chunked
    ) -> tuple[Tensor, list[LayerState]]:
        """tokens (B,T) -> logits (B,T,V), state after the last token."""
        state = self.new_state(tokens.shape[0]) if state is None else state
        blocks = cast(list[Block], self.blocks)
        x = blocks[0].ln0(self.emb(tokens))
        v_first: Tensor | None = None
        after = []
        for block, old in zip(blocks, state, strict=True):
            h = block.ln1(x)
            change, v_first, wkv = block.att(h, v_first, old.att_shift, old.wkv, recurrence)
            x = x + F.dropout(change, self.dropout, self.training)
            h2 = block.ln2(x)
            x = x + F.dropout(block.ffn(h2, old.ffn_shift), self.dropout, self.training)
            after.append(LayerState(h[:, -1], wkv, h2[:, -1]))
        return self.head(self.ln_out(x)), after
