"""Plans: their rules, tuning, and the file of measured plans."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu.backends import BACKENDS
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.formats.bundle import artifacts_digest, open_bundle, verify_files
from rwkv_npu.models.spec import Group, groups
from rwkv_npu.runtime import loading, placement, tuning
from rwkv_npu.runtime.loading import Options, machine_key
from rwkv_npu.runtime.placement import TUNED, USES, Plan, parse, save_tuned, tuned
from rwkv_npu.runtime.tuning import Measured, best_plan
from rwkv_npu.runtime.weights import BundleSource
from tests.tiny import run_main, write_model

SPEC_GROUPS: list[Group] = []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    SPEC_GROUPS[:] = groups(write_model(folder / "model.pth", "7", L=3), "layer")
    return rwkv_npu.convert(folder / "model.pth", folder / "out.rwkv", target="none", cpu="fp16")


def served(text: str) -> dict[str, tuple[str, str]]:
    """The backends of each group for tokens and for prompts; the default is numpy."""
    rules = parse(text, "numpy", BACKENDS, SPEC_GROUPS)
    return {group.name: (rules.backend(group, True), rules.backend(group, False)) for group in SPEC_GROUPS}


def test_a_name_wins_over_a_role_and_a_role_over_a_use(bundle: Path) -> None:
    assert served("decode=ort") == dict.fromkeys(
        ["first", "mid.0", "mid.1", "last", "head"], ("ort", "numpy")
    )
    found = served("decode=ort,mid=torch,mid.1:prefill=rknn,head:decode=rknn-sim,mid.0=ort")
    assert found == {
        "first": ("ort", "numpy"),
        "mid.0": ("ort", "ort"),
        "mid.1": ("torch", "rknn"),
        "last": ("ort", "numpy"),
        "head": ("rknn-sim", "numpy"),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "decode=ort,",
        "decode",
        "decode=abacus",
        "both=ort",
        "mid.9=ort",
        "mid:both=ort",
        "decode:prefill=ort",
        "=ort",
        ":decode=ort",
    ],
)
def test_unknown_keys_and_backends_are_refused(bundle: Path, text: str) -> None:
    with pytest.raises(UsageError, match="plan .* is unknown: write KEY=NAME"):
        served(text)


def test_a_key_has_one_rule(bundle: Path) -> None:
    with pytest.raises(UsageError, match="plan decode=ort, decode=numpy has decode 2 times"):
        served("decode=ort, decode=numpy")


@given(
    st.dictionaries(
        st.sampled_from((*USES, "mid", "head:decode", "mid.1:prefill")), st.sampled_from(("ort", "numpy"))
    )
)
def test_a_plan_as_text_parses_to_the_same_plan(rules: dict[str, str]) -> None:
    made = parse(rules, "ort", BACKENDS, SPEC_GROUPS)
    again = parse(made.text(), "ort", BACKENDS, SPEC_GROUPS)
    for group in SPEC_GROUPS:
        assert [made.backend(group, use) for use in (True, False)] == [
            again.backend(group, use) for use in (True, False)
        ]


@pytest.mark.parametrize(
    "text", ["head=numpy,mid=ort", "mid.0:prefill=numpy,mid.1:decode=numpy", "decode=numpy"]
)
def test_generated_text_does_not_depend_on_the_plan(bundle: Path, text: str) -> None:
    ids = np.random.default_rng(1).integers(1, 200, 30)
    with rwkv_npu.load(bundle, backend="numpy") as model:
        expected, expected_state = model.forward(ids)
    with rwkv_npu.load(bundle, backend="ort", plan=text) as model:
        logits, state = model.forward(ids[:20])
        for token in ids[20:]:
            logits, state = model.forward([token], state)
    assert np.abs(logits - expected).max() < 2e-4
    for name, part in expected_state.parts.items():
        assert np.abs(state.parts[name] - part).max() < 2e-4 * max(1, np.abs(part).max())


# -- the choice ------------------------------------------------------------------------------------------


def measured(
    backend: str, decode: dict[str, float], prefill: dict[str, float], host: float = 1.0
) -> Measured:
    return Measured(
        "layer", backend, 10, {"decode": decode, "prefill": prefill}, {"decode": host, "prefill": 10 * host}
    )


def test_the_fastest_backend_serves_each_use() -> None:
    npu = measured("rknn", {"mid": 9.0, "head": 9.0}, {"mid": 20.0})
    cpu = measured("ort", {"mid": 6.0, "head": 5.9}, {"mid": 80.0})
    seconds, found = best_plan([npu, cpu])
    assert found.text() == "decode=ort,prefill=rknn" and found.fusion == "layer"
    assert seconds == pytest.approx(128 * (6 + 5.9 + 1) + 128 * (20 + 10) / 10)


def test_a_mixture_has_to_be_worth_it() -> None:
    slow_head = measured("rknn", {"mid": 5.0, "head": 9.0}, {"mid": 20.0})
    fast_head = measured("ort", {"mid": 9.0, "head": 5.0}, {"mid": 20.5})
    assert best_plan([slow_head, fast_head])[1].text() == "mid:decode=rknn,head:decode=ort,prefill=rknn"
    no_better = measured("ort", {"mid": 5.1, "head": 8.9}, {"mid": 20.5})
    assert best_plan([slow_head, no_better])[1].text() == "decode=rknn,prefill=rknn"


def test_host_time_of_a_backend_counts() -> None:
    spinning = measured("ort", {"mid": 2.0, "head": 1.0}, {"mid": 20.0}, host=9.0)
    quiet = measured("numba", {"mid": 3.0, "head": 2.0}, {"mid": 30.0})
    assert best_plan([spinning, quiet])[1] == Plan(
        "numba", (), "layer", "decode 6000.00 ms a token, prefill 4000.00 ms a token"
    )


def test_a_mixture_is_not_promised_the_speed_of_the_fused_forward() -> None:
    """A layer takes 2 ms in the fused forward, and 5 ms as a group: a faster `first` on ONNX Runtime does not pay."""
    numba = Measured(
        "layer",
        "numba",
        10,
        {"decode": {"first": 2.0, "mid": 5.0, "head": 2.0}, "prefill": {"first": 2.0, "mid": 5.0}},
        {"decode": 1.0, "prefill": 1.0},
        {"decode": 5.5, "prefill": 3.5},
    )
    ort = measured("ort", {"first": 0.1, "mid": 6.0, "head": 2.1}, {"first": 0.1, "mid": 6.0}, host=0.1)
    seconds, plan = best_plan([numba, ort])
    assert plan.text() == "decode=numba,prefill=numba"
    assert seconds == pytest.approx(128 * 5.5 + 128 * 3.5 / 10)
    # A faster head leaves the fused forward as it is.
    ort = measured("ort", {"first": 3.0, "mid": 6.0, "head": 0.5}, {"first": 3.0, "mid": 6.0}, host=0.1)
    seconds, plan = best_plan([numba, ort])
    assert plan.text() == "decode=numba,head:decode=ort,prefill=numba"
    assert seconds == pytest.approx(128 * 4.0 + 128 * 3.5 / 10)


def test_the_fused_forward_is_measured_beside_its_groups(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    source = BundleSource(open_bundle(bundle), "layer")
    numba, ort = (tuning.measure(source, backend, Options(), 16) for backend in ("numba", "ort"))
    assert numba.fused.keys() == set(USES) and not ort.fused
    assert numba.calls["decode"].keys() == ort.calls["decode"].keys() == {"first", "mid", "last", "head"}
    assert numba.seconds("decode") == numba.fused["decode"] != sum(numba.calls["decode"].values())


def test_tune_measures_and_load_follows(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.05)
    status, out, said = run_main(capsys, "tune", "-m", bundle, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["measured"].keys() == {
        f"{fusion} {backend}" for fusion in ("layer", "projection") for backend in tuning.CPU_BACKENDS
    }
    for uses in facts["measured"].values():
        assert uses["decode"].keys() > {"rows", "head", "host", "token"} and uses["prefill"]["rows"] == 128
        assert all(value > 0 for taken in uses.values() for value in taken.values())
    assert (
        json.loads((bundle / TUNED).read_text())["machines"][machine_key()]["measured"] == facts["measured"]
    )
    assert "layer fusion, rknn: not measured: this machine has no Rockchip NPU" in said
    status, _, said = run_main(capsys, "generate", "-m", bundle, "-p", "the ", "-n", 2, "-v")
    assert status == 0 and "backend: measured by rwkv-npu tune on this machine: decode" in said
    assert f"{facts['fusion']} fusion" in said
    names = list(verify_files(open_bundle(bundle)))
    assert TUNED not in names and (bundle / TUNED).exists()
    (bundle / TUNED).unlink()


def keep(bundle: Path, rules: Plan, machine: str | None = None) -> None:
    save_tuned(bundle, machine or machine_key(), artifacts_digest(open_bundle(bundle).manifest), rules, {})


def test_explicit_options_override_a_measured_plan(bundle: Path) -> None:
    keep(bundle, Plan("numpy", (), "projection", "fast"))
    expectations = {
        ("auto", None, None): ("numpy", "projection"),
        ("ort", None, None): ("ort", "layer"),
        ("auto", "layer", None): (loading.CPU_BACKEND, "layer"),
        ("auto", "projection", None): ("numpy", "projection"),
        ("auto", None, "decode=numpy"): (f"{loading.CPU_BACKEND} for prompts, numpy for tokens", "layer"),
    }
    for (backend, fusion, text), (name, used) in expectations.items():
        with rwkv_npu.load(bundle, backend=backend, fusion=fusion, plan=text) as model:
            assert model.describe().startswith(f"{name}, {used} fusion")
    (bundle / TUNED).unlink()


def test_plans_of_other_machines_and_artifacts_are_ignored(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(bundle, Plan("numpy", (), "layer", "fast"), machine="another")
    keep(bundle, Plan("numpy", (), "layer", "fast"))
    assert json.loads((bundle / TUNED).read_text())["machines"].keys() == {"another", machine_key()}
    assert tuned(bundle, machine_key(), "other artifacts") is None
    assert tuned(bundle, "a third", artifacts_digest(open_bundle(bundle).manifest)) is None
    keep(bundle, Plan("tpu", (), "layer", "of a later version"))
    assert loading.measured_plan(open_bundle(bundle)) is None
    (bundle / TUNED).write_text('{"format": 99, "machines": 7}')
    assert loading.measured_plan(open_bundle(bundle)) is None
    (bundle / TUNED).unlink()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "machines": {"x": {}}}', "\xff"]
)
def test_a_damaged_file_is_named(bundle: Path, content: str) -> None:
    (bundle / TUNED).write_bytes(content.encode("latin-1"))
    with pytest.raises(
        BundleError, match=r"tuned\.json is damaged .*: remove it, or run rwkv-npu tune again"
    ):
        rwkv_npu.load(bundle)
    keep(bundle, Plan("numpy", (), "layer", "fast"))  # as the message says: measured again, it is whole again
    with rwkv_npu.load(bundle) as model:
        assert model.describe().startswith("numpy")
    (bundle / TUNED).unlink()


def test_converting_again_keeps_what_was_measured(bundle: Path) -> None:
    keep(bundle, Plan("numpy", (), "layer", "fast"))
    rwkv_npu.convert(bundle.parent / "model.pth", bundle, target="none", cpu="fp16")
    with rwkv_npu.load(bundle) as model:
        assert model.describe().startswith("numpy")
    (bundle / TUNED).unlink()


def test_a_plan_whose_backend_is_not_installed_is_warned_of_and_not_used(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(bundle, Plan("torch", (), "layer", "fast"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    with pytest.warns(
        UserWarning, match="needs torch, not installed here.* rwkv-npu tune -m .* measures again"
    ):
        model = rwkv_npu.load(bundle)
    assert "torch" not in model.describe()
    model.close()
    (bundle / TUNED).unlink()


def test_tune_refuses_a_checkpoint(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, said = run_main(capsys, "tune", "-m", bundle.parent / "model.pth")
    assert status == 1 and "model.pth is no bundle: rwkv-npu convert makes one" in said


def test_an_interrupted_tune_leaves_the_plan_that_was_there(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(bundle, Plan("numpy", (), "layer", "fast"))
    before = (bundle / TUNED).read_bytes()

    def interrupted(*_: object) -> Measured:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "measure", interrupted)
    status, _, said = run_main(capsys, "tune", "-m", bundle)
    assert status == 130 and said.endswith("rwkv-npu: interrupted\n")
    assert (bundle / TUNED).read_bytes() == before
    (bundle / TUNED).unlink()


def test_a_read_only_folder_is_reported_before_measuring(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_npu.cli.tune.os.access", lambda *_: False)
    monkeypatch.setattr(tuning, "measure", lambda *_: pytest.fail("it was measured"))
    status, _, said = run_main(capsys, "tune", "-m", bundle)
    assert status == 1 and "cannot be written to, and the plan is kept in it: tune a copy of your own" in said


def test_a_plan_that_cannot_be_saved_is_reported(bundle: Path) -> None:
    with pytest.raises(BundleError, match="cannot write .*tuned.json"):
        save_tuned(bundle / "nowhere", "m", "a", Plan("ort"), {})


def test_options_have_defaults() -> None:
    assert Options() == Options(None, "auto") and placement.FORMAT == 1
