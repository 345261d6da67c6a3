"""Long runs in a process of their own: many tokens, loads, threads, models and processes.

    python -m tests.reliability.long RUN FOLDER SIZE [BACKEND]

RUN is a key of RUNS, FOLDER is empty. SIZE is the number of tokens, of cycles, or of calls in each thread. Prints what
was done as JSON. A wrong number, a process that hangs, or memory that grows by more than GROWTH is an error.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_npu
from rwkv_npu.errors import BackendError
from rwkv_npu.model import Model
from tests.tiny import V, write_model

GROWTH = 24 << 20  # bytes of resident memory, after a quarter of the work
THREADS = 8
IDS = [int(i) for i in np.random.default_rng(0).integers(1, V, 40)]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Memory:
    """Checks that memory stays where it was once a quarter of the work is done."""

    def __init__(self, size: int) -> None:
        self._quarter, self._before, self.grown = max(1, size // 4), 0, 0

    def step(self, number: int) -> None:
        if number == self._quarter:
            self._before = resident()
        if number > self._quarter and number % self._quarter == 0:
            self.grown = resident() - self._before
            assert self.grown < GROWTH, f"{self.grown} bytes more after {number} steps"


def bundle(folder: Path, seed: int = 0) -> Path:
    model, out = folder / f"model{seed}" / "model.pth", folder / f"model{seed}.rwkv"
    if not out.exists():
        write_model(model, "7", seed=seed)
        rwkv_npu.convert(model, out, target="none", cpu="int8")
    return out


def logits(model: Model) -> np.ndarray:
    return model.forward(IDS)[0]


def tokens(folder: Path, size: int, backend: str) -> dict[str, Any]:
    """Generate `size` tokens in one sequence; the state then gives what reading all of them at once gives."""
    memory = Memory(size)
    with rwkv_npu.load(bundle(folder), backend=backend) as model:
        written = []
        steps = model.generate(IDS, max_tokens=size, temperature=1.0, top_p=1.0, seed=1, banned=[0])
        for number, step in enumerate(steps, 1):
            written.append(step.token)
            memory.step(number)
        assert len(written) == size
        found = step.state.logits
        expected, _ = model.forward([*IDS, *written])
        assert found is not None and np.isfinite(found).all()
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert error < 1e-3, error
    return {"grown_bytes": memory.grown, "error": error}


def cycles(folder: Path, size: int, backend: str) -> dict[str, Any]:
    """Load, read and close `size` times."""
    memory, path, expected = Memory(size), bundle(folder), None
    open_files = 0
    for number in range(1, size + 1):
        with rwkv_npu.load(path, backend=backend) as model:
            found = logits(model)
        expected = found if expected is None else expected
        assert np.array_equal(found, expected)
        memory.step(number)
        if number == max(1, size // 4):
            open_files = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) <= open_files
    return {"grown_bytes": memory.grown}


def threads(folder: Path, size: int, backend: str) -> dict[str, Any]:
    """Eight threads call one model `size` times each, every one with its own ids and state."""
    wrong: list[object] = []
    with rwkv_npu.load(bundle(folder), backend=backend) as model:
        texts = [IDS[number:] + IDS[:number] for number in range(THREADS)]
        expected = [model.forward(ids)[0] for ids in texts]

        def call(number: int) -> None:
            for _ in range(size):
                half = len(IDS) // 2
                _, state = model.forward(texts[number][:half])
                found, _ = model.forward(texts[number][half:], state, inplace=True)
                if not np.allclose(found, expected[number], rtol=0, atol=1e-4):
                    wrong.append(number)

        running = [threading.Thread(target=call, args=(number,)) for number in range(THREADS)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(300)
            assert not thread.is_alive(), "a thread hangs"
    assert not wrong, wrong
    return {"threads": THREADS}


def models(folder: Path, size: int, backend: str) -> dict[str, Any]:
    """Two models in one process, called in turn; one is closed while the other goes on."""
    one, two = (rwkv_npu.load(bundle(folder, seed), backend=backend) for seed in (0, 1))
    expected = logits(one), logits(two)
    assert not np.array_equal(*expected)
    for _ in range(size):
        assert np.array_equal(logits(one), expected[0]) and np.array_equal(logits(two), expected[1])
    one.close()
    assert np.array_equal(logits(two), expected[1])
    two.close()
    return {}


def forked(folder: Path, size: int, backend: str) -> dict[str, Any]:
    """After a load, forked processes use the model, or are refused in one line."""
    answers = set()
    with rwkv_npu.load(bundle(folder), backend=backend, threads=2) as model:
        expected = logits(model)
        for _ in range(size):
            child = os.fork()
            if not child:
                signal.alarm(60)  # a process that hangs is ended
                status = 3
                try:
                    status = 0 if np.array_equal(logits(model), expected) else 1
                except BackendError as error:
                    status = 2 if "spawn" in str(error) else 3
                finally:
                    os._exit(status)
            answers.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            assert np.array_equal(logits(model), expected)
    assert answers in ({0}, {2}), answers
    return {"answer": "right" if answers == {0} else "refused"}


def _loaded(path: str, backend: str, queue: Any) -> None:
    with rwkv_npu.load(path, backend=backend) as model:
        queue.put(logits(model))


def spawned(folder: Path, size: int, backend: str) -> dict[str, Any]:
    """After a load, spawned processes load the same model."""
    context = multiprocessing.get_context("spawn")
    with rwkv_npu.load(bundle(folder), backend=backend) as model:
        expected = logits(model)
        for _ in range(size):
            queue = context.Queue()
            child = context.Process(target=_loaded, args=(str(bundle(folder)), backend, queue))
            child.start()
            assert np.array_equal(queue.get(timeout=120), expected)
            child.join(60)
            assert child.exitcode == 0
    return {}


RUNS: dict[str, Callable[[Path, int, str], dict[str, Any]]] = {
    "tokens": tokens,
    "cycles": cycles,
    "threads": threads,
    "models": models,
    "forked": forked,
    "spawned": spawned,
}


def main(name: str, folder: str, size: str, backend: str = "numba") -> None:
    found = RUNS[name](Path(folder), int(size), backend)
    print(json.dumps({"run": name, "size": int(size), "backend": backend, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
