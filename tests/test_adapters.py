"""Adapters: merged weights against formulas written anew in PyTorch, logits, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rwkv_npu
from rwkv_npu.errors import CheckpointError, RwkvNpuError, UsageError
from rwkv_npu.formats.adapters import is_adapter, open_adapter
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint, write_checkpoint
from tests.conversions import convert, outputs
from tests.tiny import error_line, peak_memory, run_main, write_model

Weights = dict[str, torch.Tensor]
GENERATIONS = ("4", "5.2", "6", "7")
R = 8
LEAVES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


def modules(weights: Weights, leaves: tuple[str, ...] = LEAVES) -> list[str]:
    return [name[:-7] for name in weights if name.endswith(tuple(f"{leaf}.weight" for leaf in leaves))]


def noise(*shape: int, size: float = 0.1) -> torch.Tensor:
    return size * torch.randn(*shape)


# -- the formulas, by PyTorch: each returns what the training saved, and the weight of a module ----------------------


def lora(weight: torch.Tensor, scale: float = 2.0) -> tuple[Weights, torch.Tensor]:
    A, B = noise(R, weight.shape[1]), noise(weight.shape[0], R)
    layer = torch.nn.functional.linear(torch.eye(weight.shape[1]), A)  # what LoRA adds for each unit input
    return {"lora_A": A, "lora_B": B}, weight + scale * torch.nn.functional.linear(layer, B).T


def pissa(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    U, S, V = torch.svd_lowrank(weight, R)
    A0, B0 = torch.diag(S.sqrt()) @ V.T, U @ torch.diag(S.sqrt())
    A, B = A0 + noise(*A0.shape), B0 + noise(*B0.shape)
    return {"lora_A": A, "lora_B": B, "init_lora_A": A0, "init_lora_B": B0}, (weight - B0 @ A0) + B @ A


def disha(weight: torch.Tensor, r: int = R) -> tuple[Weights, torch.Tensor]:
    """y = W x + D^T (sum of the blocks of x), x padded with zeros to whole blocks."""
    out, into = weight.shape
    D = noise(r, out)
    padded = torch.nn.functional.pad(torch.eye(into), (0, -into % r))
    summed = padded.reshape(into, -1, r).sum(dim=1)
    return {"disha": D}, weight + (summed @ D).T


def bone(weight: torch.Tensor, name: str = "bone", along: str = "in") -> tuple[Weights, torch.Tensor]:
    out, into = weight.shape
    D = noise((into if along == "in" else out) // R, R, R)
    merged = weight.clone()
    for a in range(out // R):
        for b in range(into // R):
            rows, columns = slice(a * R, (a + 1) * R), slice(b * R, (b + 1) * R)
            block = D[b if along == "in" else a]
            merged[rows, columns] += weight[rows, columns] @ block + block
    return {name: D}, merged


def oldest_bone(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    parts, merged = bone(weight, along="out")
    return {"bone": parts["bone"].reshape(len(weight), R)}, merged


FORMULAS: dict[str, tuple[Callable[[torch.Tensor], tuple[Weights, torch.Tensor]], dict[str, Any]]] = {
    "LoRA": (lora, {"adapter_scale": 2.0}),
    "PiSSA": (pissa, {}),
    "DiSHA": (disha, {}),
    "DiSHA, cut": (lambda weight: disha(weight, 24), {}),
    "DiSHA, bat": (lambda weight: bone(weight, "disha"), {}),
    "Bone": (bone, {}),
    "Bone, out": (lambda weight: bone(weight, along="out"), {}),
    "Bone, oldest": (oldest_bone, {}),
}


def fine_tune(folder: Path, kind: str, generation: str = "7") -> tuple[Path, Path, Path, dict[str, Any]]:
    """(base, adapter, model merged by PyTorch, options): files of a base model that was tuned in this way."""
    base, adapter, merged = folder / "base.pth", folder / "tuned" / "rwkv-0.pth", folder / "merged.pth"
    write_model(base, generation)
    adapter.parent.mkdir()
    weights: Weights = torch.load(base)
    torch.manual_seed(5)
    formula, options = FORMULAS[kind]
    saved: Weights = {}
    for module in modules(weights):
        parts, weights[f"{module}.weight"] = formula(weights[f"{module}.weight"])
        saved |= {f"{module}.{part}": array for part, array in parts.items()}
    saved["blocks.0.ln1.weight"] = weights["blocks.0.ln1.weight"] = noise(64) + 1
    first = {name: array for name, array in saved.items() if ".init_lora_" in name}
    torch.save({name: array for name, array in saved.items() if name not in first}, adapter)
    if first:
        torch.save(first, adapter.parent / "init_pissa.pth")
    torch.save(weights, merged)
    return base, adapter, merged, options


# -- merged weights and logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", FORMULAS)
def test_a_bundle_with_an_adapter_is_the_merged_model(kind: str, generation: str, tmp_path: Path) -> None:
    base, adapter, merged, options = fine_tune(tmp_path, kind, generation)
    bundle = convert(base, tmp_path / "out.rwkv", cpu="fp32", adapter=adapter, **options)
    found = outputs(bundle, backend="numpy")
    np.testing.assert_allclose(found, outputs(merged, backend="numpy"), atol=1e-3, rtol=1e-3)
    assert np.abs(found - outputs(base, backend="numpy")).max() > 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_merge_writes_a_checkpoint_for_any_program(generation: str, dtype: str, tmp_path: Path) -> None:
    base, adapter, merged, _ = fine_tune(tmp_path, "LoRA", generation)
    write_model(base, generation, dtype=dtype)
    out = tmp_path / "out.safetensors"
    checkpoint = open_checkpoint(base)
    open_adapter(adapter).apply(checkpoint, 2.0)
    write_checkpoint(checkpoint, out, {})
    expected, found = open_checkpoint(merged), open_checkpoint(out)
    assert found.spec == expected.spec and found.names == expected.names
    for name in found.names:
        assert found.stored(name).dtype == open_checkpoint(base).stored(name).dtype
        tolerance = 1e-5 if dtype == "fp32" else 0.02
        np.testing.assert_allclose(
            found.tensor(name).astype(np.float32), expected.tensor(name), atol=tolerance, rtol=tolerance
        )


def test_a_logarithm_is_written_as_the_bonus_itself(tmp_path: Path) -> None:
    """time_first in safetensors could be either; the merged file must not be refused, or misread."""
    write_model(tmp_path / "base.pth", "5.2", time_first=True)
    checkpoint = open_checkpoint(tmp_path / "base.pth")
    write_checkpoint(checkpoint, tmp_path / "out.safetensors", {})
    found = open_checkpoint(tmp_path / "out.safetensors")
    for name in checkpoint.names:
        np.testing.assert_array_equal(found.tensor(name), checkpoint.tensor(name))


# -- PEFT ------------------------------------------------------------------------------------------------------------


def peft_folder(
    folder: Path, generation: str, leaves: tuple[str, ...], part: str = "lora", **config: Any
) -> tuple[Path, Path, Weights]:
    """(base, folder of PEFT, merged weights by the base's names) of a base model of Hugging Face."""
    from safetensors.torch import load_file, save_file

    write_model(folder / "base", generation, hf=True)
    weights = load_file(folder / "base" / "model.safetensors")
    torch.manual_seed(6)
    saved: Weights = {}
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": 16, **config}
    for module in modules(weights, leaves):
        weight, prefix = weights[f"{module}.weight"], f"base_model.model.{module}"
        alpha = next(
            (v for k, v in settings.get("alpha_pattern", {}).items() if re.search(rf"(^|\.){k}$", module)), 16
        )
        scale = alpha / (R**0.5 if settings.get("use_rslora") else R)
        tuned = lora(weight, scale) if part == "lora" else disha(weight)
        parts, merged = bone(weight, "disha", along="out") if part.endswith("bat") else tuned
        if part == "lora":
            saved |= {f"{prefix}.{name}.weight": array for name, array in parts.items()}
        else:
            saved[f"{prefix}.{part.removesuffix(' bat')}"] = parts["disha"]
        if settings.get("use_dora"):
            magnitude = 1 + noise(len(weight))
            saved[f"{prefix}.lora_magnitude_vector"] = magnitude
            merged = torch.nn.functional.normalize(merged, dim=1) * magnitude[:, None]
        weights[f"{module}.weight"] = merged
    tuned = folder / "tuned"
    tuned.mkdir()
    save_file(
        {name: array.contiguous() for name, array in saved.items()}, tuned / "adapter_model.safetensors"
    )
    (tuned / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "base", tuned, weights


@pytest.mark.parametrize(
    ("generation", "leaves", "part", "config"),
    [
        ("7", ("attn.r_proj", "ffn.key"), "lora", {}),
        ("7", ("attn.w_lora.lora.0", "attn.g_lora.lora.2"), "lora", {}),
        ("7", ("attn.r_proj", "ffn.key"), "lora", {"use_dora": True}),
        ("7", ("attn.r_proj", "ffn.key"), "lora", {"use_rslora": True, "alpha_pattern": {"ffn.key": 4}}),
        ("7", ("attn.r_proj", "lm_head"), "bone_block", {"peft_type": "BONE"}),
        ("7", ("attn.r_proj", "attn.k_proj"), "miss_block", {"peft_type": "MISS"}),
        ("7", ("attn.r_proj", "attn.k_proj"), "bone_block bat", {"peft_type": "BONE"}),
        ("7", ("attn.r_proj", "ffn.key"), "miss_block bat", {"peft_type": "MISS"}),
        ("4", ("attention.key", "feed_forward.value"), "lora", {}),
        ("6", ("attention.key", "feed_forward.value"), "lora", {"use_dora": True}),
    ],
)
def test_folders_of_peft(
    generation: str, leaves: tuple[str, ...], part: str, config: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    base, tuned, weights = peft_folder(tmp_path, generation, leaves, part, **config)
    checkpoint = open_checkpoint(base)
    changed = set(open_adapter(tuned).targets)
    open_adapter(tuned).apply(checkpoint)
    save_file({name: array.contiguous() for name, array in weights.items()}, base / "model.safetensors")
    expected = open_checkpoint(base)
    assert len(changed) == (2 * checkpoint.spec.L if "lm_head" not in leaves else checkpoint.spec.L + 1)
    for name in expected.names:
        np.testing.assert_allclose(checkpoint.tensor(name), expected.tensor(name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"init_lora_weights": "lora_ga"}, "changes the base model"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alpha_pattern": {"(a+)+": 4}}, "alpha_pattern"),
        ({"alpha_pattern": [4]}, "alpha_pattern"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
    ],
)
def test_settings_of_peft_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, tuned, _ = peft_folder(tmp_path, "7", ("attn.r_proj",))
    settings = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps(settings | config))
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tuned)


# -- refusals --------------------------------------------------------------------------------------------------------


def apply(base: Path, adapter: Path, init: Path | None = None, **options: Any) -> str:
    return open_adapter(adapter, init).apply(open_checkpoint(base), **options)


def resave(path: Path, change: Callable[[Weights], object]) -> None:
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)


