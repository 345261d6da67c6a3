"""A model as a program of groups and recurrences, and its forward pass.

`Program.evaluate` is the maths of one group over any kind of array: NumPy computes it, a tracer records it. `forward`
computes everything between the groups, and yields each group with its inputs. Its caller runs the groups and sends
their outputs back: one after the other (`run_in_order`), or beside other forwards (`runtime.waves`). It is written over
the interface `Forward`, which has two implementations. `EagerForward` here computes with NumPy arrays.
`kernels.recorder.ForwardRecorder` records the same steps once, and all later forwards replay them. This module knows
neither files nor backends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from rwkv_npu.models import MODULES
from rwkv_npu.models import spec as _spec
from rwkv_npu.models.common import Arrays, scale
from rwkv_npu.models.maths import LAYER_NORM_EPS, Maths, NumpyMaths, layer_norm, matmul
from rwkv_npu.models.rows import Rows
from rwkv_npu.models.spec import Group, Scaling, Spec

# Rows of each product on the host. BLAS sums one row in another order than several rows. A fixed number of rows makes
# a token's result independent of the rows beside it.
BLAS_ROWS = 8

# Runs a group: inputs (M, width) by name -> outputs by name, which are valid until the next run of the same group.
Run = Callable[[Group, Arrays], Mapping[str, np.ndarray]]

# A forward in steps: it yields a group and its inputs, is sent the outputs, and returns its result. Outputs are used
# until it yields the next group.
Steps = Generator[tuple[Group, dict[str, Any]], Mapping[str, Any], Any]


class Recurrence(Protocol):
    """Computes the recurrences of a model's layers."""

    def prepare(self, vector: Callable[[str], np.ndarray], spec: Spec) -> Any:
        """The parameters of one layer's recurrence. `vector(name)` returns a tensor by its name in the layer."""

    def time_mix(self, p: Any, x: Arrays, rows: Rows, layer: int, carry: Arrays) -> np.ndarray:
        """Outputs of a layer's projections (M, A) -> y (M, A), valid until the next call.

        The states of `rows` are updated in place. `carry` holds values for later layers of the same forward, such as
        v7's values of layer 0.
        """


class Forward(Protocol):
    """The steps of a forward pass. Arrays are rows (M, width), as in `maths.Maths`."""

    @property
    def maths(self) -> Maths:
        """The operations outside groups: with projection fusion, norms and mixes."""

    @property
    def mask(self) -> Any:
        """The mask of `Maths.shift`, (M, 1)."""

    def previous(self, part: str, layer: int) -> Any:
        """The argument `previous` of `Maths.shift`, (M, D), from a part of each sequence's state."""

    def store(self, part: str, layer: int, rows: Any) -> None:
        """Store the last of each sequence's `rows` (M, D) in a part of its state."""

    def time_mix(self, layer: int, out: Mapping[str, Any]) -> Any:
        """Run the recurrence of a layer: outputs of its projections -> y (M, A). Updates the states."""

    def deep_embedding(self, layer: int) -> Any:
        """7a: the (R, R) matrix of each token, as (M, R*R)."""


@dataclass(frozen=True)
class Program:
    """The computation of a model, without weights: it evaluates or traces any group."""

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
        """Compute a group with the operations of `f`: inputs `x` by name -> outputs by name."""
        if group.role == "head":
            return {"logits": f.linear(x["x"], "head.weight")}
        module, i = MODULES[self.spec.generation], group.layer
        block = f.block(i)
        if group.role == "att.in":
            return module.att_in(block, x, i)
        if group.role == "att.out":
            return {"out": self._att_out(block, x["y"], i)}
        if group.role == "ffn":
            return {"out": module.ffn(block, x, i, self.scaling)}
        if group.role == "first":
            return self._into_recurrence(f, x["x"], x["att_prev"], x["mask"], 0)
        return self._after_recurrence(f, x, group)

    def _att_out(self, block: Maths, y: Any, layer: int) -> Any:
        return block.linear(scale(y, self.scaling.residual(layer)), "att.output.weight")

    def _into_recurrence(self, f: Maths, x: Any, previous: Any, mask: Any, layer: int) -> dict[str, Any]:
        module, block = MODULES[self.spec.generation], f.block(layer)
        h = block.layer_norm(x, "ln1", self.norm_eps(layer))
        mixed = module.att_mix(block, h, f.shift(h, previous, mask), self.spec)
        return {"att_h": h, **module.att_in(block, mixed, layer)}

    def _after_recurrence(self, f: Maths, x: dict[str, Any], group: Group) -> dict[str, Any]:
        """The groups `mid` and `last`: from the recurrence of layer i to that of layer i+1, or to the head."""
        module, i = MODULES[self.spec.generation], group.layer
        block = f.block(i)
        residual = x["x"] + self._att_out(block, x["y"], i)
        h = block.layer_norm(residual, "ln2", self.norm_eps(i))
        mixed = module.ffn_mix(block, h, f.shift(h, x["ffn_prev"], x["mask"]))
        if "s" in x:
            mixed["s"] = x["s"]
        residual = residual + module.ffn(block, mixed, i, self.scaling)
        if group.role == "last":
            return {"x_out": f.layer_norm(residual, "ln_out", self.norm_eps(i)), "ffn_h": h}
        residual = scale(residual, self.rescale(i))
        following = self._into_recurrence(f, residual, x["att_prev"], x["mask"], i + 1)
        return {"x_out": residual, "ffn_h": h, **following}

    def rescale(self, layer: int) -> float:
        """Factor on the residual between `layer` and the next."""
        return self.scaling.residual(layer + 1) / self.scaling.residual(layer)

    def norm_eps(self, layer: int) -> float:
        """LayerNorm's epsilon for the scaled residual of `layer`: with it, scaling does not change the norm."""
        return LAYER_NORM_EPS * self.scaling.residual(layer) ** 2


