"""A child process that gives damaged and forged files to every reader.

    python -m tests.fuzz.target KIND FOLDER SEED COUNT SECONDS

KIND is a key of KINDS. FOLDER is empty and its own. Inputs SEED, SEED + 1, ... are made from good files by a few
random changes that know the format: values of JSON, shapes and offsets of tensors, single bytes. Each number gives
the same input every time. The number is printed before it is tried, so after a crash the last line names it. Only
the project's own errors may come out, after at most LIMIT seconds of processor time, and nothing outside FOLDER may
change.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import rwkv_npu
from rwkv_npu.errors import RwkvNpuError
from rwkv_npu.evaluation.journal import Journal
from rwkv_npu.formats.bundle import HOST, MANIFEST, SELF_TEST, WEIGHTS, open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.gguf_writer import write_gguf
from rwkv_npu.runtime.placement import tuned
from rwkv_npu.runtime.selftest import self_test
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.text.corpus import read_tokens
from rwkv_npu.text.tokenizer import load_tokenizer
from tests.forgery import sign
from tests.tiny import write_model, write_vocabulary

LIMIT = 5.0  # seconds of processor time for one input
BACKENDS = ("numpy", "numba", "ort")
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 63, 65, 2**31, 2**53, 2**63, 10**400, 0.5, float("nan"), 1e308),
    *("", "1", "7", "../x", "/etc/passwd", "a\nb", "x" * 300, "x" * 5000, [], [1], {}, {"a": 1}),
    json.loads("[" * 200 + "]" * 200),
)


class Slow(BaseException):
    """An input took more than LIMIT seconds."""


# -- changes ---------------------------------------------------------------------------------------------


def changed_json(value: Any, rng: random.Random) -> Any:
    """A copy of parsed JSON with one or two values replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        place = value
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
                if rng.random() < 0.15:
                    del place[key]
                elif type(place[key]) is int and rng.random() < 0.4:
                    place[key] += rng.choice((-64, -1, 1, 64))
                else:
                    place[key] = rng.choice(VALUES)
                break
            place = place[key]
    return value


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with some bytes flipped, cut off, or put in twice; most changes are near the start or the end."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not result:
            break
        near = rng.choice((len(result), min(len(result), 400)))
        at = rng.randrange(near) if rng.random() < 0.7 else len(result) - 1 - rng.randrange(near)
        match rng.randrange(5):
            case 0:
                del result[at:]
            case 1:
                result[at:at] = result[at : at + rng.randint(1, 40)]
            case 2:
                result[at] = rng.choice((0, 255, 0x7F, 0x80, ord("9"), ord('"')))
            case _:
                result[at] ^= 1 << rng.randrange(8)
    return bytes(result)


def changed_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: dtypes, shapes, offsets, names."""
    if rng.random() < 0.2:
        return changed_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    if rng.random() < 0.5:  # another shape of the same size, which nothing but the spec can tell
        entry = rng.choice([v for k, v in header.items() if k != "__metadata__"])
        shape = entry["shape"]
        if len(shape) > 1 and shape[0] % 2 == 0:
            entry["shape"] = rng.choice(
                ([shape[0] // 2, *shape[1:-1], shape[-1] * 2], shape[::-1], [*shape, 1])
            )
        if rng.random() < 0.3:
            names = [name for name in header if name != "__metadata__"]
            a, b = rng.choice(names), rng.choice(names)
            header[a], header[b] = header[b], header[a]
    else:
        header = changed_json(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + body


# -- kinds -----------------------------------------------------------------------------------------------


class BundleKind:
    """Forged bundles, opened by a backend and run."""

    def __init__(self, folder: Path) -> None:
        write_model(folder / "model" / "model.pth", "7")
        self.good = rwkv_npu.convert(folder / "model" / "model.pth", folder / "good.rwkv", target="none")
        self.path = folder / "forged.rwkv"
        for backend in BACKENDS:  # kernels are compiled before the clock runs
            with rwkv_npu.load(self.good, backend=backend) as model:
                model.forward([1, 2, 3])

    def make(self, rng: random.Random) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.good, self.path)
        name = rng.choice((MANIFEST, MANIFEST, HOST, WEIGHTS, WEIGHTS, "cpu/int8.safetensors", SELF_TEST))
        if name == MANIFEST:
            sign(self.path, lambda manifest: manifest.update(changed_json(manifest, rng)))
        else:
            file = self.path / name
            file.write_bytes(changed_tensors(file.read_bytes(), rng))
            sign(self.path)
        self.backend = rng.choice(BACKENDS)

    def read(self) -> None:
        self_test(BundleSource(open_bundle(self.path)))
        with rwkv_npu.load(self.path, backend=self.backend) as model:
            model.forward([1, 2, 3])
            model.forward([1])


def read_all(path: Path) -> None:
    """Open a checkpoint and compute each tensor of it."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names:
        checkpoint.tensor(name)


