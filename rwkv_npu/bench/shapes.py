"""Which products to time: square sizes, shapes, or those of a model.

Letters: M rows of a call, K inputs, N outputs; D embedding width, L layers, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path

from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import is_bundle, read_manifest
from rwkv_npu.models.spec import Spec, tensors

Shape = tuple[int, int, int]

DEFAULT_SIZES = "128:4096:128"
MODEL_ROWS = (1, 16, 64, 128)
LARGEST = 1 << 20

# BlinkDL's releases: generation, L, D. tools/make_checkpoint.py makes random checkpoints of them.
_OFFICIAL = """
v4-169m 4 12 768   | v4-430m 4 24 1024   | v4-1.5b 4 24 2048   | v4-3b 4 32 2560
v5-0.4b 5.2 24 1024 | v5-1.5b 5.2 24 2048 | v5-3b 5.2 32 2560   | v5-7b 5.2 32 4096
v6-1.6b 6 24 2048  | v6-3b 6 32 2560     | v6-7b 6 32 4096
v7-0.1b 7 12 768   | v7-0.4b 7 24 1024   | v7-1.5b 7 24 2048   | v7-2.9b 7 32 2560 | v7-7.2b 7 32 4096
"""
OFFICIAL = {
    name: (generation, int(L), int(D))
    for name, generation, L, D in (
        row.split() for row in _OFFICIAL.replace("\n", "|").split("|") if row.strip()
    )
}


def parse_sizes(text: str, flag: str = "--sizes") -> list[Shape]:
    """`FIRST:LAST:STEP`, or numbers and such ranges joined by commas, as square shapes. Raises UsageError."""
    sizes: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?::(\d+)(?::(\d+))?)?\s*", part)
        if not found:
            raise UsageError(f"{flag} {text}: {part.strip()!r} is neither a number nor FIRST:LAST:STEP")
        first, last, step = (int(group) if group else None for group in found.groups())
        assert first is not None
        if step == 0 or (last is not None and last < first):
            raise UsageError(f"{flag} {text}: {part.strip()} holds no size")
        sizes += range(first, (last or first) + 1, step or 1) if (last or first) <= LARGEST else [LARGEST + 1]
    return _checked(flag, text, [(size, size, size) for size in sizes])


def parse_shapes(text: str) -> list[Shape]:
    """`MxKxN`, joined by commas. Raises UsageError."""
    shapes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", part)
        if not found:
            raise UsageError(f"--shapes {text}: {part.strip()!r} is not MxKxN, such as 1x2048x8192")
        shapes.append((int(found[1]), int(found[2]), int(found[3])))
    return _checked("--shapes", text, shapes)


def _checked(flag: str, text: str, shapes: list[Shape]) -> list[Shape]:
    for shape in shapes:
        if not all(1 <= size <= LARGEST for size in shape):
            raise UsageError(f"{flag} {text}: sizes go from 1 to {LARGEST}")
    if len(shapes) > 10_000:
        raise UsageError(f"{flag} {text}: these are {len(shapes)} sizes")
    return ordered(shapes)


def ordered(shapes: list[Shape]) -> list[Shape]:
    """Each once, those with the least work first."""
    return sorted(set(shapes), key=lambda shape: (shape[0] * shape[1] * shape[2], shape))


def model_shapes(name: str) -> list[Shape]:
    """The projections of an official size or of a bundle, at several row counts. Raises UsageError, BundleError.

    The head multiplies one row only: a prompt needs the logits of its last token.
    """
    if name in OFFICIAL:
        spec = official_spec(name)
    elif is_bundle(Path(name)):
        spec = read_manifest(Path(name)).spec
    else:
        raise UsageError(f"--model {name} is neither a bundle nor one of {', '.join(OFFICIAL)}")
    shapes: set[Shape] = set()
    for tensor in tensors(spec):
        if tensor.kind.is_projection and not tensor.optional:
            K, N = tensor.used_shape[-2:]
            rows = (1,) if tensor.name == "head.weight" else MODEL_ROWS
            shapes |= {(M, K, N) for M in rows}
    return ordered(list(shapes))


def official_spec(name: str) -> Spec:
    """The dimensions of a released model, as BlinkDL's training code chooses them."""
    generation, L, D = OFFICIAL[name]
    is_v4, is_v7 = generation == "4", generation == "7"
    F = 4 * D if is_v4 or is_v7 else int(3.5 * D) // 32 * 32
    H, N = (1, D) if is_v4 else (D // 64, 64)
    V = 50277 if is_v4 else 65536
    ranks: dict[str, int] = {}
    if generation == "6":
        ranks = {"mix": 64, "decay": 128} if D >= 4096 else {"mix": 32, "decay": 64}
    elif is_v7:
        lengths = {"w": 1.8 * D**0.5, "a": 1.8 * D**0.5, "v": 1.3 * D**0.5, "g": 0.6 * D**0.8}
        ranks = {key: max(32, round(length / 32) * 32) for key, length in lengths.items()}
        if name == "v7-0.4b":
            ranks["g"] = 128  # the one that differs from the formula
    return Spec(generation, D=D, L=L, H=H, N=N, A=D, F=F, V=V, ranks=ranks)
