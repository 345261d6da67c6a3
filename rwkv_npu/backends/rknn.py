"""Rockchip's NPU on a board: each artifact is a context, which is opened once.

Contexts are driven through the C interface of librknnrt (`rknn_context`). RKNNLite is used instead if that interface
does not work on the board, or if RWKV_NPU_API=rknnlite is set. `RKNNLite.inference` returns arrays even
if `rknn_run` failed, so this module calls the steps of `inference` one by one and checks every return code. Inputs for
RKNNLite are fp32, because librknnrt then converts them to fp16.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from rwkv_npu.backends.base import Runner, Source, allocate_inputs
from rwkv_npu.backends.memory import MemoryPlan, check_room
from rwkv_npu.backends.rknn_api import CHIP, OVERRIDE, Networks, check
from rwkv_npu.backends.rknn_context import Context, ContextRunner, Refused
from rwkv_npu.board import hardware
from rwkv_npu.board.hardware import version_numbers
from rwkv_npu.board.npu import LOCK, captured, raise_file_limit
from rwkv_npu.errors import LONGEST, BackendError, first_line
from rwkv_npu.formats.bundle import Artifact
from rwkv_npu.models.spec import Group
from rwkv_npu.toolkit import VERSIONS, rknn_info

# Option `cores` -> masks of the cores. Layers are dealt over the masks in turn. A context runs on one core, and
# contexts on different cores run at the same time.
CORES = {"0": (1,), "1": (2,), "2": (4,), "0,1": (1, 2), "0,1,2": (1, 2, 4)}
CHIP_CORES = {"rk3588": "0,1,2", "rk3576": "0,1"}  # chips with several cores
ANY_CORE = 0  # mask: the runtime chooses the core
# While a core computes for one thread, the other checks its last outputs and hands over its next inputs.
THREADS_A_CORE = 2
PACKAGE = "rknn-toolkit-lite2"
DEFAULT_CORES = "auto"
API, LITE = "RWKV_NPU_API", "rknnlite"  # environment variable, and its value that asks for RKNNLite


class ArtifactSource(Source, Protocol):
    """Weights from a bundle that may have artifacts."""

    @property
    def precision(self) -> str | None:
        """The precision that the user requested."""

    @property
    def outdated(self) -> str:
        """The reason why the artifacts cannot be used, "" if they can."""

    def artifacts(self) -> list[Artifact]: ...

    def artifact_path(self, artifact: Artifact) -> Path: ...

    def memory_plan(self, artifacts: list[Artifact]) -> MemoryPlan: ...


class _Sizes:
    """Sizes of the outputs that librknnrt returned in the last call.

    RKNNLite 2.5.0 does not check them, and reads beyond the end of a short output. 2.3.2 refuses a short output.
    """

    def __init__(self, runtime: Any):
        self._bytes: list[int] = []
        # ctypes calls errcheck after each call. In a version of RKNNLite that keeps its library elsewhere, sizes are
        # not checked.
        with contextlib.suppress(AttributeError):
            runtime.lib.rknn_outputs_get.errcheck = self._record

    def _record(self, code: int, function: Any, arguments: tuple[Any, ...]) -> int:
        _, count, outputs, *_ = arguments
        self._bytes = [outputs[i].size for i in range(count)]
        return code

    def values(self, expected: list[int]) -> list[int]:
        """The number of fp32 values in each output, or `expected` if no sizes were recorded."""
        sizes, self._bytes = self._bytes, []  # a call that is not recorded must not see older sizes
        # Before the call, RKNNLite sets `size` to the number of values. Some versions of librknnrt do not replace it by
        # bytes.
        return expected if sizes in ([], expected) else [size // 4 for size in sizes]


def submit(runtime: Any) -> None:
    """Run the context on its inputs. Raises BackendError."""
    code = runtime.run(False)  # RKNNLite may return it with a frame number, in a tuple
    check("rknn_run", code[0] if isinstance(code, (tuple, list)) else code)


class RknnRunner:
    """A context of RKNNLite. order: names of its inputs, in the artifact's order."""

    def __init__(self, lite: Any, group: Group, rows: int, order: list[str]):
        self._runtime, self._group, self._rows = lite.rknn_runtime, group, rows
        self.inputs = allocate_inputs(group, rows)
        self._given, self._sizes = [self.inputs[name] for name in order], _Sizes(lite.rknn_runtime)
        # From 2.5.0 on, RKNNLite can reuse the arrays that it returns. Older versions leave them in reference cycles,
        # and Python's garbage collector then runs about every twenty calls.
        reuses = "reuse_outputs" in inspect.signature(self._runtime.get_outputs).parameters
        self._options = {"reuse_outputs": True} if reuses else {}

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
        """The outputs of a run by name, (M, width) each. Raises BackendError if their sizes are wrong."""
        ports = self._group.outputs
        expected = [self._rows * port.width for port in ports]
        sizes = [array.size for array in arrays]
        if sizes == expected:
            sizes = self._sizes.values(expected)
        if sizes != expected:
            raise BackendError(f"librknnrt returned outputs of {sizes} values instead of {expected}")
        return {
            port.name: array.reshape(self._rows, port.width)
            for port, array in zip(ports, arrays, strict=True)
        }


