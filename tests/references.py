"""Logits and states by other people's code, for the parity tests.

Nothing is stored: random checkpoints are written, and read by the `rwkv` package and by transformers, in the test
run. That happens in processes of their own, because the package takes a model's generation from environment
variables when it is imported, and because both take seconds to import. `References` starts them all and waits
for one when its numbers are asked for.

    python tests/references.py WORKER FOLDER JOBS        (what it starts; JOBS are Case.name, comma-separated)
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

V, T = 101, 72  # tokens a case reads: more than two chunks of a recurrence
TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, V, T)]

# Of all the sizes no two are equal, so that none can be taken for another.
_RANKS = {"6": {"mix": 8, "decay": 24}, "7": {"w": 16, "a": 24, "v": 8, "g": 40}}
_RANKS["7a"] = {**_RANKS["7"], "s": 32}  # the package knows no other s
_ENVIRONMENTS = {
    "classic": {},
    "7": {"RWKV_V7_ON": "1"},
    "7a": {"RWKV_V7_ON": "1", "RWKV_DE_VERSION": "1"},
    "transformers": {},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint that the package can read: a name, and arguments of `make_checkpoint`."""

    name: str
    generation: str
    D: int = 128
    N: int = 64
    L: int = 3
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def worker(self) -> str:
        return self.generation if self.generation in ("7", "7a") else "classic"

    @property
    def arguments(self) -> dict[str, Any]:
        sizes = {"D": self.D, "N": self.N, "L": self.L, "V": V, "F": 160}
        ranks = _RANKS.get(self.generation)
        return {"generation": self.generation, "dtype": "fp32", "ranks": ranks, **sizes, **self.options}


_SMALL: dict[str, Any] = {"D": 96, "N": 32}
_FIRST: dict[str, Any] = {"time_first": True}  # the bonus u as its logarithm
_FAAAA: dict[str, Any] = {"time_first": False}  # the bonus as it is
_STATE: dict[str, Any] = {"time_state": True}

CASES = (
    Case("4", "4", D=96),
    Case("5.0", "5.0", options=_FIRST),
    Case("5.0-n32-faaaa", "5.0", **_SMALL, options=_FAAAA),
    Case("5.0-state", "5.0", **_SMALL, options=_STATE),
    Case("5.1", "5.1", options=_FAAAA),
    Case("5.1-n32-first", "5.1", **_SMALL, options=_FIRST),
    Case("5.2", "5.2", options=_FAAAA),
    Case("5.2-n32-first-state", "5.2", **_SMALL, options=_FIRST | _STATE),
    Case("6", "6", options=_FAAAA),
    Case("6-n32-first", "6", **_SMALL, options=_FIRST),
    Case("6-state", "6", **_SMALL, options=_STATE),
    Case("7", "7"),
    Case("7-n32", "7", **_SMALL),
    Case("7-state", "7", **_SMALL, options=_STATE),
    Case("7a", "7a"),
    Case("7a-n32-state", "7a", **_SMALL, options=_STATE),
)
# Enough layers for a residual that is halved after every sixth to be halved twice.
DEEP_CASES = tuple(Case(f"{g}-deep", g, D=64, N=32, L=13) for g in ("4", "5.0", "5.2", "6", "7", "7a"))

# transformers: RWKV-4 as it is, with weights that it rescales when it runs them, and with a width of the attention
# of its own, of which transformers can run whole sequences only.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {"rescale_every": 0},
    "rescaled": {},
    "wide": {"rescale_every": 0, "attention_hidden_size": 96},
}


@dataclass(frozen=True)
class Reference:
    """Logits (T, V) after each token, and the last state in the names and layout of `spec.state_shapes`."""

    logits: np.ndarray
    state: dict[str, np.ndarray]


