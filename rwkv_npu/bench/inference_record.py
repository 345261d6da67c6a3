"""A row of `rwkv-npu bench inference`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rwkv_npu.bench import document

PREFILLS = (128, 512)  # tokens of the prompts
DECODE = 128  # tokens chosen and read, after a prompt of the first length
PARTS = ("projections", "head", "recurrence", "sampling", "dispatch", "rest")  # of the time


@dataclass
class Row:
    """One model on one backend: measured, or (`estimated`) added up from terms that are all there.

    weights, stored   dtype in which the backend holds the projections; in which the model's file does
    threads           asked for, else one a core
    load_s            from the start of the process to its first logits: imports, sessions, the file's first reading
    first_token_s     a prompt of 128 tokens read and a token chosen, in a process that has done it before
    *_tps, _p10, _p90 tokens a second: median of the repeats, and their slow and fast end
    *_ms              milliseconds by part of a token (decode), or of a prompt of so many tokens and the first choice;
                      an estimate has `calls` besides: what the calls themselves cost
    bytes_per_token   projections once, as held, and the state read and written; gb_per_s is that over the time of a
                      token, bandwidth_share that over the most that the machine was seen to read
    read_gb_per_s     what it could read just before the row: others on the same host may take their part
    peak_bytes, own_bytes   of resident memory: the most, and without mapped files, at the end
    basis             of an estimate: where its terms come from. terms: the figures that went in
    profile           where a token goes, finer: see inference_profile.py
    flags             what speaks against the figures (`busy`, `throttled`, `interrupted`)
    failed            why some or all figures are missing
    """

    model: str
    fingerprint: str
    generation: str
    parameters: int
    backend: str
    device: str = ""
    weights: str = ""
    stored: str = ""
    fusion: str = ""
    threads: int | None = None
    estimated: bool = False
    prefill_128_tps: float | None = None
    prefill_128_tps_p10: float | None = None
    prefill_128_tps_p90: float | None = None
    prefill_128_repeats: int = 0
    prefill_512_tps: float | None = None
    prefill_512_tps_p10: float | None = None
    prefill_512_tps_p90: float | None = None
    prefill_512_repeats: int = 0
    decode_tps: float | None = None
    decode_tps_p10: float | None = None
    decode_tps_p90: float | None = None
    decode_repeats: int = 0
    decode_tokens: int = 0
    first_token_s: float | None = None
    load_s: float | None = None
    calls_per_token: float | None = None
    bytes_per_token: int | None = None
    gb_per_s: float | None = None
    bandwidth_share: float | None = None
    read_gb_per_s: float | None = None
    peak_bytes: int | None = None
    own_bytes: int | None = None
    decode_ms: dict[str, float] = field(default_factory=dict)
    prefill_128_ms: dict[str, float] = field(default_factory=dict)
    prefill_512_ms: dict[str, float] = field(default_factory=dict)
    basis: str = ""
    terms: dict[str, float | int | None] = field(default_factory=dict)
    versions: str = ""
    flags: str = ""
    failed: str | None = None
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row is called in tables and pictures."""
        return f"{self.backend} {self.precision}".strip() + (" (estimate)" if self.estimated else "")

    @property
    def precision(self) -> str:
        """As held, and as stored where that is another."""
        return self.weights + (f" of {self.stored}" if self.stored not in ("", self.weights) else "")

    @property
    def is_whole(self) -> bool:
        """Neither failed nor cut short."""
        return not (self.failed or "interrupted" in self.flags)

    def finish(self, bandwidth_gb_per_s: float | None) -> None:
        """Fill in what follows from the other fields."""
        if self.bytes_per_token and self.decode_tps:
            self.gb_per_s = self.bytes_per_token * self.decode_tps / 1e9
            if bandwidth_gb_per_s and not self.estimated:
                self.bandwidth_share = self.gb_per_s / bandwidth_gb_per_s

    def update(self, more: dict[str, Any]) -> None:
        for name, value in more.items():
            if name not in self.__dataclass_fields__:
                raise KeyError(name)
            setattr(self, name, value)


class Document(document.Document[Row]):
    FORMAT = "inference 1"
    ROW = Row
    COMMAND = "rwkv-npu bench inference"


def by_model(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same weights together, whatever file they lie in; what was measured comes first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.fingerprint, []).append(row)
    return [sorted(some, key=lambda row: row.estimated) for some in found.values()]
