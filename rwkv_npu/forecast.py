"""What a conversion would make, from the shapes of a model alone: nothing is compiled, and nothing written.

Memory is added up by `memory.plan_memory`, as it is for what was compiled, and cycles follow the compiler's formula
(`estimate.formula_cycles`). The sizes of matrices are exact; what lies around them, and all that is time, is estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from rwkv_npu.artifacts import candidates, matrices, row_counts
from rwkv_npu.bundle import Artifact, Manifest
from rwkv_npu.bundle_writer import describe_groups
from rwkv_npu.checkpoint import Checkpoint
from rwkv_npu.converter import Request, default_scaling
from rwkv_npu.estimate import (
    BOARD_RATES,
    INT8_COLUMN_BYTES,
    TABLE,
    Assumptions,
    Rate,
    formula_cycles,
    on_cpu,
    on_npu,
    weights,
)
from rwkv_npu.graphs import NPU_WIDTH, Trace, trace_group
from rwkv_npu.memory import BUDGET_BYTES, MAX_CONTEXTS, MemoryPlan, plan_memory
from rwkv_npu.models.network import Program
from rwkv_npu.packing import PRECISIONS as PACKED
from rwkv_npu.packing import bits_of, packed_bytes
from rwkv_npu.recording import SELF_TEST_ROWS
from rwkv_npu.spec import FUSIONS, Group, Kind, Spec, Tensor, state_shapes, tensors

PROMPT_TOKENS = 128  # of the prompt whose reading is estimated
RATES = (TABLE, BOARD_RATES[0])  # those of one core, since a fused group runs on one
FORMULA_FOR = "rk3588"  # the chip whose tables the formula was found in

ASSUMED_SHARE = 0.8  # of the weights in int8, where nobody has chosen them yet
SHARES = {"fp16": 0.0, "mixed": ASSUMED_SHARE, "w8a8": 1.0}

# Bytes of a `.rknn` beside its weights, as found in files of toolkit 2.5.0: for each node of the graph, and for each
# input and output, which has to be transposed where it has several rows. In fp16 and in int8, of one row and of more.
BESIDE = {
    "one": ((6_300, 4_700), (6_300, 4_700)),
    "more": ((6_300, 36_000), (0, 155_000)),
}


@dataclass(frozen=True)
class Variant:
    """The artifacts of one precision. Their `weight_bytes` and `cycles` are estimates, like all else.

    int8: share of the weights that are. files: bytes of each `.rknn` by its path. memory: of all artifacts, whether
    they fit or not; left: the groups that the NPU has no room for, which convert would not make, and their bytes.
    ms: by rate, of a token written and of PROMPT_TOKENS read, with what is left on the board's CPU; none where no
    formula is known for the chip. board_bytes: what a process takes of the board's memory beside the NPU's.
    """

    precision: str
    int8: float
    rows: list[int]
    artifacts: list[Artifact]
    files: dict[str, int]
    memory: MemoryPlan
    left: list[str]
    left_bytes: int
    ms: dict[str, tuple[float, float]]
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
    """The graphs of a program's groups; those that are alike but for their layer are one."""

    def __init__(self, program: Program):
        self.program = program
        self._traces: dict[Any, Trace] = {}
        self._matrices: dict[Any, list[tuple[int, int]]] = {}

    def trace(self, group: Group, rows: int | None = None) -> Trace:
        """As the compiler reads it, or with `rows` None as the CPU does."""
        key = group.role, group.inputs, group.outputs, rows
        if key not in self._traces:
            split = NPU_WIDTH if (rows or 1) > 1 else None
            self._traces[key] = trace_group(self.program, group, rows=rows, split=split)
        return self._traces[key]

    def matrices(self, group: Group, rows: int | None = None) -> list[tuple[int, int]]:
        """(K, N) of what it multiplies with."""
        trace = self.trace(group, rows)
        key = id(trace)
        if key not in self._matrices:
            self._matrices[key] = matrices(trace, self.program.spec)
        return self._matrices[key]


def forecast(checkpoint: Checkpoint, request: Request) -> Forecast:
    """What `request` would make of a checkpoint, in each of SHARES; its own precision does not count."""
    spec = checkpoint.spec
    programs = {fusion: Program(spec, fusion, default_scaling(spec)) for fusion in FUSIONS}
    graphs = {fusion: Graphs(program) for fusion, program in programs.items()}
    parts = _bundle_parts(checkpoint, request, list(graphs.values()))
    # What every process holds: embedding and vectors, and the state of one sequence.
    held = parts["embedding and vectors"] + 4 * spec.L * sum(map(prod, state_shapes(spec).values()))
    chosen = graphs[request.fusion]
    variants = (
        [_variant(chosen, request, precision, held) for precision in SHARES] if request.compiles else []
    )
    return Forecast(spec, request.target, request.fusion, len(chosen.program.groups), parts, variants)


# -- artifacts -------------------------------------------------------------------------------------------


