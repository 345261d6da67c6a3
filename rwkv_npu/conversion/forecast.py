"""Forecasts the result of a conversion from the shapes of a model: nothing is compiled, and nothing written.

Memory is added up by `memory.plan_memory`, as it is for compiled artifacts. Cycles follow the compiler's formula
(`estimate.formula_cycles`), and times are the estimates of `runtime.estimate`, as `info` and `bench inference` print
them. The sizes of matrices are exact; the rest of a file, and every time, is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from rwkv_npu.backends.memory import BUDGET_BYTES, MAX_CONTEXTS, MemoryPlan, matrix_bytes, plan_memory
from rwkv_npu.conversion.artifacts import beside, candidates, row_counts
from rwkv_npu.conversion.quantise import sizes
from rwkv_npu.conversion.request import Request
from rwkv_npu.conversion.writer import describe_groups
from rwkv_npu.formats.bundle import Artifact, Manifest
from rwkv_npu.formats.checkpoint import Checkpoint
from rwkv_npu.graphs.trace import Matrix, Trace, compiler_trace, matrices, trace_group
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Group, Kind, Spec, Tensor, default_scaling, state_shapes, tensors
from rwkv_npu.quant.cpu import PRECISIONS as PACKED
from rwkv_npu.quant.cpu import bits_of, packed_bytes
from rwkv_npu.runtime import rk3588
from rwkv_npu.runtime.estimate import Estimate, formula_cycles, on_cpu, on_npu, weights
from rwkv_npu.runtime.selftest import SELF_TEST_ROWS

Share = Callable[[str], float]

PROMPT_TOKENS = 128  # of the prompt whose reading is estimated
TIMED = (1, PROMPT_TOKENS)  # numbers of tokens that are read at once

PRECISIONS = ("fp16", "mixed", "w8a8")
ASSUMED_SHARE = 0.8  # of the weights in int8, where nobody has chosen them yet

# Bytes of a `.rknn` beside its weights, fitted to files of toolkit 2.5.0: for each node of the graph and for each input
# and output, which are transposed where there are several rows; for each product in int8, which is converted.
ONE_ROW, SEVERAL_ROWS = (5_200, 5_500), (3_500, 30_800)
INT8_BYTES = 4_500


@dataclass(frozen=True)
class Variant:
    """The artifacts of one precision. Their `weight_bytes` and `cycles` are estimates.

    int8: share of the weights in int8; assumed: the share is an assumption. files: bytes of each `.rknn` by its path.
    memory: of all artifacts, whether they fit or not. left: groups that do not fit the NPU and stay on the CPU, and
    left_bytes their bytes. speeds: by kind of DRAM, tokens a second (slow, central, fast) for each of TIMED; empty
    where the chip's terms are not known. board_bytes: memory of a process beside the NPU's.
    """

    precision: str
    int8: float
    assumed: bool
    rows: list[int]
    artifacts: list[Artifact]
    files: dict[str, int]
    memory: MemoryPlan
    left: list[str]
    left_bytes: int
    speeds: dict[str, dict[int, tuple[float, float, float]]]
    board_bytes: int


@dataclass(frozen=True)
class Forecast:
    """calls: for a token. parts: bytes of the bundle's files other than artifacts, by what they are."""

    spec: Spec
    target: str
    fusion: str
    calls: int
    parts: dict[str, int]
    variants: list[Variant]

    def to_json(self) -> dict[str, Any]:
        limits = {"npu_bytes": BUDGET_BYTES, "contexts": MAX_CONTEXTS}
        return {"estimate": True, "parameters": self.spec.parameters, "limits": limits, **asdict(self)}


class Graphs:
    """The graphs of a program's groups. Those that are alike but for their layer are one, unless told `apart`."""

    def __init__(self, program: Program, *, apart: bool = False):
        self.program, self._apart = program, apart
        self._found: dict[Any, tuple[Trace, list[Matrix]]] = {}

    def _look(self, group: Group, rows: int | None) -> tuple[Trace, list[Matrix]]:
        key = group.layer if self._apart else None, group.role, group.inputs, group.outputs, rows
        if key not in self._found:
            program = self.program
            trace = trace_group(program, group) if rows is None else compiler_trace(program, group, rows)
            self._found[key] = trace, matrices(trace, self.program.spec)
        return self._found[key]

    def trace(self, group: Group, rows: int | None = None) -> Trace:
        """As the compiler reads it, or with `rows` None as the CPU does."""
        return self._look(group, rows)[0]

    def matrices(self, group: Group, rows: int | None = None) -> list[Matrix]:
        """The matrices that it multiplies with."""
        return self._look(group, rows)[1]


