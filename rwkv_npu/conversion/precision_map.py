"""Precisions by name: a JSON file that says of projections and groups in which precision an artifact has them.

    {"mid.*": "w8a8", "blocks.*.att.output.weight": "fp16", "head": "w8a8"}

A pattern names projections as checkpoints do, or groups, with shell wildcards; what comes later counts, and what no
pattern names is in fp16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from rwkv_npu.errors import UsageError, first_line
from rwkv_npu.graphs.trace import trace_group
from rwkv_npu.models.network import Program
from rwkv_npu.models.spec import FUSIONS, Spec

OF_A_PROJECTION = ("fp16", "w8a8")


def read_map(path: str, spec: Spec, may_be_int8: Collection[str]) -> list[str]:
    """The projections that the map at `path` has in int8, of those that may be. Raises UsageError."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise UsageError(f'{path} is no precision map: it takes {{"PATTERN": "w8a8" or "fp16", ...}}')
    return resolve(given, spec, may_be_int8, path)


def resolve(given: Mapping[str, str], spec: Spec, may_be_int8: Collection[str], where: str) -> list[str]:
    """As `read_map`, of what is in the file `where`."""
    members = _members(spec)
    precision = dict.fromkeys(may_be_int8, "fp16")
    for pattern, wanted in given.items():
        if wanted not in OF_A_PROJECTION:
            raise UsageError(
                f"{where}: {pattern!r} is to be in {wanted!r}: a projection is in {' or '.join(OF_A_PROJECTION)}"
            )
        named = {name for key, names in members.items() if fnmatchcase(key, pattern) for name in names}
        if not named:
            raise UsageError(f"{where}: nothing is called {pattern!r}: there are {_listed(members)}")
        if wanted == "w8a8" and not named.intersection(precision):
            raise UsageError(
                f"{where}: {pattern!r} stays in fp16, low-rank projections steer the state: those that may be in w8a8 "
                f"are {_listed(precision)}"
            )
        precision.update({name: wanted for name in named if name in precision})
    return [name for name, wanted in precision.items() if wanted == "w8a8"]


def _members(spec: Spec) -> dict[str, set[str]]:
    """Projections by their own names, and by those of the groups of both fusions."""
    members: dict[str, set[str]] = {}
    for fusion in FUSIONS:
        program = Program(spec, fusion)
        for group in program.groups:
            names = {constant.name for constant in trace_group(program, group).projections.values()}
            members.setdefault(group.name, set()).update(names)
            members.update({name: {name} for name in names})
    return members


def _listed(names: Collection[str]) -> str:
    """Each once, whatever its layer."""
    return ", ".join(sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) for name in names}))
