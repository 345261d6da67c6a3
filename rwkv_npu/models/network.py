"""How a model is cut into groups, and how tokens walk through them.

`evaluate` is the maths of one group over any kind of array: NumPy runs it, a tracer records it. `walk` is the way
through all of them and the recurrences between, over any kind of array too: `Network` goes it on the host, with the
groups behind a function `run`, and a recorder once for all tokens to come. None of it knows files or backends.

Rows are time-major: row t*B + b is token t of sequence b. M = T*B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from rwkv_npu.models import MODULES
from rwkv_npu.models import spec as _spec
from rwkv_npu.models.common import Arrays, scale
from rwkv_npu.models.maths import LAYER_NORM_EPS, Maths, NumpyMaths, layer_norm, matmul
from rwkv_npu.models.spec import Group, Scaling, Spec

# Rows (M, width) in, rows out; what it returns is valid until the next run of the same group.
Run = Callable[[Group, Arrays], Mapping[str, np.ndarray]]


class Recurrence(Protocol):
    """What runs the recurrences, in the form that the modules of the generations have them."""

    def prepare(self, vector: Callable[[str], np.ndarray], spec: Spec) -> Any:
        """What the recurrence of a layer reads of the model; `vector` gives tensors by their name in the layer."""

    def time_mix(self, p: Any, x: Arrays, state: Arrays, carry: Arrays) -> np.ndarray:
        """Outputs of a layer's projections (T, B, A) -> y (T, B, A), valid until the next call.

        `state` is updated in place; `carry` goes from layer to layer of one call.
        """


class Whole(Protocol):
    """Something that goes a whole walk at once, for a number of rows and of sequences."""

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """What the caller fills, by the names of `spec.walk_inputs`."""

    def run(self, state: Arrays) -> np.ndarray:
        """(M, D), what the head reads, valid until the next run. `state` (L, B, ...) is updated in place."""


class Walk(Protocol):
    """What `walk` is made of. Arrays are rows (M, width), as in `maths.Maths`."""

    @property
    def maths(self) -> Maths:
        """For what no group computes."""

    def run(self, group: Group, x: dict[str, Any]) -> Mapping[str, Any]:
        """Outputs of a group."""

    def last(self, name: str, layer: int) -> Any:
        """(B, width), a part of the state of a layer."""

    def keep(self, name: str, layer: int, rows: Any) -> None:
        """From now on that part is the last B of `rows`."""

    def time_mix(self, layer: int, out: Mapping[str, Any]) -> Any:
        """The recurrence of a layer: outputs of its projections -> y (M, A). The state is updated."""

    def deep_embedding(self, layer: int) -> Any:
        """7a: each token's (R*R) matrix, (M, R*R)."""


