"""The backend `rknn` on a fake of RKNNLite: inputs, checks, messages, and release of contexts."""

from __future__ import annotations

import contextlib
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.backends.rknn import RknnBackend, explain
from rwkv_npu.board import hardware
from rwkv_npu.errors import BackendError
from rwkv_npu.formats.bundle import Artifact, open_bundle
from rwkv_npu.model import Model
from rwkv_npu.runtime import loading, tuning
from rwkv_npu.runtime.loading import CPU_BACKEND, Options
from rwkv_npu.runtime.placement import Plan, parse
from rwkv_npu.runtime.weights import BundleSource
from tests.fake_rknnlite import TRACEBACK, FakeLite, FakeRuntime, become_a_board, fake_bundle
from tests.native import native_bundle
from tests.tiny import run_main, write_model

IDS = np.random.default_rng(2).integers(1, 200, 21).tolist()
CALLS = "first mid.0 last head".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_bundle(tmp_path_factory.mktemp("rknn"))


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    become_a_board(monkeypatch, tmp_path)
    return made


def load(bundle: Path, **options: Any) -> Model:
    return rwkv_npu.load(bundle, **{"backend": "rknn", **options})


def refused(bundle: Path, message: str, **options: Any) -> str:
    with pytest.raises(BackendError, match=message) as raised:
        load(bundle, **options)
    text = str(raised.value)
    assert "\n" not in text and len(text) < 420
    assert all(lite.released for lite in FakeLite.opened)
    return text


@pytest.mark.parametrize("fusion", ["layer", "projection"])
def test_results_equal_numpys(bundle: Path, fusion: str) -> None:
    with load(bundle, fusion=fusion) as model, rwkv_npu.load(bundle, backend="numpy", fusion=fusion) as other:
        logits, state = model.forward(IDS)
        expected, expected_state = other.forward(IDS)
        assert np.abs(logits - expected).max() < 1e-4
        logits, state = model.forward([7], state)
        assert np.abs(logits - other.forward([7], expected_state)[0]).max() < 1e-4


def test_each_artifact_is_opened_once_and_released(bundle: Path) -> None:
    with load(bundle) as model:
        model.forward(IDS)
        assert len(FakeLite.opened) == 2 * 3 + 1
        assert all(lite.rknn_data is None and not lite.released for lite in FakeLite.opened)
    assert all(lite.released for lite in FakeLite.opened)
    with load(bundle):  # the lock was given back too
        pass


def test_inputs_go_in_the_order_of_the_file_and_are_not_copied(bundle: Path) -> None:
    source = BundleSource(open_bundle(bundle))
    backend = RknnBackend(source)
    group = source.program.groups[1]
    runner = backend.open(group, 16)
    runner.run()
    fed = FakeRuntime.fed[-1]
    assert all(one is runner.inputs[port.name] for one, port in zip(fed, group.inputs[::-1], strict=True))
    backend.close()


@pytest.mark.parametrize(
    ("chip", "cores", "masks"),
    [
        ("rk3588", "auto", {1, 2, 4}),
        ("rk3588", "0", {1}),
        ("rk3588", "2", {4}),
        ("rk3588", "0,1", {1, 2}),
        ("rk3588", "0,1,2", {1, 2, 4}),
        ("rk3566", "auto", {0}),
    ],
)
def test_contexts_are_dealt_over_the_cores(
    bundle: Path, chip: str, cores: str, masks: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if chip != "rk3588":
        monkeypatch.setattr(hardware, "soc", lambda: chip)
        monkeypatch.setattr("rwkv_npu.backends.rknn._fitting", lambda source, chip: source.artifacts())
    load(bundle, npu_cores=cores).close()
    assert set(FakeLite.masks) == masks


def test_a_runtime_that_refuses_cores_chooses_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLite, "refused", {1, 2, 4})
    with pytest.warns(
        UserWarning, match="calls run one at a time, because .*core mask 1 is refused: this chip"
    ):
        load(bundle).close()
    assert FakeLite.masks[1:] == [0] * 7
    refused(bundle, "core mask 2 is refused: this chip does not have the NPU core 1: use auto", npu_cores="1")


