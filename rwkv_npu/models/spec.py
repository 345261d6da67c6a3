"""The dimensions of a model, the table of its tensors, and its partition into groups.

One table of tensors feeds the checkpoint reader (required names and shapes), the converter (projections, and tensors
that stay on the host) and the runtime. One table of groups feeds the graphs and the code that runs them. This module
knows no file format, no formula and no backend.

A *group* is a part of the maths that a backend runs in one call. *Fusion* is how the maths is partitioned into groups:
see `groups`.

Letters used everywhere:
    D embedding width   L layers   V vocabulary   A attention width (H*N; D in all official models)
    H heads   N head size   F channel-mix width   M rows of a call: tokens of one or more sequences (`rows.py`)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from math import prod
from typing import Any

import numpy as np

from rwkv_npu.errors import UsageError

GENERATIONS = ("4", "5.0", "5.1", "5.2", "6", "7", "7a")
FUSIONS = ("layer", "projection")
STACKED = 5  # mixes of v6 that share one matrix


class Kind(Enum):
    """The use of a tensor. It decides where the tensor is kept, and its layout in a checkpoint."""

    VECTOR = "vector"  # norms, mixes, decays: on the host in fp32; on disk in any shape of the same size
    LINEAR = "linear"  # a projection, on disk (out, in), used as x @ W.T
    LOW_RANK = "low-rank"  # a projection, on disk (in, out), used as x @ W; 3-D is a stack of them
    STACK = "stack"  # five projections side by side, on disk (in, 5*out), used as (5, in, out)
    TABLE = "table"  # rows looked up by token
    HOST_LINEAR = "host-linear"  # as LINEAR, but multiplied on the host

    @property
    def is_projection(self) -> bool:
        return self in (Kind.LINEAR, Kind.LOW_RANK, Kind.STACK)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: BlinkDL's name, its kind, and its shape on disk. optional: it may be missing."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    optional: bool = False

    @property
    def used_shape(self) -> tuple[int, ...]:
        """The shape in which the maths uses the tensor: (in, out) or (count, in, out) for projections."""
        if self.kind is Kind.STACK:
            rows, columns = self.shape
            return (STACKED, rows, columns // STACKED)
        return self.shape[::-1] if self.kind is Kind.LINEAR else self.shape

    def used(self, stored: np.ndarray) -> np.ndarray:
        """A projection or table as stored on disk -> a view of it in `used_shape`."""
        if self.kind is Kind.STACK:
            return stored.reshape(len(stored), STACKED, -1).swapaxes(0, 1)
        return stored.T if self.kind is Kind.LINEAR else stored


@dataclass(frozen=True)
class Spec:
    """Generation and dimensions of a model, read once from the names and shapes of its tensors.

    ranks: the low ranks by name: v6 `mix`, `decay`; v7 `w`, `a`, `v`, `g`; 7a also `s` (DeepEmbed).
    """

    generation: str
    D: int
    L: int
    H: int
    N: int
    A: int
    F: int
    V: int
    ranks: dict[str, int] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Spec:
        return Spec(**data)

    @property
    def parameters(self) -> int:
        """Number of parameters, without optional tensors."""
        return sum(prod(t.shape) for t in tensors(self) if not t.optional)


@dataclass(frozen=True)
class Scaling:
    """Powers of two that prevent overflow in fp16 graphs and do not change the result.

    ffn: the channel mix computes (relu(k/ffn))^2 and multiplies its product by ffn^2.
    residual_every: layer i computes with a residual divided by 2^(i // residual_every); 0: not divided. This is
        BlinkDL's method for fp16. It is exact, because LayerNorm's epsilon is scaled too.
    layers: (ffn, factor on the residual) of every layer, chosen from activation statistics of a text. If given,
        `ffn` and `residual_every` are not used.
    """

    ffn: float = 1.0
    residual_every: int = 0
    layers: tuple[tuple[float, float], ...] = ()

    def channel_mix(self, layer: int) -> float:
        return self.layers[layer][0] if self.layers else self.ffn

    def residual(self, layer: int) -> float:
        if self.layers:
            return self.layers[layer][1]
        return 2.0 ** -(layer // self.residual_every) if self.residual_every else 1.0

    @staticmethod
    def from_json(data: dict[str, Any]) -> Scaling:
        layers = tuple((float(ffn), float(residual)) for ffn, residual in data.get("layers", ()))
        return Scaling(data["ffn"], data["residual_every"], layers)


def default_scaling(spec: Spec) -> Scaling:
    """The scaling of a generation without activation statistics. The residual of v4 to v6 grows from layer to layer."""
    return Scaling(ffn=4.0, residual_every=6 if spec.generation[0] in "456" else 0)


# -- tensors ---------------------------------------------------------------------------------------------

_V4 = """
att.time_decay vector A        | att.time_first vector A
att.time_mix_k vector D        | att.time_mix_v vector D       | att.time_mix_r vector D
att.key.weight linear A,D      | att.value.weight linear A,D   | att.receptance.weight linear A,D
att.output.weight linear D,A
ffn.time_mix_k vector D        | ffn.time_mix_r vector D
ffn.key.weight linear F,D      | ffn.receptance.weight linear D,D | ffn.value.weight linear D,F
"""
_V5_0 = _V4.replace("att.time_decay vector A", "att.time_decay vector H").replace(
    "att.time_first vector A", "att.time_faaaa vector H | att.ln_x.weight vector A | att.ln_x.bias vector A"
)
_V5_1 = _V5_0 + "att.time_mix_g vector D | att.gate.weight linear A,D"
_V5_2 = _V5_1.replace("time_decay vector H", "time_decay vector H,N").replace(
    "time_faaaa vector H", "time_faaaa vector H,N"
)
_V6 = """
att.time_maa_x vector D | att.time_maa_w vector D | att.time_maa_k vector D
att.time_maa_v vector D | att.time_maa_r vector D | att.time_maa_g vector D
att.time_maa_w1 stack D,5*mix | att.time_maa_w2 low-rank 5,mix,D
att.time_decay vector A | att.time_decay_w1 low-rank D,decay | att.time_decay_w2 low-rank decay,A
att.time_faaaa vector H,N
att.receptance.weight linear A,D | att.key.weight linear A,D | att.value.weight linear A,D
att.gate.weight linear A,D | att.output.weight linear D,A
att.ln_x.weight vector A | att.ln_x.bias vector A
ffn.time_maa_k vector D | ffn.time_maa_r vector D
ffn.key.weight linear F,D | ffn.receptance.weight linear D,D | ffn.value.weight linear D,F
"""
_V7 = """
att.x_r vector D | att.x_w vector D | att.x_k vector D | att.x_v vector D | att.x_a vector D | att.x_g vector D
att.w0 vector A | att.w1 low-rank D,w | att.w2 low-rank w,A
att.a0 vector A | att.a1 low-rank D,a | att.a2 low-rank a,A
att.v0 vector A | att.v1 low-rank D,v | att.v2 low-rank v,A
att.g1 low-rank D,g | att.g2 low-rank g,A
att.k_k vector A | att.k_a vector A | att.r_k vector H,N
att.receptance.weight linear A,D | att.key.weight linear A,D | att.value.weight linear A,D
att.output.weight linear D,A
att.ln_x.weight vector A | att.ln_x.bias vector A
ffn.x_k vector D | ffn.key.weight linear F,D | ffn.value.weight linear D,F
"""
_V7A = (
    _V7
    + """
ffn.s_emb.weight table V,s*s | ffn.s_emb_x.weight host-linear s*s,D
ffn.s1 low-rank D,s | ffn.s2 low-rank s,F | ffn.s0 vector F
"""
)
_LAYER_TABLES = {"4": _V4, "5.0": _V5_0, "5.1": _V5_1, "5.2": _V5_2, "6": _V6, "7": _V7, "7a": _V7A}
_LAYER_NORMS = "ln1.weight vector D | ln1.bias vector D | ln2.weight vector D | ln2.bias vector D"
_TOP = """
emb.weight table V,D | blocks.0.ln0.weight vector D | blocks.0.ln0.bias vector D
ln_out.weight vector D | ln_out.bias vector D | head.weight linear V,D
"""


def _parse(table: str) -> list[tuple[str, Kind, tuple[str, ...]]]:
    rows = [entry.split() for line in table.splitlines() for entry in line.split("|") if entry.strip()]
    return [(name, Kind(kind), tuple(dims.split(","))) for name, kind, dims in rows]


def layer_table(generation: str) -> list[tuple[str, Kind, tuple[str, ...]]]:
    """Tensors of one layer as (name within the layer, kind, dimensions by letter or rank name)."""
    return _parse(_LAYER_NORMS) + _parse(_LAYER_TABLES[generation])


def _size(spec: Spec, dim: str) -> int:
    """Size of a dimension such as `D`, `w`, `5*mix` or `5`."""
    sizes = []
    for factor in dim.split("*"):
        if factor.isdigit():
            sizes.append(int(factor))
        else:
            sizes.append(spec.ranks[factor] if factor in spec.ranks else getattr(spec, factor))
    return prod(sizes)


def tensors(spec: Spec) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of this spec may hold, in layer order."""
    for name, kind, dims in _parse(_TOP):
        yield Tensor(name, kind, tuple(_size(spec, d) for d in dims))
    table = layer_table(spec.generation)
    for layer in range(spec.L):
        for name, kind, dims in table:
            # v7 mixes v with the v of layer 0. Layer 0 itself mixes nothing and does not use these.
            unused = layer == 0 and name in ("att.v0", "att.v1", "att.v2")
            shape = tuple(_size(spec, d) for d in dims)
            yield Tensor(f"blocks.{layer}.{name}", kind, shape, optional=unused)
        if spec.generation != "4":
            state = (spec.H, spec.N, spec.N)
            yield Tensor(f"blocks.{layer}.att.time_state", Kind.VECTOR, state, optional=True)


def state_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of the recurrent state of one layer and one sequence, by name. All are fp32.

    `att.wkv` is (H, N, N) in the order [v, k] for every generation that has it.
    """
    if spec.generation == "4":
        shapes: dict[str, tuple[int, ...]] = {"att.a": (spec.A,), "att.b": (spec.A,), "att.q": (spec.A,)}
    else:
        shapes = {"att.wkv": (spec.H, spec.N, spec.N)}
    return {"att.shift": (spec.D,), **shapes, "ffn.shift": (spec.D,)}


# -- groups ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Port:
    """An input or output of a group: (M, width) fp32."""

    name: str
    width: int


MASK = Port("mask", 1)  # an input of layer fusion's groups: see `maths.Maths.shift`


@dataclass(frozen=True)
class Group:
    """A part of the maths that a backend runs in one call.

    role: its position in the model, such as `mid` or `head`. layer: the layer of its first input, -1 for the head.
    """

    role: str
    layer: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def name(self) -> str:
        return self.role if self.layer < 0 or self.role in ("first", "last") else f"{self.role}.{self.layer}"

    def fixed_inputs(self, rows: int) -> tuple[Port, ...]:
        """The inputs of a graph for a fixed number of rows. A graph for one row has no mask: no row precedes it."""
        return tuple(port for port in self.inputs if rows > 1 or port != MASK)


_ATT_OUTPUTS = {
    "4": "r k v",
    "5.0": "r k v",
    "5.1": "r k v g",
    "5.2": "r k v g",
    "6": "r w k v g",
    "7": "r w k v a g vmix",  # vmix mixes in the values of layer 0; layer 0 has no vmix
    "7a": "r w k v a g vmix",
}
_ATT_INPUTS = {
    "4": "xr xk xv",
    "5.0": "xr xk xv",
    "5.1": "xr xk xv xg",
    "5.2": "xr xk xv xg",
    "6": "h dx",  # the mixes are computed from the data by projections, inside the group
    "7": "xr xw xk xv xa xg",
    "7a": "xr xw xk xv xa xg",
}
_FFN_INPUTS = {
    "4": "xk xr",
    "5.0": "xk xr",
    "5.1": "xk xr",
    "5.2": "xk xr",
    "6": "xk xr",
    "7": "xk",
    "7a": "xk h s",
}


def att_outputs(spec: Spec, layer: int) -> tuple[Port, ...]:
    """Outputs of the attention projections of a layer, (M, A) each: the inputs of its recurrence."""
    names = _ATT_OUTPUTS[spec.generation].split()
    return tuple(Port(name, spec.A) for name in names if name != "vmix" or layer > 0)


def att_inputs(spec: Spec) -> tuple[Port, ...]:
    """Inputs of `att.in`, (M, D) each, mixed on the CPU: they feed the attention projections."""
    return tuple(Port(name, spec.D) for name in _ATT_INPUTS[spec.generation].split())


def ffn_inputs(spec: Spec) -> tuple[Port, ...]:
    """Inputs of `ffn`: they feed the channel mix."""
    names = _FFN_INPUTS[spec.generation].split()
    return tuple(deep_embedding(spec) if name == "s" else Port(name, spec.D) for name in names)


def deep_embedding(spec: Spec) -> Port:
    """7a's input `s`: an (R, R) matrix for each token, row-major, looked up on the host."""
    return Port("s", spec.ranks["s"] ** 2)


def fused_inputs(spec: Spec) -> tuple[Port, ...]:
    """Inputs of the fused forward: the embedding and, in 7a, a matrix for each layer."""
    deep = [replace(deep_embedding(spec), name=f"s.{i}") for i in range(spec.L) if spec.generation == "7a"]
    return (Port("x", spec.D), *deep)


def check_fusion(fusion: str) -> None:
    """Raises UsageError for an unknown fusion."""
    if fusion not in FUSIONS:
        raise UsageError(f"fusion={fusion!r} is unknown: use one of {', '.join(FUSIONS)}")


def groups(spec: Spec, fusion: str) -> list[Group]:
    """The groups of a model, in the order in which they run.

    layer: `first`, L-1 x `mid.i` (from recurrence i to i+1), `last`, `head`: L+2 calls a token.
    projection: `att.in.i`, `att.out.i`, `ffn.i` per layer, `head`: 3L+1 calls a token.
    """
    x, y = Port("x", spec.D), Port("y", spec.A)
    out = Port("out", spec.D)
    head = Group("head", -1, (x,), (Port("logits", spec.V),))
    if fusion == "projection":
        per_layer = (
            (
                Group("att.in", i, att_inputs(spec), att_outputs(spec, i)),
                Group("att.out", i, (y,), (out,)),
                Group("ffn", i, ffn_inputs(spec), (out,)),
            )
            for i in range(spec.L)
        )
        return [group for layer in per_layer for group in layer] + [head]
    check_fusion(fusion)
    att_prev, ffn_prev = Port("att_prev", spec.D), Port("ffn_prev", spec.D)
    att_h, ffn_h, x_out = Port("att_h", spec.D), Port("ffn_h", spec.D), Port("x_out", spec.D)
    deep = tuple(port for port in ffn_inputs(spec) if port.name == "s")
    first = Group("first", 0, (x, att_prev, MASK), (att_h, *att_outputs(spec, 0)))
    mids = [
        Group(
            "mid",
            i,
            (y, x, ffn_prev, *deep, att_prev, MASK),
            (x_out, ffn_h, att_h, *att_outputs(spec, i + 1)),
        )
        for i in range(spec.L - 1)
    ]
    last = Group("last", spec.L - 1, (y, x, ffn_prev, *deep, MASK), (x_out, ffn_h))
    return [first, *mids, last, head]
