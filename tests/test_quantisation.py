"""Selection of int8 projections: their KL alone and together, maps, and conversions that select once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.backends.memory import plan_memory
from rwkv_npu.board import hardware
from rwkv_npu.conversion import converter, quantise, sensitivity
from rwkv_npu.conversion.quantise import NOTES, sizes
from rwkv_npu.conversion.request import resolve
from rwkv_npu.conversion.sensitivity import STEPS, KLEvaluator, knapsack, select, select_largest
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import INT8, Manifest, open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.model import load
from rwkv_npu.models.maths import log_softmax
from rwkv_npu.models.spec import FUSIONS, GENERATIONS
from rwkv_npu.quant.npu import PRECISIONS, Quantised
from rwkv_npu.runtime.weights import BundleSource
from tests.fake_compiler import Compiler, stand_in
from tests.tiny import V, one_line, run_main, write_model


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(1, V, 400))
    return path


def convert(capsys: Any, checkpoint: Path, out: Path, ids: Path, *options: object) -> tuple[int, str, str]:
    fixed = ("--rows", "16", "--cpu", "fp16", "--calibrate", ids)
    return run_main(capsys, "convert", checkpoint, "-o", out, *fixed, *options)


def manifest_of(out: Path) -> Manifest:
    return open_bundle(out).manifest


# -- the choice ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=1, max_size=6), st.floats(1e-3, 3))
@settings(max_examples=30, deadline=None)
def test_the_largest_set_that_fits(found: list[tuple[float, int]], limit: float) -> None:
    costs = {f"matrix {number}": cost for number, (cost, _) in enumerate(found)}
    bytes_of = {f"matrix {number}": size for number, (_, size) in enumerate(found)}

    def size(names: Any) -> int:
        return sum(bytes_of[name] for name in names)

    chosen = knapsack(costs, bytes_of, limit)
    assert sum(costs[name] for name in chosen) <= limit
    # Costs are rounded up, by a step each at most.
    tight = limit * (1 - len(costs) / STEPS)
    sets = chain.from_iterable(combinations(costs, count) for count in range(len(costs) + 1))
    fitting = [names for names in sets if sum(costs[name] for name in names) <= tight]
    assert size(chosen) >= max(map(size, fitting))
    names, kl = select_largest(costs, bytes_of, limit, lambda names: 1.3 * sum(costs[name] for name in names))
    assert kl <= limit and size(names) >= max(
        size(each) for each in fitting if 1.4 * sum(costs[n] for n in each) <= limit * 0.98
    )


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1), st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=1
    ),
    st.floats(0, 3),
)
def test_projections_with_the_least_kl_for_their_bytes_come_first(
    found: dict[str, tuple[float, int]], limit: float
) -> None:
    costs = {name: cost for name, (cost, _) in found.items()}
    bytes_of = {name: size for name, (_, size) in found.items()}

    def measure(names: Any) -> float:
        return 1.1 * sum(costs[name] for name in names)

    names, kl = select(costs, bytes_of, limit, measure)
    assert kl == pytest.approx(measure(names)) and kl <= limit
    order = sorted(costs, key=lambda name: costs[name] / bytes_of[name])
    assert names == order[: len(names)]
    assert len(names) == len(order) or measure(order[: len(names) + 1]) > limit


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_groups_before_a_projection_are_not_computed_again(
    generation: str, fusion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_model(tmp_path / "model.pth", generation, vocabulary=False)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, V, 240))
    out = tmp_path / "o"
    status = convert(
        capsys, tmp_path / "model.pth", out, tmp_path / "ids.npy", "--precision", "w8a8", "--target", "none"
    )
    assert status[0] == 0
    bundle = open_bundle(out)
    source = BundleSource(bundle, fusion)
    tokens = np.random.default_rng(1).integers(1, V, 80)
    quick = KLEvaluator(source, tokens)
    monkeypatch.setattr(sensitivity, "KEPT", 0)
    whole = KLEvaluator(source, tokens)
    assert quick.together({}) == 0
    for name in sizes(bundle.spec):
        chosen = {name: bundle.quantised(name)}
        found = quick.alone(chosen)
        assert found == pytest.approx(whole.together(chosen), rel=1e-9) and found > 0, name


# -- maps ------------------------------------------------------------------------------------------------


def test_the_last_matching_pattern_counts(checkpoint: Path) -> None:
    spec = open_checkpoint(checkpoint).spec
    given_map = {"mid.*": "w8a8", "blocks.*.att.output.weight": "fp16", "head": "w8a8", "ffn.1": "w8a8"}
    assert set(resolve(given_map, spec, sizes(spec), "m")) == {
        *(f"blocks.0.ffn.{name}.weight" for name in ("key", "value")),
        *(f"blocks.1.att.{name}.weight" for name in ("receptance", "key", "value")),
        *(f"blocks.1.ffn.{name}.weight" for name in ("key", "value")),
        "head.weight",
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"blocks.0.att.keys": "w8a8"}, "there are att.in.N, att.out.N"),
        ({"blocks.9.*": "w8a8"}, "nothing is called 'blocks.9.*'"),
        ({"head": "w4a16"}, "a projection is in fp16 or w8a8"),
        ({"blocks.*.att.w1": "w8a8"}, "stays in fp16"),
        (["head"], "is no precision map"),
        ({"head": 8}, "is no precision map"),
        ("{", "is not JSON"),
        (None, "cannot read"),
    ],
)
def test_a_wrong_map_is_refused(
    content: Any, says: str, checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    options = ("--precision", "mixed", "--precision-map", path)
    status, _, err = convert(capsys, checkpoint, tmp_path / "o", ids, *options)
    assert status == 1 and says in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--precision", "w4a16"), "rk3588 has no precision 'w4a16': use one of fp16, bf16, w8a8, mixed"),
        (("--precision", "bf16", "--target", "rk3566"), "use one of fp16, w8a8, mixed"),
        (
            ("--precision", "mixed", "--toolkit", "2.3.0"),
            "use one of fp16, bf16, or --toolkit 2.3.2 or later",
        ),
        (
            ("--precision", "w8a8", "--toolkit", "2.2.0", "--target", "rk3562"),
            "rknn-toolkit2 2.2.0 has no precision 'w8a8' for rk3562: use one of fp16, or --toolkit 2.3.2",
        ),
        (("--precision", "mixed", "--max-kl", "-1"), "it must be a number of nats above 0"),
        (("--precision", "mixed", "--max-kl", "nan"), "it must be a number of nats above 0"),
        (("--precision", "w8a8", "--precision-map", "m.json"), "is for --precision mixed"),
        (
            ("--precision", "w8a8", "--max-kl", "0.1"),
            "--max-kl is for --cpu auto, and for --precision mixed without --precision-map",
        ),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    options: tuple[str, ...], says: str, checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    status, _, err = convert(capsys, checkpoint, tmp_path / "o", ids, *options)
    assert status == 1 and says in err and one_line(err)
    assert not list(tmp_path.glob("o*"))


# -- conversions -----------------------------------------------------------------------------------------


def test_mixed_is_measured_once(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, compiler: Any
) -> None:
    out = tmp_path / "o"
    status, _, err = convert(capsys, checkpoint, out, ids, "--precision", "mixed", "--max-kl", "1e-4")
    assert status == 0 and "large projections in int8" in err and "300 tokens are few" in err
    manifest = manifest_of(out)
    chosen = manifest.int8["mixed"]
    assert chosen.kl <= 1e-4 == chosen.max_kl and all(row.kl is not None for row in manifest.sensitivity)
    assert {row.name for row in manifest.sensitivity} == set(sizes(manifest.spec))
    assert INT8 in manifest.files and not (out / NOTES).exists()
    assert all(
        bool(a.int8) == bool(_members(out, a.group) & set(chosen.projections)) for a in manifest.artifacts
    )

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was there")

    monkeypatch.setattr(converter, "calibrate", never)
    monkeypatch.setattr(quantise, "KLEvaluator", never)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.rknn")}
    assert convert(capsys, checkpoint, out, ids, "--precision", "mixed", "--max-kl", "1e-4")[0] == 0
    assert manifest_of(out).int8 == manifest.int8
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.rknn")}


def test_another_choice_is_compiled_again(checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o"
    for limit in ("1e-9", "10"):
        assert convert(capsys, checkpoint, out, ids, "--precision", "mixed", "--max-kl", limit)[0] == 0
        manifest = manifest_of(out)
        everything = len(sizes(manifest.spec))
        assert (len(manifest.int8["mixed"].projections) == everything) == (limit == "10")
    assert all(artifact.int8 for artifact in manifest.artifacts)
    # A byte a number, a little for each column, and the small low-rank matrices in fp16.
    weights = sum(sizes(manifest.spec).values())
    assert weights < sum(artifact.weight_bytes for artifact in manifest.artifacts) < 1.3 * weights


def test_mixed_that_exceeds_the_npus_memory(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a map this is known before any work, for a measured choice only afterwards. Both messages give advice."""
    mixed = ("--precision", "mixed")
    assert convert(capsys, checkpoint, tmp_path / "all", ids, *mixed, "--max-kl", "10")[0] == 0
    total = plan_memory(manifest_of(tmp_path / "all")).total
    monkeypatch.setattr("rwkv_npu.backends.memory.BUDGET_BYTES", int(1.1 * total))
    (tmp_path / "map.json").write_text('{"head": "w8a8"}')
    out = tmp_path / "out"
    status, _, err = convert(capsys, checkpoint, out, ids, *mixed, "--precision-map", tmp_path / "map.json")
    assert status == 1 and one_line(err) and "at mixed with rows 16" in err and "w8a8" in err
    assert not list(tmp_path.glob("out*"))
    status, _, err = convert(capsys, checkpoint, out, ids, *mixed, "--max-kl", "1e-9")
    assert status == 1 and not out.exists()
    assert "try --precision w8a8, a larger --max-kl, or --target none" in err.splitlines()[-1]
    assert convert(capsys, checkpoint, out, ids, *mixed, "--max-kl", "10")[0] == 0