class References:
    """Starts the processes that compute; `package` and `transformers` wait for what they computed."""

    def __init__(self, folder: Path):
        from tools.make_checkpoint import make_checkpoint

        self._folder = folder
        jobs: dict[str, list[str]] = {"transformers": list(TRANSFORMERS)}
        for case in (*CASES, *DEEP_CASES):
            make_checkpoint(self.path(case), **case.arguments)
            jobs.setdefault(case.worker, []).append(case.name)
        self._processes = {worker: self._start(worker, names) for worker, names in jobs.items()}
        self._done: dict[str, dict[str, np.ndarray]] = {}

    def path(self, case: Case) -> Path:
        return self._folder / f"{case.name}.pth"

    def package(self, case: Case, way: str) -> Reference:
        """The package's results, read token by token (`one`) or as a sequence (`seq`)."""
        return self._reference(case.worker, f"{case.name}/{way}")

    def transformers(self, name: str) -> tuple[Path, Reference]:
        """A folder that transformers saved, and its results, without a state if it has none."""
        return self._folder / f"hf-{name}", self._reference("transformers", name)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _start(self, worker: str, names: list[str]) -> subprocess.Popen[bytes]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RWKV_")}
        fixed = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "HF_HUB_OFFLINE": "1"}
        with open(self._folder / f"{worker}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, __file__, worker, str(self._folder), ",".join(names)],
                env={**inherited, **fixed, **_ENVIRONMENTS[worker]},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _reference(self, worker: str, key: str) -> Reference:
        if worker not in self._done:
            status = self._processes[worker].wait()
            said = (self._folder / f"{worker}.log").read_text(errors="replace")
            assert status == 0, f"the reference process {worker} failed:\n{said[-4000:]}"
            with np.load(self._folder / f"{worker}.npz") as file:
                self._done[worker] = dict(file)
        found = self._done[worker]
        parts = {
            name.removeprefix(f"{key}/"): array for name, array in found.items() if name.startswith(f"{key}/")
        }
        return Reference(parts.pop("logits"), parts)


# -- in the processes ------------------------------------------------------------------------------------


def _run_package(folder: Path, case: Case) -> dict[str, np.ndarray]:
    import torch
    from rwkv.model import RWKV  # type: ignore[import-untyped]

    path = folder / f"{case.name}.pth"
    if case.generation == "6" and case.options.get("time_first"):
        path = _with_faaaa(path)
    is_v7 = case.worker != "classic"
    model = RWKV(str(path.with_suffix("") if is_v7 else path), "cpu fp32")

    def start() -> Any:
        if not (is_v7 and case.options.get("time_state")):
            return None
        # The package leaves a tuned state of v7 to its caller.
        state = model.generate_zero_state()
        weights = torch.load(path)
        for layer in range(case.L):
            state[3 * layer + 1] = weights[f"blocks.{layer}.att.time_state"].float()
        return state

    out, state = {}, start()
    logits = []
    for token in TOKENS:
        one, state = model.forward([token], state)
        logits.append(one)
    out["one/logits"] = torch.stack(logits).numpy()
    out |= {f"one/{name}": part for name, part in _package_state(case, state).items()}
    every, state = model.forward(TOKENS, start(), full_output=True)
    out["seq/logits"] = every.numpy()
    return out | {f"seq/{name}": part for name, part in _package_state(case, state).items()}


def _with_faaaa(path: Path) -> Path:
    """Write a v6 checkpoint with `time_faaaa` for `time_first`: the package counts v6's heads by that name."""
    import torch

    new = path.with_name(f"{path.stem}-faaaa.pth")
    renamed = {}
    for name, tensor in torch.load(path).items():
        logarithm = name.endswith(".att.time_first")
        renamed[name.replace("time_first", "time_faaaa")] = tensor.exp() if logarithm else tensor
    torch.save(renamed, new)
    return new


def _package_state(case: Case, state: list[Any]) -> dict[str, np.ndarray]:
    """The package's list, 3 or 5 tensors a layer, by our names. Its v5 and v6 keep the transpose, S[k,v]."""
    if case.generation == "4":
        names = ["att.shift", "att.a", "att.b", "att.q", "ffn.shift"]
    else:
        names = ["att.shift", "att.wkv", "ffn.shift"]
    parts = {
        name: np.stack([part.numpy() for part in state[i :: len(names)]]) for i, name in enumerate(names)
    }
    if case.worker == "classic" and case.generation != "4":
        parts["att.wkv"] = parts["att.wkv"].swapaxes(-1, -2)
    return parts


def _run_transformers(folder: Path, name: str) -> dict[str, np.ndarray]:
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    options = {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": 8, "intermediate_size": 160}
    torch.manual_seed(1)
    model = RwkvForCausalLM(RwkvConfig(**options, **TRANSFORMERS[name])).eval()
    for parameter_name, parameter in model.named_parameters():
        _randomise(parameter_name, parameter.data)
    # Before the model runs: that divides weights of late layers in place, in eval mode.
    model.save_pretrained(folder / f"hf-{name}")
    states = name != "wide"
    with torch.no_grad():
        result = model(torch.tensor([TOKENS]), use_cache=states)
    out = {"logits": result.logits[0].numpy()}
    if states:
        names = ("ffn.shift", "att.shift", "att.a", "att.b", "att.q")
        out |= {part: value[0].T.numpy() for part, value in zip(names, result.state, strict=True)}
    return out


def _randomise(name: str, values: Any) -> None:
    """Realistic weights where those of transformers would give logits near 0."""
    if name.endswith(("ln1.weight", "ln2.weight", "ln_out.weight", "pre_ln.weight")):
        values.normal_(1.0, 0.1)
    elif name.endswith(".bias"):
        values.normal_(0.0, 0.05)
    elif ".time_mix_" in name:
        values.uniform_(0.1, 0.9)
    elif name.endswith(".time_first"):
        values.normal_(-1.2, 0.4)
    elif values.ndim == 2:
        values.normal_(0.0, (2.0 if name.startswith("head") else 0.7) / values.shape[1] ** 0.5)


def main(worker: str, folder: str, names: str) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # the package collects garbage at every layer that it loads, among all of torch's objects
    cases = {case.name: case for case in (*CASES, *DEEP_CASES)}
    results = {}
    for name in names.split(","):
        if worker == "transformers":
            found = _run_transformers(Path(folder), name)
        else:
            found = _run_package(Path(folder), cases[name])
        results |= {f"{name}/{key}": array for key, array in found.items()}
    np.savez(Path(folder) / f"{worker}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
