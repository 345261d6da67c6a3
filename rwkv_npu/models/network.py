"""How a model is cut into groups, and how tokens walk through them.

`evaluate` is the maths of one group over any kind of array: NumPy runs it, a tracer records it. `Network` is
the other half: the recurrences and whatever stays on the host, with the groups behind a function `run`. It
knows neither files nor backends.

Rows are time-major: row t*B + b is token t of sequence b. M = T*B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from rwkv_npu import spec as _spec
from rwkv_npu.maths import LAYER_NORM_EPS, Maths, NumpyMaths, layer_norm, matmul
from rwkv_npu.models import MODULES
from rwkv_npu.models.common import Arrays, scale
from rwkv_npu.spec import Group, Scaling, Spec

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


@dataclass(frozen=True)
class Program:
    """What is computed, apart from the weights: enough to evaluate or trace any group of a model."""

    spec: Spec
    fusion: str
    scaling: Scaling = Scaling()

    @cached_property
    def groups(self) -> list[Group]:
        return _spec.groups(self.spec, self.fusion)

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


class Network:
    """The host's half of a model: embedding, recurrences and, with projection fusion, norms and mixes.

    `host(name)` gives the tensors that are no projections, in the shape of the table in `spec.py`: vectors
    in fp32, tables (rows by token) in whatever float type they are stored. `recurrence`: None is the reference.
    """

    def __init__(
        self, program: Program, host: Callable[[str], np.ndarray], recurrence: Recurrence | None = None
    ):
        self.program = program
        self.spec = spec = program.spec
        self._host = host
        self._groups = {(group.role, group.layer): group for group in program.groups}
        self._maths = NumpyMaths(host)
        self._recurrence = recurrence or MODULES[spec.generation]
        self._prepared = [self._recurrence.prepare(self._maths.block(i).vector, spec) for i in range(spec.L)]
        self._recurrent_ports = [_spec.att_outputs(spec, i) for i in range(spec.L)]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """(M,) token ids -> (M, D) fp32, through ln0."""
        rows = self._host("emb.weight")[tokens].astype(np.float32)
        weight, bias = (self._host(f"blocks.0.ln0.{part}") for part in ("weight", "bias"))
        return layer_norm(rows, weight, bias, LAYER_NORM_EPS)

    def hidden(self, run: Run, tokens: np.ndarray, state: Arrays) -> np.ndarray:
        """(T, B) token ids -> (T*B, D), what the head reads. `state` (L, B, ...) is updated in place."""
        walk = self._layer_walk if self.program.fusion == "layer" else self._projection_walk
        return walk(run, tokens, state)

    def logits(self, run: Run, x: np.ndarray) -> np.ndarray:
        """(M, D) -> (M, V)."""
        return run(self._groups["head", -1], {"x": x})["logits"]

    def _layer_walk(self, run: Run, tokens: np.ndarray, state: Arrays) -> np.ndarray:
        T, B = tokens.shape
        x0 = self.embed(tokens.reshape(-1))
        x = scale(x0, self.program.scaling.residual(0))
        att_last, ffn_last = state["att.shift"], state["ffn.shift"]
        carry: Arrays = {}
        out = run(self._groups["first", 0], {"x": x, "att_last": att_last[0]})
        for i in range(self.spec.L):
            att_last[i] = out["att_h"][-B:]
            inputs = {"y": self._time_mix(i, out, state, carry, T, B), "x": x, "ffn_last": ffn_last[i]}
            if self.spec.generation == "7a":
                inputs["s"] = self._deep_embedding(i, tokens, x0)
            if i + 1 < self.spec.L:
                out = run(self._groups["mid", i], {**inputs, "att_last": att_last[i + 1]})
            else:
                out = run(self._groups["last", i], inputs)
            ffn_last[i] = out["ffn_h"][-B:]
            x = out["x_out"]
        return x

    def _projection_walk(self, run: Run, tokens: np.ndarray, state: Arrays) -> np.ndarray:
        (T, B), program, f = tokens.shape, self.program, self._maths
        module = MODULES[self.spec.generation]
        x0 = self.embed(tokens.reshape(-1))
        x = scale(x0, program.scaling.residual(0))
        carry: Arrays = {}
        for i in range(self.spec.L):
            block = f.block(i)
            h = block.layer_norm(x, "ln1", program.norm_eps(i))
            mixed = module.att_mix(block, h, f.shift(h, state["att.shift"][i]), self.spec)
            state["att.shift"][i] = h[-B:]
            out = self._run(run, "att.in", i, mixed)
            y = self._time_mix(i, out, state, carry, T, B)
            x = x + self._run(run, "att.out", i, {"y": y})["out"]
            h = block.layer_norm(x, "ln2", program.norm_eps(i))
            mixed = module.ffn_mix(block, h, f.shift(h, state["ffn.shift"][i]))
            state["ffn.shift"][i] = h[-B:]
            if self.spec.generation == "7a":
                mixed["s"] = self._deep_embedding(i, tokens, x0)
            x = x + self._run(run, "ffn", i, mixed)["out"]
            if i + 1 < self.spec.L:
                x = scale(x, program.rescale(i))
        return f.layer_norm(x, "ln_out", program.norm_eps(self.spec.L - 1))

    def _run(self, run: Run, role: str, layer: int, values: Arrays) -> Mapping[str, np.ndarray]:
        group = self._groups[role, layer]
        return run(group, {port.name: values[port.name] for port in group.inputs})

    def _time_mix(
        self, layer: int, out: Mapping[str, np.ndarray], state: Arrays, carry: Arrays, T: int, B: int
    ) -> np.ndarray:
        """The recurrence of a layer over the outputs of its projections: (M, A) each -> y (M, A)."""
        ports = self._recurrent_ports[layer]
        inputs = {port.name: out[port.name].reshape(T, B, port.width) for port in ports}
        recurrent = {name: value[layer] for name, value in state.items()}
        y = self._recurrence.time_mix(self._prepared[layer], inputs, recurrent, carry)
        return y.reshape(T * B, -1)

    def _deep_embedding(self, layer: int, tokens: np.ndarray, x0: np.ndarray) -> np.ndarray:
        """7a: (M, R*R), each token's matrix: its row of s_emb plus its embedding times s_emb_x."""
        name = f"blocks.{layer}.ffn.s_emb"
        rows = self._host(f"{name}.weight")[tokens.reshape(-1)].astype(np.float32)
        return rows + matmul(x0, self._host(f"{name}_x.weight").T)