def forecast(
    checkpoint: Checkpoint,
    request: Request,
    chosen: Collection[str] | None = None,
    there: Sequence[Artifact] = (),
) -> Forecast:
    """Forecast `request` for a checkpoint, in each of PRECISIONS, whatever its own.

    chosen: names of the projections that `mixed` has in int8; None where they are not known yet. there: artifacts of
    an existing bundle, whose memory counts where they are of the same kind.
    """
    spec = checkpoint.spec
    programs = {fusion: Program(spec, fusion, default_scaling(spec)) for fusion in FUSIONS}
    graphs = {fusion: Graphs(program, apart=chosen is not None) for fusion, program in programs.items()}
    parts = _bundle_parts(checkpoint, request, list(graphs.values()))
    # Every process holds embedding and vectors, and the state of one sequence.
    held = parts["embedding and vectors"] + 4 * spec.L * sum(map(prod, state_shapes(spec).values()))
    ours, variants = graphs[request.fusion], []
    for precision in PRECISIONS if request.compiles else ():
        assumed = precision == "mixed" and chosen is None
        variants.append(
            _variant(ours, request, precision, _share(spec, precision, chosen), held, assumed, there)
        )
    return Forecast(spec, request.target, request.fusion, len(ours.program.groups), parts, variants)


# -- artifacts -------------------------------------------------------------------------------------------


def _share(spec: Spec, precision: str, chosen: Collection[str] | None) -> Share:
    """Share of a projection in int8, by its name: 0 or 1 where the choice is known."""
    able = {} if precision == "fp16" else sizes(spec)
    if precision == "mixed" and chosen is not None:
        return lambda name: float(name in chosen)
    part = 1.0 if precision != "mixed" else ASSUMED_SHARE * sum(weights(spec).values()) / sum(able.values())
    return lambda name: part if name in able else 0.0


def _variant(
    graphs: Graphs,
    request: Request,
    precision: str,
    share: Share,
    held: int,
    assumed: bool,
    there: Sequence[Artifact],
) -> Variant:
    program = graphs.program
    spec, groups = program.spec, {group.name: group for group in program.groups}
    manifest = Manifest(spec, "", "", program.fusion, "", program.scaling, None, groups=describe_groups(spec))
    manifest.artifacts = list(there)

    def weigh(group: Group) -> int:
        return _weight_bytes(graphs.matrices(group), share)

    plans = list(candidates(manifest, program, request.target, precision, request.rows, weigh))
    artifacts, memory = next((plan for plan in plans if plan[1].fits), plans[-1])
    if request.target == rk3588.NAME:
        found = [graphs.matrices(groups[a.group], a.rows) for a in artifacts]
        artifacts = [
            replace(a, cycles=_cycles(f, a.rows, share)) for a, f in zip(artifacts, found, strict=True)
        ]
    files = {a.path: a.weight_bytes + _around(graphs, groups[a.group], a.rows, share) for a in artifacts}
    left = _left(manifest, artifacts)
    kept = [artifact for artifact in artifacts if artifact.group not in left]
    return Variant(
        precision=precision,
        int8=_int8([one for group in program.groups for one in graphs.matrices(group)], share),
        assumed=assumed,
        rows=row_counts(artifacts),
        artifacts=artifacts,
        files=files,
        memory=memory,
        left=left,
        left_bytes=sum(weigh(groups[name]) for name in left),
        speeds=_speeds(graphs, kept, [groups[name] for name in left], request.cpu_precision),
        # RKNNLite keeps what it has read of a file beside what it has given to the NPU.
        board_bytes=held + sum(files[artifact.path] for artifact in kept),
    )


def _int8(found: Sequence[Matrix], share: Share) -> float:
    """Share of the numbers in some matrices that are in int8."""
    return sum(share(one.name) * one.k * one.n for one in found) / sum(one.k * one.n for one in found)


def _blend(share: float, fp16: float, int8: float) -> float:
    return (1 - share) * fp16 + share * int8


def _weight_bytes(found: Sequence[Matrix], share: Share) -> int:
    sizes = (_blend(share(m.name), *(matrix_bytes(m.k, m.n, bits) for bits in (16, 8))) for m in found)
    return round(sum(sizes))


def _cycles(found: Sequence[Matrix], rows: int, share: Share) -> dict[str, int]:
    sums = dict.fromkeys(("ddr", "npu", "total"), 0.0)
    for one in found:
        fp16, int8 = (formula_cycles(one.k, one.n, rows, bits) for bits in (16, 8))
        for key, wide, narrow in zip(sums, fp16, int8, strict=True):
            sums[key] += _blend(share(one.name), wide, narrow)
    return {key: round(value) for key, value in sums.items()}


