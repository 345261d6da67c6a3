"""Run one system in this process: open a model, then execute commands, one line of JSON each.

    PYTHON bench/peers/worker.py RUNTIME        (started by children.py, in the environment of the runtime)

    {"do": "open", "model": PATH, "weights": NAME, "generation": "7", "threads": 2}
    {"do": "logits", "prompt": [ids], "tokens": [ids], "out": FILE.npy}   logits after the prompt and each token
    {"do": "turn", "prompts": [[ids], ...], "tokens": [ids]}              the same, timed, with several prompts
    {"do": "memory"}

Each answer is a line of JSON, `{"error": LINE}` if the command failed. This file needs NumPy and the runtime. It
imports this project only if that is the runtime.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from typing import Any

import numpy as np


class Ours:
    """This project on a bundle, with its default backend or a given one."""

    packages = ("rwkv_npu", "numba", "onnxruntime", "numpy")

    def __init__(self, command: dict[str, Any]):
        import rwkv_npu

        self._model = rwkv_npu.load(
            command["model"], backend=command.get("backend", "auto"), threads=command["threads"]
        )
        self.reset()

    def reset(self) -> None:
        self._state = self._model.new_state()

    def read(self, ids: list[int]) -> np.ndarray:
        logits, self._state = self._model.forward(ids, self._state, inplace=True)
        return logits


class Package:
    """The `rwkv` package, as in its README: TorchScript on, state passed from call to call."""

    packages = ("rwkv", "torch")

    def __init__(self, command: dict[str, Any]):
        generation, path = command["generation"], command["model"]
        os.environ["RWKV_CUDA_ON"] = "0"
        os.environ["RWKV_JIT_ON"] = "1"
        if generation == "7":
            os.environ["RWKV_V7_ON"] = "1"
            path = path.removesuffix(".pth")
        import torch
        from rwkv.model import RWKV  # type: ignore[import-untyped]

        torch.set_num_threads(command["threads"])
        self._model = RWKV(path, f"cpu {command['weights']}")
        self.reset()

    def reset(self) -> None:
        self._state = None

    def read(self, ids: list[int]) -> np.ndarray:
        logits, self._state = self._model.forward(ids, self._state)
        return logits.float().numpy()


class Transformers:
    """Hugging Face transformers, which knows RWKV-4 only."""

    packages = ("transformers", "torch")

    def __init__(self, command: dict[str, Any]):
        import torch
        from transformers import RwkvForCausalLM

        torch.set_num_threads(command["threads"])
        torch.set_grad_enabled(False)
        self._tensor = torch.tensor
        self._model = RwkvForCausalLM.from_pretrained(command["model"], dtype=torch.float32).eval()
        self.reset()

    def reset(self) -> None:
        self._state = None

    def read(self, ids: list[int]) -> np.ndarray:
        out = self._model(self._tensor([ids]), state=self._state, use_cache=True, logits_to_keep=1)
        self._state = out.state
        return out.logits[0, -1].numpy()


class LlamaCpp:
    """llama.cpp through the C functions that llama-cpp-python exposes: ids in, logits out."""

    packages = ("llama_cpp_python",)

    def __init__(self, command: dict[str, Any]):
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(command["model"].encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file: see the log")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.no_perf = 1024, True
        options.n_threads = options.n_threads_batch = command["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context: see the log")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        print(llama_cpp.llama_print_system_info().decode(), file=sys.stderr)

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)

    def read(self, ids: list[int]) -> np.ndarray:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._width,)).copy()


RUNTIMES: dict[str, Any] = {
    "ours": Ours,
    "package": Package,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def open_system(runtime: str, command: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    begin = time.perf_counter()
    kind = RUNTIMES[runtime]
    system = kind(command)
    system.read([1])  # some runtimes load their weights only here
    versions = {name: importlib.metadata.version(name) for name in kind.packages}
    return system, {"ready_s": time.perf_counter() - begin, "versions": versions}


def write_logits(system: Any, command: dict[str, Any]) -> dict[str, Any]:
    system.reset()
    rows = [system.read(command["prompt"])]
    rows += [system.read([token]) for token in command["tokens"]]
    np.save(command["out"], np.stack(rows).astype(np.float32))
    return {}


def take_turn(system: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each prompt, by its length, and of the tokens after the first prompt.

    `others`: cores that other processes used during the turn.
    """
    seconds = {}
    busy, own, begin = busy_seconds(), time.process_time(), time.perf_counter()
    for prompt in command["prompts"]:
        system.reset()
        start = time.perf_counter()
        system.read(prompt)
        seconds[f"prefill_{len(prompt)}_s"] = time.perf_counter() - start
        if "decode_s" not in seconds:
            start = time.perf_counter()
            for token in command["tokens"]:
                system.read([token])
            seconds["decode_s"] = time.perf_counter() - start
    others = busy_seconds() - busy - (time.process_time() - own)
    return {**seconds, "others": round(max(0.0, others) / (time.perf_counter() - begin), 3)}


def busy_seconds() -> float:
    """CPU seconds of all cores since the machine started, including time stolen by the host."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, Any]:
    """Resident bytes: the peak, and the present size without mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
    names = {"peak_rss_bytes": "VmHWM", "own_bytes": "RssAnon"}
    return {name: int(found[key].split()[0]) * 1024 for name, key in names.items()}


def main() -> int:
    runtime = sys.argv[1]
    # Runtimes print: answers use the real stdout, everything else is redirected to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "open":
                system, answer = open_system(runtime, command)
            elif command["do"] == "memory":
                answer = memory()
            else:
                answer = {"logits": write_logits, "turn": take_turn}[command["do"]](system, command)
        except Exception as error:  # any error of a runtime becomes the failure of its row
            first = (str(error).strip() or "no message").splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
