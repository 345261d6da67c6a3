"""Study one size: create the models, compare logits, measure in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.peers.children import Child
from bench.peers.results import BUSY, difference, rotation, summarise
from bench.peers.systems import (
    REFERENCE,
    SYSTEMS,
    Failed,
    System,
    Workshop,
    available_bytes,
    chosen,
    fitting,
    size_on_disk,
)
from bench.peers.worker import busy_seconds
from tools.make_checkpoint import SIZES, make_spec

CHECKED = 16  # tokens after the prompt whose logits are compared
PAUSE = 0.3  # seconds to watch the machine; threads of the last turn have stopped spinning by then
PATIENCE = 30  # seconds that a turn waits for a quiet machine
TRIES = 4  # of a turn that other processes disturb


@dataclass
class Task:
    """The input of every system: prompts, and tokens to read one by one after the first prompt."""

    size: str
    prompt_lengths: Sequence[int]
    token_count: int
    prompts: list[list[int]] = field(init=False)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.spec = make_spec(**SIZES[self.size])
        draw = np.random.default_rng(1).integers
        self.prompts = [draw(1, self.spec.V, length).tolist() for length in self.prompt_lengths]
        self.tokens = draw(1, self.spec.V, self.token_count).tolist()


def study(
    task: Task, workshop: Workshop, names: list[str], rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure all systems. Returns their figures and the versions of packages. Raises Failed if logits are wrong.

    A system that cannot be created, opened or run is skipped with its reason.
    """
    wanted = chosen(names, task.spec.generation, bool(workshop.limit))
    reference = reference_logits(task, workshop)
    left_out: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    children: dict[str, Child] = {}
    free = available_bytes()
    kept = fitting(wanted, task.spec.parameters, free)
    with ExitStack() as stack:
        for system in wanted:
            if system not in kept:
                left_out[system.name] = f"memory: {free / 1e9:.1f} GB were free for all"
                continue
            try:
                child, row = open_child(task.size, task.spec.generation, system, workshop, stack)
                row["logits"] = difference(checked_logits(task, child, system, workshop), reference)
            except Failed as error:
                left_out[system.name] = str(error)
                continue
            versions |= row.pop("versions")
            children[system.name], rows[system.name] = child, row
            workshop.say(f"{task.size} {system.name}: logits off by {row['logits']['largest']:.2g}")
        refuse_wrong(rows)
        left_out |= take_turns(task, children, rows, rounds, workshop.say)
        for name, child in children.items():
            rows[name] |= child.ask("memory")
    found = {"parameters": task.spec.parameters, "systems": rows, "left_out": left_out}
    prompts = {f"prefill_{length}": length for length in task.prompt_lengths}
    summarise(found, {"decode": task.token_count, **prompts})
    return found, versions


def open_child(
    model: str, generation: str, system: System, workshop: Workshop, stack: ExitStack
) -> tuple[Child, dict[str, Any]]:
    """A worker with the system's file of `model` open. `stack` closes it."""
    path = workshop.model(system, model)
    python = workshop.python(system.environment)
    log = workshop.folder / "logs" / f"{model}.{_file_name(system)}.log"
    child = stack.enter_context(Child(python, system.runtime, workshop.threads, log, workshop.variables))
    options = {"generation": generation, "threads": workshop.threads}
    row = child.ask("open", model=str(path), weights=system.weights, backend=system.backend, **options)
    return child, {**row, "file_bytes": size_on_disk(path)}


def logits_of(
    child: Child, system: System, workshop: Workshop, prompt: Sequence[int], tokens: Sequence[int]
) -> np.ndarray:
    """Logits (1 + tokens, V): after the prompt, and after each token."""
    out = workshop.folder / f"{_file_name(system)}.npy"
    child.ask("logits", out=str(out), prompt=prompt, tokens=tokens)
    logits: np.ndarray = np.load(out)
    out.unlink()
    return logits


def checked_logits(task: Task, child: Child, system: System, workshop: Workshop) -> np.ndarray:
    return logits_of(child, system, workshop, task.prompts[0], task.tokens[:CHECKED])


def reference_logits(task: Task, workshop: Workshop) -> np.ndarray:
    """Compute the reference in a process that ends before the others need its memory."""
    system = next(system for system in SYSTEMS if system.name == REFERENCE)
    with ExitStack() as stack:
        child, _ = open_child(task.size, task.spec.generation, system, workshop, stack)
        return checked_logits(task, child, system, workshop)


def _file_name(system: System) -> str:
    return system.name.replace(" ", "-")


def refuse_wrong(rows: dict[str, dict[str, Any]]) -> None:
    """Raises Failed if a system's difference from the reference is larger than its precision explains."""
    bounds = {system.name: system.tolerance for system in SYSTEMS}
    for name, row in rows.items():
        if not row["logits"]["largest"] <= bounds[name]:
            raise Failed(
                f"{name} computes something else: its logits are off by {row['logits']['largest']:.3g} standard "
                f"deviations, and its precision explains {bounds[name]:g}"
            )


def take_turns(
    task: Task,
    children: dict[str, Child],
    rows: dict[str, dict[str, Any]],
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Measure every system once a round, after a warm-up round.

    A system that fails is removed from `children` and `rows`. Returns the reasons.
    """
    failed: dict[str, str] = {}
    for row in rows.values():
        row["turns"] = []
    for turn in range(rounds + 1):
        for name in rotation(list(children), turn):
            try:
                taken = quiet_turn(task, children[name])
            except Failed as error:
                failed[name] = str(error)
                del children[name], rows[name]
                continue
            if turn:
                rows[name]["turns"].append(taken)
        say(f"{task.size}: round {turn} of {rounds} done" if turn else f"{task.size}: warmed up")
    return failed


def quiet_turn(task: Task, child: Child) -> dict[str, Any]:
    """Measure one turn. A disturbed turn is repeated, and the least disturbed one counts."""
    taken: list[dict[str, Any]] = []
    while not taken or (taken[-1]["others"] > BUSY and len(taken) < TRIES):
        wait_for_quiet()
        taken.append(child.ask("turn", prompts=task.prompts, tokens=task.tokens))
    return min(taken, key=lambda turn: turn["others"])


def wait_for_quiet() -> None:
    """Wait until no other process is busy, at most PATIENCE seconds."""
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE:
        busy = busy_seconds()
        time.sleep(PAUSE)
        if busy_seconds() - busy < BUSY * PAUSE:
            return