def test_unknown_cores_are_named(bundle: Path) -> None:
    refused(bundle, "NPU cores '5' are unknown: use one of auto 0 1 2 0,1 0,1,2", npu_cores="5")


def test_prints_of_rockchips_libraries_are_hidden(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(bundle).close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("call", ["set", "run", "get", "fewer", "short"])
def test_return_codes_are_checked(bundle: Path, call: str) -> None:
    backend = RknnBackend(BundleSource(open_bundle(bundle)))
    runner = backend.open(BundleSource(open_bundle(bundle)).program.groups[0], 1)
    FakeRuntime.codes[call] = [-3]
    messages = {"set": "Set inputs failed. error code: -3", "run": "rknn_run returned -3"}
    messages |= {
        "get": "Get outputs failed, error code: -3",
        "fewer": "returned outputs of .* values instead of",
        "short": "returned outputs of .* values instead of",
    }
    with pytest.raises(BackendError, match=messages[call]):
        runner.run()
    runner.run()
    backend.close()


def test_output_sizes_are_unchecked_if_the_library_is_elsewhere(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hidden:
        def get(self, *_: object) -> None: ...

    monkeypatch.setattr("tests.fake_rknnlite.FakeLibrary", Hidden)
    with load(bundle) as model, rwkv_npu.load(bundle, backend="numpy") as other:
        assert np.abs(model.forward(IDS)[0] - other.forward(IDS)[0]).max() < 1e-4


def test_faults_while_it_runs_do_not_change_the_text(bundle: Path) -> None:
    with load(bundle) as model, rwkv_npu.load(bundle, backend="numpy") as other:
        FakeRuntime.codes.update(run=[0, -1, 0, 0, -1, -1], get=[0, 0, -5])
        with pytest.warns(UserWarning, match="rknn failed at .*rknn_run returned -1"):
            text = [step.token for step in model.generate(IDS, max_tokens=12, temperature=0)]
        assert text == [step.token for step in other.generate(IDS, max_tokens=12, temperature=0)]
        assert model.engine.counters.faults.calls == 4 and len(model.engine.counters.faults.groups) == 1


def test_the_fallback_is_as_precise_as_the_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the CPU's default precision is int8, the fallback of an fp16 group still computes in fp16."""
    bundle = fake_bundle(monkeypatch, tmp_path / "m.pth", write_model(tmp_path / "m.pth", "7"), cpu="int8")
    become_a_board(monkeypatch, tmp_path)

    def state_of(model: Model) -> np.ndarray:
        return model.forward(IDS[:16])[1].parts["att.wkv"].copy()

    with rwkv_npu.load(bundle, backend="numpy") as exact, load(bundle, backend="ort") as eight_bits:
        expected = state_of(exact)
        assert np.abs(state_of(eight_bits) - expected).max() > 1e-3 * np.abs(expected).max()
    for options in ({}, {"backend": "auto", "plan": "prefill=rknn,decode=ort"}):  # even where the CPU is open
        with load(bundle, **options) as model:
            FakeRuntime.codes.update(run=[-1] * 99)
            with pytest.warns(UserWarning, match="rknn failed at"):
                assert np.abs(state_of(model) - expected).max() < 1e-5 * np.abs(expected).max()
            FakeRuntime.codes.clear()


def test_the_statistics_count_faults(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for faults in (0, 1, 2):
        FakeRuntime.codes.update(run=[0] * 7 + [-1] * faults)  # after the self-tests
        arguments = ("-m", bundle, "-p", "the ", "-n", 2, "--backend", "rknn")
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # the command line prints them
            status, _, said[faults] = run_main(capsys, "generate", *arguments)
        assert status == 0
    assert "NPU" not in said[0]
    assert said[1].endswith("| 1 calls to the NPU failed\n") and "warning" not in said[1]
    assert said[2].endswith("| 2 calls to the NPU failed, on the CPU: first\n")
    assert "warning: rknn failed at first (rknn_run returned -1: failed): the CPU runs it" in said[2]


# -- errors and warnings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "E RKNN: Invalid RKNN model version 6\n" + TRACEBACK + "Exception: RKNN init failed. error code: "
            "RKNN_ERR_MODEL_INVALID\n",
            r"Invalid RKNN model version 6: librknnrt 2\.3\.2 cannot read files of toolkit 2\.5\.0: on a PC, run "
            r"rwkv-npu toolkit install --version 2\.3\.2 and rwkv-npu convert --toolkit 2\.3\.2",
        ),
        (
            TRACEBACK + "Exception: RKNN init failed. error code: RKNN_ERR_MALLOC_FAIL\n",
            "RKNN_ERR_MALLOC_FAIL: end other programs, or convert with one row count",
        ),
        (
            TRACEBACK + "Exception: Can not find dynamic library on RK3588!\n",
            "Can not find dynamic library on RK3588!: librknnrt.so belongs in /usr/lib",
        ),
        (
            "!!! It is detected that some necessary files are missing in the container.\n" + TRACEBACK,
            "missing in the container.: start it with --device /dev/dri/renderD129",
        ),
        (
            "E RKNN: failed to open rknpu module, need to insmod rknpu dirver!\n" + TRACEBACK,
            "need to insmod rknpu dirver!: .* rwkv-npu doctor",
        ),
        (TRACEBACK + "Exception: something new\n", "cannot open .*: something new"),
        ("", "it reports no reason: run rwkv-npu doctor"),
    ],
)
def test_rknnlites_log_becomes_one_line_with_advice(
    bundle: Path, log: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeLite, "says", log)
    monkeypatch.setattr(FakeLite, "fails", True)
    refused(bundle, message)
    monkeypatch.setattr(FakeLite, "says", "")
    monkeypatch.setattr(FakeLite, "fails", False)
    load(bundle).close()  # nothing of the failure is left, the lock least of all


