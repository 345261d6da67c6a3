"""A file that many rows of results are kept in: JSON, with the machine and the command that they came from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.files import write_atomically

Row = TypeVar("Row")
Of = TypeVar("Of", bound="Document[Any]")


@dataclass
class Document(Generic[Row]):
    """What one file holds. `machine` says where and `command` how the rows came about.

    Of a kind of results: FORMAT of their files, the class of a ROW, and the COMMAND that makes them.
    """

    FORMAT: ClassVar[int | str]
    ROW: ClassVar[type[Any]]
    COMMAND: ClassVar[str]

    machine: dict[str, Any]
    command: str = ""
    results: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self, **more: Any) -> str:
        data = {"format": self.FORMAT, "command": self.command, "machine": self.machine, "notes": self.notes}
        rows: list[Any] = self.results
        return json.dumps({**data, **more, "results": [asdict(row) for row in rows]}, indent=1) + "\n"

    def save(self, path: Path) -> None:
        """Raises UsageError."""
        try:
            write_atomically(path, self.to_json().encode())
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls: type[Of], path: Path) -> Of:
        """Raises UsageError for what is not such a file; of its rows, what this version does not know is left out."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != cls.FORMAT:
                raise UsageError(
                    f"{path} holds results of format {data['format']}; this version reads {cls.FORMAT}"
                )
            known = {field.name for field in fields(cls.ROW)}
            rows = [cls.ROW(**{name: row[name] for name in row if name in known}) for row in data["results"]]
            return cls(data["machine"], data["command"], rows, data.get("notes", []))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} does not hold results of `{cls.COMMAND}` ({error})") from error