def test_a_lora_needs_its_scale_and_others_have_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, adapter, _, _ = fine_tune(tmp_path / "a", "LoRA")
    with pytest.raises(
        UsageError, match=r"adapter_scale=.*usually 1 \(lora_alpha 8\) or 2 \(lora_alpha 16\)"
    ):
        apply(base, adapter)
    for scale in (0.0, float("nan")):
        with pytest.raises(UsageError, match="other than 0"):
            apply(base, adapter, scale=scale)
    base, adapter, _, _ = fine_tune(tmp_path / "b", "PiSSA")
    with pytest.raises(UsageError, match="PiSSA has none"):
        apply(base, adapter, scale=1.0)


def test_blocks_that_can_be_read_in_two_ways(tmp_path: Path) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "Bone")
    resave(adapter, lambda saved: [saved.pop(name) for name in list(saved) if ".ffn." in name])
    with pytest.raises(UsageError, match=r"adapter_blocks= in \(.* or out"):
        apply(base, adapter)
    assert {apply(base, adapter, blocks=blocks) for blocks in ("in", "out")} == {"in", "out"}
    made = []
    for blocks in ("in", "out"):
        checkpoint = open_checkpoint(base)
        open_adapter(adapter).apply(checkpoint, blocks=blocks)
        made.append(checkpoint.stored("blocks.0.att.key.weight"))
    assert np.abs(made[0] - made[1]).max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"blocks.0.att.key.lora_A": noise(R, 32)}),
            r"blocks.0.att.key.weight \(64, 64\)",
        ),
        (lambda s: s.update({"blocks.9.att.key.lora_A": noise(R, 64)}), "lora_A only"),
        (lambda s: s.update({"blocks.9.ln1.weight": noise(64)}), "blocks.9.ln1.weight.*of 2 layers"),
        (lambda s: s.update({"blocks.0.ln1.weight": noise(32)}), "ln1.weight has shape"),
        (lambda s: s["blocks.1.ffn.key.lora_B"].fill_(float("nan")), "blocks.1.ffn.key.weight holds NaN"),
        (lambda s: s["blocks.0.ln1.weight"].fill_(float("inf")), "ln1.weight holds NaN or infinity"),
        (lambda s: s.update({"blocks.0.att.key.lora_M": noise(1, 64)}), "lora_M"),
        (lambda s: s.update({"blocks.0.att.gate.bone": noise(R, 64)}), "Bone and LoRA"),
        (lambda s: s.update({"blocks.0.att.key.lora_A": torch.ones(R, 64, dtype=torch.int64)}), "floating"),
    ],
)
def test_what_does_not_fit_the_base(
    change: Callable[[Weights], object], message: str, tmp_path: Path
) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "LoRA")
    resave(adapter, change)
    with pytest.raises(CheckpointError, match=message):
        apply(base, adapter, scale=1.0)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    _, adapter, _, _ = fine_tune(tmp_path, "LoRA", "6")
    write_model(tmp_path / "other.pth", "7")
    with pytest.raises(CheckpointError, match="of another model"):
        apply(tmp_path / "other.pth", adapter, scale=1.0)


