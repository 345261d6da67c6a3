"""Forecast the result of a conversion from a model's shapes. Compiles nothing and writes nothing.

Memory is computed by `memory.plan_memory`, as for compiled artifacts. Cycles follow the compiler's formula
(`estimate.formula_cycles`). Times are the estimates of `runtime.estimate`, which `info` and `bench inference` print.
Sizes of matrices are exact. The rest of a file and all times are estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from rwkv_npu.runtime.rk3588 import TERMS, Terms
from rwkv_npu.runtime.selftest import SELF_TEST_ROWS

Share = Callable[[str], float]  # name of a projection -> share of it in int8

PROMPT_TOKENS = 128  # of the prompt in the speed estimate
TIMED = (1, PROMPT_TOKENS, 512)  # numbers of tokens read at once
BATCH = 8  # sequences of which each writes a token

PRECISIONS = ("fp16", "mixed", "w8a8")
ASSUMED_SHARE = 0.8  # of the weights in int8, while the choice of mixed is unknown

# Bytes of a `.rknn` beside its weights, fitted to files of toolkit 2.5.0: for each node of the graph, for each input
# and output (transposed if there are several rows), and for the conversions of each int8 product.
ONE_ROW, SEVERAL_ROWS = (5_200, 5_500), (3_500, 30_800)
INT8_BYTES = 4_500


@dataclass(frozen=True)
class Variant:
    """The artifacts of one precision. Their `weight_bytes` and `cycles` are estimates.

    int8: share of the weights in int8. assumed: True if this share is an assumption. files: bytes of each `.rknn` by
    its path. memory: of all artifacts, even if they do not fit. left: groups that do not fit the NPU and stay on the
    CPU. left_bytes: size of their weights. speeds: tokens a second (slow, central, fast), by kind of DRAM and number of
    tokens (TIMED); empty for a chip without measurements. batch_speeds: of BATCH sequences together, by kind of DRAM.
    board_bytes: memory of the process, without the NPU's.
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
    batch_speeds: dict[str, tuple[float, float, float]]
    board_bytes: int


@dataclass(frozen=True)
class Forecast:
    """The forecast of a conversion.

    calls: NPU calls for a token. parts: bytes of the bundle's files other than artifacts, by kind.
    """

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
    """The graphs of a program's groups, cached. Layers with equal graphs share one, unless `by_layer` is set.

    terms: parameters of the speed estimates.
    """

    def __init__(self, program: Program, terms: Terms = TERMS, *, by_layer: bool = False):
        self.program, self.terms, self._by_layer = program, terms, by_layer
        self._cache: dict[Any, tuple[Trace, list[Matrix]]] = {}

    def _get(self, group: Group, rows: int | None) -> tuple[Trace, list[Matrix]]:
        key = group.layer if self._by_layer else None, group.role, group.inputs, group.outputs, rows
        if key not in self._cache:
            program = self.program
            trace = trace_group(program, group) if rows is None else compiler_trace(program, group, rows)
            self._cache[key] = trace, matrices(trace, self.program.spec)
        return self._cache[key]

    def trace(self, group: Group, rows: int | None = None) -> Trace:
        """The graph for the compiler at this row count; with `rows` None, the graph for the CPU."""
        return self._get(group, rows)[0]

    def matrices(self, group: Group, rows: int | None = None) -> list[Matrix]:
        """The matrices in that graph."""
        return self._get(group, rows)[1]


def forecast(
    checkpoint: Checkpoint,
    request: Request,
    int8: Collection[str] | None = None,
    existing: Sequence[Artifact] = (),
    terms: Terms = TERMS,
) -> Forecast:
    """Forecast a conversion of `checkpoint`, in each of PRECISIONS.

    int8: names of the projections that `mixed` puts in int8; None if they are unknown. existing: artifacts of an
    existing bundle; those of the same kind take NPU memory too. terms: parameters of the speed estimates.
    """
    spec = checkpoint.spec
    programs = {fusion: Program(spec, fusion, default_scaling(spec)) for fusion in FUSIONS}
    graphs = {
        fusion: Graphs(program, terms, by_layer=int8 is not None) for fusion, program in programs.items()
    }
    parts = _bundle_parts(checkpoint, request, list(graphs.values()))
    # Every process holds the embedding, the vectors, and the state of one sequence.
    host_bytes = parts["embedding and vectors"] + 4 * spec.L * sum(map(prod, state_shapes(spec).values()))
    fused, variants = graphs[request.fusion], []
    for precision in PRECISIONS if request.compiles else ():
        assumed = precision == "mixed" and int8 is None
        share = _share(spec, precision, int8)
        variants.append(_variant(fused, request, precision, share, host_bytes, assumed, existing))
    return Forecast(spec, request.target, request.fusion, len(fused.program.groups), parts, variants)


# -- artifacts -------------------------------------------------------------------------------------------


def _share(spec: Spec, precision: str, int8: Collection[str] | None) -> Share:
    """The share of each projection in int8: 0 or 1 if the choice is known."""
    candidates = {} if precision == "fp16" else sizes(spec)
    if precision == "mixed" and int8 is not None:
        return lambda name: float(name in int8)
    share = 1.0
    if precision == "mixed":
        share = ASSUMED_SHARE * sum(weights(spec).values()) / sum(candidates.values())
    return lambda name: share if name in candidates else 0.0