def _variant(graphs: Graphs, request: Request, precision: str, held: int) -> Variant:
    program, int8 = graphs.program, SHARES[precision]
    spec, groups = program.spec, {group.name: group for group in program.groups}
    manifest = Manifest(spec, "", "", program.fusion, "", program.scaling, None, groups=describe_groups(spec))

    def weigh(group: Group) -> int:
        return _weight_bytes(graphs.matrices(group), int8)

    plans = list(candidates(manifest, program, request.target, precision, request.rows, weigh))
    artifacts, memory = next((plan for plan in plans if plan[1].fits), plans[-1])
    if request.target == FORMULA_FOR:
        found = [graphs.matrices(groups[a.group], a.rows) for a in artifacts]
        artifacts = [
            replace(a, cycles=_cycles(f, a.rows, int8)) for a, f in zip(artifacts, found, strict=True)
        ]
    files = {a.path: a.weight_bytes + _around(graphs, groups[a.group], a.rows, int8) for a in artifacts}
    left = _left(manifest, artifacts)
    kept = [artifact for artifact in artifacts if artifact.group not in left]
    return Variant(
        precision=precision,
        int8=int8,
        rows=row_counts(artifacts),
        artifacts=artifacts,
        files=files,
        memory=memory,
        left=left,
        left_bytes=sum(weigh(groups[name]) for name in left),
        ms=_ms(graphs, kept, [groups[name] for name in left], request.cpu),
        # RKNNLite keeps what it has read of a file beside what it has given to the NPU.
        board_bytes=held + sum(files[artifact.path] for artifact in kept),
    )


def _weight_bytes(found: Sequence[tuple[int, int]], int8: float) -> int:
    """What matrices take of the NPU's memory, the share `int8` of them in 8 bits."""
    fp16 = sum(2 * k * n for k, n in found)
    w8a8 = sum((k + INT8_COLUMN_BYTES) * n for k, n in found)
    return round((1 - int8) * fp16 + int8 * w8a8)


def _cycles(found: Sequence[tuple[int, int]], rows: int, int8: float) -> dict[str, int]:
    wide, narrow = (
        [sum(terms) for terms in zip(*(formula_cycles(k, n, rows, bits) for k, n in found), strict=True)]
        for bits in (16, 8)
    )
    sums = (round((1 - int8) * w + int8 * n) for w, n in zip(wide, narrow, strict=True))
    return dict(zip(("ddr", "npu", "total"), sums, strict=True))


def _around(graphs: Graphs, group: Group, rows: int, int8: float) -> int:
    """Bytes of a `.rknn` other than its weights."""
    nodes = len(graphs.trace(group, rows).nodes)
    ports = sum(not port.per_sequence for port in (*group.inputs, *group.outputs))
    fp16, w8a8 = (node * nodes + port * ports for node, port in BESIDE["one" if rows == 1 else "more"])
    return round((1 - int8) * fp16 + int8 * w8a8)


def _left(manifest: Manifest, artifacts: list[Artifact]) -> list[str]:
    """Groups that are left when the NPU is filled in the order in which a token passes them."""
    kept: list[Artifact] = []
    left = []
    for group in dict.fromkeys(artifact.group for artifact in artifacts):
        more = [*kept, *(artifact for artifact in artifacts if artifact.group == group)]
        if plan_memory(manifest, more).fits:
            kept = more
        else:
            left.append(group)
    return left


def _ms(graphs: Graphs, kept: list[Artifact], left: list[Group], cpu: str) -> dict[str, tuple[float, float]]:
    """By rate, milliseconds of a token, and of a prompt of PROMPT_TOKENS."""
    spec = graphs.program.spec
    if not all(artifact.cycles for artifact in kept):
        return {}

    def ms(rate: Rate, tokens: int) -> float:
        total = on_npu(spec, kept, tokens, rate, Assumptions(), {}).total_ms
        of_all = on_cpu(spec, cpu, tokens, Assumptions(), {}).ms
        for group in left:
            part = "head" if group.role == "head" else "projections"
            total += of_all[part] * sum(map(prod, graphs.matrices(group))) / weights(spec)[part]
        return total

    return {rate.label: (ms(rate, 1), ms(rate, PROMPT_TOKENS)) for rate in RATES}


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
    if request.cpu in PACKED:
        packed = [packed_bytes(tensor, bits_of(request.cpu, tensor)) for tensor in projections]
        parts[f"weights in {request.cpu}"] = sum(packed)
    shapes = {tensor.name: tensor.used_shape for tensor in present}
    small = [_small_bytes(fusion, group, shapes) for fusion in graphs for group in fusion.program.groups]
    return {**parts, "graphs and self-test": sum(small)}


def _small_bytes(graphs: Graphs, group: Group, shapes: dict[str, tuple[int, ...]]) -> int:
    """Of a graph, whose projections are elsewhere, and of the rows with which a board tests its NPU."""
    trace, rows = graphs.trace(group), 1 if group.role == "head" else SELF_TEST_ROWS
    numbers = sum(prod(shapes[constant.name]) for constant in trace.vectors.values())
    numbers += sum(array.size for array in trace.literals.values())
    numbers += sum(
        port.width * (1 if port.per_sequence else rows) for port in (*group.inputs, *group.outputs)
    )
    return 4 * numbers + sum(node.ByteSize() for node in trace.nodes)