def test_initial_values_are_no_adapter(tmp_path: Path) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "PiSSA")
    first = adapter.parent / "init_pissa.pth"
    with pytest.raises(CheckpointError, match="initial values of PiSSA"):
        apply(base, first, scale=1.0)
    with pytest.raises(CheckpointError, match="init_pissa.pth has no initial values of blocks.0"):
        resave(first, lambda saved: [saved.pop(name) for name in list(saved) if "blocks.0" in name])
        apply(base, adapter)


def test_a_model_is_no_adapter_and_an_adapter_no_model(tmp_path: Path) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "Bone")
    assert is_adapter(adapter) and not is_adapter(base)
    with pytest.raises(CheckpointError, match="no adapter"):
        open_adapter(base)
    with pytest.raises(CheckpointError, match="convert its base model with adapter=FILE"):
        open_checkpoint(adapter)


# -- commands --------------------------------------------------------------------------------------------------------


def test_convert_and_info_name_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "LoRA")
    out = tmp_path / "out.rwkv"
    flags = ("--target", "none", "--adapter", adapter, "--adapter-scale", "2")
    assert run_main(capsys, "convert", base, "-o", out, *flags)[0] == 0
    manifest = open_bundle(out).manifest
    plain = open_checkpoint(base).fingerprint
    assert manifest.adapter["base_fingerprint"] == plain != manifest.fingerprint
    assert manifest.adapter["fingerprint"] == open_adapter(adapter).fingerprint
    status, said, _ = run_main(capsys, "info", out)
    assert status == 0 and "rwkv-0.pth, LoRA, scale 2" in said and plain in said
    assert run_main(capsys, "convert", base, "-o", out, *flags, "--cpu", "int4")[0] == 0  # the same weights
    other = (*flags[:-1], "1")
    assert "other weights" in error_line(run_main(capsys, "convert", base, "-o", out, *other))


