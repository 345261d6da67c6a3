"""What fp16 may do to logits, stated once for the simulator and the emulated board."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import rwkv_npu


def bound(logits: np.ndarray) -> float:
    """On the largest deviation from these logits, NumPy's in fp32."""
    return float(0.02 * logits.std() + 0.02)


def check_logits(found: np.ndarray, expected: np.ndarray) -> None:
    """(T, V) within the bound, and the most likely token the same wherever it is clear which that is."""
    limit = bound(expected)
    assert np.abs(found - expected).max() < limit
    top = np.sort(expected, axis=-1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 2 * limit
    assert clear.sum() > len(expected) // 8
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


def check_state(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, part in expected.items():
        assert np.abs(found[name] - part).max() < 0.02 * max(1.0, np.abs(part).max()), name


def forced(
    bundle: Path, ids: list[int], prompt: int, **options: object
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads `prompt` of the ids in one go and the others one by one: logits after each, and the state in the end."""
    with rwkv_npu.load(bundle, **options) as model:  # type: ignore[arg-type]
        logits, state = model.forward(ids[:prompt])
        rows = [logits]
        for token in ids[prompt:]:
            logits, state = model.forward([token], state, inplace=True)
            rows.append(logits)
    return np.stack(rows), dict(state.parts)
