"""A bundle exported for one board: its files, what it computes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.conversion import export as exporting
from rwkv_npu.conversion.export import export
from rwkv_npu.errors import BundleError, UsageError
from rwkv_npu.formats.bundle import HOST, INT8, MANIFEST, SELF_TEST, WEIGHTS, open_bundle, packed_file
from tests.conversions import contents, convert, names, outputs
from tests.fake_compiler import stand_in
from tests.tiny import Run, error_line


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for two chips, in both of the CPU's quantised precisions. Not to be changed."""
    folder = tmp_path_factory.mktemp("export")
    out = folder / "model.rwkv"
    np.save(folder / "ids.npy", np.arange(1, 65))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        options: dict[str, Any] = {"rows": "1,16", "calibrate": folder / "ids.npy"}
        for target, precision, cpu in (("rk3576", "fp16", "int4"), ("rk3588", "w8a8", "int8")):
            convert(checkpoint, out, target=target, precision=precision, cpu=cpu, **options)
        convert(checkpoint, out, target="rk3588", fusion="projection", **options)
    return out


def test_it_has_what_the_board_needs_and_no_more(bundle: Path, out: Path, run: Run) -> None:
    status, printed, err = run("export", bundle, "--for", "RK3588S", "--cpu", "int4", "-o", out)
    assert (status, printed) == (0, f"{out}\n") and names(out.parent) == [out.name]
    assert err.splitlines()[-1] == f"next: scp -r {out} board:"
    whole, manifest = open_bundle(bundle).manifest, open_bundle(out).manifest
    kept = [a for a in whole.artifacts if (a.target, a.fusion) == ("rk3588", "layer")]
    assert manifest.artifacts == kept and {a.precision for a in kept} == {"w8a8"}
    files = {HOST, SELF_TEST, "vocab.txt", packed_file("int4"), *(a.path for a in kept)}
    assert contents(out).keys() == {MANIFEST, *files}
    assert all((out / name).read_bytes() == (bundle / name).read_bytes() for name in files)
    assert run("info", "--check", out)[0] == 0


@pytest.mark.parametrize("cpu", ["int8", "int4", "fp16"])
def test_it_computes_what_the_whole_bundle_does(cpu: str, bundle: Path, out: Path) -> None:
    export(bundle, out, target="none", cpu=cpu)
    assert rwkv_npu.load(out).precision == cpu
    for backend in ("ort", "numpy", "torch"):
        expected = outputs(bundle, backend=backend, precision=cpu)
        np.testing.assert_array_equal(outputs(out, backend=backend), expected)


def test_a_fallback_of_the_npu_uses_the_weights_in_the_bundle(bundle: Path, out: Path) -> None:
    export(bundle, out, target="rk3588", cpu="int4")
    model = rwkv_npu.load(out, backend="ort")
    assert model.source.unquantised().cpu_precision == "int4"


def test_fp16_keeps_what_is_computed_with_it(bundle: Path, out: Path) -> None:
    export(bundle, out, target="rk3588", precision="w8a8", cpu="fp16")
    assert {WEIGHTS, INT8} <= contents(out).keys()
    options: dict[str, Any] = {"backend": "numpy", "precision": "w8a8"}
    np.testing.assert_array_equal(outputs(out, **options), outputs(bundle, **options))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--for", "rk3562"], "no artifacts for rk3562"),
        (["--for", "rk3588", "--precision", "bf16"], "rk3588 w8a8, layer fusion"),
        (["--for", "rk3588", "--cpu", "fp32"], "model.rwkv --cpu fp32 adds"),
        (["--for", "rk9999"], "rk3588"),
    ],
)
def test_what_the_bundle_lacks(flags: list[str], names: str, bundle: Path, out: Path, run: Run) -> None:
    assert names in error_line(run("export", bundle, *flags, "-o", out))
    assert not list(out.parent.iterdir())


def test_outputs_that_are_refused(bundle: Path, out: Path, tmp_path: Path) -> None:
    before = contents(bundle)
    for place in (bundle, bundle / "inside"):
        with pytest.raises(UsageError):
            export(bundle, place, target="none", force=True)
    assert contents(bundle) == before
    out.mkdir()
    (out / "precious").touch()
    for force in (False, True):
        with pytest.raises(BundleError, match="not a bundle"):
            export(bundle, out, target="none", force=force)
    assert names(out) == ["precious"]


def test_an_exported_bundle_is_replaced_by_force_and_never_extended(
    bundle: Path, checkpoint: Path, out: Path, run: Run
) -> None:
    export(bundle, out, target="none", cpu="int4")
    assert "--force" in error_line(run("export", bundle, "--for", "none", "-o", out))
    status, printed, err = run("convert", checkpoint, "-o", out, "--target", "none")
    assert (status, printed) == (1, "") and "exported" in err
    assert "no artifacts: exported" in run("info", out)[1]
    findings = json.loads(run("doctor", "-m", out, "--json")[1])
    (mend,) = (finding["mend"] for finding in findings if finding["what"] == "artifacts")
    assert mend == "export the whole bundle again, after rwkv-npu convert model.pth --target rk3588"
    export(bundle, out, target="none", cpu="int8", force=True)
    assert open_bundle(out).manifest.cpu_precisions == ("int8",)
    for use in (["--precision", "fp16"], ["--backend", "rknn-matmul"]):
        assert run("generate", "-m", out, "-p", "a", *use)[0] == 1


def test_damage_is_not_exported(bundle: Path, out: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "rwkv_npu.formats.bundle._SMALL", 0
    )  # opening looks at sizes alone, as of large files
    copy = Path(shutil.copytree(bundle, tmp_path / "copy.rwkv"))
    artifact = next((copy / "rknn" / "rk3588").glob("*.layer.*"))
    artifact.write_bytes(artifact.read_bytes()[::-1])
    with pytest.raises(BundleError, match="damaged"):
        export(copy, out, target="rk3588", fusion="layer")
    assert not out.exists()


def test_an_interrupted_export_goes_on(
    bundle: Path, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    command = ("export", bundle, "--for", "none", "-o", out)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_compare", interrupted)
        status, printed, err = run(*command)
    assert (status, printed, names(out.parent)) == (130, "", [f"{out.name}.partial"])
    assert "continues from here" in err
    copied = out.with_name(f"{out.name}.partial") / packed_file("int8")
    stamp = copied.stat().st_mtime_ns
    assert run(*command)[0] == 0 and names(out.parent) == [out.name]
    assert (out / packed_file("int8")).stat().st_mtime_ns == stamp


def test_other_logits_are_an_error(bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here the exported bundle is another model's."""
    tokens = iter(([1], [2]))

    def other(source: Any, plan: Any, options: Any) -> Any:
        engine = opened(source, plan, options)
        forward, ids = engine.forward, next(tokens)
        monkeypatch.setattr(engine, "forward", lambda _: forward(ids))
        return engine

    opened = exporting.open_engine
    monkeypatch.setattr(exporting, "open_engine", other)
    with pytest.raises(BundleError, match="other logits"):
        export(bundle, out, target="none")
    assert not out.exists()
