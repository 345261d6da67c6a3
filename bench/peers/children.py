"""The parent's side of the worker processes. Commands and answers are lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.peers.systems import HERE, Failed


class Child:
    """A running worker. Output of its runtime goes to `log`."""

    def __init__(
        self, python: Path, runtime: str, threads: int, log: Path, variables: Mapping[str, str] | None = None
    ):
        self._log = log
        fixed = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("RWKV_", "PYTHON"))
        }
        with open(log, "w") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(HERE / "worker.py"), runtime],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**inherited, **fixed, **(variables or {}), "HF_HUB_OFFLINE": "1"},
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises Failed."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer raises Failed below, with the status
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"{do}: the process ended with status {self._process.wait()}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{do}: {answer['error']}; see {self._log}")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