@pytest.mark.parametrize(
    ("runtime", "toolkit", "advice"),
    [
        ("2.3.2", "2.5.0", "convert --toolkit 2.3.2"),
        ("2.3.2", "2.3.2", "convert --toolkit 2.3.0"),
        ("2.3.2", "2.2.0", "convert --toolkit 2.3.2"),
        ("2.2.0", "2.2.0", "convert --toolkit 2.2.0"),
        ("2.0.0", "2.2.0", "update it to 2.2.0 or later"),
        (None, "2.2.0", "update it to 2.2.0 or later"),
    ],
)
def test_advice_for_a_file_that_the_runtime_cannot_read(
    runtime: str | None, toolkit: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "runtime_library", lambda: Path("librknnrt.so"))
    monkeypatch.setattr(hardware, "runtime_version", lambda library: runtime)
    artifact = Artifact("first.rknn", "first", "rk3588", "fp16", "none", 1, 0, toolkit=toolkit)
    assert explain("rknn_init returned -6: invalid", artifact).endswith(advice)


def test_a_runtime_older_than_every_toolkit_has_to_be_updated(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_a_board(monkeypatch, tmp_path, runtime="1.6.0")
    monkeypatch.setattr(FakeLite, "says", "E RKNN: Invalid RKNN model version 6\n")
    monkeypatch.setattr(FakeLite, "fails", True)
    refused(bundle, r"librknnrt 1\.6\.0 cannot read .*: update it to 2\.2\.0 or later")


def test_old_versions_cause_one_warning(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRuntime, "versions", ("1.5.2 (c6b7b351a@2023)", "0.8.2"))
    with pytest.warns(
        UserWarning, match=r"librknnrt 1\.5\.2 is .* 2\.5\.0, and .* driver 0\.8\.2 .* 0\.9\.6"
    ) as warned:
        load(bundle).close()
    assert len(warned) == 1


def test_on_a_pc_the_error_names_the_board(made: Path) -> None:
    with pytest.raises(BackendError, match="needs a board with a Rockchip NPU.*rknn-sim.*doctor"):
        load(made)


def test_another_chip(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "soc", lambda: "rk3576")
    refused(bundle, r"no artifacts .* rk3576, layer fusion \(there are: rk3588\).*convert --target rk3576")
    refused(bundle, r"no artifacts .* rk3576, layer fusion, fp16 \(there are: rk3588", precision="fp16")


def test_a_board_without_rknnlite(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rknnlite.api", None)
    refused(bundle, "RWKV_NPU_API=rknnlite needs rknn-toolkit-lite2: pip install rknn-toolkit-lite2")


def test_memory_is_counted_before_anything_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: {"MemAvailable": 1000})
    refused(bundle, r"free memory of 0\.00 GB: 7 contexts .* GB of NPU memory")
    monkeypatch.setattr(hardware, "memory", lambda: {})
    big = BundleSource.artifacts
    monkeypatch.setattr(
        BundleSource, "artifacts", lambda self: [replace(a, weight_bytes=1 << 30) for a in big(self)]
    )
    refused(bundle, r"do not fit the NPU: 7 contexts \(of 150\), weights 7\.52 .*one row count, such as 32")
    assert not FakeLite.opened


def test_a_file_of_another_group_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: BundleSource, artifact: Artifact) -> Path:
        return self.bundle.path / artifact.path.replace("/last.", "/first.")

    monkeypatch.setattr(BundleSource, "artifact_path", other)
    refused(bundle, "has inputs .* not those of last")


