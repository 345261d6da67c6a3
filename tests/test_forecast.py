"""`convert --dry-run`: what it foretells against what is made, by this project and by Rockchip's compiler."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rwkv_npu
from rwkv_npu import toolkit
from rwkv_npu.backends.memory import BUDGET_BYTES, plan_memory
from rwkv_npu.cli.dry_run import table
from rwkv_npu.conversion.artifacts import plan_artifacts
from rwkv_npu.conversion.forecast import Forecast, Variant, forecast
from rwkv_npu.conversion.quantise import sizes
from rwkv_npu.conversion.request import Request
from rwkv_npu.errors import UsageError
from rwkv_npu.formats.bundle import (
    HOST,
    MANIFEST,
    WEIGHTS,
    Artifact,
    Int8Set,
    open_bundle,
    packed_file,
    read_manifest,
)
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.graphs.trace import compiler_trace
from rwkv_npu.model import demo_model
from rwkv_npu.models.spec import FUSIONS, GENERATIONS, Spec, tensors
from rwkv_npu.runtime.estimate import formula_cycles, weights
from rwkv_npu.runtime.rk3588 import TERMS
from rwkv_npu.runtime.weights import CheckpointSource
from tests.compiler_graphs import compiler_model
from tests.emulated import GENERATIONS as ON_BOARD
from tests.emulated import ROWS
from tests.tiny import one_line, run_main, write_model

SIZES = {
    "1.5B": Spec("7", 2048, 24, 32, 64, 2048, 8192, 65536, {"w": 96, "a": 96, "v": 64, "g": 256}),
    "2.9B": Spec("7", 2560, 32, 40, 64, 2560, 10240, 65536, {"w": 96, "a": 96, "v": 64, "g": 320}),
    "7.2B": Spec("7", 4096, 32, 64, 64, 4096, 16384, 65536, {"w": 128, "a": 128, "v": 96, "g": 480}),
}


def request(
    target: str = "rk3588", fusion: str = "layer", rows: tuple[int, ...] | None = None, cpu: str = "int8"
) -> Request:
    return Request(Path("m.pth"), target=target, fusion=fusion, rows=rows, cpu=cpu)


def hollow(path: Path, spec: Spec) -> Path:
    """A checkpoint whose header is there, and whose weights are a hole in the file."""
    header, end = {}, 0
    for tensor in tensors(spec):
        if not tensor.optional:
            begin, end = end, end + 2 * prod(tensor.shape)
            entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
            header[tensor.name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Forecast]]:
    folder, found = tmp_path_factory.mktemp("hollow"), {}

    def of(name: str) -> Forecast:
        if name not in found:
            found[name] = forecast(
                open_checkpoint(hollow(folder / f"{name}.safetensors", SIZES[name])), request()
            )
        return found[name]

    yield of
    for path in folder.iterdir():
        path.unlink()


def by_precision(found: Forecast) -> dict[str, Variant]:
    return {variant.precision: variant for variant in found.variants}


# -- cycles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "rows", "cycles"),
    [
        (768, 768, 1, 50_001),
        (2048, 2048, 1, 355_331),
        (2560, 2560, 1, 554_989),
        (768, 3072, 1, 199_809),
        (2560, 10240, 1, 2_219_302),
        (512, 512, 512, 262_144),
        (4096, 4096, 4096, 134_217_728),
        (2048, 65536, 1, 11_370_000),
    ],
)
def test_the_formula_gives_the_compilers_cycles(k: int, n: int, rows: int, cycles: int) -> None:
    ddr, npu, total = formula_cycles(k, n, rows, 16)
    assert total == max(ddr, npu) == pytest.approx(cycles, rel=2e-3)
    assert formula_cycles(k, n, rows, 8)[2] == pytest.approx(total / 2, rel=2e-2)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 300), st.sampled_from([8, 16]))
def test_cycles_grow_with_everything(k: int, n: int, rows: int, bits: int) -> None:
    found = formula_cycles(k, n, rows, bits)
    for other in ((k + 1, n, rows), (k, n + 1, rows), (k, n, rows + 1)):
        assert all(a <= b for a, b in zip(found, formula_cycles(*other, bits), strict=True))


# -- against what is made without a compiler -------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_artifacts_are_those_that_convert_plans(generation: str, tmp_path: Path) -> None:
    """In fp16: the same paths, weights to the byte, and rows."""
    write_model(tmp_path / "model.pth", generation)
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    rwkv_npu.convert(tmp_path / "model.pth", tmp_path / "out", target="none")
    manifest = open_bundle(tmp_path / "out").manifest
    for fusion in FUSIONS:
        program = CheckpointSource(checkpoint, fusion).program
        planned = plan_artifacts(manifest, program, "rk3588", "fp16", None)
        fp16 = by_precision(forecast(checkpoint, request(fusion=fusion)))["fp16"]
        assert [(a.path, a.weight_bytes) for a in fp16.artifacts] == [
            (a.path, a.weight_bytes) for a in planned
        ]
        assert fp16.memory == plan_memory(manifest, planned) and fp16.left == []


@pytest.mark.parametrize("cpu", ["int8", "int4", "fp16", "fp32"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_files_of_the_bundle_have_the_forecast_sizes(generation: str, cpu: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth", generation, D=128, dtype="bf16")
    parts = forecast(open_checkpoint(tmp_path / "model.pth"), request("none", cpu=cpu)).parts
    out = rwkv_npu.convert(tmp_path / "model.pth", tmp_path / "out", target="none", cpu=cpu)
    files = {name: record.size for name, record in open_bundle(out).manifest.files.items()}
    storage = "fp32" if cpu == "fp32" else "fp16"
    named = {
        HOST: "embedding and vectors",
        WEIGHTS: f"weights in {storage}",
        packed_file(cpu): f"weights in {cpu}",
    }
    for name, part in named.items():
        if name in files:
            assert 0 <= files.pop(name) - parts.pop(part) < 20_000  # header and fillers
    files.pop("vocab.txt")
    # Graphs, and the rows with which a board tests its NPU.
    assert sum(files.values()) == pytest.approx(parts.pop("graphs and self-test"), rel=0.35) and not parts


def test_int8_is_smaller_and_faster(large: Callable[[str], Forecast]) -> None:
    """All large projections are in w8a8, 97 per cent of the weights; `mixed` is taken to have 80."""
    fp16, mixed, w8a8 = found = large("2.9B").variants
    assert [v.precision for v in found] == ["fp16", "mixed", "w8a8"]
    assert [v.rows for v in found] == [[32]] * 3 and [v.assumed for v in found] == [False, True, False]
    able = sum(sizes(SIZES["2.9B"]).values())
    assert (fp16.int8, mixed.int8) == (0, pytest.approx(0.8)) and 0.95 < w8a8.int8 < 0.99
    # A byte less for each number that is in int8, and eight more a column.
    saved = fp16.memory.weights - w8a8.memory.weights
    assert saved == pytest.approx(able, rel=0.005) and saved < able
    assert fp16.memory.weights - mixed.memory.weights == pytest.approx(saved * 0.8 / w8a8.int8, rel=1e-6)
    for dram, speeds in fp16.speeds.items():
        for tokens in speeds:
            assert sorted(speeds[tokens]) == list(speeds[tokens])
            central = [v.speeds[dram][tokens][1] for v in found]
            assert central[0] < central[1] < central[2]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("generation", ["4", "6", "7"])
def test_a_set_that_was_chosen_is_counted_to_the_byte(generation: str, fusion: str, tmp_path: Path) -> None:
    """`mixed` with what a manifest says, and w8a8, weigh what convert plans for them."""
    write_model(tmp_path / "model.pth", generation, L=3)
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    rwkv_npu.convert(tmp_path / "model.pth", tmp_path / "out", target="none")
    manifest, program = open_bundle(tmp_path / "out").manifest, CheckpointSource(checkpoint, fusion).program
    able = list(sizes(checkpoint.spec))
    chosen = [name for name in able if "blocks.1." in name or name == "head.weight"]
    found = by_precision(forecast(checkpoint, request(fusion=fusion), chosen))
    for precision, names in {"mixed": chosen, "w8a8": able}.items():
        planned = plan_artifacts(manifest, program, "rk3588", precision, None, names)
        variant = found[precision]
        assert [(a.path, a.weight_bytes) for a in variant.artifacts] == [
            (a.path, a.weight_bytes) for a in planned
        ]
        share = sum(prod(t.shape) for t in tensors(checkpoint.spec) if t.name in names)
        assert variant.int8 * sum(weights(checkpoint.spec).values()) == pytest.approx(share)
        assert not variant.assumed


def test_large_models_are_forecast_from_the_header(tmp_path: Path) -> None:
    path = hollow(tmp_path / "7.2B.safetensors", SIZES["7.2B"])
    begin = time.process_time()
    found = forecast(open_checkpoint(path), request())
    assert time.process_time() - begin < 10  # 0.6 s; 14 GB are not read
    assert found.spec == SIZES["7.2B"] and path.stat().st_blocks * 512 < 1_000_000


def test_groups_that_do_not_fit_stay_on_the_cpu(large: Callable[[str], Forecast], tmp_path: Path) -> None:
    found = large("2.9B")
    fp16, mixed, _ = found.variants
    assert not fp16.memory.fits and mixed.memory.fits and mixed.left == []
    assert fp16.left == [f"mid.{i}" for i in range(22, 31)] + ["last", "head"]
    assert fp16.left_bytes + BUDGET_BYTES > fp16.memory.weights
    # What is left is slower there than anything on the NPU.
    assert fp16.speeds["LPDDR5"][1][1] < mixed.speeds["LPDDR5"][1][1]
    checkpoint = hollow(tmp_path / "m.safetensors", SIZES["2.9B"])
    program = CheckpointSource(open_checkpoint(checkpoint)).program
    manifest = open_bundle(
        rwkv_npu.convert(demo_model(), tmp_path / "demo", target="none", cpu="fp16")
    ).manifest
    manifest.groups |= {"layer": _groups(program.spec)}
    with pytest.raises(UsageError, match="does not fit the NPU of rk3588 at fp16"):
        plan_artifacts(manifest, program, "rk3588", "fp16", None)


def _groups(spec: Spec) -> list[dict[str, object]]:
    from rwkv_npu.conversion.writer import describe_groups

    return describe_groups(spec)["layer"]


def test_other_chips_have_no_formula() -> None:
    found = forecast(open_checkpoint(demo_model()), request("rk3576"))
    assert all(variant.speeds == {} and not variant.artifacts[0].cycles for variant in found.variants)
    text = " ".join(table(found, TERMS).split())
    assert "no measurements of the rk3576" in text
    assert "one NPU core" not in text and "LPDDR5" not in text and "--explain" not in text
    assert not forecast(open_checkpoint(demo_model()), request("none")).variants


# -- the command -----------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_main(capsys, "convert", *arguments)


def test_the_table_fits_a_terminal(large: Callable[[str], Forecast]) -> None:
    for name in SIZES:
        lines = table(large(name)).splitlines()
        assert max(map(len, lines)) <= 80 and not any(line != line.rstrip() for line in lines)
    text = table(large("2.9B"))
    assert "fp16 does not fit, and a conversion refuses it: 34 contexts" in " ".join(text.split())
    assert (
        "mid.0-30, rows 32" in text
        and "an assumption" in text
        and "written or measured" in " ".join(text.split())
    )
    projection = forecast(open_checkpoint(demo_model()), request(fusion="projection"))
    assert "att.in.1-3, rows 64" in table(projection)


def test_the_command_compiles_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rwkv_npu.toolkit.environment.require", None)
    status, out, err = run(demo_model(), "--dry-run")
    assert (status, err) == (0, "") and "RWKV-7, 3.7 M parameters, for the rk3588" in out
    status, out, err = run(demo_model(), "--dry-run", "--json", "--rows", "1,32", "-o", "/none/there")
    facts = json.loads(out)
    assert (status, err) == (0, "") and facts["estimate"] is True
    assert [variant["rows"] for variant in facts["variants"]] == [[1, 32]] * 3
    assert list(facts["variants"][0]["files"])[0] == "rknn/rk3588/first.layer.fp16.m1.rknn"
    assert list(tmp_path.iterdir()) == []


def test_explained(run: Run) -> None:
    from rwkv_npu.runtime.rk3588 import TERMS

    flags = (demo_model(), "--dry-run", "-o", "/none/there")
    short, long = run(*flags)[1], run(*flags, "--explain")[1]
    assert "--explain" in short and not any(name in short for name in TERMS)
    assert all(name in long for name in TERMS) and max(map(len, long.splitlines())) <= 80


def test_speeds_are_those_of_info(run: Run, tmp_path: Path) -> None:
    """A manifest with the forecast's artifacts: the dry run, `info` and `bench inference` have one estimate."""
    from rwkv_npu.runtime.estimate import for_bundle, on_npu

    fp16 = by_precision(forecast(open_checkpoint(demo_model()), request()))["fp16"]
    spec = open_checkpoint(demo_model()).spec
    for tokens, (slow, central, fast) in fp16.speeds["LPDDR5"].items():
        found = for_bundle(spec, fp16.artifacts, tokens)
        assert found is not None and found.speeds(tokens) == pytest.approx((slow, central, fast))
    batch = on_npu(spec, fp16.artifacts, 8, "LPDDR5", sequences=8)
    assert fp16.batch_speeds["LPDDR5"] == batch.speeds(8, sampled=True)
    assert batch.total_ms == pytest.approx(8e3 / fp16.batch_speeds["LPDDR5"][1])


