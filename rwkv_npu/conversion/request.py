"""The settings of a conversion, and precision maps.

A precision map is a JSON file for `mixed` that assigns precisions to projections and groups by name:

    {"mid.*": "w8a8", "blocks.*.att.output.weight": "fp16", "head": "w8a8"}

A pattern with shell wildcards matches names of projections, as in checkpoints, or of groups. Later patterns win. A
projection that no pattern matches stays in fp16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rwkv_npu.board.hardware import version_numbers
from rwkv_npu.conversion.quantise import MAX_KL, REMEDIES, sizes
from rwkv_npu.conversion.writer import STORAGE
from rwkv_npu.errors import UsageError, first_line
from rwkv_npu.graphs.trace import trace_group
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Spec, check_fusion
from rwkv_npu.quant.cpu import PRECISIONS
from rwkv_npu.quant.npu import PRECISIONS as INT8_PRECISIONS
from rwkv_npu.toolkit import OLDEST_INT8, TARGETS

NO_TARGET = "none"  # graphs for the CPU only
NO_TEXT = "none"  # for `calibrate`: int4 is rounded to nearest
NEW_BUNDLE_CPU = "int8"  # default CPU precision of a new bundle

# Precisions of artifacts; some chips have others. bf16 compiles for the RK3588, but no board has run it.
ARTIFACT_PRECISIONS = ("fp16", *INT8_PRECISIONS)
NPU_PRECISIONS = {"rk3588": ("fp16", "bf16", *INT8_PRECISIONS)}
PROJECTION_PRECISIONS = ("fp16", "w8a8")  # allowed in a precision map


@dataclass(frozen=True)
class Request:
    """The settings of a conversion: the arguments of `converter.convert`.

    rows None: chosen by memory. cpu None: the existing bundle's precision, int8 for a new bundle.
    Raises UsageError for an unknown value, or for values that do not go together.
    """

    checkpoint: Path
    out: Path | None = None
    target: str = "rk3588"
    precision: str = "fp16"
    fusion: str = "layer"
    rows: tuple[int, ...] | None = None
    cpu: str | None = None
    force: bool = False
    jobs: int | None = None
    verify: bool = False
    tokenizer: str | None = None
    toolkit: str | None = None
    layout: str | None = None
    calibrate: tuple[str, ...] = ()
    precision_map: str | None = None
    max_kl: float = MAX_KL
    remedies: str = "all"
    adapter: Path | None = None
    adapter_scale: float | None = None
    adapter_init: Path | None = None
    adapter_blocks: str | None = None
    initial_state: Path | None = None

    def __post_init__(self) -> None:
        check_fusion(self.fusion)
        known: list[tuple[str, str | None, Collection[str | None]]] = [
            ("cpu", self.cpu, (None, *STORAGE, *PRECISIONS)),
            ("target", self.target, (*TARGETS, NO_TARGET)),
            ("remedies", self.remedies, REMEDIES),
        ]
        for name, value, values in known:
            if value not in values:
                names = ", ".join(known_value for known_value in values if known_value)
                raise UsageError(f"{name}={value!r} is unknown: use one of {names}")
        if self.precision not in self._npu_precisions:
            raise UsageError(
                f"{self.target} has no precision {self.precision!r}: use one of {', '.join(self._npu_precisions)}"
            )
        if not 0 < self.max_kl < float("inf"):
            raise UsageError(f"max_kl={self.max_kl}: it must be a number of nats above 0")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs={self.jobs}: it must be at least 1")
        if self.precision_map is not None and self.precision != "mixed":
            raise UsageError(
                f"precision_map= is for precision='mixed', not for {self.precision!r}: it selects the int8 projections"
            )
        measured = self.cpu == "auto" or self.precision == "mixed" and self.precision_map is None
        if self.max_kl != MAX_KL and not measured:
            raise UsageError(
                "max_kl= is for cpu='auto', and for precision='mixed' without precision_map=: it limits the choice of "
                "projections"
            )
        if not self.reads_text and (self.compiles or self.quantises or self.cpu == "auto"):
            raise UsageError(
                f"calibrate={NO_TEXT!r} is for bundles of the CPU alone (target='none' precision='fp16'), and not for "
                "cpu='auto': a text is needed to choose by"
            )
        if self.adapter is None and not (
            self.adapter_scale is self.adapter_init is self.adapter_blocks is None
        ):
            raise UsageError("adapter_scale=, adapter_init= or adapter_blocks= is given, but no adapter=")
        if self.toolkit is not None:
            self.check_toolkit(self.toolkit)

    def check_toolkit(self, version: str) -> None:
        """Raises UsageError if this version of the compiler cannot build the request."""
        if self.compiles and self.quantises and version_numbers(version) < version_numbers(OLDEST_INT8):
            floats = [name for name in self._npu_precisions if name not in INT8_PRECISIONS]
            raise UsageError(
                f"rknn-toolkit2 {version} has no precision {self.precision!r} for {self.target}: use one of "
                f"{', '.join(floats)}, or toolkit={OLDEST_INT8!r} or later"
            )

    @property
    def _npu_precisions(self) -> tuple[str, ...]:
        return NPU_PRECISIONS.get(self.target, ARTIFACT_PRECISIONS)

    @property
    def cpu_precision(self) -> str:
        """Precision of the CPU's products; the default of a new bundle if the user gives none."""
        return self.cpu or NEW_BUNDLE_CPU

    @property
    def storage(self) -> str:
        """Precision of the weights that every backend can read. Quantised weights are stored beside them."""
        return "fp32" if self.cpu == "fp32" else "fp16"

    @property
    def compiles(self) -> bool:
        return self.target != NO_TARGET

    @property
    def quantises(self) -> bool:
        return self.precision in INT8_PRECISIONS

    @property
    def reads_text(self) -> bool:
        return self.calibrate != (NO_TEXT,)

    @property
    def calibrates(self) -> bool:
        """True if the model must read a text for the NPU: for fp16 range scaling, or for int8 parameters."""
        return self.compiles or self.quantises


