"""Rockchip's NPU through RKNNLite, on a board: one context per artifact, opened once.

`RKNNLite.inference` hands out arrays even where `rknn_run` failed, so that its steps are called apart here, and
every code is looked at. Inputs go in as fp32: librknnrt makes fp16 of them whatever they are.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from rwkv_npu.backends.base import Source, allocate_inputs
from rwkv_npu.backends.memory import MemoryPlan, check_room
from rwkv_npu.backends.rknn_api import check
from rwkv_npu.board import hardware
from rwkv_npu.board.hardware import numbers
from rwkv_npu.board.npu import LOCK, captured, raise_file_limit
from rwkv_npu.errors import LONGEST, BackendError, first_line
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Group
from rwkv_npu.toolkit import VERSIONS, rknn_info

CORES = {"auto": 0, "0": 1, "1": 2, "2": 4, "0,1": 3, "0,1,2": 7}
PACKAGE = "rknn-toolkit-lite2"
DEFAULT_CORES = "auto"


class ArtifactSource(Source, Protocol):
    """A model with artifacts on this machine's disk."""

    @property
    def outdated(self) -> str: ...

    def artifacts(self) -> list[Artifact]: ...

    def artifact_path(self, artifact: Artifact) -> Path: ...

    def memory_plan(self, artifacts: list[Artifact]) -> MemoryPlan: ...