def test_mixed_is_what_a_map_or_the_bundle_says(run: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth")
    (tmp_path / "map.json").write_text('{"*.ffn.*": "w8a8"}')
    flags = (tmp_path / "model.pth", "-o", tmp_path / "out", "--dry-run", "--json")

    def mixed(*more: object) -> dict[str, object]:
        found: dict[str, object] = json.loads(run(*flags, *more)[1])["variants"][1]
        return found

    assumed = mixed()
    assert assumed["assumed"] and assumed["int8"] == pytest.approx(0.8)
    mapped = mixed("--precision", "mixed", "--precision-map", tmp_path / "map.json")
    spec = open_checkpoint(tmp_path / "model.pth").spec
    ffn = [name for name in sizes(spec) if ".ffn." in name]
    share = sum(prod(t.shape) for t in tensors(spec) if t.name in ffn) / sum(weights(spec).values())
    assert not mapped["assumed"] and mapped["int8"] == pytest.approx(share)
    rwkv_npu.convert(tmp_path / "model.pth", tmp_path / "out", target="none")
    manifest = read_manifest(tmp_path / "out")
    manifest.int8["mixed"] = Int8Set(tuple(ffn), share, 0.001)
    (tmp_path / "out" / MANIFEST).write_text(manifest.to_json())
    assert mixed() == mapped
    assert mixed("--force") == assumed  # the bundle would be replaced
    # What the bundle has already takes of the NPU's memory too.
    before = run(*flags)[1]
    kind = ("mid.0", "rk3588", "fp16", "layer", 7)
    manifest.artifacts = [Artifact("rknn/rk3588/other.rknn", *kind, weight_bytes=10**9)]
    manifest.files["rknn/rk3588/other.rknn"] = manifest.files[WEIGHTS]
    (tmp_path / "out" / MANIFEST).write_text(manifest.to_json())
    fp16, more = (json.loads(text)["variants"][0]["memory"] for text in (before, run(*flags)[1]))
    assert more["weights"] == fp16["weights"] + 10**9


@pytest.mark.parametrize("free", [0, 3_000_000])
def test_artifacts_of_the_bundle_leave_less_memory(free: int) -> None:
    """All of the NPU's memory, or all but a little."""
    kind = ("mid.0", "rk3588", "fp16", "layer", 7)
    there = [Artifact("rknn/rk3588/other.rknn", *kind, weight_bytes=BUDGET_BYTES - free)]
    found = forecast(open_checkpoint(demo_model()), request(), None, there)
    fp16, _, w8a8 = found.variants
    assert not fp16.memory.fits and fp16.speeds and w8a8.memory.fits and w8a8.left == []
    groups = list(dict.fromkeys(artifact.group for artifact in fp16.artifacts))
    assert fp16.left and set(fp16.left) <= set(groups) and (fp16.left == groups) == (free == 0)
    text = " ".join(table(found).split())
    assert "fp16 does not fit, and a conversion refuses it" in text
    assert "; contexts in the bundle already: 1." in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["/none.pth", "--dry-run"], "/none.pth"),
        ([demo_model(), "--dry-run", "--target", "rk9999"], "rk9999"),
        ([demo_model(), "--dry-run", "--rows", "0"], "rows"),
        ([demo_model(), "--dry-run", "--cpu", "int3"], "int3"),
        ([demo_model(), "--dry-run", "--remedies", "bogus"], "--remedies bogus is unknown"),
        (
            [demo_model(), "--dry-run", "--precision-map", "m.json"],
            "--precision-map is for --precision mixed",
        ),
        ([demo_model(), "--json"], "--json is for --dry-run"),
        ([demo_model(), "--explain"], "--explain is for --dry-run"),
    ],
)
def test_the_command_refuses(run: Run, flags: list[str], message: str) -> None:
    status, out, err = run(*flags)
    assert (status, out) == (1, "") and one_line(err) and message in err