def parse_target(target: str) -> str:
    """The chip of a name in upper or lower case, with or without the letter of a variant: RK3588S -> rk3588."""
    name = target.strip().lower()
    variant = re.fullmatch(r"(rk\d{4})[a-z]\d?", name)
    return variant[1] if variant else name


def parse_rows(rows: str | int | Sequence[int]) -> tuple[int, ...] | None:
    """`auto` -> None; "1,64", 64 or [1, 64] -> (1, 64). Raises UsageError outside 1 .. 1024."""
    if rows == "auto":
        return None
    parts = rows.split(",") if isinstance(rows, str) else [rows] if isinstance(rows, int) else rows
    try:
        counts = sorted({int(part) for part in parts})
    except (TypeError, ValueError):
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 1024:
        raise UsageError(f"rows={rows!r} makes no sense: write auto, or numbers from 1 to 1024 such as 1,64")
    return tuple(counts)


# -- precision maps --------------------------------------------------------------------------------------


def read_map(path: str, spec: Spec) -> list[str]:
    """Names of the projections that the precision map at `path` puts in int8. Raises UsageError."""
    try:
        precisions = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(precisions, dict) or not all(isinstance(value, str) for value in precisions.values()):
        raise UsageError(f'{path} is no precision map: it takes {{"PATTERN": "w8a8" or "fp16", ...}}')
    return resolve(precisions, spec, sizes(spec), path)


def resolve(patterns: Mapping[str, str], spec: Spec, may_be_int8: Collection[str], where: str) -> list[str]:
    """As `read_map`, for the content of the file `where`."""
    members = _members(spec)
    precision = dict.fromkeys(may_be_int8, "fp16")
    for pattern, wanted in patterns.items():
        if wanted not in PROJECTION_PRECISIONS:
            raise UsageError(
                f"{where}: {pattern!r} is to be in {wanted!r}: a projection is in {' or '.join(PROJECTION_PRECISIONS)}"
            )
        matched = {name for key, names in members.items() if fnmatchcase(key, pattern) for name in names}
        if not matched:
            raise UsageError(f"{where}: nothing is called {pattern!r}: there are {_listed(members)}")
        if wanted == "w8a8" and not matched.intersection(precision):
            raise UsageError(
                f"{where}: {pattern!r} stays in fp16, low-rank projections steer the state: those that may be in w8a8 "
                f"are {_listed(precision)}"
            )
        precision.update({name: wanted for name in matched if name in precision})
    return [name for name, wanted in precision.items() if wanted == "w8a8"]


def _members(spec: Spec) -> dict[str, set[str]]:
    """Names of projections, by what a pattern can match: a projection's own name, or a group of either fusion."""
    members: dict[str, set[str]] = {}
    for fusion in FUSIONS:
        program = Program(spec, fusion)
        for group in program.groups:
            names = {constant.name for constant in trace_group(program, group).projections.values()}
            members.setdefault(group.name, set()).update(names)
            members.update({name: {name} for name in names})
    return members


def _listed(names: Collection[str]) -> str:
    """The names, with N for the number of a layer, each once."""
    return ", ".join(sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) for name in names}))