def forward(program: Program, f: Forward, x: Any) -> Steps:
    """All groups but the head, and all recurrences: embedded tokens (M, D) -> the head's input (M, D)."""
    x = scale(x, program.scaling.residual(0))
    return (_by_layers if program.fusion == "layer" else _by_projections)(program, f, x)


def run_in_order(steps: Steps, run: Callable[[Group, dict[str, Any]], Mapping[str, Any]]) -> Any:
    """Drive the steps of one forward by a function that runs a group. Returns their result."""
    try:
        group, inputs = next(steps)
        while True:
            group, inputs = steps.send(run(group, inputs))
    except StopIteration as end:
        return end.value


def _by_layers(program: Program, f: Forward, x: Any) -> Steps:
    spec = program.spec
    first = {"x": x, "att_prev": f.previous("att.shift", 0), "mask": f.mask}
    out = yield program.group("first", 0), first
    for i in range(spec.L):
        f.store("att.shift", i, out["att_h"])
        inputs = {"y": f.time_mix(i, out), "x": x, "ffn_prev": f.previous("ffn.shift", i), "mask": f.mask}
        if spec.generation == "7a":
            inputs["s"] = f.deep_embedding(i)
        if i + 1 < spec.L:
            inputs["att_prev"] = f.previous("att.shift", i + 1)
        out = yield program.group("mid" if i + 1 < spec.L else "last", i), inputs
        f.store("ffn.shift", i, out["ffn_h"])
        x = out["x_out"]
    return x


def _by_projections(program: Program, f: Forward, x: Any) -> Steps:
    spec, maths = program.spec, f.maths
    module = MODULES[spec.generation]

    def call(role: str, layer: int, values: Mapping[str, Any]) -> tuple[Group, dict[str, Any]]:
        group = program.group(role, layer)
        return group, {port.name: values[port.name] for port in group.inputs}

    for i in range(spec.L):
        block = maths.block(i)
        h = block.layer_norm(x, "ln1", program.norm_eps(i))
        previous = maths.shift(h, f.previous("att.shift", i), f.mask)
        mixed = module.att_mix(block, h, previous, spec)
        f.store("att.shift", i, h)
        y = f.time_mix(i, (yield call("att.in", i, mixed)))
        x = x + (yield call("att.out", i, {"y": y}))["out"]
        h = block.layer_norm(x, "ln2", program.norm_eps(i))
        mixed = module.ffn_mix(block, h, maths.shift(h, f.previous("ffn.shift", i), f.mask))
        f.store("ffn.shift", i, h)
        if spec.generation == "7a":
            mixed["s"] = f.deep_embedding(i)
        x = x + (yield call("ffn", i, mixed))["out"]
        if i + 1 < spec.L:
            x = scale(x, program.rescale(i))
    return maths.layer_norm(x, "ln_out", program.norm_eps(spec.L - 1))


class ReferenceRecurrence:
    """`Recurrence` in NumPy, by the `time_mix` of the generation's module, one segment after the other."""

    def __init__(self, spec: Spec):
        module = MODULES[spec.generation]
        self.prepare, self._time_mix = module.prepare, module.time_mix

    def time_mix(self, p: Any, x: Arrays, rows: Rows, layer: int, carry: Arrays) -> np.ndarray:
        x = {name: np.asarray(array, np.float32) for name, array in x.items()}
        carried: Any = carry.setdefault("segments", [{} for _ in rows.counts])  # type: ignore[arg-type]
        y = np.empty_like(x["v"])
        for (segment, state), own in zip(rows.segments, carried, strict=True):
            # The modules take (T, B, A) and states (B, ...): here B = 1.
            tokens = {name: array[segment, None] for name, array in x.items()}
            parts = {name: part[layer, None] for name, part in state.items()}
            y[segment] = self._time_mix(p, tokens, parts, own)[:, 0]
        return y