def _around(graphs: Graphs, group: Group, rows: int, share: Share) -> int:
    """Bytes of a `.rknn` other than its weights."""
    nodes = len(graphs.trace(group, rows).nodes)
    ports = len(group.fixed_inputs(rows)) + len(group.outputs)
    products = sum(share(one.name) for one in graphs.matrices(group, rows))
    node_bytes, port_bytes = ONE_ROW if rows == 1 else SEVERAL_ROWS
    return round(node_bytes * nodes + port_bytes * ports + INT8_BYTES * products)


def _left(manifest: Manifest, artifacts: list[Artifact]) -> list[str]:
    """Groups that are left when the NPU, with what the bundle has for it already, is filled in the order in which
    a token passes them."""
    kept, left = beside(manifest, artifacts), []
    for group in dict.fromkeys(artifact.group for artifact in artifacts):
        more = [*kept, *(artifact for artifact in artifacts if artifact.group == group)]
        if plan_memory(manifest, more).fits:
            kept = more
        else:
            left.append(group)
    return left


def _speeds(
    graphs: Graphs, kept: list[Artifact], left: list[Group], cpu: str
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Tokens a second (slow, central, fast) by DRAM and number of tokens; groups in `left` are on the CPU."""
    if not all(artifact.cycles for artifact in kept):
        return {}
    return {
        dram: {tokens: _with_left(graphs, kept, left, cpu, tokens, dram).speeds(tokens) for tokens in TIMED}
        for dram in rk3588.DRAMS
    }


def _with_left(
    graphs: Graphs, kept: list[Artifact], left: list[Group], cpu: str, tokens: int, dram: str
) -> Estimate:
    spec = graphs.program.spec
    npu = on_npu(spec, kept, tokens, dram)
    if not left:
        return npu
    on_board, count = on_cpu(spec, cpu, tokens, dram), weights(spec)
    shares = dict.fromkeys(("projections", "head"), 0.0)
    for group in left:
        part = "head" if group.role == "head" else "projections"
        shares[part] += sum(one.k * one.n for one in graphs.matrices(group)) / count[part]

    def added(bound: str) -> dict[str, float]:
        ms = dict(getattr(npu, bound))
        return ms | {
            part: ms[part] + share * getattr(on_board, bound)[part] for part, share in shares.items()
        }

    return Estimate(added("ms"), added("low"), added("high"), npu.npu_calls)


# -- the rest of a bundle --------------------------------------------------------------------------------


def _bundle_parts(checkpoint: Checkpoint, request: Request, graphs: Sequence[Graphs]) -> dict[str, int]:
    present = [tensor for tensor in tensors(checkpoint.spec) if tensor.name in checkpoint]
    projections = [tensor for tensor in present if tensor.kind.is_projection]
    others = [tensor for tensor in present if not tensor.kind.is_projection]

    def width(tensor: Tensor) -> int:
        """Bytes of a number: vectors are in fp32, tables as they come, but in fp32 at most."""
        return 4 if tensor.kind is Kind.VECTOR else min(4, checkpoint.stored(tensor.name).itemsize)

    size = 4 if request.storage == "fp32" else 2
    parts = {
        "embedding and vectors": sum(width(tensor) * prod(tensor.shape) for tensor in others),
        f"weights in {request.storage}": sum(size * prod(tensor.shape) for tensor in projections),
    }
    if request.cpu_precision in PACKED:
        packed = [packed_bytes(tensor, bits_of(request.cpu_precision, tensor)) for tensor in projections]
        parts[f"weights in {request.cpu_precision}"] = sum(packed)
    shapes = {tensor.name: tensor.used_shape for tensor in present}
    small = [_small_bytes(fusion, group, shapes) for fusion in graphs for group in fusion.program.groups]
    return {**parts, "graphs and self-test": sum(small)}


def _small_bytes(graphs: Graphs, group: Group, shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes of a graph without its projections, and of the rows of its self-test."""
    trace, rows = graphs.trace(group), 1 if group.role == "head" else SELF_TEST_ROWS
    numbers = sum(prod(shapes[constant.name]) for constant in trace.vectors.values())
    numbers += sum(array.size for array in trace.literals.values())
    numbers += rows * sum(port.width for port in (*group.inputs, *group.outputs))
    return 4 * numbers + sum(node.ByteSize() for node in trace.nodes)