def _variant(
    graphs: Graphs,
    request: Request,
    precision: str,
    share: Share,
    host_bytes: int,
    assumed: bool,
    existing: Sequence[Artifact],
) -> Variant:
    program = graphs.program
    spec, groups = program.spec, {group.name: group for group in program.groups}
    manifest = Manifest(spec, "", "", program.fusion, "", program.scaling, None, groups=describe_groups(spec))
    manifest.artifacts = list(existing)

    def weigh(group: Group) -> int:
        return _weight_bytes(graphs.matrices(group), share)

    plans = list(candidates(manifest, program, request.target, precision, request.rows, weigh))
    artifacts, memory = next((plan for plan in plans if plan[1].fits), plans[-1])
    if request.target == rk3588.NAME:
        traced = [graphs.matrices(groups[a.group], a.rows) for a in artifacts]
        artifacts = [
            replace(a, cycles=_cycles(m, a.rows, share)) for a, m in zip(artifacts, traced, strict=True)
        ]
    files = {a.path: a.weight_bytes + _overhead(graphs, groups[a.group], a.rows, share) for a in artifacts}
    left = _left(manifest, artifacts)
    kept = [artifact for artifact in artifacts if artifact.group not in left]
    estimator = partial(_estimate, graphs, kept, [groups[name] for name in left], request.cpu_precision)
    drams = rk3588.DRAMS if all(artifact.cycles for artifact in kept) else ()
    return Variant(
        precision=precision,
        int8=_int8_share([matrix for group in program.groups for matrix in graphs.matrices(group)], share),
        assumed=assumed,
        rows=row_counts(artifacts),
        artifacts=artifacts,
        files=files,
        memory=memory,
        left=left,
        left_bytes=sum(weigh(groups[name]) for name in left),
        speeds={dram: {tokens: estimator(tokens, dram).speeds(tokens) for tokens in TIMED} for dram in drams},
        batch_speeds={
            dram: estimator(BATCH, dram, sequences=BATCH).speeds(BATCH, sampled=True) for dram in drams
        },
        # RKNNLite keeps a copy of the file beside the NPU's memory.
        board_bytes=host_bytes + sum(files[artifact.path] for artifact in kept),
    )


def _int8_share(matrices: Sequence[Matrix], share: Share) -> float:
    """Share of all matrix elements in int8."""
    return sum(share(m.name) * m.k * m.n for m in matrices) / sum(m.k * m.n for m in matrices)


def _blend(share: float, fp16: float, int8: float) -> float:
    return (1 - share) * fp16 + share * int8


def _weight_bytes(matrices: Sequence[Matrix], share: Share) -> int:
    return round(
        sum(_blend(share(m.name), *(matrix_bytes(m.k, m.n, bits) for bits in (16, 8))) for m in matrices)
    )


def _cycles(matrices: Sequence[Matrix], rows: int, share: Share) -> dict[str, int]:
    sums = dict.fromkeys(("ddr", "npu", "total"), 0.0)
    for matrix in matrices:
        fp16, int8 = (formula_cycles(matrix.k, matrix.n, rows, bits) for bits in (16, 8))
        for key, wide, narrow in zip(sums, fp16, int8, strict=True):
            sums[key] += _blend(share(matrix.name), wide, narrow)
    return {key: round(value) for key, value in sums.items()}


def _overhead(graphs: Graphs, group: Group, rows: int, share: Share) -> int:
    """Bytes of a `.rknn` beside its weights."""
    nodes = len(graphs.trace(group, rows).nodes)
    ports = len(group.fixed_inputs(rows)) + len(group.outputs)
    products = sum(share(matrix.name) for matrix in graphs.matrices(group, rows))
    node_bytes, port_bytes = ONE_ROW if rows == 1 else SEVERAL_ROWS
    return round(node_bytes * nodes + port_bytes * ports + INT8_BYTES * products)


def _left(manifest: Manifest, artifacts: list[Artifact]) -> list[str]:
    """Groups that do not fit if the NPU is filled in the order of the forward, beside the bundle's artifacts."""
    kept, left = beside(manifest, artifacts), []
    for group in dict.fromkeys(artifact.group for artifact in artifacts):
        more = [*kept, *(artifact for artifact in artifacts if artifact.group == group)]
        if plan_memory(manifest, more).fits:
            kept = more
        else:
            left.append(group)
    return left


def _estimate(
    graphs: Graphs,
    kept: list[Artifact],
    left: list[Group],
    cpu: str,
    tokens: int,
    dram: str,
    sequences: int = 1,
) -> Estimate:
    """The estimate of `on_npu`. Groups in `left` run on the CPU."""
    spec = graphs.program.spec
    npu = on_npu(spec, kept, tokens, dram, graphs.terms, sequences=sequences)
    if not left:
        return npu
    on_board, count = on_cpu(spec, cpu, tokens, dram, graphs.terms), weights(spec)
    shares = dict.fromkeys(("projections", "head"), 0.0)
    for group in left:
        part = "head" if group.role == "head" else "projections"
        shares[part] += sum(m.k * m.n for m in graphs.matrices(group)) / count[part]

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
        """Bytes of an element: vectors are fp32, tables keep their dtype but take fp32 at most."""
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
    """Bytes of a graph without its projections, and of the rows of its golden vectors."""
    trace, rows = graphs.trace(group), 1 if group.role == "head" else SELF_TEST_ROWS
    numbers = sum(prod(shapes[constant.name]) for constant in trace.vectors.values())
    numbers += sum(array.size for array in trace.literals.values())
    numbers += rows * sum(port.width for port in (*group.inputs, *group.outputs))
    return 4 * numbers + sum(node.ByteSize() for node in trace.nodes)