class FileKind:
    """Damaged files of one kind, each given to its reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "model.pth", "6", time_state=True)
        write_model(folder / "model.safetensors", "7")
        write_gguf(open_checkpoint(folder / "model.safetensors"), folder / "model.gguf", [b"a", b"b"])
        self.model = rwkv_npu.load(folder / "model.safetensors", backend="numpy")
        self.model.forward([1, 2])[1].save(folder / "state.st")
        tuned_state = {f"blocks.{i}.att.time_state": np.zeros((4, 16, 16), np.float32) for i in range(2)}
        import torch

        torch.save({name: torch.from_numpy(a) for name, a in tuned_state.items()}, folder / "tuned.pth")
        write_vocabulary(folder / "words.txt")
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        np.save(folder / "ids.npy", np.arange(20))
        (folder / "ids.json").write_text("[1, 2, 3]")
        (folder / "text.txt").write_text("hello\n")
        plan = {"default": "ort", "rules": {"head": "ort"}, "fusion": "layer", "note": "x", "artifacts": "y"}
        (folder / "tune.json").write_text(json.dumps({"format": 1, "machines": {"m": plan}}))
        index = {"weight_map": {"emb.weight": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with Journal(
            folder / "journal.st", {"model": "m"}, ["log_p"], 8, [self.model.new_state()]
        ) as journal:
            journal.add({"log_p": np.zeros(4)}, [self.model.new_state()])
        self.readers: dict[str, Callable[[Path], object]] = {
            "model.pth": open_checkpoint,
            "model.safetensors": open_checkpoint,
            "model.safetensors.index.json": open_checkpoint,
            "model.gguf": read_all,
            "state.st": self.model.load_state,
            "tuned.pth": self.model.load_state,
            "words.txt": load_tokenizer,
            "tokenizer.json": lambda path: load_tokenizer(path).decode(load_tokenizer(path).encode("a b\nc")),
            "ids.npy": lambda path: read_tokens(str(path), lambda text: []),
            "ids.json": lambda path: read_tokens(str(path), lambda text: []),
            "text.txt": lambda path: read_tokens(str(path), lambda text: [1]),
            "tune.json": lambda path: tuned(path.parent, "m", "y"),
            "journal.st": lambda path: Journal(path, {"model": "m"}, ["log_p"], 8, [self.model.new_state()]),
        }
        self.good = {name: (folder / name).read_bytes() for name in self.readers}
        for name in self.readers:
            self.readers[name](folder / name)

    def make(self, rng: random.Random) -> None:
        self.name = rng.choice(list(self.readers))
        data = self.good[self.name]
        if self.name.endswith(".json") and rng.random() < 0.8:
            data = json.dumps(changed_json(json.loads(data), rng)).encode()
        elif self.name.endswith((".st", ".safetensors")):
            data = changed_tensors(data, rng)
        else:
            data = changed_bytes(data, rng)
        self.path = self.folder / "case" / self.name
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        self.path.write_bytes(data)

    def read(self) -> None:
        self.readers[self.name](self.path)


TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False,
              "vocab": {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, "merges": [["a", "b"]]},
}  # fmt: skip

KINDS: dict[str, Any] = {"bundles": BundleKind, "files": FileKind}


def main(kind: str, folder: str, seed: str, count: str, seconds: str) -> None:
    tried = KINDS[kind](Path(folder))
    end = time.monotonic() + float(seconds)

    def too_slow(number: int, frame: FrameType | None) -> None:
        raise Slow

    signal.signal(signal.SIGPROF, too_slow)
    warnings.simplefilter("ignore")
    for number in range(int(seed), int(seed) + int(count)):
        if time.monotonic() > end:
            break
        tried.make(random.Random(number))
        print(number, flush=True)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            tried.read()
        except RwkvNpuError as error:
            assert str(error).isprintable() and len(str(error)) < 1500
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