class RknnBackend:
    """Runs the artifacts of a bundle on the NPU. Contexts are opened one after the other, at first use.

    cores: the NPU cores that run them, a key of CORES, or `auto` for all.
    Raises BackendError with the missing chip, package, library or artifacts, and advice.
    """

    name = "rknn"

    def __init__(self, source: ArtifactSource, *, threads: int | None = None, cores: str = DEFAULT_CORES):
        if cores != DEFAULT_CORES and cores not in CORES:
            raise BackendError(
                f"NPU cores {cores!r} are unknown: use one of {' '.join([DEFAULT_CORES, *CORES])}"
            )
        self._source, self._auto = source, cores == DEFAULT_CORES
        if source.outdated:
            raise BackendError(source.outdated)
        chip = _chip()
        self._masks = CORES.get(CHIP_CORES.get(chip, "") if self._auto else cores, (ANY_CORE,))
        chosen = _fitting(source, chip=chip)
        self._artifacts = {(artifact.group, artifact.rows): artifact for artifact in chosen}
        self._networks, self._lite = _interface()
        check_room(source.memory_plan(chosen), "the artifacts", "convert with one row count, such as 32")
        self._contexts: dict[tuple[str, int], Any] = {}  # of RKNNLite, or `Context`
        raise_file_limit()
        LOCK.acquire()
        self._locked = True
        self._bar = tqdm(total=len(chosen), desc="load the NPU", unit="graph", leave=False, disable=None)

    def row_counts(self, group: Group) -> tuple[int, ...]:
        return tuple(sorted(rows for name, rows in self._artifacts if name == group.name))

    def queue(self, group: Group) -> int:
        # All groups of a queue run on one core: the number of masks divides the number of queues.
        return group.layer % (len(self._masks) * (1 if self._masks == (ANY_CORE,) else THREADS_A_CORE))

    def _mask(self, group: Group) -> int:
        """The cores of a group: layers are dealt over the masks."""
        return self._masks[group.layer % len(self._masks)]

    def open(self, group: Group, rows: int) -> Runner:
        key = group.name, rows
        if key not in self._artifacts:
            raise BackendError(f"there is no artifact of {group.name} for {rows} rows")
        artifact = self._artifacts[key]
        path = self._source.artifact_path(artifact)
        order = _input_order(path, group, rows)
        if key not in self._contexts:
            self._contexts[key] = opened = self._open_context(path, artifact, group)
            self._bar.update()
            if len(self._contexts) == 1 and (warning := _outdated(opened, artifact)):
                warnings.warn(warning, stacklevel=2)
        context = self._contexts[key]
        if isinstance(context, Context):
            return ContextRunner(context, group, rows)
        return RknnRunner(context, group, rows, order)

    def _open_context(self, path: Path, artifact: Artifact, group: Group) -> Any:
        """Open a context on the core of its layer. With `auto`, the runtime chooses the core if it refuses this one."""
        try:
            return self._open_on(path, artifact, self._mask(group))
        except CoreRefused as refused:
            if not self._auto:
                raise BackendError(f"{refused}: use auto") from refused
            warnings.warn(
                f"the runtime chooses the NPU core, and calls run one at a time, because {refused}",
                stacklevel=2,
            )
            self._masks = (ANY_CORE,)
            return self._open_on(path, artifact, ANY_CORE)

    def _open_on(self, path: Path, artifact: Artifact, mask: int) -> Any:
        """Open a context on the cores of a mask. If librknnrt raises `Refused` for the first one, use RKNNLite."""
        if self._networks is not None:
            try:
                return _open_network(self._networks, path, artifact, mask)
            except Refused as refused:
                if self._contexts:
                    raise
                self._networks, self._lite = None, _rknnlite(refused)
        return _open_lite(self._lite, path, artifact, mask)

    def on_each_core(self, group: Group, rows: int) -> tuple[list[Runner], str]:
        """A runner of one group on each core, and the reason if a core has none, else "".

        The runners share the weights. RKNNLite cannot share them, so the group then has one runner.
        """
        runners = [self.open(group, rows)]
        context = self._contexts[group.name, rows]
        if not isinstance(context, Context):
            return runners, "RKNNLite does not share weights between contexts"
        for mask in self._masks:
            if mask == self._mask(group):
                continue
            try:
                with captured():
                    duplicate = context.duplicate(mask)
            except BackendError as refused:
                return runners, str(refused)
            self._contexts[f"{group.name} on cores {mask}", rows] = duplicate
            runners.append(ContextRunner(duplicate, group, rows))
        return runners, ""

    def versions(self) -> dict[str, str]:
        """Versions of librknnrt (`runtime`) and of its `driver`, as a context reports them. {} before the first."""
        context = next(iter(self._contexts.values()), None)
        return dict(zip(("runtime", "driver"), _versions(context), strict=True)) if context else {}

    def close(self) -> None:
        self._bar.close()
        while self._contexts:
            with captured():
                context = self._contexts.popitem()[1]
                context.close() if isinstance(context, Context) else context.release()
        if self._locked:
            self._locked = False
            LOCK.release()