class _Sizes:
    """Bytes of each output as librknnrt gave them. RKNNLite 2.5.0 does not look, and reads on behind a short one; 2.3.2
    refuses it."""

    def __init__(self, runtime: Any):
        self._given: list[int] = []
        # ctypes calls it after each call, with its arguments. A version of RKNNLite that keeps its library elsewhere
        # goes unchecked.
        with contextlib.suppress(AttributeError):
            runtime.lib.rknn_outputs_get.errcheck = self._note

    def _note(self, code: int, function: Any, arguments: tuple[Any, ...]) -> int:
        _, count, outputs, *_ = arguments
        self._given = [outputs[i].size for i in range(count)]
        return code

    def values(self, expected: list[int]) -> list[int]:
        """Numbers of fp32 values. What a library does not set is the number that RKNNLite expects, in values."""
        # A call that is not seen has none, and not those of the one before.
        given, self._given = self._given, []
        return expected if given in ([], expected) else [size // 4 for size in given]


def submit(runtime: Any) -> None:
    """Run what was set. Raises BackendError for a code, which RKNNLite may pack with a frame's number."""
    code = runtime.run(False)
    check("rknn_run", code[0] if isinstance(code, (tuple, list)) else code)


class RknnRunner:
    """A context. `order` names its inputs as the artifact has them."""

    def __init__(self, lite: Any, group: Group, rows: int, order: list[str]):
        self._runtime, self._group, self._rows = lite.rknn_runtime, group, rows
        self.inputs = allocate_inputs(group, rows)
        self._given, self._sizes = [self.inputs[name] for name in order], _Sizes(lite.rknn_runtime)
        # From 2.5.0 on RKNNLite can keep the arrays that it returns. Older ones leave them in reference cycles,
        # which Python's collector finds: it runs every twenty calls or so, by the number of their objects.
        able = "reuse_outputs" in inspect.signature(self._runtime.get_outputs).parameters
        self._options = {"reuse_outputs": True} if able else {}

    def run(self) -> Mapping[str, np.ndarray]:
        runtime = self._runtime
        try:
            check("rknn_inputs_set", runtime.set_inputs(self._given, None, None))
            submit(runtime)
            arrays = runtime.get_outputs(False, **self._options)
        except BackendError:
            raise
        except Exception as error:  # RKNNLite raises Exception itself
            raise BackendError(f"RKNNLite: {_bare(first_line(error))}") from error
        return self._named(arrays)

    def _named(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Raises BackendError where what came back is not what the group has to give."""
        ports = self._group.outputs
        wanted = [self._rows * port.width for port in ports]
        found = [array.size for array in arrays]
        if found == wanted:
            found = self._sizes.values(wanted)
        if found != wanted:
            raise BackendError(f"librknnrt returned outputs of {found} values instead of {wanted}")
        return {
            port.name: array.reshape(self._rows, port.width)
            for port, array in zip(ports, arrays, strict=True)
        }


class RknnBackend:
    """Contexts are opened one after the other, in the order in which they are asked for.

    cores: which of the NPU's cores run them, a key of CORES. Raises BackendError with what is missing, and what to
    do about it.
    """

    name = "rknn"

    def __init__(self, source: ArtifactSource, *, threads: int | None = None, cores: str = DEFAULT_CORES):
        if cores not in CORES:
            raise BackendError(f"NPU cores {cores!r} are unknown: use one of {' '.join(CORES)}")
        self._source, self._cores = source, cores
        if source.outdated:
            raise BackendError(source.outdated)
        chosen = _fitting(source.artifacts(), chip=_chip())
        self._artifacts = {(artifact.group, artifact.rows): artifact for artifact in chosen}
        self._lite = _rknnlite()
        check_room(source.memory_plan(chosen), "the artifacts", "convert with one row count (--rows 32)")
        self._contexts: dict[tuple[str, int], Any] = {}
        raise_file_limit()
        LOCK.acquire()
        self._locked = True
        self._bar = tqdm(total=len(chosen), desc="load the NPU", unit="graph", leave=False, disable=None)

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return tuple(sorted(rows for name, rows in self._artifacts if name == group.name))

    def open(self, group: Group, rows: int) -> RknnRunner:
        key = group.name, rows
        if key not in self._artifacts:
            raise BackendError(f"there is no artifact of {group.name} for {rows} rows")
        artifact = self._artifacts[key]
        path = self._source.artifact_path(artifact)
        if key not in self._contexts:
            self._contexts[key] = lite = _open_context(self._lite, path, artifact, self._cores)
            self._bar.update()
            if len(self._contexts) == 1 and (said := _misfits(lite, artifact)):
                warnings.warn(said, stacklevel=2)
        return RknnRunner(self._contexts[key], group, rows, _input_order(path, group, rows))

    def close(self) -> None:
        self._bar.close()
        while self._contexts:
            with captured():
                self._contexts.popitem()[1].release()
        if self._locked:
            self._locked = False
            LOCK.release()


# -- what has to be there --------------------------------------------------------------------------------


def _chip() -> str:
    chip = hardware.soc()
    if chip is None:
        raise BackendError(
            "rknn needs a board with a Rockchip NPU, and this machine is none: rknn-sim computes the same, "
            "and rwkv-npu doctor says what a board needs"
        )
    return chip


def _fitting(artifacts: list[Artifact], chip: str) -> list[Artifact]:
    """The artifacts for this chip, of one precision."""
    fitting = [artifact for artifact in artifacts if artifact.target == chip]
    if not fitting:
        others = ", ".join(sorted({artifact.target for artifact in artifacts})) or "none at all"
        raise BackendError(
            f"there are no artifacts of this fusion for the {chip} (there are: {others}): add them on a PC with "
            f"rwkv-npu convert --target {chip}, or use --backend ort"
        )
    return [artifact for artifact in fitting if artifact.precision == fitting[0].precision]


def _rknnlite() -> Any:
    with captured() as printed:
        try:
            from rknnlite.api import RKNNLite
        except ImportError as error:
            missing: ImportError | None = error
        else:
            return RKNNLite
    raise BackendError(
        f"rknn needs {PACKAGE}: pip install {PACKAGE} (on aarch64, Python 3.10 to 3.12; {missing}{printed.text[:80]})"
    )


# -- opening ---------------------------------------------------------------------------------------------


def _input_order(path: Path, group: Group, rows: int) -> list[str]:
    """Names of the artifact's inputs. Raises BackendError where it is not of this group."""
    info = rknn_info(path)
    inputs = [port["name"] for port in info["inputs"]]
    outputs = [port["name"] for port in info["outputs"]]
    expected = sorted(port.name for port in group.fixed_inputs(rows))
    if sorted(inputs) != expected or outputs != [port.name for port in group.outputs]:
        raise BackendError(f"{path} has inputs {inputs} and outputs {outputs}, which is not {group.name}")
    return inputs


def _open_context(rknnlite: Any, path: Path, artifact: Artifact, cores: str) -> Any:
    """An RKNNLite that has loaded the artifact. Raises BackendError."""
    with captured() as printed:
        lite, raised = rknnlite(verbose=False), ""
        try:
            failed = lite.load_rknn(str(path)) or lite.init_runtime(core_mask=CORES[cores])
        except Exception as error:  # it logs most of what goes wrong, and raises the rest
            failed, raised = -1, f"E {error}"
        if failed:
            with contextlib.suppress(Exception):
                lite.release()
    if failed:
        said = explain(f"{printed.text}\n{raised}", artifact, cores)
        raise BackendError(f"RKNNLite cannot open {path.name}: {said}")
    lite.rknn_data = None  # the file's content, which librknnrt has copied: weights need not be there twice
    return lite


def _misfits(lite: Any, artifact: Artifact) -> str:
    """Names the runtime or driver if it is older than it should be, "" if neither is."""
    with captured():
        _, runtime, driver = (str(text) for text in lite.rknn_runtime.get_sdk_version())
    return hardware.outdated(runtime, driver, artifact.toolkit)


def explain(text: str, artifact: Artifact, cores: str) -> str:
    """Turns RKNNLite's log into one line that says what to do."""
    library = hardware.runtime_library()
    runtime = hardware.runtime_version(library) if library else None
    remedies = {
        r"Invalid RKNN model version.*|.*RKNN_ERR_MODEL_INVALID.*": _older_file(artifact, runtime),
        r"Can not find dynamic library.*": "librknnrt.so belongs into /usr/lib; it comes with the board's image",
        r".*missing in the container.*": "start it with --device /dev/dri/renderD129 and "
        "-v /proc/device-tree/compatible:/proc/device-tree/compatible",
        r".*(failed to open rknpu|need to insmod).*|.*RKNN_ERR_DEVICE_UNAVAILABLE.*": "the kernel's NPU driver cannot "
        "be opened: rwkv-npu doctor says more",
        r".*(RKNN_ERR_MALLOC_FAIL|failed to allocate|Cannot allocate memory).*": "end other programs, or convert with "
        "one row count (--rows 32)",
        r".*Too many open files.*": "raise the limit, ulimit -Hn",
        r".*RKNN_ERR_TARGET_PLATFORM_UNMATCH.*": f"the artifact is for the {artifact.target}: convert with --target",
        r".*(core mode|core mask|core_mask).*": f"--npu-cores {cores} is not for this chip: use auto",
    }
    for pattern, remedy in remedies.items():
        if match := re.search(pattern, text):
            return f"{_bare(match[0])}: {remedy}"
    lines = text.splitlines()
    native = [line for line in lines if re.match(r"E? ?RKNN\b", line)]  # librknnrt knows more than RKNNLite
    said = native or [line for line in lines if re.match(r"E |\w*(Error|Exception)\b", line)]
    return _bare(said[-1]) if said else "it does not say why: rwkv-npu doctor may"


def _older_file(artifact: Artifact, runtime: str | None) -> str:
    """The way to an artifact that the board's runtime reads."""
    known = f"librknnrt {runtime}" if runtime else "this librknnrt"
    what = f"{known} does not read what toolkit {artifact.toolkit or '(unknown)'} compiled"
    if runtime is None or (artifact.toolkit and numbers(runtime) >= numbers(artifact.toolkit)):
        # Its own word does not explain it: try the next older compiler.
        older = [v for v in VERSIONS if not artifact.toolkit or numbers(v) < numbers(artifact.toolkit)]
    else:
        older = [v for v in VERSIONS if numbers(v) <= numbers(runtime)]
    if not older:
        return f"{what}: update it to {VERSIONS[-1]} or later"
    return f"{what}: on a PC, rwkv-npu toolkit install --version {older[0]} and rwkv-npu convert --toolkit {older[0]}"


def _bare(line: str) -> str:
    """A line without what RKNNLite puts before what librknnrt says."""
    return re.sub(r"^(E |Exception: )+", "", line.strip())[:LONGEST]