def test_a_bundle_has_one_choice_for_all_chips(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    """The simulator builds the artifacts again, with the manifest's choice."""
    out, targets = tmp_path / "o", ("rk3588", "rk3576")
    for target, content in zip(targets, ('{"head": "w8a8"}', '{"*.ffn.*": "w8a8"}'), strict=True):
        (tmp_path / "map.json").write_text(content)
        options = ("--target", target, "--precision", "mixed", "--precision-map", tmp_path / "map.json")
        status, _, err = convert(capsys, checkpoint, out, ids, *options)
        assert status == 0
    assert "removing the artifacts for rk3588, layer fusion, rows 1, 16" in err
    assert {artifact.target for artifact in manifest_of(out).artifacts} == {"rk3576"}
    assert run_main(capsys, "info", out, "--check")[0] == 0 and not list(out.glob("rknn/rk3588/*"))


def test_damaged_ranges_are_reported(checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any) -> None:
    """The message names artifacts that this conversion does not replace, although it replaces the parameters."""
    out = tmp_path / "o"
    for precision, fusion in (("w8a8", "layer"), ("w8a8", "projection"), ("fp16", "layer")):
        assert convert(capsys, checkpoint, out, ids, "--precision", precision, "--fusion", fusion)[0] == 0
    (out / INT8).unlink()
    status, _, err = convert(capsys, checkpoint, out, ids, "--precision", "w8a8")
    assert status == 0 and f"{INT8} is missing or damaged: it will be made again" in err
    lost = "convert with --target rk3588 --precision w8a8 --fusion projection to have them again"
    assert err.count("removing artifacts that depend on it") == 1 and lost in err
    kinds = {(artifact.precision, artifact.fusion) for artifact in manifest_of(out).artifacts}
    assert kinds == {("w8a8", "layer"), ("fp16", "layer")}
    assert run_main(capsys, "info", out, "--check")[0] == 0


def test_another_text_replaces_all_int8_parameters(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "o"
    for precision in ("fp16", "w8a8"):
        assert convert(capsys, checkpoint, out, ids, "--precision", precision)[0] == 0
    before = manifest_of(out)
    np.save(tmp_path / "other.npy", np.random.default_rng(1).integers(1, V, 400))
    status, _, err = convert(capsys, checkpoint, out, tmp_path / "other.npy", "--precision", "mixed")
    assert status == 0 and "To have them again, convert with --target rk3588 --precision w8a8" in err
    after = manifest_of(out)
    assert run_main(capsys, "info", out, "--check")[0] == 0
    assert after.int8_key != before.int8_key and list(after.int8) == ["mixed"]
    assert after.files[INT8] != before.files[INT8]
    assert {a.precision for a in after.artifacts if a.int8} == {"mixed"}
    assert [a for a in after.artifacts if a.precision == "fp16"] == [
        a for a in before.artifacts if a.precision == "fp16"
    ]


def test_an_interrupted_measurement_resumes(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "o", KLEvaluator.alone
    labels: list[str] = []

    def interrupted(self: KLEvaluator, quantised: Mapping[str, Quantised]) -> float:
        labels.extend(quantised)
        if len(labels) == 3:
            raise KeyboardInterrupt
        return measured(self, quantised)

    monkeypatch.setattr(KLEvaluator, "alone", interrupted)
    assert convert(capsys, checkpoint, out, ids, "--precision", "mixed")[0] == 130
    assert not out.exists()
    monkeypatch.setattr(converter, "calibrate", None)  # not again
    assert convert(capsys, checkpoint, out, ids, "--precision", "mixed")[0] == 0
    assert len(labels) == len(sizes(manifest_of(out).spec)) + 1


def test_artifacts_in_int8_get_the_bound_of_int8(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    assert convert(capsys, checkpoint, out, ids, "--precision", "mixed")[0] == 0
    assert convert(capsys, checkpoint, out, ids, "--precision", "fp16")[0] == 0
    monkeypatch.setattr(hardware, "soc", lambda: "rk3588")
    bundle = open_bundle(out)
    found = {
        precision: BundleSource(bundle, precision=precision).precision_on("rknn") in PRECISIONS
        for precision in (None, "fp16", "mixed")
    }
    assert found == {None: True, "fp16": False, "mixed": True}


def test_a_board_runs_the_artifacts_for_its_chip(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    for chip, precision in (("rk3588", "mixed"), ("rk3576", "fp16")):
        assert convert(capsys, checkpoint, out, ids, "--precision", precision, "--target", chip)[0] == 0
    source = BundleSource(open_bundle(out))
    for chip, precision in (("rk3588", "mixed"), ("rk3576", "fp16"), ("rk3562", None)):
        monkeypatch.setattr(hardware, "soc", lambda chip=chip: chip)
        assert source.precision_on("rknn") == precision and source.precision_on("rknn-sim") == "mixed"


def test_a_map_is_followed(checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "map.json", tmp_path / "o"
    path.write_text('{"head": "w8a8"}')
    options = ("--precision", "mixed", "--precision-map", path, "--target", "none")
    assert convert(capsys, checkpoint, out, ids, *options)[0] == 0
    chosen = manifest_of(out).int8["mixed"]
    assert chosen.projections == ("head.weight",) and chosen.kl > 0 and chosen.max_kl is None


def test_numpy_computes_the_chosen_projections_in_int8(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "o"
    assert convert(capsys, checkpoint, out, ids, "--precision", "w8a8", "--target", "none")[0] == 0
    tokens = np.load(ids)[:40]
    logits = {}
    for precision in ("fp16", "w8a8"):
        with load(out, backend="numpy", precision=precision) as model:
            logits[precision] = model.forward(tokens, all_logits=True)[0]
    bundle = open_bundle(out)
    source = BundleSource(bundle, precision="fp16")
    judged = KLEvaluator(source, tokens)
    expected = judged.together({name: bundle.quantised(name) for name in sizes(bundle.spec)})
    p, q = (log_softmax(logits[precision]) for precision in ("fp16", "w8a8"))
    assert (np.exp(p) * (p - q)).sum(-1).mean() == pytest.approx(expected, rel=1e-3)


def test_backends_without_int8_refuse_an_int8_precision(
    checkpoint: Path, ids: Path, tmp_path: Path, capsys: Any
) -> None:
    """Otherwise the CPU's own precision would be measured as if it were the NPU's."""
    out = tmp_path / "o"
    assert convert(capsys, checkpoint, out, ids, "--precision", "w8a8", "--target", "none")[0] == 0
    for backend in ("numba", "ort", "torch"):
        status, _, err = run_main(
            capsys, "generate", "-m", out, "--precision", "w8a8", "--backend", backend, "-n", 1, "-p", "a"
        )
        assert status == 1 and one_line(err) and f"{backend} cannot multiply in w8a8: --backend numpy" in err
    with load(out, precision="w8a8") as model:
        assert list(model.engine.backends) == ["numpy"] and model.precision == "w8a8"
    with load(out, precision="fp16") as model:
        assert list(model.engine.backends) != ["numpy"]


def test_names_of_maps_are_pure(checkpoint: Path) -> None:
    spec = open_checkpoint(checkpoint).spec
    with pytest.raises(UsageError, match="nothing is called"):
        resolve({"": "w8a8"}, spec, sizes(spec), "m")


def _members(out: Path, group: str) -> set[str]:
    from rwkv_npu.graphs.trace import trace_group

    program = BundleSource(open_bundle(out)).program
    (found,) = [g for g in program.groups if g.name == group]
    return set(trace_group(program, found).projections)