# -- requirements ----------------------------------------------------------------------------------------


def _chip() -> str:
    chip = hardware.soc() or (CHIP if OVERRIDE in os.environ else None)
    if chip is None:
        raise BackendError(
            "rknn needs a board with a Rockchip NPU, and this machine has none: rknn-sim computes the same, "
            "and rwkv-npu doctor checks a board"
        )
    return chip


def _fitting(source: ArtifactSource, chip: str) -> list[Artifact]:
    """The artifacts for a chip, in the precision of the first. Raises BackendError if there are none."""
    artifacts = source.artifacts()
    fitting = [artifact for artifact in artifacts if artifact.target == chip]
    if not fitting:
        others = ", ".join(sorted({artifact.target for artifact in artifacts})) or "none at all"
        kind = ", ".join(filter(None, (f"{source.program.fusion} fusion", source.precision)))
        raise BackendError(
            f"there are no artifacts for the {chip}, {kind} (there are: {others}): add them on a PC with "
            f"rwkv-npu convert --target {chip}, or use backend auto"
        )
    return [artifact for artifact in fitting if artifact.precision == fitting[0].precision]


def _interface() -> tuple[Networks | None, Any]:
    """The interface to use: (librknnrt's, None), or (None, RKNNLite's class) if that fails or API asks for it."""
    if os.environ.get(API) == LITE:
        return None, _rknnlite()
    try:
        return Networks(), None
    except BackendError as refused:
        return None, _rknnlite(refused)


def _rknnlite(refused: BackendError | None = None) -> Any:
    """RKNNLite's class. refused: why librknnrt's interface is not used; shown as a warning."""
    with captured() as printed:
        try:
            from rknnlite.api import RKNNLite
        except ImportError as error:
            missing: ImportError | None = error
        else:
            missing = None
    if missing is None:
        if refused:
            warnings.warn(f"RKNNLite drives the NPU, more slowly, because {refused}", stacklevel=4)
        return RKNNLite
    if refused:
        raise BackendError(f"{refused}; RKNNLite may work, but it is not installed: pip install {PACKAGE}")
    raise BackendError(
        f"{API}={LITE} needs {PACKAGE}: pip install {PACKAGE} (on aarch64, Python 3.10 to 3.12; "
        f"{missing}{printed.text[:80]})"
    )


# -- opening ---------------------------------------------------------------------------------------------


def _input_order(path: Path, group: Group, rows: int) -> list[str]:
    """Names of an artifact's inputs, in its order. Raises BackendError if the artifact is of another group."""
    info = rknn_info(path)
    inputs = [port["name"] for port in info["inputs"]]
    outputs = [port["name"] for port in info["outputs"]]
    expected = sorted(port.name for port in group.fixed_inputs(rows))
    if sorted(inputs) != expected or outputs != [port.name for port in group.outputs]:
        raise BackendError(f"{path} has inputs {inputs} and outputs {outputs}, not those of {group.name}")
    return inputs


class CoreRefused(BackendError):
    """The runtime does not run contexts on this core."""


def _open_network(library: Networks, path: Path, artifact: Artifact, mask: int) -> Context:
    """A context of librknnrt, on the cores of a mask. Raises BackendError, CoreRefused, Refused."""
    with captured() as printed:
        try:
            return Context.open(library, path.read_bytes(), mask)
        except Refused:
            raise
        except BackendError as error:
            failed = str(error)
    raise _refusal("librknnrt", f"{printed.text}\n{failed}", path, artifact, mask)