@dataclass(frozen=True)
class Program:
    """What is computed, apart from the weights: enough to evaluate or trace any group of a model."""

    spec: Spec
    fusion: str
    scaling: Scaling = Scaling()

    @cached_property
    def groups(self) -> list[Group]:
        return _spec.groups(self.spec, self.fusion)

    @cached_property
    def _by_role(self) -> dict[tuple[str, int], Group]:
        return {(group.role, group.layer): group for group in self.groups}

    def group(self, role: str, layer: int = -1) -> Group:
        return self._by_role[role, layer]

    def evaluate(self, group: Group, f: Maths, x: dict[str, Any]) -> dict[str, Any]:
        """Outputs of `group`, by name, for its inputs `x`, computed with the operations of `f`."""
        if group.role == "head":
            return {"logits": f.linear(x["x"], "head.weight")}
        module, i = MODULES[self.spec.generation], group.layer
        block = f.block(i)
        if group.role == "att.in":
            return module.att_in(block, x, self.spec, i)
        if group.role == "att.out":
            return {"out": self._att_out(block, x["y"], i)}
        if group.role == "ffn":
            return {"out": module.ffn(block, x, i, self.scaling)}
        if group.role == "first":
            return self._into_recurrence(f, x["x"], x["att_last"], 0)
        return self._after_recurrence(f, x, group)

    def _att_out(self, block: Maths, y: Any, layer: int) -> Any:
        return block.linear(scale(y, self.scaling.residual(layer)), "att.output.weight")

    def _into_recurrence(self, f: Maths, x: Any, last: Any, layer: int) -> dict[str, Any]:
        module, block = MODULES[self.spec.generation], f.block(layer)
        h = block.layer_norm(x, "ln1", self.norm_eps(layer))
        mixed = module.att_mix(block, h, f.shift(h, last), self.spec)
        return {"att_h": h, **module.att_in(block, mixed, self.spec, layer)}

    def _after_recurrence(self, f: Maths, x: dict[str, Any], group: Group) -> dict[str, Any]:
        """`mid` and `last`: from the recurrence of layer i to that of layer i+1, or to the head."""
        module, i = MODULES[self.spec.generation], group.layer
        block = f.block(i)
        residual = x["x"] + self._att_out(block, x["y"], i)
        h = block.layer_norm(residual, "ln2", self.norm_eps(i))
        mixed = module.ffn_mix(block, h, f.shift(h, x["ffn_last"]))
        if "s" in x:
            mixed["s"] = x["s"]
        residual = residual + module.ffn(block, mixed, i, self.scaling)
        if group.role == "last":
            return {"x_out": f.layer_norm(residual, "ln_out", self.norm_eps(i)), "ffn_h": h}
        residual = scale(residual, self.rescale(i))
        return {"x_out": residual, "ffn_h": h, **self._into_recurrence(f, residual, x["att_last"], i + 1)}

    def rescale(self, layer: int) -> float:
        """Factor on the residual when it passes from `layer` to the next."""
        return self.scaling.residual(layer + 1) / self.scaling.residual(layer)

    def norm_eps(self, layer: int) -> float:
        """LayerNorm's epsilon for a residual that is scaled: with it, the scale changes nothing."""
        return LAYER_NORM_EPS * self.scaling.residual(layer) ** 2


def walk(program: Program, w: Walk, x: Any) -> Any:
    """(M, D), embedded tokens -> (M, D), what the head reads: every group but the head, and every recurrence."""
    x = scale(x, program.scaling.residual(0))
    return (_layer_walk if program.fusion == "layer" else _projection_walk)(program, w, x)


def _layer_walk(program: Program, w: Walk, x: Any) -> Any:
    spec = program.spec
    out = w.run(program.group("first", 0), {"x": x, "att_last": w.last("att.shift", 0)})
    for i in range(spec.L):
        w.keep("att.shift", i, out["att_h"])
        inputs = {"y": w.time_mix(i, out), "x": x, "ffn_last": w.last("ffn.shift", i)}
        if spec.generation == "7a":
            inputs["s"] = w.deep_embedding(i)
        if i + 1 < spec.L:
            inputs["att_last"] = w.last("att.shift", i + 1)
        out = w.run(program.group("mid" if i + 1 < spec.L else "last", i), inputs)
        w.keep("ffn.shift", i, out["ffn_h"])
        x = out["x_out"]
    return x


def _projection_walk(program: Program, w: Walk, x: Any) -> Any:
    spec, f = program.spec, w.maths
    module = MODULES[spec.generation]

    def run(role: str, layer: int, values: Mapping[str, Any]) -> Mapping[str, Any]:
        group = program.group(role, layer)
        return w.run(group, {port.name: values[port.name] for port in group.inputs})

    for i in range(spec.L):
        block = f.block(i)
        h = block.layer_norm(x, "ln1", program.norm_eps(i))
        mixed = module.att_mix(block, h, f.shift(h, w.last("att.shift", i)), spec)
        w.keep("att.shift", i, h)
        y = w.time_mix(i, run("att.in", i, mixed))
        x = x + run("att.out", i, {"y": y})["out"]
        h = block.layer_norm(x, "ln2", program.norm_eps(i))
        mixed = module.ffn_mix(block, h, f.shift(h, w.last("ffn.shift", i)))
        w.keep("ffn.shift", i, h)
        if spec.generation == "7a":
            mixed["s"] = w.deep_embedding(i)
        x = x + run("ffn", i, mixed)["out"]
        if i + 1 < spec.L:
            x = scale(x, program.rescale(i))
    return f.layer_norm(x, "ln_out", program.norm_eps(spec.L - 1))