# -- against the compiler --------------------------------------------------------------------------------


@pytest.mark.compiler
@pytest.mark.parametrize("generation", ON_BOARD)
def test_cycles_are_those_of_the_compiler(
    generation: str, board_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """A whole token and a whole prompt. The compiler also counts operators that it fuses into products of many rows."""
    bundle = board_bundles[generation]
    made = {artifact.path: artifact for artifact in open_bundle(bundle).manifest.artifacts}
    checkpoint = demo_model() if generation == "7" else bundle.with_suffix(".pth")
    counts = tuple(map(int, ROWS.split(",")))
    for fusion in FUSIONS:
        fp16 = by_precision(forecast(open_checkpoint(checkpoint), request(fusion=fusion, rows=counts)))[
            "fp16"
        ]
        for rows in counts:
            pairs = [(a, made[a.path]) for a in fp16.artifacts if a.rows == rows]
            for key, tolerance in {"npu": 0.001, "ddr": 0.06, "total": 0.06 if rows > 1 else 0.01}.items():
                foretold, found = (sum(a.cycles[key] for a in side) for side in zip(*pairs, strict=True))
                assert foretold == pytest.approx(found, rel=tolerance), (fusion, rows, key)


@pytest.mark.compiler
def test_artifacts_have_the_forecast_weights(board_bundles: dict[str, Path]) -> None:
    """The demo model's, each to 10 per cent though it is small, and all to 6."""
    manifest = open_bundle(board_bundles["7"]).manifest
    for fusion in FUSIONS:
        fp16 = by_precision(forecast(open_checkpoint(demo_model()), request(fusion=fusion, rows=(1, 16))))[
            "fp16"
        ]
        sizes = {path: manifest.files[path].size for path in fp16.files}
        for path, foretold in fp16.files.items():
            assert foretold == pytest.approx(sizes[path], rel=0.1), path
        assert sum(fp16.files.values()) == pytest.approx(sum(sizes.values()), rel=0.06)


@pytest.mark.compiler
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", ["mid.1", "att.in.1", "head"])
def test_int8_artifacts_have_the_forecast_sizes(
    name: str, rows: int, toolkit_environment: toolkit.Environment, tmp_path: Path
) -> None:
    """Weights, file and cycles of large projections in int8 and the rest in fp16, in ranges made up."""
    fusion, rows = ("projection" if name == "att.in.1" else "layer"), (1 if name == "head" else rows)
    checkpoint = open_checkpoint(demo_model())
    source = CheckpointSource(checkpoint, fusion)
    (group,) = [group for group in source.program.groups if group.name == name]
    model = compiler_model(source.program, group, rows, source.tensor)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    parts = compiler_trace(source.program, group, rows).projections.items()
    able = sizes(checkpoint.spec)
    int8 = {part: ((-4.0, 4.0), (-8.0, 8.0)) for part, constant in parts if constant.name in able}
    options = toolkit.CompileOptions(int8=int8)
    made = toolkit.compile_graph(toolkit_environment, tmp_path / "g.onnx", tmp_path / "g.rknn", options)
    w8a8 = by_precision(forecast(checkpoint, request(fusion=fusion, rows=(1, 64))))["w8a8"]
    (artifact,) = [a for a in w8a8.artifacts if (a.group, a.rows) == (name, rows)]
    assert made.cycles is not None
    assert artifact.cycles["npu"] == pytest.approx(made.cycles.npu, rel=0.001)
    assert artifact.cycles["total"] == pytest.approx(made.cycles.total, rel=0.02)
    assert artifact.weight_bytes == pytest.approx(made.npu_weight_bytes, rel=0.06)
    assert w8a8.files[artifact.path] == pytest.approx(made.size, rel=0.1)