class Network:
    """The host's part of a model: embedding, recurrences and, with projection fusion, norms and mixes.

    host(name): returns a tensor that is not a projection, in the shape of `spec.tensors`. Vectors are fp32; tables
    (rows by token) have the float type in which they are stored.
    recurrence: None takes the reference in NumPy.
    """

    def __init__(
        self, program: Program, host: Callable[[str], np.ndarray], recurrence: Recurrence | None = None
    ):
        self.program, self.spec = program, program.spec
        self._host = host
        self.maths = NumpyMaths(host)
        self._recurrence = recurrence or ReferenceRecurrence(program.spec)
        self._prepared: dict[int, Any] = {}  # parameters of the recurrence by layer, prepared at first use
        self._recurrent_ports = [_spec.att_outputs(self.spec, i) for i in range(self.spec.L)]

    def steps(self, rows: Rows) -> Steps:
        """The forward pass up to the head: M rows -> the head's input (M, D). Updates the states in place."""
        x = self.embed(rows.ids)
        return (yield from forward(self.program, EagerForward(self, rows, x), x))

    def hidden(self, run: Run, rows: Rows) -> np.ndarray:
        """The result of `steps`. run: runs a group."""
        x: np.ndarray = run_in_order(self.steps(rows), run)
        return x

    def logits(self, run: Run, x: np.ndarray) -> np.ndarray:
        """Run the head: (M, D) -> (M, V)."""
        return run(self.program.group("head"), {"x": x})["logits"]

    def fill(self, inputs: Arrays, ids: np.ndarray) -> None:
        """Write the inputs of a fused forward (`spec.fused_inputs`) for token ids (M,)."""
        x = inputs["x"][:] = self.embed(ids)
        for i in range(len(inputs) - 1):
            inputs[f"s.{i}"][:] = self.deep_embedding(i, ids, x)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """(M,) token ids -> (M, D) fp32, through ln0."""
        rows = self._host("emb.weight")[ids].astype(np.float32)
        weight, bias = (self._host(f"blocks.0.ln0.{part}") for part in ("weight", "bias"))
        return layer_norm(rows, weight, bias, LAYER_NORM_EPS)

    def deep_embedding(self, layer: int, ids: np.ndarray, x0: np.ndarray) -> np.ndarray:
        """7a: each token's matrix, (M, R*R): its row of s_emb plus its embedding `x0` (M, D) times s_emb_x."""
        name = f"blocks.{layer}.ffn.s_emb"
        rows = self._host(f"{name}.weight")[ids].astype(np.float32)
        padded = np.zeros((-(-len(x0) // BLAS_ROWS), BLAS_ROWS, x0.shape[1]), np.float32)
        padded.reshape(-1, x0.shape[1])[: len(x0)] = x0
        weight = self._host(f"{name}_x.weight").T
        products = np.concatenate([matmul(block, weight) for block in padded])
        return rows + products[: len(x0)]

    def time_mix(self, layer: int, out: Mapping[str, np.ndarray], rows: Rows, carry: Arrays) -> np.ndarray:
        """Run the recurrence of a layer: outputs of its projections, (M, A) each -> y (M, A)."""
        if layer not in self._prepared:
            self._prepared[layer] = self._recurrence.prepare(self.maths.block(layer).vector, self.spec)
        inputs = {port.name: out[port.name] for port in self._recurrent_ports[layer]}
        # `carry` keeps layer 0's values for later layers. Meanwhile another forward may overwrite the group's outputs.
        if layer == 0:
            inputs["v"] = inputs["v"].copy()
        return self._recurrence.time_mix(self._prepared[layer], inputs, rows, layer, carry)


class EagerForward:
    """`Forward` over NumPy arrays: each step is computed at once."""

    def __init__(self, network: Network, rows: Rows, embedded: np.ndarray):
        self.maths, self.mask = network.maths, rows.mask
        self.previous, self.store = rows.previous, rows.store
        self._network, self._rows, self._embedded = network, rows, embedded
        self._carry: Arrays = {}

    def time_mix(self, layer: int, out: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._network.time_mix(layer, out, self._rows, self._carry)

    def deep_embedding(self, layer: int) -> np.ndarray:
        return self._network.deep_embedding(layer, self._rows.ids, self._embedded)
