"""Opens the backends of a model: selects them for `auto`, and adds the fallback to an NPU backend."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shlex
import warnings
from dataclasses import dataclass
from typing import cast

from rwkv_npu.backends import BACKENDS, NPU_BACKENDS, open_backend
from rwkv_npu.backends.base import Backend, Faults, NpuBackend
from rwkv_npu.backends.fallback import FP16_BOUND, INT8_BOUND, Fallback
from rwkv_npu.board import hardware
from rwkv_npu.errors import RwkvNpuError, UsageError, first_line
from rwkv_npu.formats.bundle import Bundle, artifacts_digest
from rwkv_npu.kernels.recurrence import compiled
from rwkv_npu.quant.npu import PRECISIONS as INT8_PRECISIONS
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.estimate import sequences_for_npu
from rwkv_npu.runtime.placement import Plan, tuned
from rwkv_npu.runtime.selftest import self_test
from rwkv_npu.runtime.weights import ModelSource

# The fastest CPU backend that is installed. It runs the model if there is no NPU, and is the fallback of an NPU.
CPU_BACKEND = "numba" if importlib.util.find_spec("numba") else "ort"
NPU_BACKEND, SIMULATOR = "rknn", "rknn-sim"
PACKAGES = {"numba": "numba", "torch": "torch"}  # packages that a backend needs and an installation may lack


@dataclass(frozen=True)
class Options:
    """Options of backends. threads: on the CPU, None for the default. npu_cores: on the NPU."""

    threads: int | None = None
    npu_cores: str = "auto"


def open_engine(source: ModelSource, plan: Plan, options: Options, *, fused: bool = True) -> Engine:
    """Open an engine on the plan's backends. fused: use fused forwards; otherwise it runs group by group.

    Raises RwkvNpuError, with nothing left open.
    """
    groups = source.program.groups
    if not _offers_precision(plan, source):
        raise UsageError(
            f"{', '.join(plan.backends(groups))} cannot multiply in {source.precision}: backend='numpy' computes it, "
            f"and {NPU_BACKEND} and {SIMULATOR} run artifacts that were converted with precision={source.precision!r}"
        )
    opened: dict[str, Backend] = {}
    fallbacks: list[Fallback] = []
    faults, recorded = Faults(), functools.cache(lambda: self_test(source))
    advice = _advice(source)

    def cpu() -> Backend:
        """Open the fallback's own CPU backend. The plan's CPU backend may have fewer bits than the NPU."""
        return open_backend(CPU_BACKEND, source.unquantised(), threads=options.threads)

    with contextlib.ExitStack() as on_failure:
        for name in plan.backends(groups):
            if name in NPU_BACKENDS:
                made = open_backend(name, source, threads=options.threads, cores=options.npu_cores)
                bound = INT8_BOUND if source.precision_on(name) in INT8_PRECISIONS else FP16_BOUND
                fallbacks.append(
                    Fallback(cast(NpuBackend, made), recorded, cpu, faults, bound=bound, advice=advice)
                )
                opened[name] = fallbacks[-1]
            else:
                opened[name] = open_backend(name, source, threads=options.threads)
            on_failure.callback(opened[name].close)
        engine = Engine(
            source.program,
            source.tensor,
            assign=lambda group, decode: opened[plan.backend(group, decode)],
            fingerprint=source.fingerprint,
            initial=source.initial_states(),
            faults=faults,
            fused=fused,
            batch=plan.batch,
            # The NumPy backend alone is the reference. Its recurrence is NumPy's too.
            recurrence=None if opened.keys() == {"numpy"} else compiled(source.spec, options.threads),
        )
        for fallback in fallbacks:
            fallback.check_self_tests()
        on_failure.pop_all()
    return engine


def _offers_precision(plan: Plan, source: ModelSource) -> bool:
    """False if an int8 precision of artifacts is requested, and no backend of the plan computes in it."""
    precisions = {source.precision_on(name) for name in plan.backends(source.program.groups)}
    return source.precision not in INT8_PRECISIONS or source.precision in precisions


def _advice(source: ModelSource) -> str:
    """Advice for messages about wrong results of an NPU."""
    if source.program.fusion == "layer":
        return "; where the residual leaves fp16's range, fusion='projection' keeps it on the CPU"
    return "; rwkv-npu doctor compares the versions of compiler, runtime and driver"


def open_automatically(source: ModelSource, options: Options, measured: Plan | None) -> tuple[Engine, str]:
    """Open an engine on the fastest backends that work here. Returns it and the reason for the choice.

    It tries, in this order: the plan that was measured on this machine; the NPU for prompts and the CPU for tokens; the
    CPU alone. The NPU needs its runtime, and artifacts that pass their self-test. Warns if it does not work.
    """
    absent, on_cpu = why_absent(NPU_BACKEND, source), Plan(CPU_BACKEND)
    if measured and _offers_precision(measured, source):
        plan, reason = measured, f"measured by rwkv-npu tune on this machine: {measured.note}"
    elif absent and not _offers_precision(on_cpu, source):
        plan = Plan("numpy")
        reason = f"numpy, which computes {source.precision} as an NPU does, and slowly, since {absent}"
    elif absent:
        plan, reason = on_cpu, f"{CPU_BACKEND}, since {absent}"
    else:
        plan, reason = _unmeasured(source)
    try:
        return open_engine(source, plan, options), reason
    except RwkvNpuError as error:
        if plan.names.isdisjoint(NPU_BACKENDS):
            raise
        warnings.warn(f"the NPU is not used: {error}", stacklevel=3)
        for_cpu = source if _offers_precision(on_cpu, source) else source.unquantised()
        return open_engine(for_cpu, on_cpu, options), f"{CPU_BACKEND}, since the NPU: {first_line(error)}"


def _unmeasured(source: ModelSource) -> tuple[Plan, str]:
    """The plan for a board that was not measured, and the reason: the NPU reads prompts, and the CPU writes.

    With many sequences the NPU reads their tokens too, if the estimate says that this is faster.
    """
    fitting = [a for a in source.artifacts() if a.target == hardware.soc() and a.group != "head"]
    used = [artifact for artifact in fitting if artifact.precision == fitting[0].precision]
    if source.precision in INT8_PRECISIONS:
        return Plan(NPU_BACKEND), f"{NPU_BACKEND}, which runs the artifacts in {source.precision}"
    if max(artifact.rows for artifact in used) == 1:
        return Plan(NPU_BACKEND), f"{NPU_BACKEND}, whose artifacts have one row; rwkv-npu tune measures"
    batch = sequences_for_npu(source.spec, used, source.cpu_precision)
    also = f" and {batch} or more sequences at once" if batch else ""
    reason = f"{NPU_BACKEND} reads prompts{also}, {CPU_BACKEND} writes"
    plan = Plan(CPU_BACKEND, (("decode", CPU_BACKEND), ("prefill", NPU_BACKEND)), batch=batch)
    return plan, f"{reason}: {'estimated' if batch else 'assumed'}, rwkv-npu tune measures"


def measured_plan(bundle: Bundle) -> Plan | None:
    """The plan that `rwkv-npu tune` made on this machine. None if there is none, or it cannot be used here (warns)."""
    plan = tuned(bundle.path, machine_key(), artifacts_digest(bundle.manifest))
    if plan is None or not plan.names <= BACKENDS.keys():  # another version wrote it, with other backends
        return None
    packages = {name: PACKAGES[name] for name in sorted(plan.names & PACKAGES.keys())}
    missing = [name for name in packages.values() if importlib.util.find_spec(name) is None]
    if missing:
        warnings.warn(
            f"the plan that rwkv-npu tune kept in {bundle.path} needs {' and '.join(missing)}, not installed here: "
            f"without a plan now; rwkv-npu tune -m {shlex.quote(str(bundle.path))} measures again",
            stacklevel=3,
        )
        return None
    return plan


def machine_key() -> str:
    """The key of this machine's plan: chip, cores and runtime. Machines with the same key are equally fast."""
    library = hardware.runtime_library()
    runtime = f", librknnrt {hardware.runtime_version(library)}" if library else ""
    return f"{hardware.soc() or 'no NPU'}, {hardware.cpu_model()} x {len(hardware.core_numbers())}{runtime}"


def why_absent(backend: str, source: ModelSource) -> str | None:
    """The reason why an NPU backend cannot work here; None if it may. The NPU itself is not used."""
    chip = hardware.soc()
    if chip is None:
        return "this machine has no Rockchip NPU"
    if backend == "rknn":
        if source.outdated:
            return source.outdated
        if not any(artifact.target == chip for artifact in source.artifacts()):
            in_precision = f", in {source.precision}" if source.precision else ""
            return f"there are no artifacts for the {chip}, {source.program.fusion} fusion{in_precision}"
    if hardware.runtime_library() is None:
        return "librknnrt.so is not in /usr/lib"
    return None
