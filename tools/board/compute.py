"""The process that computes for the stand-in: it receives a group's inputs over a local socket and returns the outputs.

Each context of the stand-in has a connection, and a thread here. It first sends the identity that the compiler wrote to
the .rknn file: the bundle and the group, or the product of the matmul benchmark. Messages: standin/remote.c.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.backends.base import Backend
from rwkv_npu.bench.products import make_problem
from rwkv_npu.errors import RwkvNpuError, UsageError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.models.spec import FUSIONS, Group
from rwkv_npu.runtime.weights import BundleSource
from tools.board.half import HalfBackend

Function = Callable[[list[np.ndarray]], list[np.ndarray]]  # arrays of a group's inputs -> of its outputs
MakeBackend = Callable[[BundleSource], Backend]

_COUNT, _ANSWER = struct.Struct("=I"), struct.Struct("=i")
ACCEPTED, REFUSED = _ANSWER.pack(0), _ANSWER.pack(-1)


class Bundles:
    """The groups of several bundles, by fingerprint, name and int8 key. backend(source): opens their backend."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], backend: MakeBackend = HalfBackend):
        self._groups: dict[tuple[str, str, str], tuple[Backend, Group]] = {}
        for bundle in map(open_bundle, paths):
            for fusion, precision in product(FUSIONS, (None, *bundle.manifest.int8)):
                source = BundleSource(bundle, fusion, precision)
                opened, groups = backend(source), {group.name: group for group in source.program.groups}
                for name, int8 in _contents(source).items():
                    self._groups[source.fingerprint, name, int8] = opened, groups[name]

    def function(self, identity: str, inputs: dict[str, int], outputs: dict[str, int]) -> Function:
        """A function that computes the group of `identity`. inputs, outputs: elements by port. Raises KeyError."""
        keys = json.loads(identity)
        if "product" in keys:
            return _product(*map(int, keys["product"].split("x")))
        backend, group = self._groups[keys["fingerprint"], keys["group"], keys.get("int8", "")]
        rows = next(iter(outputs.values())) // group.outputs[0].width
        names = list(inputs), list(outputs)  # a file may have its inputs in another order
        known = {port.name for port in group.fixed_inputs(rows)}, [port.name for port in group.outputs]
        if (set(names[0]), names[1]) != known:
            raise KeyError(f"{group.name} has other inputs and outputs than its file")
        runner = backend.open(group, rows)

        def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
            for name, array in zip(names[0], arrays, strict=True):
                runner.inputs[name][:] = array.reshape(runner.inputs[name].shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # infinities and NaN are results here
                results = runner.run()
            return [results[name] for name in names[1]]

        return compute


def _contents(source: BundleSource) -> dict[str, str]:
    """The groups to compute from a source, with their int8 keys. Without a precision: all groups, in fp16."""
    if source.precision is None:
        return {group.name: "" for group in source.program.groups}
    return {artifact.group: artifact.int8 for artifact in source.artifacts() if artifact.int8}


def _product(m: int, k: int, n: int) -> Function:
    """The benchmark's product A @ B. Its B is determined by the shape."""
    b = make_problem(m, k, n).b.astype(np.float16).astype(np.float32)

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0].reshape(m, k).astype(np.float16).astype(np.float32) @ b]

    return compute


def _remove_leftover(path: Path) -> None:
    """Remove the socket of a server that was killed. Raises UsageError if a server still listens there."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise UsageError(f"{path}: another process listens there: end it, or name another socket")


class Server:
    """Listens on the socket `path` until it is closed. A context manager."""

    def __init__(self, path: str | os.PathLike[str], bundles: Bundles):
        if len(os.fsencode(path)) > 100:  # of the 108 bytes that an address has
            raise UsageError(f"{path} is too long for a socket: name a shorter one")
        self.path, self._bundles = Path(path), bundles
        self._socket = socket.socket(socket.AF_UNIX)
        _remove_leftover(self.path)
        try:
            self._socket.bind(os.fspath(path))
        except OSError as error:
            raise UsageError(f"{path}: cannot make a socket there: {error.strerror}") from error
        self._socket.listen(256)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            text = _read(stream, 1)
            if text is None:
                return
            try:
                identity, *ends = text.decode().split("\n")
                inputs, outputs = (_sizes(line) for line in ends)
                compute = self._bundles.function(identity, inputs, outputs)
            except (KeyError, ValueError, RwkvNpuError) as error:
                print(f"the stand-in asks for {text[:200]!r}: {error!r}", flush=True)
                connection.sendall(REFUSED)
                return
            connection.sendall(ACCEPTED)
            bounds = np.cumsum(list(inputs.values()))[:-1]
            while (data := _read(stream, 4)) is not None:
                results = compute(np.split(np.frombuffer(data, np.float32), bounds))
                parts = [np.ascontiguousarray(array, np.float32).tobytes() for array in results]
                try:
                    connection.sendall(b"".join([ACCEPTED, *parts]))
                except OSError:  # the process has ended
                    return


def _sizes(line: str) -> dict[str, int]:
    return {name: int(size) for name, _, size in (word.rpartition(":") for word in line.split(" "))}


def _read(stream: Any, width: int) -> bytes | None:
    """Read a count, and that many items of `width` bytes. None if the connection is closed."""
    try:
        head = stream.read(_COUNT.size)
        if len(head) < _COUNT.size:
            return None
        size = width * _COUNT.unpack(head)[0]
        data = stream.read(size)
    except OSError:
        return None
    return data if len(data) == size else None
