"""A converted model on disk: a directory with a manifest, weights, graphs and artifacts.

    manifest.json               the content of the bundle; it holds its own checksum
    host.safetensors            embedding, norms, mixes, decays
    graphs/weights.safetensors  every projection once, for every backend of the CPU
    graphs/FUSION.GROUP.onnx    one graph a group; it refers to the weights by offset
    cpu/PRECISION.safetensors   every projection quantised, packed for the kernels (quant/cpu.py)
    calib/int8.safetensors      quantization parameters of the projections that may be int8 in artifacts
    selftest.safetensors        golden vectors of every group, with which a board tests its NPU
    rknn/TARGET/GROUP.FUSION.PRECISION.mROWS.rknn
    vocab.txt | tokenizer.json  the vocabulary, unless it ships with the package
    chat_template.jinja         if the checkpoint has one

Opening reads the manifest, checks the digest of every small file and the size of every large one, and maps the weights.
`verify_files` checks every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import BundleError
from rwkv_npu.formats.bundle_check import (
    STORAGE,
    check_golden,
    check_manifest,
    check_packed,
    check_ranges,
    check_tensors,
    from_json,
)
from rwkv_npu.formats.files import irregular_entries, is_file, os_reason
from rwkv_npu.formats.safetensors import TensorFile
from rwkv_npu.models.spec import Port, Scaling, Spec, tensors
from rwkv_npu.quant.cpu import Packed
from rwkv_npu.quant.npu import ProjectionParams, Quantised, QuantParams

FORMAT = (2, 0)  # a newer major is refused, a newer minor opens
# Version of the groups' inputs and outputs. 2: each layer has its own residual scale. 3: rows of several sequences.
MATHS = 3
_KNOWN_MATHS = {1, 2, MATHS}
MANIFEST = "manifest.json"
MARK = "conversion"  # a file in OUT.partial that identifies the conversion
HOST = "host.safetensors"
WEIGHTS = "graphs/weights.safetensors"
SELF_TEST = "selftest.safetensors"
INT8 = "calib/int8.safetensors"

_SMALL = 4 << 20  # bytes; files up to this size are checked whole on opening
_LARGEST_MANIFEST = 64 << 20  # bytes; the manifest of a model of 61 layers has 1 MB


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and digest of a file of the bundle."""

    size: int
    digest: str


@dataclass(frozen=True)
class Artifact:
    """A graph that is compiled for one target, precision, fusion and row count.

    weight_bytes: size of its weights. cycles: the compiler's estimate for one core (DDR, NPU, total). on_cpu: operators
    that run on the board's CPU. error: relative rms error that `verify` measured, None without it. int8: digest of the
    int8 projections and their quantization parameters, "" without int8. Artifacts with other digests are not current.
    """

    path: str
    group: str
    target: str
    precision: str
    fusion: str
    rows: int
    weight_bytes: int
    cycles: dict[str, int] = field(default_factory=dict)
    on_cpu: tuple[str, ...] = ()
    toolkit: str = ""
    error: float | None = None
    int8: str = ""

    @staticmethod
    def from_json(data: dict[str, Any]) -> Artifact:
        """Raises ValueError for a value of another type than its field's."""
        artifact: Artifact = from_json(Artifact, data, "the artifact")
        return artifact


@dataclass(frozen=True)
class Sensitivity:
    """The error of a model with one projection in int8.

    bytes: size of its int8 weights. error: relative rms error of its product on held-out rows. kl: KL divergence of the
    model's logits, in nats a token, None if not measured. algorithm, smoothed: its calibration method, and SmoothQuant.
    """

    name: str
    bytes: int
    algorithm: str
    smoothed: bool
    error: float
    kl: float | None = None


@dataclass(frozen=True)
class Int8Set:
    """The projections that the artifacts of a precision have in int8.

    share: their part of all projection weights. kl: KL divergence of the logits with all of them in int8, computed in
    NumPy. max_kl: the limit on kl, None if the projections were not chosen by measurement.
    """

    projections: tuple[str, ...]
    share: float
    kl: float
    max_kl: float | None = None


