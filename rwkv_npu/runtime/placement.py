"""Placement: which backend runs which group, and the plans that `rwkv-npu tune` measured.

A plan is a default backend and rules, KEY=BACKEND. A key is a use (`decode`: one row of each sequence; `prefill`: more
rows), a group by name (`mid.3`) or by role (`mid`), or a group and a use (`head:decode`). If several rules match, the
most specific one counts: a name comes before a role, and a role before a use.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.formats.files import write_atomically
from rwkv_npu.models.spec import Group

USES = ("decode", "prefill")
TUNED = "tuned.json"  # in a bundle, but not in its manifest: a plan belongs to a machine
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A default backend, and rules (key, backend).

    fusion, note: the fusion and the speeds of a measured plan. batch: the fewest sequences whose next tokens
    the prefill backends read together; None: never.
    """

    default: str
    rules: tuple[tuple[str, str], ...] = ()
    fusion: str | None = None
    note: str = ""
    batch: int | None = None

    def backend(self, group: Group, decode: bool) -> str:
        """The backend that runs a group."""
        use, rules = USES[0 if decode else 1], dict(self.rules)
        keys = (f"{group.name}:{use}", group.name, f"{group.role}:{use}", group.role, use)
        return next((rules[key] for key in keys if key in rules), self.default)

    @property
    def names(self) -> set[str]:
        """The backends that the plan names."""
        return {self.default, *(name for _, name in self.rules)}

    def text(self) -> str:
        """The plan as text that `parse` reads."""
        rules = self.rules or [(use, self.default) for use in USES]
        return ",".join(f"{key}={name}" for key, name in rules)

    def backends(self, groups: Iterable[Group]) -> list[str]:
        """The backends that run these groups, without duplicates. Those that decode come first."""
        groups = list(groups)
        return list(
            dict.fromkeys(self.backend(group, decode) for decode in (True, False) for group in groups)
        )


def parse(
    plan: str | Mapping[str, str] | None, default: str, known: Iterable[str], groups: list[Group]
) -> Plan:
    """Make a plan from "prefill=rknn,decode=ort" or {"prefill": "rknn", ...}.

    known: names of backends. Raises UsageError for unknown keys and names.
    """
    if isinstance(plan, str):
        parts = [part.partition("=") for part in plan.split(",")]
        pairs = [(key.strip(), name.strip()) for key, _, name in parts]
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        if key and count > 1:
            raise UsageError(f"plan {plan} has {key} {count} times: once is enough")
        plan = dict(pairs)
    names = {*USES, *(group.name for group in groups), *(group.role for group in groups)}
    for key, name in (plan or {}).items():
        group, _, use = key.partition(":")
        if name not in known or group not in names or (use and (use not in USES or group in USES)):
            raise UsageError(
                f"plan {key}={name} is unknown: write KEY=NAME,... with KEY decode, prefill, a group such as "
                f"{groups[-1].name}, or {groups[-1].name}:decode, and NAME of {', '.join(known)}"
            )
    return Plan(default, tuple((plan or {}).items()))


# -- measured plans --------------------------------------------------------------------------------------


def tuned(folder: Path, machine: str, artifacts: str) -> Plan | None:
    """The plan measured on `machine` with these artifacts, or None. Raises BundleError if the file is damaged.

    A plan that was measured with other artifacts is ignored, because it may need those.
    """
    entry = _read(folder).get(machine)
    if entry is None or entry["artifacts"] != artifacts:
        return None
    try:
        rules = tuple((str(key), str(name)) for key, name in entry["rules"].items())
        batch = entry.get("batch")
        batch = None if batch is None else int(batch)
        return Plan(str(entry["default"]), rules, str(entry["fusion"]), str(entry["note"]), batch)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Damaged(folder, error) from error


def save_tuned(folder: Path, machine: str, artifacts: str, plan: Plan, measured: Mapping[str, Any]) -> Path:
    """Add a measured plan to those of other machines. A damaged file is replaced. Raises BundleError."""
    path = folder / TUNED
    entry = {
        "artifacts": artifacts,
        "fusion": plan.fusion,
        "default": plan.default,
        "rules": dict(plan.rules),
        "note": plan.note,
        "batch": plan.batch,
        "measured": measured,
    }
    others: dict[str, Any] = {}
    with contextlib.suppress(_Damaged):
        others = _read(folder)
    machines = {**others, machine: entry}
    try:
        write_atomically(path, json.dumps({"format": FORMAT, "machines": machines}, indent=1).encode())
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror}") from error
    return path


def _read(folder: Path) -> dict[str, Any]:
    """The stored plans by machine; {} if the file is missing, or another version wrote it in another format."""
    try:
        data = json.loads((folder / TUNED).read_text(encoding="utf-8"))
        machines: dict[str, Any] = data["machines"] if data["format"] == FORMAT else {}
        if not all(isinstance(entry["artifacts"], str) for entry in machines.values()):
            raise TypeError("an entry names no artifacts")
        return machines
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BundleError(f"cannot read {folder / TUNED}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(folder, error) from error


class _Damaged(BundleError):
    def __init__(self, folder: Path, error: Exception):
        super().__init__(
            f"{folder / TUNED} is damaged ({error!r:.80}): remove it, or run rwkv-npu tune again"
        )