def test_info_says_what_an_adapter_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    A, B = noise(16, 768), noise(3072, 16)
    saved = {f"blocks.{i}.ffn.key.lora_A": A for i in range(12)}
    torch.save(saved | {f"blocks.{i}.ffn.key.lora_B": B for i in range(12)}, tmp_path / "a.pth")
    status, said, _ = run_main(capsys, "info", tmp_path / "a.pth")
    assert status == 0
    assert "LoRA, rank 16" in said and "v4-169m, v7-0.1b" in said and "--adapter-scale X" in said
    facts = json.loads(run_main(capsys, "info", tmp_path / "a.pth", "--json")[1])
    assert facts["layers"] == 12 and facts["targets"] == ["ffn.key.weight"]


def test_merge_refuses_what_it_must(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "LoRA")
    out = tmp_path / "out.safetensors"
    assert "--adapter-scale" in error_line(run_main(capsys, "merge", base, adapter, "-o", out))
    assert not out.exists()
    assert run_main(capsys, "merge", base, adapter, "-o", out, "--adapter-scale", "2")[0] == 0
    before = out.read_bytes()
    again = run_main(capsys, "merge", base, adapter, "-o", out, "--adapter-scale", "1")
    assert "exists" in error_line(again) and out.read_bytes() == before
    other = run_main(capsys, "merge", base, adapter, "-o", tmp_path / "x.pth", "--adapter-scale", "1")
    assert "safetensors" in error_line(other)
    assert not list(tmp_path.glob("*.writing"))