# -- auto ------------------------------------------------------------------------------------------------


def test_auto_reads_prompts_on_the_npu_and_writes_on_the_cpu(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = run_main(capsys, "generate", "-m", bundle, "-p", "the ", "-n", 3, "-v")
    assert status == 0 and f"rknn for prompts, {CPU_BACKEND} for tokens, layer fusion" in said
    assert re.search(
        rf"^backend: rknn reads prompts.*, {CPU_BACKEND} writes: .*, rwkv-npu tune measures$", said, re.M
    )
    with load(bundle, backend="auto") as model:
        FakeRuntime.fed.clear()
        model.forward(IDS[:16])
        assert len(FakeRuntime.fed) == 3  # the head's row is the CPU's
        FakeRuntime.fed.clear()
        model.forward([7])
        assert not FakeRuntime.fed


def test_artifacts_of_one_row_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fake_bundle(
        monkeypatch, tmp_path / "m.pth", write_model(tmp_path / "m.pth", "7"), rows="1", cpu="fp16"
    )
    become_a_board(monkeypatch, tmp_path)
    with load(bundle, backend="auto") as model:
        assert model.describe().startswith("rknn, layer fusion")
        assert model.reason == "rknn, whose artifacts have one row; rwkv-npu tune measures"


def test_the_estimate_decides_where_many_sequences_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "sequences_for_npu", lambda *_: 3)
    with load(bundle, backend="auto") as model, rwkv_npu.load(bundle, backend="numpy") as other:
        said = f"rknn reads prompts and 3 or more sequences at once, {CPU_BACKEND} writes: estimated"
        assert model.reason == f"{said}, rwkv-npu tune measures"
        for tokens, groups_on_npu in (
            ([[5], [6]], 0),
            ([[5], [6], [7]], 3),
            ([[5], [6], [7], IDS[:9]], 3),  # a prompt beside them, in the same forward
            ([[5], IDS[:9]], 3),
        ):
            FakeRuntime.fed.clear()
            logits, _ = model.forward_batch(tokens, [model.new_state() for _ in tokens])
            expected, _ = other.forward_batch(tokens, [other.new_state() for _ in tokens])
            assert len(FakeRuntime.fed) == groups_on_npu
            assert np.abs(logits - expected).max() < 1e-3