class Network:
    """The host's half of a model: embedding, recurrences and, with projection fusion, norms and mixes.

    `host(name)` gives the tensors that are no projections, in the shape of the table in `spec.py`: vectors
    in fp32, tables (rows by token) in whatever float type they are stored. `recurrence`: None is the reference.
    """

    def __init__(
        self, program: Program, host: Callable[[str], np.ndarray], recurrence: Recurrence | None = None
    ):
        self.program, self.spec = program, program.spec
        self._host = host
        self.maths = NumpyMaths(host)
        self._recurrence = recurrence or MODULES[program.spec.generation]
        self._prepared: dict[int, Any] = {}  # by layer, when they are needed first
        self._recurrent_ports = [_spec.att_outputs(self.spec, i) for i in range(self.spec.L)]

    def hidden(self, run: Run, tokens: np.ndarray, state: Arrays) -> np.ndarray:
        """(T, B) token ids -> (T*B, D), what the head reads. `state` (L, B, ...) is updated in place."""
        x = self.embed(tokens)
        return walk(self.program, _HostWalk(self, run, tokens, x, state), x)

    def hidden_at_once(self, whole: Whole, tokens: np.ndarray, state: Arrays) -> np.ndarray:
        """The same where one call does it all."""
        x = whole.inputs["x"][:] = self.embed(tokens)
        for i in range(len(whole.inputs) - 1):
            whole.inputs[f"s.{i}"][:] = self.deep_embedding(i, tokens, x)
        return whole.run(state)

    def logits(self, run: Run, x: np.ndarray) -> np.ndarray:
        """(M, D) -> (M, V)."""
        return run(self.program.group("head"), {"x": x})["logits"]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """(T, B) token ids -> (M, D) fp32, through ln0."""
        rows = self._host("emb.weight")[tokens.reshape(-1)].astype(np.float32)
        weight, bias = (self._host(f"blocks.0.ln0.{part}") for part in ("weight", "bias"))
        return layer_norm(rows, weight, bias, LAYER_NORM_EPS)

    def deep_embedding(self, layer: int, tokens: np.ndarray, x0: np.ndarray) -> np.ndarray:
        """7a: (M, R*R), each token's matrix: its row of s_emb plus its embedding `x0` (M, D) times s_emb_x."""
        name = f"blocks.{layer}.ffn.s_emb"
        rows = self._host(f"{name}.weight")[tokens.reshape(-1)].astype(np.float32)
        return rows + matmul(x0, self._host(f"{name}_x.weight").T)

    def time_mix(
        self, layer: int, out: Mapping[str, np.ndarray], state: Arrays, carry: Arrays, shape: tuple[int, int]
    ) -> np.ndarray:
        """The recurrence of a layer over the outputs of its projections: (M, A) each -> y (M, A). shape: (T, B)."""
        if layer not in self._prepared:
            self._prepared[layer] = self._recurrence.prepare(self.maths.block(layer).vector, self.spec)
        ports = self._recurrent_ports[layer]
        inputs = {port.name: out[port.name].reshape(*shape, port.width) for port in ports}
        recurrent = {name: part[layer] for name, part in state.items()}
        y = self._recurrence.time_mix(self._prepared[layer], inputs, recurrent, carry)
        return y.reshape(-1, self.spec.A)


class _HostWalk:
    """A walk over NumPy arrays: (T, B) tokens, `state` (L, B, ...)."""

    def __init__(self, network: Network, run: Run, tokens: np.ndarray, embedded: np.ndarray, state: Arrays):
        self.maths, self.run = network.maths, run
        self._network, self._tokens, self._embedded, self._state = network, tokens, embedded, state
        self._carry: Arrays = {}

    def last(self, name: str, layer: int) -> np.ndarray:
        return self._state[name][layer]

    def keep(self, name: str, layer: int, rows: np.ndarray) -> None:
        self._state[name][layer] = rows[-self._tokens.shape[1] :]

    def time_mix(self, layer: int, out: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._network.time_mix(layer, out, self._state, self._carry, self._tokens.shape)

    def deep_embedding(self, layer: int) -> np.ndarray:
        return self._network.deep_embedding(layer, self._tokens, self._embedded)
