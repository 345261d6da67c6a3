"""The sizes of BlinkDL's releases, and the dimensions that follow from a size.

Letters: D embedding width, L layers, V vocabulary, F width of the channel mix, H heads, N head size.
"""

from __future__ import annotations

from rwkv_npu.models.spec import Spec

WORLD, PILE = 65536, 50277  # vocabularies: RWKV World, and the Pile of RWKV-4

# name: (generation, L, D)
OFFICIAL = {
    "v4-169m": ("4", 12, 768),
    "v4-430m": ("4", 24, 1024),
    "v4-1.5b": ("4", 24, 2048),
    "v4-3b": ("4", 32, 2560),
    "v5-0.4b": ("5.2", 24, 1024),
    "v5-1.5b": ("5.2", 24, 2048),
    "v5-3b": ("5.2", 32, 2560),
    "v5-7b": ("5.2", 32, 4096),
    "v6-1.6b": ("6", 24, 2048),
    "v6-3b": ("6", 32, 2560),
    "v6-7b": ("6", 32, 4096),
    "v7-0.1b": ("7", 12, 768),
    "v7-0.4b": ("7", 24, 1024),
    "v7-1.5b": ("7", 24, 2048),
    "v7-2.9b": ("7", 32, 2560),
    "v7-7.2b": ("7", 32, 4096),
}
RANKS = {"v7-0.4b": {"g": 128}}  # the one release that differs from the formula


def default_ranks(generation: str, D: int) -> dict[str, int]:
    """Low ranks by name, by the formulas of BlinkDL's training code. v7's follow from the width."""

    def rounded(x: float) -> int:
        return max(32, round(x / 32) * 32)

    if generation == "6":
        return {"mix": 64, "decay": 128} if D >= 4096 else {"mix": 32, "decay": 64}
    if generation not in ("7", "7a"):
        return {}
    ranks = {c: rounded(x * D**0.5) for c, x in (("w", 1.8), ("a", 1.8), ("v", 1.3))}
    ranks["g"] = rounded(0.6 * D**0.8)
    return ranks | ({"s": 32} if generation == "7a" else {})


def default_channel_mix(generation: str, D: int) -> int:
    """F by the formula of BlinkDL's training code."""
    return 4 * D if generation in ("4", "7", "7a") else int(3.5 * D) // 32 * 32


def official_spec(name: str) -> Spec:
    """The dimensions of a released model. Raises KeyError for a name that is not in OFFICIAL."""
    generation, L, D = OFFICIAL[name]
    H, N = (1, D) if generation == "4" else (D // 64, 64)
    V = PILE if generation == "4" else WORLD
    ranks = default_ranks(generation, D) | RANKS.get(name, {})
    return Spec(generation, D=D, L=L, H=H, N=N, A=D, F=default_channel_mix(generation, D), V=V, ranks=ranks)
