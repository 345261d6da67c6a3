"""RKNNLite's shape without Rockchip's library: it computes with NumPy what a file's group computes, logs instead of
raising as the real one does, and misbehaves on request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends.rknn import API, LITE
from rwkv_npu.board import hardware, npu
from rwkv_npu.conversion import artifacts, converter
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.models.maths import NumpyMaths
from rwkv_npu.models.spec import FUSIONS, Group, Spec, groups
from rwkv_npu.runtime.weights import BundleSource
from rwkv_npu.toolkit import Cycles, Environment, Job
from tools.board.files import write_rknn

TRACEBACK = "E Catch exception when init runtime!\nE Traceback (most recent call last):\n  File x, line 1\n"


class FakeLibrary:
    """The part of a ctypes library that the tests use: `rknn_outputs_get`."""

    def __init__(self) -> None:
        self.rknn_outputs_get = SimpleNamespace(errcheck=lambda code, function, arguments: code)

    def get(self, group: Group, rows: int, short: bool) -> None:
        outputs = [
            SimpleNamespace(size=4 * rows * port.width // (2 if short else 1)) for port in group.outputs
        ]
        self.rknn_outputs_get.errcheck(0, None, (7, len(outputs), outputs, None))


class FakeRuntime:
    """`rknn_runtime` of RKNNLite 2.5.0. Return codes are set on the class, one for each call."""

    versions = "2.5.0 (c949ad889d@2026)", "0.9.8"
    codes: dict[str, list[int]] = {}
    fed: list[Sequence[np.ndarray]] = []

    def __init__(self, group: Group, source: BundleSource):
        self._group, self._source = group, source
        self._inputs: dict[str, np.ndarray] = {}
        self.lib = FakeLibrary()

    def _code(self, call: str) -> int:
        codes = self.codes.get(call, [])
        return codes.pop(0) if codes else 0

    def set_inputs(
        self, inputs: Any, data_type: Any, data_format: Any, inputs_pass_through: Any = None
    ) -> int:
        assert data_type is data_format is None
        self.fed.append(inputs)
        for array in inputs:
            assert array.dtype == np.float32 and array.flags.c_contiguous and array.ndim == 2
        if code := self._code("set"):
            raise Exception(f"Set inputs failed. error code: {code}")
        ports = self._group.fixed_inputs(max(map(len, inputs)))
        names = [port.name for port in ports][::-1]  # the order of the file
        self._inputs = dict(zip(names, inputs, strict=True))
        return 0

    def get_sdk_version(self) -> tuple[str, str, str]:
        return ("RKNN VERSION:\n", *self.versions)

    def run(self, get_frame_id: bool = False) -> int:
        return self._code("run")

    def get_outputs(self, get_frame_id: bool = False, reuse_outputs: bool = False) -> list[np.ndarray]:
        if code := self._code("get"):
            raise Exception(f"E Get outputs failed, error code: {code}")
        self.lib.get(self._group, max(map(len, self._inputs.values())), bool(self._code("short")))
        inputs = {"mask": np.zeros((1, 1), np.float32), **self._inputs}  # which a single row has no need of
        outputs = self._source.evaluate(self._group, NumpyMaths(self._source.tensor), inputs)
        arrays = [np.array(outputs[port.name]).reshape(-1) for port in self._group.outputs]
        return arrays[:-1] if self._code("fewer") else arrays


class FakeLite:
    """says: the log of init_runtime. It returns -1 if `fails`, or for a mask in `refused`."""

    says, fails = "W Query dynamic range failed.\n", False
    opened: list[FakeLite] = []
    masks: list[int] = []
    refused: set[int] = set()

    def __init__(self, verbose: bool = False) -> None:
        self.rknn_data: bytes | None = None
        self.rknn_runtime: FakeRuntime | None = None
        self.released = False
        self.opened.append(self)

    def load_rknn(self, path: str) -> int:
        self.rknn_data = Path(path).read_bytes()
        return 0

    def init_runtime(self, core_mask: int = 0) -> int:
        assert self.rknn_data
        os.write(1, b"I RKNN: librknnrt version: 2.3.2\n")
        os.write(2, self.says.encode())
        self.masks.append(core_mask)
        if core_mask in self.refused:
            os.write(2, b"E RKNN: core mask %d is refused\n" % core_mask)
        if self.fails or core_mask in self.refused:
            return -1
        where = json.loads(self.rknn_data[68:].partition(b"\0")[0])
        source = BundleSource(open_bundle(where["bundle"]), where["fusion"])
        group = next(group for group in source.program.groups if group.name == where["group"])
        self.rknn_runtime = FakeRuntime(group, source)
        return 0

    def release(self) -> None:
        self.released = True


def fake_bundle(patch: pytest.MonkeyPatch, checkpoint: Path, spec: Spec, **options: Any) -> Path:
    """A bundle of `checkpoint`, whose artifacts FakeLite runs, as if the compiler had made them."""
    out = checkpoint.parent / "out.rwkv"
    known = {(fusion, group.name): group for fusion in FUSIONS for group in groups(spec, fusion)}

    def compile_many(environment: Environment, jobs: Sequence[Job], *, parallel: int | None) -> Iterator[Any]:
        for job in jobs:
            job.write_graph()
            job.onnx_path.unlink()
            name, fusion, _, rows = job.out_path.stem.rsplit(".", 3)
            identity = json.loads(job.options.custom_string)
            where = {**identity, "bundle": str(out), "fusion": fusion, "group": name}
            write_rknn(job.out_path, known[fusion, name], int(rows[1:]), where)
            yield (
                job,
                SimpleNamespace(
                    cycles=Cycles(1, 2, 3), cpu_fallback=(), version="2.5.0", verify_outputs=None
                ),
            )

    patch.setattr(artifacts, "compile_many", compile_many)
    patch.setattr(converter.environment, "require", lambda _: Environment(Path("python"), "2.5.0", False))
    return rwkv_npu.convert(checkpoint, out, **{"rows": "1,16", "cpu": "fp16", **options})


def become_a_board(monkeypatch: pytest.MonkeyPatch, folder: Path, runtime: str = "2.3.2") -> None:
    """Until the test ends, this machine looks like an RK3588 with RKNNLite and librknnrt."""
    package, api = ModuleType("rknnlite"), ModuleType("rknnlite.api")
    package.__path__ = []
    package.__spec__ = SimpleNamespace(name="rknnlite")  # type: ignore[assignment]
    api.RKNNLite = FakeLite  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rknnlite", package)
    monkeypatch.setitem(sys.modules, "rknnlite.api", api)
    library = folder / "librknnrt.so"
    library.write_bytes(f"librknnrt version: {runtime} (x)".encode())
    monkeypatch.setenv(API, LITE)
    monkeypatch.setattr(hardware, "soc", lambda: "rk3588")
    monkeypatch.setattr(hardware, "runtime_library", lambda: library)
    monkeypatch.setattr(npu, "LOCK", npu.Lock(folder))
    monkeypatch.setattr("rwkv_npu.backends.rknn.LOCK", npu.LOCK)
    for name, value in {"says": FakeLite.says, "fails": False, "opened": [], "masks": []}.items():
        monkeypatch.setattr(FakeLite, name, value)
    monkeypatch.setattr(FakeRuntime, "codes", {})
    monkeypatch.setattr(FakeRuntime, "fed", [])
