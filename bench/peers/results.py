"""Evaluate the measurements: medians, ratios, differences of logits, and the Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from bench.peers.systems import OURS

BUSY = 0.15  # cores that other processes use during a turn; from here on the turn counts as disturbed


def rotation(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: always the same cycle of systems, with a different start."""
    start = turn % max(1, len(names))
    return [*names[start:], *names[:start]]


def difference(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Compare the logits (rows, V) of a system with those of the reference.

    Returns the largest and the root-mean-square difference, over the reference's standard deviation, and the share of
    rows with the same best token.
    """
    if logits.shape != reference.shape:
        raise ValueError(f"logits of shape {logits.shape} and {reference.shape} cannot be compared")
    spread = float(reference.std())
    gap = logits.astype(np.float64) - reference
    same = logits.argmax(axis=1) == reference.argmax(axis=1)
    # NaN differences must count as infinite: max() would ignore them.
    largest = float(np.abs(gap).max()) if np.isfinite(gap).all() else float("inf")
    return {
        "largest": largest / spread,
        "rms": float(np.sqrt(np.mean(gap**2))) / spread,
        "same_best": float(same.mean()),
    }


def rates(turns: Sequence[Mapping[str, float]], tokens: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Tokens per second by use: median, lowest and highest of the turns."""
    result = {}
    for use in tokens:
        found = [tokens[use] / turn[f"{use}_s"] for turn in turns]
        result[use] = {"median": median(found), "low": min(found), "high": max(found)}
    return result


def ratios(
    ours: Sequence[Mapping[str, float]], peer: Sequence[Mapping[str, float]], uses: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Our speed over the peer's: the median of the ratios within each round, which are robust against drift."""
    result = {}
    for use in uses:
        found = [b[f"{use}_s"] / a[f"{use}_s"] for a, b in zip(ours, peer, strict=True)]
        result[use] = {"median": median(found), "low": min(found), "high": max(found)}
    return result


def summarise(size: dict[str, Any], tokens: Mapping[str, int]) -> None:
    """Compute rates and ratios of a size from its turns. tokens: number of tokens of each use."""
    size["uses"] = list(tokens)
    systems = {name: row for name, row in size["systems"].items() if row.get("turns")}
    for row in systems.values():
        row["tokens_per_s"] = rates(row["turns"], tokens)
        row["disturbed_turns"] = sum(turn["others"] > BUSY for turn in row["turns"])
    size["ratios"] = {
        ours: {
            peer: ratios(row["turns"], systems[peer]["turns"], tokens)
            for peer in systems
            if not peer.startswith(OURS)
        }
        for ours, row in systems.items()
        if ours.startswith(OURS)
    }


# -- tables ------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The study of a size as Markdown."""
    machine, settings = results["machine"], results["settings"]
    prompts = " and ".join(map(str, settings["prompts"]))
    about = [
        "# RWKV on a CPU: this project beside its peers",
        "",
        f"{machine['cpu']} ({machine['instruction_set']}), {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{results['date']}; "
        f"this project at {results['commit']}; `{results['command']}`.",
        f"The same random weights for all; {settings['threads']} threads; prompts of {prompts} tokens, "
        f"then {settings['tokens']} tokens one by one; {settings['rounds']} rounds in which every system takes "
        "its turn. Median, and in brackets the lowest and highest.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    return "\n".join(about) + "\n\n" + size_report(results["size"], results)


def size_report(name: str, size: Mapping[str, Any]) -> str:
    parts = [f"## {name}: {size['parameters'] / 1e6:.0f} million parameters", speed_table(size)]
    for use in size["uses"]:
        if any(size["ratios"].values()):
            parts.append(ratio_table(size, use))
    left_out = [f"- {system}: {why}" for system, why in size["left_out"].items()]
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(left_out))
    return "\n\n".join(parts)


def speed_table(size: Mapping[str, Any]) -> str:
    speeds = [f"{_words(use)} t/s" for use in size["uses"]]
    head = ["system", *speeds, "peak RSS GB", "file GB", "ready s"]
    head += ["largest logit difference", "rms", "disturbed turns"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name, row in size["systems"].items():
        if "tokens_per_s" not in row:
            continue
        logits, speed = row["logits"], row["tokens_per_s"]
        cells = [name, *(_spread(speed[use], 1) for use in size["uses"])]
        cells += [
            f"{row['peak_rss_bytes'] / 1e9:.2f}",
            f"{row['file_bytes'] / 1e9:.2f}",
            f"{row['ready_s']:.1f}",
        ]
        cells += [f"{logits['largest']:.2g}", f"{logits['rms']:.2g}", str(row["disturbed_turns"])]
        lines.append(_line(cells))
    note = "Differences are from `rwkv fp32`, over the standard deviation of its logits."
    return "\n".join([*lines, "", note])


def ratio_table(size: Mapping[str, Any], use: str) -> str:
    ours = list(size["ratios"])
    lines = [_line([f"{_words(use)}: ours / peer", *ours]), _line(["---"] * (1 + len(ours)))]
    for peer in size["ratios"][ours[0]]:
        lines.append(_line([peer, *(_spread(size["ratios"][name][peer][use], 2) for name in ours)]))
    return "\n".join(lines)


def _words(use: str) -> str:
    return use.replace("_", " of ")


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}-{value['high']:.{digits}f})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