def test_values_beyond_fp16_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _, _ = fine_tune(tmp_path, "LoRA")
    write_model(base, dtype="fp16")
    out = tmp_path / "out.safetensors"
    said = error_line(run_main(capsys, "merge", base, adapter, "-o", out, "--adapter-scale", "1e7"))
    assert "float16" in said and sorted(tmp_path.glob("out*")) == []


def test_a_conversion_with_an_adapter_takes_no_more_memory(tmp_path: Path) -> None:
    """The embedding and the head are most of this model: a merged copy of all would show."""
    base, adapter = tmp_path / "base.pth", tmp_path / "a.pth"
    write_model(base, "7", L=8, D=512, vocabulary=False, ranks={}, dtype="bf16")
    torch.save(
        {
            f"blocks.{i}.{leaf}.lora_{part}": noise(*((4, into) if part == "A" else (out, 4)))
            for i in range(8)
            for leaf, out, into in (("ffn.key", 2048, 512), ("ffn.value", 512, 2048))
            for part in "AB"
        },
        adapter,
    )
    plain = ("convert", base, "--target", "none", "--cpu", "fp16", "-o")
    used = [
        peak_memory(*plain, tmp_path / "plain.rwkv"),
        peak_memory(*plain, tmp_path / "tuned.rwkv", "--adapter", adapter, "--adapter-scale", "1"),
    ]
    assert [status for status, _ in used] == [0, 0]
    assert used[1][1] - used[0][1] < 40e6  # two matrices in fp32 are 8 MB; all of them, 67 MB


def test_settings_of_an_adapter_without_one(tmp_path: Path) -> None:
    write_model(tmp_path / "base.pth")
    with pytest.raises(RwkvNpuError, match="no adapter"):
        rwkv_npu.convert(tmp_path / "base.pth", tmp_path / "out", target="none", adapter_scale=1.0)