def _open_lite(rknnlite: Any, path: Path, artifact: Artifact, mask: int) -> Any:
    """An RKNNLite that has loaded the artifact, on the cores of a mask. Raises BackendError, CoreRefused."""
    with captured() as printed:
        lite, raised = rknnlite(verbose=False), ""
        try:
            failed = lite.load_rknn(str(path)) or lite.init_runtime(core_mask=mask)
        except Exception as error:  # RKNNLite logs most errors and raises the others
            failed, raised = -1, f"E {error}"
        if failed:
            with contextlib.suppress(Exception):
                lite.release()
    if failed:
        raise _refusal("RKNNLite", f"{printed.text}\n{raised}", path, artifact, mask)
    lite.rknn_data = None  # free the file's content: librknnrt has a copy
    return lite


def _refusal(opener: str, text: str, path: Path, artifact: Artifact, mask: int) -> BackendError:
    """The error for an artifact that cannot be opened. text: what was printed."""
    if mask != ANY_CORE and (refused := re.search(r".*(core mode|core mask|core_mask).*", text)):
        core = mask.bit_length() - 1
        return CoreRefused(f"{_bare(refused[0])}: this chip does not have the NPU core {core}")
    return BackendError(f"{opener} cannot open {path.name}: {explain(text, artifact)}")


def _outdated(context: Any, artifact: Artifact) -> str:
    """A warning about a runtime or driver that is too old, "" if neither is."""
    runtime, driver = _versions(context)
    return hardware.outdated(runtime, driver, artifact.toolkit)


def _versions(context: Any) -> tuple[str, str]:
    """Versions of librknnrt and of its driver."""
    with captured():
        if isinstance(context, Context):
            return context.versions()
        _, runtime, driver = (str(text) for text in context.rknn_runtime.get_sdk_version())
    return runtime, driver


def explain(text: str, artifact: Artifact) -> str:
    """Turn the log of librknnrt or RKNNLite into one line: the error and advice."""
    library = hardware.runtime_library()
    runtime = hardware.runtime_version(library) if library else None
    advice = {
        r"Invalid RKNN model version.*|.*RKNN_ERR_MODEL_INVALID.*|rknn_init returned -6:.*": _older_file(
            artifact, runtime
        ),
        r"Can not find dynamic library.*": "librknnrt.so belongs in /usr/lib; it comes with the board's image",
        r".*missing in the container.*": "start it with --device /dev/dri/renderD129 and "
        "-v /proc/device-tree/compatible:/proc/device-tree/compatible",
        r".*(failed to open rknpu|need to insmod|RKNN_ERR_DEVICE_UNAVAILABLE|rknn_init returned -3:).*": "the "
        "kernel's NPU driver cannot be opened: run rwkv-npu doctor",
        r".*(RKNN_ERR_MALLOC_FAIL|failed to allocate|Cannot allocate memory|returned -4:).*": "end other programs, "
        "or convert with one row count, such as 32",
        r".*Too many open files.*": "raise the limit, ulimit -Hn",
        r".*(RKNN_ERR_TARGET_PLATFORM_UNMATCH|rknn_init returned -13:).*": "the artifact is for the "
        f"{artifact.target}: convert for this chip",
    }
    for pattern, action in advice.items():
        if match := re.search(pattern, text):
            return f"{_bare(match[0])}: {action}"
    lines = text.splitlines()
    # Errors of librknnrt are more precise than those of RKNNLite.
    native = [line for line in lines if re.match(r"E? ?RKNN\b", line)]
    errors = native or [line for line in lines if re.match(r"E |\w*(Error|Exception)\b", line)]
    codes = re.findall(r"rknn_\w+ .*returned .*", text)
    return _bare((errors or codes)[-1]) if errors or codes else "it reports no reason: run rwkv-npu doctor"


def _older_file(artifact: Artifact, runtime: str | None) -> str:
    """Advice for an artifact that the board's runtime cannot read: another compiler, or a newer runtime."""
    known = f"librknnrt {runtime}" if runtime else "this librknnrt"
    problem = f"{known} cannot read files of toolkit {artifact.toolkit or '(unknown)'}"
    choices = [v for v in VERSIONS if runtime and version_numbers(v) <= version_numbers(runtime)]
    if runtime is None or (
        artifact.toolkit and version_numbers(runtime) >= version_numbers(artifact.toolkit)
    ):
        # The versions do not explain the error: try the next older compiler, or else the runtime's own.
        older = [
            v
            for v in VERSIONS
            if not artifact.toolkit or version_numbers(v) < version_numbers(artifact.toolkit)
        ]
        choices = older or choices
    if not choices:
        return f"{problem}: update it to {VERSIONS[-1]} or later"
    commands = f"rwkv-npu toolkit install --version {choices[0]} and rwkv-npu convert --toolkit {choices[0]}"
    return f"{problem}: on a PC, run {commands}"


def _bare(line: str) -> str:
    """A line of librknnrt without the prefixes that RKNNLite adds."""
    return re.sub(r"^(E |Exception: )+", "", line.strip())[:LONGEST]
