"""The error of logits that fp16 may cause, for the simulator and the emulated board."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import rwkv_npu


def bound(logits: np.ndarray) -> float:
    """The bound of the largest deviation from these logits, which are NumPy's in fp32."""
    return float(0.02 * logits.std() + 0.02)


def check_logits(found: np.ndarray, expected: np.ndarray) -> None:
    """Logits (T, V) are within the bound, and the most likely token is the same unless two are nearly equal."""
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
    """Read the first `prompt` ids together and the others one by one. Returns logits after each, and the last state."""
    with rwkv_npu.load(bundle, **options) as model:  # type: ignore[arg-type]
        logits, state = model.forward(ids[:prompt])
        rows = [logits]
        for token in ids[prompt:]:
            logits, state = model.forward([token], state, inplace=True)
            rows.append(logits)
    return np.stack(rows), dict(state.parts)