def test_tune_measures_how_many_sequences_the_npu_takes(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan("ort", (("decode", "ort"), ("prefill", "rknn")), "layer")
    seconds = {(2, None): 2.0, (2, 2): 3.0, (4, None): 4.0, (4, 4): 3.0}
    monkeypatch.setattr(tuning, "_batch_seconds", lambda engine, *key: seconds[key])
    source = BundleSource(open_bundle(bundle))
    assert tuning._measure_batch(source, plan, Options()) == 4
    assert tuning._measure_batch(source, Plan("ort"), Options()) is None


def test_a_batch_is_timed_where_it_is_read(bundle: Path) -> None:
    plan = parse(
        "prefill=rknn,decode=ort", "ort", ("rknn", "ort"), BundleSource(open_bundle(bundle)).program.groups
    )
    engine = loading.open_engine(BundleSource(open_bundle(bundle)), plan, Options())
    with contextlib.closing(engine):
        for batch, calls in ((None, 0), (4, 3 * (1 + tuning.FEWEST))):
            FakeRuntime.fed.clear()
            assert tuning._batch_seconds(engine, 4, batch) > 0
            assert len(FakeRuntime.fed) == calls


@pytest.mark.parametrize("kind", ["opening", "self-test", "lock"])
def test_auto_warns_and_takes_the_cpu_if_the_npu_fails(
    bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = {
        "opening": "reports no reason",
        "self-test": "contexts fail",
        "lock": "cannot open the NPU's lock",
    }[kind]
    if kind == "opening":
        monkeypatch.setattr(FakeLite, "fails", True)
        monkeypatch.setattr(FakeLite, "says", "")
    elif kind == "self-test":
        monkeypatch.setattr(FakeRuntime, "run", lambda self, frame: -1)
    else:
        (tmp_path / "rwkv_npu.lock").mkdir()
    with pytest.warns(UserWarning, match=f"the NPU is not used: .*{message}"):
        model = load(bundle, backend="auto")
    assert model.describe().startswith(CPU_BACKEND) and model.reason.startswith(
        f"{CPU_BACKEND}, since the NPU: "
    )
    model.close()
    with pytest.raises(BackendError, match=message):
        load(bundle)


def test_auto_does_not_warn_without_an_npu(made: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "runtime_library", lambda: None)
    with load(bundle, backend="auto") as model:
        assert model.reason == f"{CPU_BACKEND}, since librknnrt.so is not in /usr/lib"
    monkeypatch.setattr(hardware, "soc", lambda: "rk3576")
    with load(bundle, backend="auto") as model:
        assert model.reason == f"{CPU_BACKEND}, since there are no artifacts for the rk3576, layer fusion"
    monkeypatch.setattr(hardware, "soc", lambda: None)
    with load(bundle, backend="auto") as model:
        assert model.reason == f"{CPU_BACKEND}, since this machine has no Rockchip NPU"


def test_a_group_that_fails_its_test_runs_on_the_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRuntime.run
    monkeypatch.setattr(
        FakeRuntime, "run", lambda self, frame: -1 if self._group.name == "mid.0" else run(self, frame)
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.warns(UserWarning, match=r"1 of 6 contexts .*mid.0.* fusion='projection'"))
        model = stack.enter_context(load(bundle))
        with rwkv_npu.load(bundle, backend="numpy") as other:
            assert np.abs(model.forward(IDS)[0] - other.forward(IDS)[0]).max() < 1e-3


def test_prompts_on_the_npu_and_tokens_on_the_cpu(bundle: Path) -> None:
    with load(bundle, backend="auto", plan="prefill=rknn,decode=ort") as model:
        assert len(FakeLite.opened) == 3  # the artifacts of many rows, and of these not the head
        assert model.describe().startswith("rknn for prompts, ort for tokens")
        with rwkv_npu.load(bundle, backend="numpy") as other:
            assert np.abs(model.forward(IDS)[0] - other.forward(IDS)[0]).max() < 1e-3


def test_the_names_of_the_command_line_are_those_of_the_backends() -> None:
    from rwkv_npu import backends
    from rwkv_npu.backends import rknn
    from rwkv_npu.cli import common

    assert (*common.BACKENDS,) == ("auto", *backends.BACKENDS)
    assert (*common.NPU_CORES,) == (rknn.DEFAULT_CORES, *rknn.CORES)
