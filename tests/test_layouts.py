"""Checkpoints and tuned states as other programs write them: read right, or refused with both readings named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rwkv_npu
from rwkv_npu.errors import CheckpointError, RwkvNpuError, StateError, UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.layout import strip_prefixes
from tests.checkpoints import small, weights
from tests.tiny import Run, error_line, one_line, write_model

IDS = [5, 6, 7, 60, 61, 2]
TRANSPOSED = {
    "6": ["time_mix_w1", "time_mix_w2", "time_decay_w1", "time_decay_w2", "time_state"],
    "7": ["w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2", "time_state"],
}


def as_web_rwkv(stored: dict[str, torch.Tensor], generation: str) -> dict[str, torch.Tensor]:
    """The tensors that web-rwkv's converter writes for a checkpoint, in the same precision."""
    result = {}
    for name, tensor in stored.items():
        if generation == "5.1" and name.endswith(("time_decay", "time_faaaa")):
            tensor = tensor[:, None].repeat(1, stored["emb.weight"].shape[1] // tensor.shape[0])
        name = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix").lower()
        if name.rsplit(".", 1)[-1] in TRANSPOSED.get(generation, ["time_state"]):
            tensor = tensor.transpose(-1, -2)
        result[name] = tensor.contiguous()
    return result


def logits(path: Path, **options: Any) -> np.ndarray:
    with rwkv_npu.load(path, backend="numpy", **options) as model:
        return model.forward(IDS)[0]


def both(folder: Path, generation: str, **options: Any) -> tuple[Path, Path]:
    """A checkpoint as BlinkDL's programs and as web-rwkv's converter write it."""
    stored = weights(folder, generation, dtype="fp32", **options)
    save_file(as_web_rwkv(stored, generation), folder / "web.st")
    return folder / f"good-{generation}.pth", folder / "web.st"


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal up to rounding: BLAS may add in another order where a matrix is a transposed view."""
    return bool(np.abs(ours - theirs).max() < 1e-5)


@pytest.mark.parametrize("generation", ["6", "7"])
@pytest.mark.parametrize("tuned", [False, True])
def test_files_of_web_rwkv_are_read_as_the_pth_they_came_from(
    tmp_path: Path, generation: str, tuned: bool
) -> None:
    ours, theirs = both(tmp_path, generation, time_state=tuned)
    assert same(logits(ours), logits(theirs))
    assert same(logits(ours), logits(theirs, layout="web-rwkv"))
    assert np.array_equal(logits(ours), logits(ours, layout="blinkdl"))
    for path, other in ((theirs, "blinkdl"), (ours, "web-rwkv")):
        with pytest.raises(CheckpointError, match="layout"):
            open_checkpoint(path, other)


@pytest.mark.parametrize("generation", ["5.1", "5.2"])
def test_rwkv_5_of_web_rwkv_has_to_be_named(tmp_path: Path, generation: str) -> None:
    ours, theirs = both(tmp_path, generation, time_first=False, time_state=True)
    with pytest.raises(CheckpointError, match="layout='web-rwkv'.*layout='blinkdl'"):
        open_checkpoint(theirs)
    expected = logits(ours)
    assert np.abs(logits(theirs, layout="web-rwkv") - expected).max() < 1e-5
    assert np.abs(logits(theirs, layout="blinkdl") - expected).max() > 1e-3  # the reading that was silent


def test_time_first_of_a_pth_can_only_be_blinkdls(tmp_path: Path) -> None:
    ours = small(tmp_path / "a.pth", "5.2", time_first=True, dtype="fp32")
    copy = tmp_path / "a.safetensors"
    small(copy, "5.2", time_first=True, dtype="fp32")
    with pytest.raises(CheckpointError, match="give layout="):
        open_checkpoint(copy)
    assert np.array_equal(logits(ours), logits(copy, layout="blinkdl"))


def test_rwkv_4_is_the_same_in_both(tmp_path: Path) -> None:
    ours = small(tmp_path / "a.pth", "4", dtype="fp32")
    save_file(torch.load(ours, weights_only=True), tmp_path / "web.st")
    assert np.array_equal(logits(ours), logits(tmp_path / "web.st"))


def test_square_low_ranks_do_not_tell_their_layout(tmp_path: Path) -> None:
    square = {"ranks": dict.fromkeys("wavg", 64)}
    ours, theirs = both(tmp_path, "7", **square)
    with pytest.raises(CheckpointError, match="square"):
        open_checkpoint(theirs)
    assert same(logits(ours), logits(theirs, layout="web-rwkv"))


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="blinkdl, web-rwkv"):
        open_checkpoint(tmp_path, "gguf")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "_forward_module.model.", "model.module._orig_mod.", "model.model."],
)
def test_prefixes_of_training_frameworks_are_stripped(tmp_path: Path, prefix: str) -> None:
    stored = weights(tmp_path, "7")
    save_file({prefix + name: tensor for name, tensor in stored.items()}, tmp_path / "a.safetensors")
    plain = open_checkpoint(tmp_path / "good-7.pth")
    assert open_checkpoint(tmp_path / "a.safetensors").fingerprint == plain.fingerprint


def test_prefixes_before_the_names_of_fla() -> None:
    names = [
        "model.layers.0.attn.r_proj.weight",
        "model.embeddings.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    for prefix in ("", "_orig_mod.", "_forward_module.module."):
        assert list(strip_prefixes(dict.fromkeys(f"{prefix}{name}" for name in names))) == names


def test_a_tensor_under_two_prefixes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="twice"):
        strip_prefixes({"module.emb.weight": 1, "emb.weight": 2})


# Tuned states


def time_states(L: int = 2, **changes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"blocks.{layer}.att.time_state" for layer in range(L)]
    return {name: torch.randn(4, 16, 16, generator=generator) for name in names} | changes


@pytest.mark.parametrize("name", ["tuned.pth", "tuned.pt", "tuned.bin", "tuned.ckpt", "tuned.PTH", "tuned"])
def test_a_tuned_state_is_told_by_its_content_and_stays(
    run: Run, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    state = tmp_path / name
    torch.save(time_states(), state)
    before = state.read_bytes()
    status, text, said = run(
        "generate", "-m", checkpoint, "-p", "the ", "-n", 3, "--seed", 1, "--state", state
    )
    assert status == 0 and "stays as it is" in said and state.read_bytes() == before
    other = run("generate", "-m", checkpoint, "-p", "the ", "-n", 3, "--seed", 1)
    assert other[0] == 0
    line = error_line(run("generate", "-m", checkpoint, "-p", "the ", "-n", 0, "--state", state))
    assert "never written" in line and state.read_bytes() == before


@pytest.mark.parametrize("name", ["chat.pth", "chat.st", "chat", "chat.safetensors"])
def test_a_state_is_saved_and_read_again_under_any_name(
    run: Run, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    state = tmp_path / name
    for _ in range(2):
        status, _, said = run("generate", "-m", checkpoint, "-p", "the ", "-n", 3, "--state", state)
        assert status == 0 and "tuned" not in said
    model = rwkv_npu.load(checkpoint, backend="numpy")
    assert model.load_state(state).tokens_seen == 8


def test_a_link_given_as_state_stays_a_link(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "state"
    link.symlink_to(target)
    for _ in range(2):
        assert run("generate", "-m", checkpoint, "-p", "the ", "-n", 3, "--state", link)[0] == 0
    assert link.is_symlink() and target.is_file() and not target.is_symlink()


@pytest.mark.parametrize("kind", ["text", "model", "pipe"])
def test_files_that_are_not_states_are_refused_and_kept(
    run: Run, checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    state = tmp_path / "file"
    if kind == "pipe":
        import os

        os.mkfifo(state)
    else:
        state.write_bytes(b"notes of mine" if kind == "text" else checkpoint.read_bytes())
    before = state.read_bytes() if kind != "pipe" else b""
    status, text, said = run("generate", "-m", checkpoint, "-p", "the ", "-n", 3, "--state", state)
    assert status == 1 and text == "" and one_line(said)
    assert kind == "pipe" or state.read_bytes() == before


def test_tuned_states_in_both_layouts(checkpoint: Path, tmp_path: Path) -> None:
    states = time_states()
    torch.save(states, tmp_path / "tuned.pth")
    save_file(states, tmp_path / "ours.safetensors")
    save_file(
        {name: t.transpose(-1, -2).contiguous().half() for name, t in states.items()}, tmp_path / "web.st"
    )
    model = rwkv_npu.load(checkpoint, backend="numpy")
    expected = model.load_state(tmp_path / "tuned.pth").parts["att.wkv"]
    assert np.array_equal(expected, np.stack([tensor.numpy() for tensor in states.values()]))
    ours = model.load_state(tmp_path / "ours.safetensors", "blinkdl").parts["att.wkv"]
    theirs = model.load_state(tmp_path / "web.st", layout="web-rwkv").parts["att.wkv"]
    assert np.array_equal(ours, expected) and np.abs(theirs - expected).max() < 2e-3
    for name in ("ours.safetensors", "web.st"):
        with pytest.raises(StateError, match="web-rwkv.*blinkdl"):
            model.load_state(tmp_path / name)


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (time_states(3), "more layers"),
        (time_states(1), "blocks.1.att.time_state is missing"),
        (time_states(**{"blocks.1.att.time_state": torch.zeros(4, 16, 8)}), "float32 (4, 16, 8)"),
        (time_states(**{"blocks.1.att.time_state": torch.zeros(4, 16, 16, dtype=torch.int32)}), "int32"),
        (time_states(**{"blocks.1.att.time_state": 7}), "is int"),
        (time_states(**{"emb.weight": torch.zeros(2)}), "other tensors"),
    ],
)
def test_a_tuned_state_has_to_fit_in_both_directions(
    checkpoint: Path, tmp_path: Path, states: dict[str, Any], said: str
) -> None:
    torch.save(states, tmp_path / "tuned.pth")
    with pytest.raises(RwkvNpuError) as raised:
        rwkv_npu.load(checkpoint, backend="numpy").load_state(tmp_path / "tuned.pth")
    assert said in str(raised.value)


def test_rwkv_4_has_no_tuned_state(tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth", "4")
    torch.save(time_states(), tmp_path / "tuned.pt")
    with pytest.raises(StateError, match="RWKV-4 has none"):
        rwkv_npu.load(tmp_path / "model.pth", backend="numpy").load_state(tmp_path / "tuned.pt")


def test_the_command_line_takes_the_layout(run: Run, tmp_path: Path) -> None:
    _, theirs = both(tmp_path, "5.2", time_first=False)
    assert "--layout" in error_line(run("info", theirs))
    status, text, _ = run("info", theirs, "--layout", "web-rwkv")
    assert status == 0 and "RWKV-5.2" in text
    assert "--layout" in error_line(run("convert", theirs, "--dry-run", "--target", "none"))
    assert (
        run("convert", theirs, "--layout", "web-rwkv", "--target", "none", "-o", tmp_path / "o.rwkv")[0] == 0
    )


def test_a_linked_snapshot_gives_the_bundle_its_own_name(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "3f2a").write_bytes(checkpoint.read_bytes())
    (tmp_path / "rwkv7-0.1b.pth").symlink_to(tmp_path / "blobs" / "3f2a")
    monkeypatch.chdir(tmp_path)
    status, text, _ = run("convert", "rwkv7-0.1b.pth", "--target", "none")
    assert status == 0 and text == "rwkv7-0.1b.rwkv\n" and (tmp_path / "rwkv7-0.1b.rwkv").is_dir()


def test_a_layout_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """web-rwkv has no RWKV-5.0: to read such a file as its own would take time_first for something else."""
    ours = small(tmp_path / "a.pth", "5.0", dtype="fp32")
    with pytest.raises(CheckpointError, match="layout"):
        open_checkpoint(ours, layout="web-rwkv")