@dataclass(frozen=True)
class Rounding:
    """How the four bits of the CPU's int4 or auto weights were made.

    text: digest of the ids whose activation statistics GPTQ used, "" for rounding to nearest. tokens: their number.
    four_bits: the projections that auto has in four bits. kl: KL divergence of the logits with these four bits, nats a
    token, in NumPy. max_kl: the limit on kl. The last three are empty for int4.
    """

    text: str = ""
    tokens: int = 0
    four_bits: tuple[str, ...] = ()
    kl: float | None = None
    max_kl: float | None = None


@dataclass
class Manifest:
    """The content of a bundle's manifest.

    fingerprint: digest of a sample of the weights, quick to compute for any checkpoint. weights_digest: of all weights.
    tokenizer: `builtin:NAME` for a shipped vocabulary, a file of the bundle, or None.
    stop_ids: tokens that end a text, beside token 0.
    cpu: precision of `graphs/weights.safetensors`, "" without it. packed: precisions of the quantised projections.
    cpu_default, npu_default: precisions used by default. npu_default "" (older bundles): the first artifact's.
    int8: the int8 projections of each NPU precision that has some. sensitivity: of every projection that may be int8.
    int8_key: digest of the inputs that `int8` and `sensitivity` depend on.
    rounding: of each precision in `packed` that has four bits. Older bundles lack it: they are rounded to nearest.
    headroom: the largest magnitude in the fp16 graphs with `scaling`, its place, and the number of tokens read.
    adapter: file, kind, reading and fingerprint of the adapter merged into the weights, and its base's fingerprint.
    initial_state: file and digest of a tuned state in the weights. Both are {} without one.
    """

    spec: Spec
    fingerprint: str
    checkpoint: str
    fusion: str
    cpu: str
    scaling: Scaling
    tokenizer: str | None
    weights_digest: str = ""
    format: tuple[int, int] = FORMAT
    made_by: str = ""
    groups: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    graph_errors: dict[str, float] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)
    cpu_default: str = ""
    npu_default: str = ""
    int8: dict[str, Int8Set] = field(default_factory=dict)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    int8_key: str = ""
    stop_ids: list[int] = field(default_factory=list)
    rounding: dict[str, Rounding] = field(default_factory=dict)
    headroom: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, str] = field(default_factory=dict)
    initial_state: dict[str, str] = field(default_factory=dict)

    @property
    def cpu_precisions(self) -> tuple[str, ...]:
        """Precisions in which the CPU can run, its default first."""
        return tuple(dict.fromkeys(filter(None, [self.cpu_default, self.cpu, *self.packed])))

    @property
    def outdated(self) -> str:
        """The reason why graphs and artifacts cannot be used, "" if they can. Weights of format 1 always can."""
        if self.format[0] == FORMAT[0]:
            return ""
        return (
            f"this bundle of format {self.format[0]}.{self.format[1]} serves the CPU only, since its .rknn files have "
            "other inputs: for the NPU, convert the checkpoint again with force=True"
        )

    def forget(self, names: Collection[str]) -> None:
        """Remove files from the manifest, with everything that depends on them."""
        names = set(names)
        if INT8 in names:
            names |= {artifact.path for artifact in self.artifacts if artifact.int8}
            self.int8, self.sensitivity, self.int8_key = {}, [], ""
        self.files = {name: record for name, record in self.files.items() if name not in names}
        self.packed = [precision for precision in self.packed if packed_file(precision) not in names]
        self.rounding = {name: one for name, one in self.rounding.items() if name in self.packed}
        if self.cpu_default not in (self.cpu, *self.packed):
            self.cpu_default = ""
        self.artifacts = [artifact for artifact in self.artifacts if artifact.path not in names]

    def to_json(self) -> str:
        data = asdict(self)
        data["checksum"] = _checksum(data)
        return json.dumps(data, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Parse and check a manifest. Raises ValueError, KeyError or TypeError for a damaged one."""
        data = json.loads(text)
        major, minor = map(int, data["format"])
        if major not in (1, FORMAT[0]):
            raise _OtherVersion(f"{major}.{minor}")
        if data.pop("checksum") != _checksum(data):
            raise ValueError("its checksum does not match")
        maths = {group["maths"] for groups in data["groups"].values() for group in groups}
        if maths - _KNOWN_MATHS:
            raise _OtherVersion(f"{major}.{minor}, maths {max(maths)}")
        manifest: Manifest = from_json(Manifest, data, "its manifest")
        check_manifest(manifest)
        return manifest


class _OtherVersion(ValueError):
    pass


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


class Bundle:
    """An open bundle. Arrays are views of mapped files, without copies."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._host = TensorFile(path / HOST, error=BundleError)
        self._weights: TensorFile | None = None
        self._packed: dict[str, TensorFile] = {}
        self._int8: TensorFile | None = None
        self._shapes = {t.name: t.used_shape for t in tensors(manifest.spec) if t.kind.is_projection}
        if manifest.cpu:
            self._weights = TensorFile(path / WEIGHTS, error=BundleError)
        _fits(check_tensors, self.spec, STORAGE.get(manifest.cpu), self._host, self._weights)

    @property
    def spec(self) -> Spec:
        return self.manifest.spec

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in `Tensor.used_shape`. Raises BundleError if it is missing."""
        if name in self._host:
            return self._host.array(name)
        if self._weights is None:
            raise BundleError(
                f"{self.path} was exported with {self.manifest.packed[0]} weights alone, and this needs those in fp16: "
                "take the bundle that it was made from, or export it with cpu='fp16'"
            )
        return self._weights.array(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a projection: (K, N), or (count, K, N) of a stack."""
        return self._shapes[name]

    def packed(self, precision: str, name: str, index: int | None = None) -> Packed:
        """A projection, or number `index` of a stack, quantised for the CPU. Raises BundleError if it is missing."""
        if precision not in self._packed:
            opened = TensorFile(self.path / packed_file(precision), error=BundleError)
            _fits(check_packed, self.spec, self._weights, opened)
            self._packed[precision] = opened
        file, label = self._packed[precision], packed_label(name, index)
        *_, k, n = self._shapes[name]
        return Packed(file.array(f"{label}.data"), file.array(f"{label}.scales"), (k, n))

    def forget_packed(self, precision: str) -> None:
        """Forget quantised projections, after their file was written: the next access reads it."""
        self._packed.pop(precision, None)

    def release(self, name: str) -> None:
        """Free the memory of a projection's pages. The next access reads the file again."""
        if self._weights is not None:
            self._weights.release(name)

    def quantised(self, name: str) -> Quantised:
        """A projection in int8, as artifacts have it. Raises BundleError if the bundle has no parameters for it."""
        weight = self.tensor(name)
        return Quantised.of(self.ranges(name), weight)

    def ranges(self, name: str) -> ProjectionParams:
        """The quantization parameters of a projection in artifacts. Raises BundleError."""
        _fits(check_ranges, self._ranges, name, self._shapes[name][-2])
        given, *made = (QuantParams(float(a[0]), int(a[1])) for a in self._ranges.array(f"{name}.ranges"))
        smoothed = f"{name}.smoothing" in self._ranges
        smoothing = np.array(self._ranges.array(f"{name}.smoothing")) if smoothed else None
        return ProjectionParams(given, tuple(made), smoothing)

    def self_test(self, named: Mapping[str, Port]) -> dict[str, np.ndarray] | None:
        """The golden vectors by tensor name, (n, width) fp32; None if the bundle has none. named: their ports."""
        if not is_file(self.path / SELF_TEST):
            return None
        with TensorFile(self.path / SELF_TEST, error=BundleError) as file:
            _fits(check_golden, file, named)
            return {name: np.array(file.array(name)) for name in named}

    def forget_ranges(self) -> None:
        """Forget the open file of quantization parameters after it was replaced. The next access opens the new one."""
        self._int8 = None

    @property
    def _ranges(self) -> TensorFile:
        if self._int8 is None:
            self._int8 = TensorFile(self.path / INT8, error=BundleError)
        return self._int8

    def is_projection(self, name: str) -> bool:
        return name in self._shapes

    def __contains__(self, name: str) -> bool:
        return name in self._host or (self._weights is not None and name in self._weights)

    def graph_path(self, fusion: str, group: str) -> Path:
        return self.path / graph_file(fusion, group)


def _fits(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check of bundle_check.py. Raises BundleError."""
    try:
        check(*arguments)
    except ValueError as error:
        raise BundleError(f"{error}: copy the bundle again, or convert again with force=True") from None


def graph_file(fusion: str, group: str) -> str:
    return f"graphs/{fusion}.{group}.onnx"


def packed_file(precision: str) -> str:
    return f"cpu/{precision}.safetensors"


def packed_label(name: str, index: int | None) -> str:
    """The label of a matrix in a packed file, whose tensors are LABEL.data and LABEL.scales."""
    return name if index is None else f"{name}.{index}"


def artifact_file(target: str, group: str, fusion: str, precision: str, rows: int) -> str:
    return f"rknn/{target}/{group}.{fusion}.{precision}.m{rows}.rknn"


def is_bundle(path: Path) -> bool:
    """True if `path` is a bundle. Raises BundleError for an unfinished conversion, or a bundle without manifest."""
    finished = is_file(path / MANIFEST)
    if not finished and is_file(path / MARK):
        raise BundleError(f"{path} is an unfinished conversion: run the same rwkv-npu convert again")
    if not finished and is_file(path / HOST) and is_file(path / WEIGHTS):
        raise BundleError(
            f"{path} is a bundle without its {MANIFEST}: copy it again, or convert again with force=True"
        )
    return finished


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open and check a bundle. Raises BundleError naming the file that is missing, damaged or too new."""
    root = Path(path)
    manifest = read_manifest(root)
    for name, record in manifest.files.items():
        _check_file(root / name, record, whole=record.size <= _SMALL)
    return Bundle(root, manifest)


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of a bundle. Raises BundleError, also for links, pipes or devices in the bundle."""
    where = root / MANIFEST
    check_plain(root)
    try:
        with where.open("rb") as file:
            text = file.read(_LARGEST_MANIFEST + 1)
        if len(text) > _LARGEST_MANIFEST:
            raise ValueError(f"it has more than {_LARGEST_MANIFEST} bytes")
        return Manifest.from_json(text.decode())
    except OSError as error:
        raise BundleError(f"cannot read {where}: {error.strerror}") from error
    except _OtherVersion as error:
        raise BundleError(
            f"{root} is a bundle of format {error}, this version reads {FORMAT[0]}: convert again with "
            "force=True, or use the version of rwkv_npu that made it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{where} is damaged ({error}): copy the bundle again, or convert again with force=True"
        ) from error


def check_plain(root: Path) -> None:
    """Raises BundleError if a bundle contains a link, a pipe or a device, which could lead outside the bundle."""
    try:
        irregular = next(irregular_entries(root), None)
    except OSError as error:
        raise BundleError(f"cannot read {root}: {os_reason(error)}") from error
    if irregular is not None:
        raise BundleError(
            f"{root} holds {irregular!r:.200}, which is no plain file or folder: copy the bundle with cp -rL, or "
            "convert again"
        )


def artifacts_digest(manifest: Manifest) -> str:
    """Digest of all artifacts and weights. A measured plan is valid as long as the digest stays the same."""
    files = {name: record.digest for name, record in manifest.files.items() if not name.endswith(".onnx")}
    return _checksum(files)


def verify_files(bundle: Bundle) -> Iterator[str]:
    """Check every byte of the bundle. Yields the name of each file after its check. Raises BundleError."""
    for name, record in bundle.manifest.files.items():
        _check_file(bundle.path / name, record, whole=True)
        yield name


def damaged_files(root: Path, manifest: Manifest) -> Iterator[str]:
    """Names of the files that are missing or damaged."""
    for name, record in manifest.files.items():
        try:
            _check_file(root / name, record, whole=True)
        except BundleError:
            yield name


def _check_file(path: Path, record: FileRecord, *, whole: bool) -> None:
    try:
        size = path.stat().st_size
        if size != record.size:
            raise BundleError(
                f"{path} has {size} bytes instead of {record.size}: copy the bundle again, or convert again"
            )
        if whole and file_digest(path) != record.digest:
            raise BundleError(f"{path} is damaged: copy the bundle again, or convert again")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} is missing from the bundle: {getattr(error, 'strerror', None) or 'no such name'}"
        ) from error


def file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_file(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_digest(path))
