"""Placement: a few rules from keys to backends, and the plans that were measured for machines.

A key is a use (`decode`: one row a sequence, `prefill`: more), a group (its name `mid.3`, or its role `mid`), or both
(`head:decode`). The most particular rule that fits wins: a name before a role before a use.
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
TUNED = "tuned.json"  # in a bundle, and not in its manifest: it belongs to machines
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """`default` runs the groups that no rule names. `fusion`, `note`: of a measured plan, the fusion that it is for and
    its speeds. `batch`: from this many sequences on, their next tokens are read as prompts are; None: never."""

    default: str
    rules: tuple[tuple[str, str], ...] = ()
    fusion: str | None = None
    note: str = ""
    batch: int | None = None

    def backend(self, group: Group, decode: bool) -> str:
        use, rules = USES[0 if decode else 1], dict(self.rules)
        keys = (f"{group.name}:{use}", group.name, f"{group.role}:{use}", group.role, use)
        return next((rules[key] for key in keys if key in rules), self.default)

    @property
    def names(self) -> set[str]:
        return {self.default, *(name for _, name in self.rules)}

    def text(self) -> str:
        """As `parse` reads it."""
        rules = self.rules or [(use, self.default) for use in USES]
        return ",".join(f"{key}={name}" for key, name in rules)

    def backends(self, groups: Iterable[Group]) -> list[str]:
        """The backends that run some group, without repetitions; those of decode first."""
        groups = list(groups)
        return list(
            dict.fromkeys(self.backend(group, decode) for decode in (True, False) for group in groups)
        )


def parse(
    plan: str | Mapping[str, str] | None, default: str, known: Iterable[str], groups: list[Group]
) -> Plan:
    """A plan of "prefill=rknn,decode=ort" or {"prefill": "rknn", ...}. Raises UsageError for unknown keys and names."""
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
    """The plan measured on `machine` with these artifacts, None if there is none. Raises BundleError if it is damaged.

    A plan of other artifacts is none: they may lack what it uses.
    """
    found = _read(folder).get(machine)
    if found is None or found["artifacts"] != artifacts:
        return None
    try:
        rules = tuple((str(key), str(name)) for key, name in found["rules"].items())
        batch = found.get("batch")
        batch = None if batch is None else int(batch)
        return Plan(str(found["default"]), rules, str(found["fusion"]), str(found["note"]), batch)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Damaged(folder, error) from error


def save_tuned(folder: Path, machine: str, artifacts: str, plan: Plan, measured: Mapping[str, Any]) -> Path:
    """Keep a measured plan beside those of other machines; a damaged file is replaced. Raises BundleError."""
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
    """Plans by machine; none of a file of another format, which another version has written."""
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
