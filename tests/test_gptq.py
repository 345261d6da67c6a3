"""GPTQ: the error of products against rounding to nearest, a dense reference, and conversions that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.conversion import converter, rounding
from rwkv_npu.conversion.calibration import calibrate
from rwkv_npu.conversion.rounding import Unpacked
from rwkv_npu.conversion.sensitivity import KLEvaluator
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import open_bundle, packed_file
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.model import demo_model
from rwkv_npu.quant import gptq
from rwkv_npu.quant.cpu import BLOCK, pack, stored_numbers, unpack
from rwkv_npu.quant.gptq import pack_compensated, parts
from rwkv_npu.runtime.weights import CheckpointSource
from rwkv_npu.text.corpus import calibration_text, held_out_text
from rwkv_npu.text.tokenizer import find_tokenizer
from tests.conversions import contents, convert, names, outputs
from tests.tiny import V, run_main, write_model


def problem(K: int, N: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight (K, N), and inputs (rows, K) that depend on each other."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((K, K)) * np.geomspace(1, 0.05, K)
    inputs = rng.standard_normal((3 * K, K)) @ mixing
    return rng.standard_normal((K, N)).astype(np.float32), inputs.astype(np.float32)


def moments(inputs: np.ndarray, widest: int = gptq.WIDEST) -> list[np.ndarray]:
    spans = parts(inputs.shape[1], widest)
    return [inputs[:, a:b].T @ inputs[:, a:b] / np.float32(len(inputs)) for a, b in spans]


def product_error(inputs: np.ndarray, weight: np.ndarray, rounded: np.ndarray) -> float:
    return float(np.square(inputs @ (rounded - weight)).sum())


@given(st.integers(1, 150), st.integers(1, 90), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_products_are_nearer_than_by_rounding_to_nearest(K: int, N: int, seed: int) -> None:
    weight, inputs = problem(K, N, seed)
    found = pack_compensated(weight, moments(inputs))
    nearest = product_error(inputs, weight, unpack(pack(weight, 4)))
    assert found.shape == (K, N) and found.bits == 4
    assert product_error(inputs, weight, unpack(found)) <= (0.8 if K > 40 else 1.0) * nearest


def test_without_dependence_each_weight_goes_to_the_nearest_number() -> None:
    """With a diagonal H nothing can be compensated."""
    weight, _ = problem(130, 70)
    H = np.diag(np.random.default_rng(1).uniform(0.5, 2, 130)).astype(np.float32)
    found = pack_compensated(weight, [H])
    q = stored_numbers(found).astype(np.float32).swapaxes(0, 1).reshape(found.padded_k, -1)[:130, :70] - 8
    scales = found.scales.astype(np.float32).swapaxes(0, 1).reshape(len(found.scales[0]), -1)[:, :70]
    scales = np.repeat(scales, BLOCK, axis=0)[:130]
    assert (q == np.clip(np.rint(weight / scales), -8, 7)).all()


def test_the_compensation_is_that_of_the_dense_method() -> None:
    """Against the textbook: after each row, the best change of all later rows, by solving for it anew."""
    weight, inputs = problem(BLOCK, 5)
    H, U = gptq._factors(moments(inputs)[0])
    q, scales = gptq._compensate(weight, H, U)
    W = weight.astype(np.float64)
    for row in range(BLOCK):
        expected = np.clip(np.rint(W[row] / scales[0]), -8, 7)
        assert (q[row] == expected).mean() > 0.99
        lost = W[row] - q[row] * scales[0]
        W[row + 1 :] += np.linalg.solve(H[row + 1 :, row + 1 :].astype(float), H[row + 1 :, row, None] * lost)


def test_numbers_depend_neither_on_columns_beside_them_nor_on_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, inputs = problem(192, 300)
    whole = pack_compensated(weight, moments(inputs))
    again = pack_compensated(weight, moments(inputs))
    assert (whole.data == again.data).all() and (whole.scales == again.scales).all()
    monkeypatch.setattr(gptq, "_COLUMNS", 1)
    piecewise = pack_compensated(weight, moments(inputs))
    assert (whole.data == piecewise.data).mean() > 0.999  # sums of another order round some numbers elsewhere


def test_wide_inputs_are_rounded_in_parts() -> None:
    assert parts(70) == [(0, 70)] and parts(300, 128) == [(0, 128), (128, 256), (256, 300)]
    weight, inputs = problem(300, 40)
    found = pack_compensated(weight, moments(inputs, 128))
    nearest = product_error(inputs, weight, unpack(pack(weight, 4)))
    assert product_error(inputs, weight, unpack(found)) < nearest


def test_inputs_that_are_zero_leave_weights_as_they_are() -> None:
    weight, inputs = problem(64, 20)
    inputs[:, 10:20] = 0
    error = np.abs(unpack(pack_compensated(weight, moments(inputs))) - weight)[10:20]
    assert error.max() < np.abs(weight).max() / 7
    assert (
        unpack(pack_compensated(weight, [np.zeros((64, 64), np.float32)])).shape == weight.shape
    )  # nothing is known


# -- a trained model -------------------------------------------------------------------------------------


def test_a_trained_model_predicts_better_than_by_rounding_to_nearest() -> None:
    source = CheckpointSource(open_checkpoint(demo_model()))
    chosen = ["blocks.1.ffn.key.weight", "blocks.2.ffn.value.weight", "blocks.3.att.output.weight"]
    encode = find_tokenizer(vocab_size=source.spec.V, beside=demo_model()).encode
    seen = calibrate(source, calibration_text(encode).ids[:1024], keep=2, moments=chosen)
    evaluator = KLEvaluator(source, held_out_text(encode).ids[:256])
    weights = {name: np.asarray(source.tensor(name), np.float32) for name in chosen}
    nearest = {name: Unpacked(pack(weight, 4), True) for name, weight in weights.items()}
    better = {
        name: Unpacked(pack_compensated(weight, seen.moments[name]), True) for name, weight in weights.items()
    }
    assert evaluator.together(better) < 0.9 * evaluator.together(nearest) < 0.01


# -- conversions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(1, V, 400))
    return path


def test_int4_is_rounded_by_a_text(checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any) -> None:
    rounded = convert(checkpoint, tmp_path / "a", cpu="int4", calibrate=ids)
    nearest = convert(checkpoint, tmp_path / "b", cpu="int4", calibrate="none")
    manifest = open_bundle(rounded).manifest
    assert manifest.rounding["int4"].tokens == 300 and not open_bundle(nearest).manifest.rounding
    file = packed_file("int4")
    assert (rounded / file).stat().st_size == (nearest / file).stat().st_size
    assert (rounded / file).read_bytes() != (nearest / file).read_bytes()
    assert names(rounded) == names(nearest)  # nothing else is left
    for bundle, words in ((rounded, "rounded by GPTQ on 300 tokens"), (nearest, "rounded to nearest")):
        assert words in run_main(capsys, "info", bundle)[1]
    # What is there is kept, unless it is asked for otherwise.
    before = (rounded / file).read_bytes()
    convert(checkpoint, rounded)
    assert (rounded / file).read_bytes() == before
    convert(checkpoint, rounded, cpu="int4", calibrate="none")
    assert (rounded / file).read_bytes() == (nearest / file).read_bytes()
    assert not open_bundle(rounded).manifest.rounding
    convert(checkpoint, nearest, cpu="int4", calibrate=ids)
    assert (nearest / file).read_bytes() == before


def test_without_a_vocabulary_int4_is_rounded_to_nearest(
    wordless: Path, tmp_path: Path, ids: Path, capsys: Any
) -> None:
    options = ("--target", "none", "--cpu", "int4")
    status, _, err = run_main(capsys, "convert", wordless, "-o", tmp_path / "o", *options)
    assert status == 0 and "int4 is rounded to nearest: no vocabulary is known" in err
    assert not open_bundle(tmp_path / "o").manifest.rounding
    assert run_main(capsys, "convert", wordless, "-o", tmp_path / "p", *options, "--calibrate", ids)[0] == 0
    assert open_bundle(tmp_path / "p").manifest.rounding["int4"].tokens == 300


@pytest.mark.parametrize("limit", [1e-9, 0.02])
def test_auto_has_as_much_in_int4_as_the_limit_allows(
    limit: float, checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    out = convert(checkpoint, tmp_path / "o", cpu="auto", calibrate=ids, max_kl=limit)
    bundle = open_bundle(out)
    found = bundle.manifest.rounding["auto"]
    every = rounding.candidates(bundle.spec, "auto")
    assert found.kl is not None and found.kl <= limit == found.max_kl
    assert (limit == 1e-9) == (not found.four_bits)
    bits = {name: bundle.packed("auto", name).bits for name in every}
    assert {name for name, count in bits.items() if count == 4} == set(found.four_bits)
    assert np.isfinite(outputs(out, precision="auto")).all()
    assert f"{len(found.four_bits)} matrices in int4" in run_main(capsys, "info", out)[1]


def test_stacks_keep_eight_bits_and_every_backend_agrees(ids: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth", "6")
    out = convert(tmp_path / "model.pth", tmp_path / "o", cpu="auto", calibrate=ids, max_kl=1e9)
    spec = open_bundle(out).spec
    assert set(open_bundle(out).manifest.rounding["auto"].four_bits) == set(rounding.candidates(spec, "auto"))
    dense = outputs(out, precision="auto", backend="numpy")
    for backend in ("numba", "ort"):
        found = outputs(out, precision="auto", backend=backend)
        assert np.abs(found - dense).max() < 0.05 * np.abs(dense).max(), backend


@pytest.mark.parametrize("cpu", ["int4", "auto"])
def test_an_interrupted_conversion_goes_on(
    cpu: str, checkpoint: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"cpu": cpu, "calibrate": ids, "max_kl": 3e-4 if cpu == "auto" else 0.005}
    whole = convert(checkpoint, tmp_path / "whole", **options)
    made: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return pack_compensated(*arguments)

    monkeypatch.setattr(rounding, "pack_compensated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr(converter, "calibrate", None)  # not again
    out = convert(checkpoint, tmp_path / "o", **options)
    assert len(made) == 1 + len(rounding.candidates(open_bundle(out).spec, cpu))
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu": "auto", "calibrate": "none"}, "a text is needed"),
        ({"calibrate": "none", "precision": "w8a8"}, "for bundles of the CPU alone"),
        ({"cpu": "int4", "max_kl": 0.1}, "max_kl= is for cpu='auto'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(checkpoint, tmp_path / "o", **options)


def test_auto_needs_a_text(wordless: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chooses by a text"):
        convert(wordless, tmp_path / "o", cpu="auto")
    assert not any(tmp_path.iterdir())
