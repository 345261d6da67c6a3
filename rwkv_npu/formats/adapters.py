"""Adapters: the small files of a fine-tuning, which are merged into the weights of its base model.

RWKV-PEFT writes a `.pth` with BlinkDL's names. PEFT writes a folder with adapter_config.json and Hugging Face's names.
A file's kind is recognised by its content. `merging.py` has the formulas.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import CheckpointError, UsageError
from rwkv_npu.formats.checkpoint import Checkpoint, all_finite, pieces, read_tensors
from rwkv_npu.formats.detect import FLOATS, check_tensor
from rwkv_npu.formats.files import is_file, is_folder
from rwkv_npu.formats.gguf import is_gguf
from rwkv_npu.formats.huggingface import blinkdl_names, read_json
from rwkv_npu.formats.layout import strip_prefixes
from rwkv_npu.formats.merging import BLOCKS, LOW_RANK, Target
from rwkv_npu.models.official import OFFICIAL, official_spec
from rwkv_npu.models.spec import Kind, Spec, Tensor, tensors

CONFIG, PISSA_INIT = "adapter_config.json", "init_pissa.pth"

_PART = re.compile(
    r"(.+)\.(?:init_)?(lora_A|lora_B|lora_magnitude_vector|bone|bone_block|miss_block|disha)((?:\.(?:weight|default))*)"
)
_OTHERS = re.compile(r".*\.(lora_M|lora_embedding_[AB]|hada_|lokr_|oft_|boft_|vera_|ia3_).*")
_KINDS = {"bone": "Bone", "bone_block": "Bone of PEFT", "miss_block": "MiSS of PEFT", "disha": "DiSHA"}
# The readings (merging.py) that each program's files can have.
_READINGS = {"DiSHA": {"in", "repeat"}, "Bone of PEFT": {"out", "repeat"}, "MiSS of PEFT": {"out", "repeat"}}
_UNSUPPORTED = (  # settings of adapter_config.json
    "fan_in_fan_out lora_bias layer_replication megatron_config target_parameters trainable_token_indices "
    "alora_invocation_tokens use_qalora use_bdlora velora_config monteclora_config"
).split()
# Ways to initialise PEFT's LoRA that leave the base model as it is. The other ways change it.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class Adapter:
    """An open adapter. Made by `open_adapter`.

    kind: LoRA, PiSSA, DoRA, Bone or DiSHA. targets: the change of each matrix, by BlinkDL's name. replaced: tensors
    that were trained as a whole. config: PEFT's adapter_config.json, {} for RWKV-PEFT's files.
    """

    def __init__(self, path: Path, kind: str, targets: dict[str, Target], replaced: dict[str, np.ndarray]):
        self.path, self.kind, self.targets, self.replaced = path, kind, targets, replaced
        self.config: dict[str, Any] = {}

    @property
    def layers(self) -> int:
        """Number of the last layer that the adapter changes, counted from 1. 0 if it changes none."""
        found = [re.match(r"blocks\.(\d+)\.", name) for name in (*self.targets, *self.replaced)]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    @property
    def fingerprint(self) -> str:
        """Digest of all values and of the configuration, in 32 hex digits."""
        digest = hashlib.blake2b(f"{self.kind} {sorted(self.config.items())!r}".encode(), digest_size=16)
        named = [(f"{name}.{part}", a) for name, t in self.targets.items() for part, a in t.parts.items()]
        for name, array in sorted([*named, *self.replaced.items()], key=lambda item: item[0]):
            digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
            for piece in pieces(array):
                digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def models(self) -> list[str]:
        """Names of the official models that the adapter fits."""
        specs = {name: official_spec(name) for name in OFFICIAL}
        return [n for n, spec in specs.items() if spec.L == self.layers and not any(self.misfits(spec))]

    def misfits(self, spec: Spec) -> Iterator[str]:
        """Yield a line for each reason why the adapter does not fit a model of this spec."""
        known = {tensor.name: tensor for tensor in tensors(spec)}
        for name in (*self.targets, *self.replaced):
            if name not in known:
                yield f"it changes {name:.80}, which RWKV-{spec.generation} of {spec.L} layers does not have"
        for name, target in self.targets.items():
            if name in known and not _readings(target, known[name]):
                shapes = " and ".join(f"{part} {array.shape}" for part, array in target.parts.items())
                yield f"{shapes} does not fit {name} {known[name].shape}"
        for name, array in self.replaced.items():
            if name in known:
                try:
                    check_tensor(known[name], array)
                except CheckpointError as error:
                    yield str(error)

    def apply(self, checkpoint: Checkpoint, scale: float | None = None, blocks: str | None = None) -> str:
        """Merge the adapter into a checkpoint. Returns how it was read: "scale 2", or one of BLOCKS.

        scale: alpha / r of a LoRA without PEFT's adapter_config.json. blocks: of a Bone with ambiguous shapes.
        Raises UsageError for a setting that is missing or not needed, CheckpointError for another base model.
        """
        if fault := next(self.misfits(checkpoint.spec), None):
            raise CheckpointError(
                f"{self.path} is an adapter of another model than {checkpoint.path}: {fault}"
            )
        for name, target in self.targets.items():
            if not all(map(all_finite, target.parts.values())):
                raise CheckpointError(f"{self.path}: the change of {name} holds NaN or infinity")
        for name, array in self.replaced.items():
            if not all_finite(array):
                raise CheckpointError(f"{self.path}: {name} holds NaN or infinity")
            if checkpoint.is_logarithm(name):
                raise CheckpointError(
                    f"{self.path} has {name}, of which {checkpoint.path} holds the logarithm"
                )
        scales, reading = self._scales(scale), self._reading(checkpoint.spec, blocks)
        changes: dict[str, Any] = {name: partial(np.asarray, array) for name, array in self.replaced.items()}
        for name, target in self.targets.items():
            base = changes.get(name) or checkpoint.producer(name)
            changes[name] = partial(target.produce, base, reading, scales[name])
        shown = ", ".join(sorted({f"{value:.6g}" for value in scales.values()}))
        how = f"scale {shown}" if reading == LOW_RANK else reading
        checkpoint.amend(changes, f"{self.fingerprint} {how}")
        return how

    def _scales(self, scale: float | None) -> dict[str, float]:
        """The factor s of each target (merging.py)."""
        r = next(iter(self.targets.values())).rank
        stored = "" if self.kind in ("LoRA", "DoRA") else f"{self.kind} has none"
        if self.config:
            stored = f"its {CONFIG} gives it"
        if stored and scale is not None:
            raise UsageError(f"adapter_scale={scale} is not for {self.path}: {stored}")
        if not stored and scale is None:
            raise UsageError(
                f"{self.path} is a LoRA of rank {r} without its alpha: give adapter_scale=, which is alpha / rank, "
                f"usually 1 (lora_alpha {r}) or 2 (lora_alpha {2 * r}); for PiSSA, give adapter_init={PISSA_INIT}"
            )
        if scale is not None and not (math.isfinite(scale) and scale != 0):
            raise UsageError(f"adapter_scale={scale}: it must be a number other than 0")
        if not self.config or "lora_alpha" not in self.config:
            return dict.fromkeys(self.targets, 1.0 if scale is None else scale)
        return {name: _peft_scale(self.config, target) for name, target in self.targets.items()}

    def _reading(self, spec: Spec, blocks: str | None) -> str:
        """The reading that fits all targets: LOW_RANK, or one of BLOCKS."""
        shapes = {tensor.name: tensor for tensor in tensors(spec)}
        found = set.intersection(*(_readings(target, shapes[name]) for name, target in self.targets.items()))
        found &= _READINGS.get(self.kind, found)
        if blocks is not None and blocks not in found:
            raise UsageError(f"adapter_blocks={blocks!r:.20} does not fit {self.path}: leave it out")
        if len(found) > 1 and blocks is None:
            known = " or ".join(f"{name} ({BLOCKS[name]})" for name in sorted(found))
            raise UsageError(
                f"{self.path} changes square matrices only, so that its blocks can be read in two ways: give "
                f"adapter_blocks= {known}"
            )
        if not found:
            raise CheckpointError(f"{self.path} changes some matrices in one way and some in another")
        return blocks or found.pop()


def _readings(target: Target, tensor: Tensor) -> set[str]:
    if tensor.kind not in (Kind.LINEAR, Kind.LOW_RANK, Kind.HOST_LINEAR) or len(tensor.shape) != 2:
        return set()
    out, into = tensor.shape[::-1] if target.transposed else tensor.shape
    return target.readings(out, into)


def _peft_scale(config: Mapping[str, Any], target: Target) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if f".{target.module}".endswith(f".{pattern}"):
            alpha = value
            break
    return float(alpha) / (math.sqrt(target.rank) if config.get("use_rslora") else target.rank)


# -- opening -----------------------------------------------------------------------------------------------


def is_adapter(path: Path) -> bool:
    """True for PEFT's folder, or a file with an adapter's tensors. Raises CheckpointError for a damaged file."""
    if is_folder(path):
        return is_file(path / CONFIG)
    return is_file(path) and not is_gguf(path) and any(map(_PART.fullmatch, read_tensors(path)))


def open_adapter(path: Path | str, init: Path | str | None = None) -> Adapter:
    """Open an adapter: RWKV-PEFT's `.pth`, or PEFT's folder, or the file of weights in that folder.

    init: the initial values of PiSSA. None: init_pissa.pth beside the file, if it exists. Raises CheckpointError.
    """
    path = Path(path)
    folder = path if is_folder(path) else path.parent
    config = read_json(folder / CONFIG) if is_file(folder / CONFIG) else {}
    if is_folder(path):
        names = ("adapter_model.safetensors", "adapter_model.bin")
        path = next((path / name for name in names if is_file(path / name)), path / names[0])
    stored = read_tensors(path)
    if found := next(filter(_OTHERS.fullmatch, stored), None):
        raise CheckpointError(
            f"{path} holds {found!r:.80}: only LoRA, PiSSA, DoRA of PEFT, Bone, MiSS and DiSHA can be merged"
        )
    if any(".init_lora_" in name for name in stored):
        raise CheckpointError(f"{path} holds the initial values of PiSSA, not what was trained")
    adapter = _sort_tensors(path, stored)
    if config:
        _check_config(folder / CONFIG, config)
        if config.get("use_dora") and adapter.kind != "DoRA":
            raise CheckpointError(f"{path} has no lora_magnitude_vector, and its {CONFIG} sets use_dora")
        keys = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "base_model_name_or_path")
        adapter.config = {key: config[key] for key in keys if config.get(key) is not None}
    beside = path.parent / PISSA_INIT
    if init is None and adapter.kind == "LoRA" and not config and is_file(beside) and beside != path:
        init = beside
    if init is not None:
        _add_first_values(adapter, Path(init))
    return adapter


def _sort_tensors(path: Path, stored: dict[str, Any]) -> Adapter:
    # PEFT's prefix stands before the names of a model with a head (model.layers.N) or without (layers.N).
    named = {re.sub(r"^base_model\.model\.", "", name): value for name, value in stored.items()}
    named = {re.sub(r"^(?=layers\.)", "model.", name): value for name, value in named.items()}
    parts: dict[str, dict[str, np.ndarray]] = {}
    kinds: set[str] = set()
    replaced: dict[str, np.ndarray] = {}
    for name, array in strip_prefixes(named).items():
        if not isinstance(array, np.ndarray) or array.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name!r:.80} is no tensor of floating-point numbers")
        if match := _PART.fullmatch(name):
            module, part = match[1], match[2]
            kinds.add("DoRA" if part == "lora_magnitude_vector" else _KINDS.get(part, "LoRA"))
            parts.setdefault(module, {})["block" if part in _KINDS else part] = array
        else:
            replaced |= dict(blinkdl_names(name.replace(".modules_to_save", ""), array))
    kinds -= {"LoRA"} if "DoRA" in kinds else set()
    if len(kinds) != 1:
        raise CheckpointError(
            f"{path} is no adapter: it has the tensors of {' and '.join(sorted(kinds)) or 'none'}"
        )
    targets = {}
    for module, own in parts.items():
        if not ({"lora_A", "lora_B"} <= own.keys() or own.keys() == {"block"}):
            raise CheckpointError(f"{path}: {module!r:.80} has {', '.join(own)} only")
        if not all(array.ndim in (1, 2, 3) and array.size for array in own.values()):
            raise CheckpointError(f"{path}: {module!r:.80} has a part without values, or of many dimensions")
        probe = np.empty((1, 2), np.int8)
        ((name, seen),) = blinkdl_names(f"{module}.weight", probe)
        if name in targets:
            raise CheckpointError(f"{path} changes {name} twice")
        targets[name] = Target(module, seen.shape != probe.shape, own)
    unused = {f"blocks.0.att.v{side}" for side in "012"}  # in RWKV-7, see checkpoint.py
    replaced = {name: array for name, array in replaced.items() if name not in unused}
    return Adapter(path, kinds.pop(), targets, replaced)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError for settings of PEFT whose result is not computed here."""
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
        raise CheckpointError(f"{path} sets alpha_pattern to something else than an alpha for each name")
    numbers = [config.get("lora_alpha", 0), *patterns.values()]
    if kind not in ("LORA", "BONE", "MISS"):
        raise CheckpointError(
            f"{path} sets peft_type to {kind!r:.20}: only LORA, BONE and MISS can be merged"
        )
    if (
        kind == "LORA"
        and "lora_alpha" not in config
        or not all(type(n) in (int, float) and abs(n) < 1e6 for n in numbers)
    ):
        raise CheckpointError(f"{path} gives no number as lora_alpha, or an immense one")
    if init not in _PLAIN_INITS:
        raise CheckpointError(
            f"{path} sets init_lora_weights to {init!r:.20}, which changes the base model too: save the adapter with "
            "path_initial_model_for_weight_conversion, as PEFT calls it"
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(f"{path} sets {key}, which is not supported")


def _add_first_values(adapter: Adapter, path: Path) -> None:
    """Turn a LoRA into PiSSA, with the initial values in the file at `path`."""
    if adapter.kind != "LoRA" or adapter.config:
        source = f"{adapter.kind} of PEFT" if adapter.config else adapter.kind
        raise CheckpointError(f"{path} is for PiSSA of RWKV-PEFT, and {adapter.path} is {source}")
    first = _sort_tensors(path, read_tensors(path)).targets
    for name, target in adapter.targets.items():
        if name not in first:
            raise CheckpointError(f"{path} has no initial values of {name:.80}, which {adapter.path} changes")
        target.parts["first_A"], target.parts["first_B"] = (first[name].parts[f"lora_{c}"] for c in "AB")
    adapter.kind = "PiSSA"
