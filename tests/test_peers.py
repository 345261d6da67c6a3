"""The study of peers: the GGUF export, the worker processes, and what is made of the turns."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bench.peers import quality, results, study
from bench.peers.children import Child
from bench.peers.systems import LIMITS, OURS, REFERENCE, SYSTEMS, Failed, chosen, fitting, size_on_disk
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.gguf import gguf_name
from rwkv_npu.formats.gguf_writer import entries, metadata, write_gguf
from tools.make_checkpoint import make_checkpoint

D, L, V, F, N = 96, 2, 67, 160, 32
RANKS = {"w": 8, "a": 16, "v": 24, "g": 40}  # no two alike


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "tiny.pth"
    make_checkpoint(path, generation="7", D=D, L=L, V=V, N=N, F=F, ranks=RANKS)
    return path


# -- GGUF --------------------------------------------------------------------------------------------------

# What llama.cpp asks of a layer, in NumPy's order of the dimensions.
_LAYER = {
    "attn_norm.weight": (D,),
    "attn_norm.bias": (D,),
    "attn_norm_2.weight": (D,),
    "attn_norm_2.bias": (D,),
    "time_mix_w0.weight": (D,),
    "time_mix_w1.weight": (8, D),
    "time_mix_w2.weight": (D, 8),
    "time_mix_a0.weight": (D,),
    "time_mix_a1.weight": (16, D),
    "time_mix_a2.weight": (D, 16),
    "time_mix_v0.weight": (D,),
    "time_mix_v1.weight": (24, D),
    "time_mix_v2.weight": (D, 24),
    "time_mix_g1.weight": (40, D),
    "time_mix_g2.weight": (D, 40),
    "time_mix_lerp_fused.weight": (6, 1, 1, D),
    "time_mix_k_k.weight": (D,),
    "time_mix_k_a.weight": (D,),
    "time_mix_r_k.weight": (D,),
    "time_mix_key.weight": (D, D),
    "time_mix_value.weight": (D, D),
    "time_mix_receptance.weight": (D, D),
    "time_mix_output.weight": (D, D),
    "time_mix_ln.weight": (D,),
    "time_mix_ln.bias": (D,),
    "channel_mix_lerp_k.weight": (D,),
    "channel_mix_key.weight": (F, D),
    "channel_mix_value.weight": (D, F),
}
_TOP = {
    "token_embd.weight": (V, D),
    "token_embd_norm.weight": (D,),
    "token_embd_norm.bias": (D,),
    "output_norm.weight": (D,),
    "output_norm.bias": (D,),
    "output.weight": (V, D),
}


def test_gguf_has_every_tensor_that_llama_cpp_wants(checkpoint_file: Path) -> None:
    expected = _TOP | {f"blk.{layer}.{name}": shape for layer in range(L) for name, shape in _LAYER.items()}
    expected |= {"blk.0.time_mix_v1.weight": (16, D), "blk.0.time_mix_v2.weight": (D, 16)}  # unused stand-ins
    found = list(entries(open_checkpoint(checkpoint_file)))
    assert {entry.name: entry.shape for entry in found} == expected
    assert len(found) == len(expected)
    for entry in found:
        array = entry.read()
        assert (array.shape, array.dtype) == (entry.shape, np.dtype(entry.dtype)), entry.name
        assert array.flags.c_contiguous, entry.name


def test_gguf_values(checkpoint_file: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_file)
    found = {entry.name: entry for entry in entries(checkpoint)}

    def stored(name: str) -> np.ndarray:
        return checkpoint.stored(name).astype(np.float32)

    np.testing.assert_array_equal(found["blk.1.time_mix_w1.weight"].read(), stored("blocks.1.att.w1").T)
    np.testing.assert_array_equal(
        found["blk.1.channel_mix_key.weight"].read(), stored("blocks.1.ffn.key.weight")
    )
    np.testing.assert_array_equal(
        found["blk.1.time_mix_r_k.weight"].read(), stored("blocks.1.att.r_k").ravel()
    )
    fused = found["blk.1.time_mix_lerp_fused.weight"].read()
    for i, mix in enumerate("rwkvag"):
        np.testing.assert_array_equal(fused[i, 0, 0], stored(f"blocks.1.att.x_{mix}").ravel())
    assert found["blk.0.time_mix_w1.weight"].dtype == np.float32  # as llama.cpp's converter has it
    assert found["blk.0.time_mix_g1.weight"].dtype == np.float16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("emb.weight", "token_embd.weight"),
        ("blocks.0.ln0.bias", "token_embd_norm.bias"),
        ("blocks.11.ln2.weight", "blk.11.attn_norm_2.weight"),
        ("blocks.3.att.ln_x.bias", "blk.3.time_mix_ln.bias"),
        ("blocks.3.att.w1", "blk.3.time_mix_w1.weight"),
        ("blocks.3.ffn.x_k", "blk.3.channel_mix_lerp_k.weight"),
    ],
)
def test_gguf_names(name: str, expected: str) -> None:
    assert gguf_name(name, "7") == expected


def test_gguf_metadata(checkpoint_file: Path) -> None:
    found = metadata(open_checkpoint(checkpoint_file))
    assert {key.removeprefix("rwkv7."): value for key, value in found.items()} == {
        "context_length": 1 << 20,
        "embedding_length": D,
        "block_count": L,
        "feed_forward_length": F,
        "vocab_size": V,
        "wkv.head_size": N,
        "attention.head_count": 0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.decay_lora_rank": 8,
        "attention.iclr_lora_rank": 16,
        "attention.value_residual_mix_lora_rank": 24,
        "attention.gate_lora_rank": 40,
    }


def test_gguf_file_reads_back(checkpoint_file: Path, tmp_path: Path) -> None:
    import gguf

    write_gguf(open_checkpoint(checkpoint_file), tmp_path / "tiny.gguf", None)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    for entry in entries(open_checkpoint(checkpoint_file)):
        np.testing.assert_array_equal(read.pop(entry.name).reshape(entry.shape), entry.read())
    assert not read
    assert reader.fields["rwkv7.vocab_size"].contents() == V
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


# -- worker processes --------------------------------------------------------------------------------------


def test_worker_answers(checkpoint_file: Path, tmp_path: Path) -> None:
    ids = {"prompt": [1, 2, 3], "tokens": [4, 5]}
    with Child(Path(sys.executable), "ours", 1, tmp_path / "log") as child:
        with pytest.raises(Failed, match="cannot be read: No such file"):
            child.ask("open", model=str(tmp_path / "missing.rwkv"), weights="fp32", generation="7", threads=1)
        opened = child.ask("open", model=str(checkpoint_file), weights="fp32", generation="7", threads=1)
        assert opened["ready_s"] > 0 and "onnxruntime" in opened["versions"]
        child.ask("logits", out=str(tmp_path / "a.npy"), **ids)
        turn = child.ask("turn", prompts=[[1, 2, 3], [6] * 5], tokens=[4, 5])
        assert set(turn) == {"prefill_3_s", "prefill_5_s", "decode_s", "others"}
        assert min(turn.pop("others") + 1e-9, *turn.values()) > 0
        child.ask("logits", out=str(tmp_path / "b.npy"), **ids)
        assert 0 < child.ask("memory")["own_bytes"] <= child.ask("memory")["peak_rss_bytes"]
    logits = np.load(tmp_path / "a.npy")
    assert logits.shape == (3, V)
    np.testing.assert_array_equal(logits, np.load(tmp_path / "b.npy"))  # each begins with a fresh state


def test_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    with Child(Path(sys.executable), "no such runtime", 1, tmp_path / "log") as child:
        with pytest.raises(Failed, match="open: KeyError: 'no such runtime'; see .*log"):
            child.ask("open")
        child._process.kill()
        with pytest.raises(Failed, match="turn: the process ended with status -9; see .*log"):
            child.ask("turn")


# -- arithmetic --------------------------------------------------------------------------------------------


def test_difference_is_in_units_of_the_spread() -> None:
    reference = np.array([[0.0, 2.0], [0.0, 2.0]], np.float32)  # standard deviation 1
    logits = np.array([[0.5, 2.0], [0.0, -2.0]], np.float32)
    found = results.difference(logits, reference)
    assert found == pytest.approx({"largest": 4.0, "rms": (16.25 / 4) ** 0.5, "same_best": 0.5})
    logits[0, 0] = np.nan
    assert results.difference(logits, reference)["largest"] == float("inf")
    with pytest.raises(ValueError, match="shape"):
        results.difference(logits[:1], reference)


def test_wrong_logits_end_the_study() -> None:
    rows = {system.name: {"logits": {"largest": system.tolerance}} for system in SYSTEMS}
    study.refuse_wrong(rows)
    for largest in (0.06, float("inf"), float("nan")):
        rows["llama.cpp F16"]["logits"]["largest"] = largest
        with pytest.raises(Failed, match="llama.cpp F16 computes something else"):
            study.refuse_wrong(rows)


def test_rounds_begin_with_each_in_turn() -> None:
    assert [results.rotation("abc", turn) for turn in (0, 1, 2, 3)] == [
        [*"abc"],
        [*"bca"],
        [*"cab"],
        [*"abc"],
    ]
    assert results.rotation([], 1) == []


USES = {"decode": 8, "prefill_8": 8}


def _turns(*seconds: float) -> list[dict[str, float]]:
    return [{"prefill_8_s": s, "decode_s": 2 * s, "others": s / 10} for s in seconds]


def test_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed in the third round: no ratio notices.
    found = results.ratios(_turns(1, 1, 2), _turns(3, 3, 6), USES)
    assert found == {use: {"median": 3.0, "low": 3.0, "high": 3.0} for use in USES}


def test_report_names_everything() -> None:
    row = {"logits": {"largest": 0.01, "rms": 0.001, "same_best": 1.0}, "file_bytes": 2e9, "ready_s": 3.0}
    row |= {"peak_rss_bytes": 4e9, "own_bytes": 1e9}
    size = {
        "parameters": 190_000_000,
        "systems": {
            f"{OURS} fp16": row | {"turns": _turns(2, 1, 4)},
            REFERENCE: row | {"turns": _turns(4, 4, 4)},
        },
        "left_out": {"llama.cpp F16": "no compiler"},
    }
    results.summarise(size, USES)
    ours = size["systems"][f"{OURS} fp16"]
    assert ours["tokens_per_s"]["prefill_8"] == {"median": 4.0, "low": 2.0, "high": 8.0}
    assert ours["disturbed_turns"] == 2
    assert list(size["ratios"]) == [f"{OURS} fp16"] and list(size["ratios"][f"{OURS} fp16"]) == [REFERENCE]
    whole = {
        "size": "v7-0.1b",
        "machine": {"cpu": "Some CPU", "instruction_set": "AVX2", "cores": 2, "memory_gb": 25.0},
        "settings": {"threads": 2, "prompts": [8, 16], "tokens": 8, "rounds": 3},
        "date": "2026-01-01",
        "commit": "1234567",
        "command": "python -m bench.peers --folder x",
        "versions": {"rwkv": "1"},
        **size,
    }
    text = results.report(whole)
    assert "Some CPU" in text and "`python -m bench.peers --folder x`" in text
    assert "| rwkv_npu fp16 | 2.0 (1.0-4.0) | 4.0 (2.0-8.0) | 4.00 | 2.00 | 3.0 | 0.01 | 0.001 | 2 |" in text
    assert "| system | decode t/s | prefill of 8 t/s |" in text and "prompts of 8 and 16 tokens" in text
    assert "| rwkv fp32 | 2.00 (1.00-4.00) |" in text
    assert "- llama.cpp F16: no compiler" in text


def test_what_a_format_costs_a_model() -> None:
    """Logits that differ by a constant are the same predictions; two of four choices swapped are not."""
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], np.float32))
    same = quality.compared(reference + 3, reference, [0, 2], size=1)
    assert same == pytest.approx(
        {"bits_per_byte": 3.0, "kl_mean": 0.0, "kl_p99": 0.0, "same_best": 1.0}, abs=1e-6
    )
    other = reference.copy()
    other[1] = np.log([0.5, 0.25, 0.25])
    found = quality.compared(other, reference, [0, 2], size=2)
    assert found["same_best"] == 0.5 and found["bits_per_byte"] == pytest.approx(1.5)
    assert found["kl_mean"] == pytest.approx(0.25 * np.log(2) / 2, rel=1e-5)
    text = quality.report(
        {
            "tokens": 2,
            "bytes": 2,
            "commit": "1",
            "command": "c",
            "systems": {"a": found},
            "left_out": {"b": "no"},
        }
    )
    assert "| a | 1.5000 |" in text and "left out: b: no" in text


# -- systems -----------------------------------------------------------------------------------------------


def test_systems_are_chosen_by_generation_and_name() -> None:
    assert {system.runtime for system in chosen([], "7")} == {"ours", "llama.cpp", "package"}
    assert {system.runtime for system in chosen([], "4")} == {"ours", "transformers", "package"}
    assert [system.name for system in chosen(["Q4", "bf16"], "7")] == ["llama.cpp Q4_0", "rwkv bf16"]


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    systems = chosen([], "7")
    everything = int(sum(system.resident for system in systems) * 1000) + len(systems)
    assert fitting(systems, 1000, everything, reserve=0) == systems
    short = everything - int(systems[-1].resident * 1000)
    assert fitting(systems, 1000, short, reserve=0) == systems[:-1]
    assert fitting(systems, 1000, 100, reserve=0) == []


def test_size_on_disk_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"4567")
    assert (size_on_disk(tmp_path), size_on_disk(tmp_path / "c")) == (7, 4)


def test_a_limit_leaves_out_systems_that_choose_their_own_instructions() -> None:
    assert {s.name for s in chosen([], "7")} - {s.name for s in chosen([], "7", limited=True)} == {
        f"{OURS} int4 ort"
    }


def test_a_limit_reaches_the_worker(tmp_path: Path) -> None:
    variables = LIMITS["avx2"].variables
    with Child(Path(sys.executable), "package", 1, tmp_path / "log", variables) as child:
        environ = Path(f"/proc/{child._process.pid}/environ")
        while not (environment := environ.read_text().split("\0"))[0]:
            assert child._process.poll() is None  # it is empty while the process starts
    assert {f"{name}={value}" for name, value in variables.items()} <= set(environment)
